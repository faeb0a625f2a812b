"""Collapses of adversarial training, made to happen in the real loop: seen, gone back from, and not for ever."""

import dataclasses
import math
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from sr_data.batch_feed import BatchFeed
from sr_data.storage import Store, open_store
from sr_train import checkpoint as ckpt
from sr_train.adversarial_learner import AdversarialLearner
from sr_train.collective import Collective
from sr_train.gan_control import Control
from sr_train.gan_options import GanConfig, WatchdogConfig
from sr_train.gan_watchdog import CollapseError, GanWatchdog
from sr_train.loop import LoopPlan, Position, train
from sr_train.options import OptimConfig, ScheduleConfig
from tests.support.gan import (
    EDSR,
    WITH_BATCH_NORM,
    WITHOUT_BATCH_NORM,
    Networks,
    adversarial_learner,
    flat_state,
    patches,
)

BATCH = 8
GENTLE = GanConfig(pixel_weight=1.0, perceptual_weight=0.0, adversarial_weight=1e-3)
UNWATCHED = WatchdogConfig(max_psnr_drop_db=1e3, max_colour_shift=1e3, min_adversarial_gradient_share=0.0)
"""Nothing is a collapse; tests turn on what they are about."""


class Patches:
    """A function of the step, as the pool's patches are."""

    def __init__(
        self, *, bad_step: int | None = None, dies_at: int | None = None, collective: Collective | None = None
    ):
        self.bad_step, self.dies_at, self.collective = bad_step, dies_at, collective or Collective()

    def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> tuple[Tensor, Tensor]:
        if step == self.dies_at:
            raise KeyboardInterrupt
        lr_NCHW, hr_NCHW = patches(step, BATCH)
        rank, world_size = self.collective.rank, self.collective.world_size
        if step == self.bad_step and rank == world_size - 1:
            hr_NCHW = hr_NCHW * math.inf
        return lr_NCHW.chunk(world_size)[rank], hr_NCHW.chunk(world_size)[rank]


class Recorder:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.reports: list[tuple[int, Mapping[str, float]]] = []
        self.validations: list[tuple[int, float, bool]] = []
        self.recoveries: list[tuple[int, str]] = []

    def on_steps(self, values: Mapping[str, float], *, step: int, num_steps: int, seconds: float) -> None:
        self.reports.append((step, dict(values)))

    def on_validation(self, values: Mapping[str, float], *, step: int, is_best: bool) -> None:
        self.validations.append((step, values["psnr_db"], is_best))

    def on_checkpoint(self, key: str, *, step: int, seconds: float, stalled_s: float) -> None: ...

    def on_recovery(self, message: str, *, step: int) -> None:
        self.recoveries.append((step, message))

    def on_trouble(self, message: str, step: int) -> None:
        raise AssertionError(message)


@torch.no_grad()
def psnr_db(network: nn.Module, step: int = 0) -> Mapping[str, float]:
    """A real validation, on patches that training does not see."""
    lr_NCHW, hr_NCHW = patches(1_000_000, 16)
    mse = nn.functional.mse_loss(network(lr_NCHW).clamp(0, 1), hr_NCHW)
    return {"psnr_db": -10 * math.log10(float(mse)) if mse.isfinite() else math.nan}


@pytest.fixture(scope="module")
def pretrained() -> dict[str, Tensor]:
    """A generator as adversarial training finds it: 150 steps on the pixel loss, near 24 dB."""
    optim = OptimConfig()
    ours = adversarial_learner((EDSR, WITHOUT_BATCH_NORM[1]), gan=GENTLE, optim=optim)
    ours.control = Control(discriminator_pause_steps_left=150)
    for step in range(150):
        ours.step([patches(5_000 + step, BATCH)], learning_rate=2e-3)
    assert psnr_db(ours.network)["psnr_db"] > 22
    return dict(ours.network.state_dict())


def new_learner(
    generator: Mapping[str, Tensor] | None,
    *,
    gan: GanConfig = GENTLE,
    configs: Networks = WITHOUT_BATCH_NORM,
    collective: Collective | None = None,
) -> AdversarialLearner:
    ours = adversarial_learner(configs, gan=gan, optim=OptimConfig(), collective=collective)
    if generator is not None:
        ours.network.load_state_dict(dict(generator))
    return ours


def run(
    learner: AdversarialLearner,
    store: Store,
    *,
    watchdog: GanWatchdog | None,
    total_steps: int,
    learning_rate: float = 1e-4,
    interval_steps: int = 4,
    report_interval_s: float = 0.0,
    source: Patches | None = None,
    position: Position | None = None,
    collective: Collective | None = None,
) -> tuple[Position, Recorder]:
    """The real loop, reporting after every step where the interval is 0."""
    plan = LoopPlan(
        optim=OptimConfig(total_patches=total_steps * BATCH, global_batch_size=BATCH),
        schedule=ScheduleConfig(kind="constant", learning_rate=learning_rate),
        validation_interval_patches=interval_steps * BATCH,
        checkpoint_interval_patches=interval_steps * BATCH,
        keep_last=3,
        early_stop_after=None,
        early_stop_min_gain_db=0.0,
        report_interval_s=report_interval_s,
    )
    recorder, source = Recorder(), source or Patches(collective=collective)
    ended = train(
        plan,
        learner=learner,
        feed=BatchFeed(source, num_micro=1, device=torch.device("cpu"), ahead=False),  # type: ignore[arg-type]
        validate=psnr_db,
        store=store,
        meta={},
        position=position or Position(),
        observer=recorder,
        collective=collective or Collective(),
        watchdog=watchdog,
    )
    return ended, recorder


def watch(learner: AdversarialLearner, **changes: Any) -> GanWatchdog:
    return GanWatchdog(learner, dataclasses.replace(UNWATCHED, **changes), global_batch_size=BATCH)


def is_finite(learner: AdversarialLearner) -> bool:
    names = {key for key in flat_state(learner) if not key.startswith("control/")}
    return all(bool(flat_state(learner)[name].isfinite().all()) for name in names)


# --- in the loop ---


def test_a_drop_of_psnr_takes_the_run_back_and_lowers_the_learning_rate(
    tmp_path: Path, pretrained: dict[str, Tensor]
) -> None:
    ours = new_learner(pretrained)
    start_db = psnr_db(ours.network)["psnr_db"]
    watchdog = watch(ours, max_psnr_drop_db=3.0, learning_rate_factor=1e-3)
    store = open_store(str(tmp_path))
    ended, recorder = run(ours, store, watchdog=watchdog, total_steps=16, learning_rate=0.3)

    (step, message) = recorder.recoveries[0]
    assert len(recorder.recoveries) == 1 and step == 4
    assert "PSNR fell to" in message and f"back to {ckpt.key_of_step(0)}" in message
    assert "0.001 of the schedule's" in message and "recovery 1 of at most 3" in message
    start, collapsed, *later = recorder.validations
    assert start == (0, pytest.approx(start_db), True)
    assert collapsed[1] < start_db - 3 and not collapsed[2]
    assert [step for step, _, _ in later] == [8, 12, 16] and all(it > start_db - 1 for _, it, _ in later)
    assert {values["learning_rate_factor"] for step, values in recorder.reports if step > 4} == {1e-3}
    assert ended.step == 16 and is_finite(ours)
    saved = ckpt.read_checkpoint(store, ckpt.latest_key(store) or "")
    control = Control.from_tensors(saved.tensors["control"])
    assert (control.learning_rate_factor, control.num_recoveries) == (1e-3, 1)


@pytest.mark.parametrize("configs", [WITH_BATCH_NORM, WITHOUT_BATCH_NORM], ids=["batch norm", "spectral norm"])
def test_a_loss_that_is_not_finite_takes_the_run_back_too(configs: Networks, tmp_path: Path) -> None:
    """BatchNorm's running statistics, too: they are infinite after such a batch."""
    ours = new_learner(None, configs=configs)
    ended, recorder = run(
        ours, open_store(str(tmp_path)), watchdog=watch(ours), total_steps=12, source=Patches(bad_step=5)
    )
    ((step, message),) = recorder.recoveries
    assert step == 6 and "after 0 good steps" in message and f"back to {ckpt.key_of_step(4)}" in message
    assert ended.step == 12 and is_finite(ours) and math.isfinite(recorder.validations[-1][1])
    assert ours.control.learning_rate_factor == 0.5


def test_a_saturated_discriminator_is_paused_until_the_generator_has_caught_up(tmp_path: Path) -> None:
    gan = dataclasses.replace(GENTLE, adversarial_weight=0.05, discriminator_learning_rate_factor=10.0)
    ours = new_learner(None, gan=gan, configs=(EDSR, WITH_BATCH_NORM[1]))
    watchdog = watch(
        ours,
        saturation_accuracy=0.9,
        min_adversarial_gradient_share=1.0,  # whatever it still teaches
        patience_patches=3 * BATCH,
        pause_patches=20 * BATCH,
        max_recoveries=100,
    )
    _, recorder = run(
        ours, open_store(str(tmp_path)), watchdog=watchdog, total_steps=120, learning_rate=1e-3, interval_steps=40
    )
    seen, message = recorder.recoveries[0]
    assert "the discriminator has saturated: right about" in message and "paused for 20 steps" in message
    reports = dict(recorder.reports)
    for step in range(seen - 3, seen + 1):
        assert reports[step]["discriminator_accuracy_fake"] >= 0.9
        assert reports[step]["discriminator_accuracy_real"] >= 0.9
    pause = [reports[step] for step in range(seen + 1, seen + 20)]
    assert all(values["discriminator_paused"] for values in pause) and not reports[seen + 20]["discriminator_paused"]
    assert all(values["learning_rate_factor"] == 1.0 for values in pause)
    assert min(values["discriminator_accuracy_fake"] for values in pause) < 0.5
    assert is_finite(ours)


def test_colours_that_stay_off_take_the_run_back(tmp_path: Path, pretrained: dict[str, Tensor]) -> None:
    """A collapse between two validations: reports see it."""
    ours = new_learner(pretrained)
    watchdog = watch(ours, max_colour_shift=0.05, patience_patches=2 * BATCH, learning_rate_factor=1e-3)
    _, recorder = run(
        ours, open_store(str(tmp_path)), watchdog=watchdog, total_steps=30, learning_rate=0.3, interval_steps=30
    )
    assert "colours are off by" in recorder.recoveries[0][1]
    assert dict(recorder.reports)[30]["colour_shift"] < 0.05


def test_the_number_of_recoveries_is_bounded_and_the_end_says_what_to_do(
    tmp_path: Path, pretrained: dict[str, Tensor]
) -> None:
    ours = new_learner(pretrained)
    start_db = psnr_db(ours.network)["psnr_db"]
    watchdog = watch(ours, max_psnr_drop_db=3.0, learning_rate_factor=0.9, max_recoveries=2)
    store = open_store(str(tmp_path))
    with pytest.raises(CollapseError) as caught:
        run(ours, store, watchdog=watchdog, total_steps=100, learning_rate=0.3)
    message = str(caught.value)
    for part in ("step 12", "PSNR fell to", "went back 2 times", "0.81 of", "--schedule.learning-rate"):
        assert part in message
    assert "--watchdog.max-recoveries 2" in message
    # What is left can be gone on from.
    saved = ckpt.read_checkpoint(store, ckpt.latest_key(store) or "")
    left = new_learner(None)
    left.load_state(saved.tensors)
    assert psnr_db(left.network)["psnr_db"] == pytest.approx(start_db)


def test_without_a_watchdog_nobody_looks(tmp_path: Path, pretrained: dict[str, Tensor]) -> None:
    """The same collapse as above ends the run as if nothing were wrong."""
    ours = new_learner(pretrained)
    start_db = psnr_db(ours.network)["psnr_db"]
    _, recorder = run(ours, open_store(str(tmp_path)), watchdog=None, total_steps=8, learning_rate=0.3)
    assert recorder.validations[-1][1] < start_db - 3 and recorder.recoveries == []


def test_a_run_resumed_after_a_recovery_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    straight = new_learner(None)
    run(
        straight,
        open_store(str(tmp_path / "straight")),
        watchdog=watch(straight),
        total_steps=14,
        source=Patches(bad_step=5),
    )
    store, stopped = open_store(str(tmp_path / "stopped")), new_learner(None)
    with pytest.raises(KeyboardInterrupt):
        run(
            stopped, store, watchdog=watch(stopped), total_steps=14, source=Patches(bad_step=5, dies_at=10)
        )  # after the checkpoint of step 8, which follows the recovery
    saved = ckpt.read_checkpoint(store, ckpt.latest_key(store) or "")
    assert saved.step == 8
    resumed = new_learner(None)
    resumed.load_state(saved.tensors)
    position = Position.from_meta(saved.meta)
    run(resumed, store, watchdog=watch(resumed), total_steps=14, position=position)
    assert resumed.control.num_recoveries == 1 and resumed.control.learning_rate_factor == 0.5
    expected, got = flat_state(straight), flat_state(resumed)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_when_reports_come_changes_nothing_where_nothing_collapses(tmp_path: Path) -> None:
    often, rarely, alone = (new_learner(None) for _ in range(3))
    run(often, open_store(str(tmp_path / "a")), watchdog=watch(often), total_steps=6)
    run(rarely, open_store(str(tmp_path / "b")), watchdog=watch(rarely), total_steps=6, report_interval_s=1e6)
    run(alone, open_store(str(tmp_path / "c")), watchdog=None, total_steps=6)
    expected = flat_state(often)
    assert float(expected.pop("control/psnr_at_start_db")) > 0
    for other in (rarely, alone):
        got = flat_state(other)
        assert all(torch.equal(value, got[name]) for name, value in expected.items())


def _recovers(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
    )
    torch.set_num_threads(1)
    collective = Collective.of_process_group()
    ours = new_learner(None, configs=WITH_BATCH_NORM, collective=collective)
    ended, recorder = run(
        ours,
        open_store(f"{folder}/store"),
        watchdog=watch(ours),
        total_steps=10,
        source=Patches(bad_step=5, collective=collective),
        collective=collective,
    )
    outcome = {"state": flat_state(ours), "recoveries": recorder.recoveries, "step": ended.step}
    torch.save(outcome, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_all_workers_go_back_together(tmp_path: Path) -> None:
    """The bad patch is on the last rank alone."""
    mp.spawn(_recovers, args=(2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert first["recoveries"] == second["recoveries"] and len(first["recoveries"]) == 1
    assert first["step"] == 10
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]) and value.isfinite().all(), name


# --- what is judged how ---

HEALTHY = {
    "colour_shift": 0.01,
    "discriminator_accuracy_real": 0.7,
    "discriminator_accuracy_fake": 0.7,
    "adversarial_gradient_norm": 0.5,
    "perceptual_gradient_norm": 0.5,
    "pixel_gradient_norm": 0.0,
    "discriminator_paused": 0.0,
}
SATURATED = HEALTHY | {
    "discriminator_accuracy_real": 1.0,
    "discriminator_accuracy_fake": 1.0,
    "adversarial_gradient_norm": 1e-4,
}


@pytest.fixture
def learner() -> AdversarialLearner:
    return new_learner(None)


def judging(learner: AdversarialLearner, **changes: Any) -> GanWatchdog:
    return GanWatchdog(learner, WatchdogConfig(patience_patches=4 * BATCH, **changes), global_batch_size=BATCH)


def test_psnr_is_compared_with_the_first_validation_and_that_is_kept(learner: AdversarialLearner) -> None:
    watchdog = judging(learner, max_psnr_drop_db=2.0)
    assert watchdog.judge({"psnr_db": 30.0}, step=1) is None
    assert watchdog.judge({"psnr_db": 28.1}, step=2) is None
    assert "3.00 dB below the start" in (watchdog.judge({"psnr_db": 27.0}, step=3) or "")
    resumed = new_learner(None)
    learner.control = dataclasses.replace(learner.control, num_steps=0)
    resumed.load_state(learner.state())
    assert judging(resumed, max_psnr_drop_db=2.0).judge({"psnr_db": 27.0}, step=3) is not None


def test_a_psnr_that_is_no_number_is_a_collapse(learner: AdversarialLearner) -> None:
    watchdog = judging(learner)
    for psnr_at, is_collapse in ((math.nan, True), (30.0, False), (math.nan, True)):
        assert (watchdog.judge({"psnr_db": psnr_at}, step=1) is not None) == is_collapse
    assert learner.control.psnr_at_start_db == 30.0


def test_only_what_lasts_is_a_collapse(learner: AdversarialLearner) -> None:
    off = HEALTHY | {"colour_shift": 0.2}
    watchdog = judging(learner)
    judged = [watchdog.judge(values, step=step) for step, values in enumerate((off, off, off, HEALTHY, off, off))]
    assert judged == [None] * 6
    assert watchdog.judge(off, step=7) is None
    assert "off by 0.200" in (watchdog.judge(off, step=8) or "")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"discriminator_accuracy_fake": 0.99}, False),
        ({"discriminator_accuracy_real": 0.99}, False),
        ({"adversarial_gradient_norm": 0.1}, False),  # it still teaches
        ({"adversarial_gradient_norm": 0.0, "perceptual_gradient_norm": 0.0}, True),
        ({"discriminator_paused": 1.0}, False),
    ],
)
def test_saturation_is_being_right_without_teaching(
    learner: AdversarialLearner, changes: dict[str, float], expected: bool
) -> None:
    watchdog = judging(learner)
    assert watchdog.judge(SATURATED | changes, step=1) is None
    assert (watchdog.judge(SATURATED | changes, step=5) is not None) == expected


def test_a_second_collapse_before_the_next_checkpoint_is_met_with_more(learner: AdversarialLearner) -> None:
    saved = {group: {name: it.clone() for name, it in named.items()} for group, named in learner.state().items()}
    watchdog = judging(learner)
    watchdog.judge({"psnr_db": 30.0}, step=1)
    watchdog.recover(saved, step=1, reason="loss nan")
    learner.step([patches(0)], learning_rate=1e-3)
    watchdog.recover(saved, step=2, reason="loss nan")
    assert (learner.control.learning_rate_factor, learner.control.num_recoveries) == (0.25, 2)
    assert learner.control.psnr_at_start_db == 30.0  # which the checkpoint does not know
    assert learner.control.num_steps == 0  # of the state that it holds now


def test_patience_begins_anew_after_a_recovery(learner: AdversarialLearner) -> None:
    watchdog = judging(learner)
    saved = learner.state()
    for step in (1, 4):
        watchdog.judge(SATURATED, step=step)
    reason = watchdog.judge(SATURATED, step=5)
    assert reason is not None
    did = watchdog.recover(saved, step=5, reason=reason)
    assert "paused for 400 steps" in did and learner.control.learning_rate_factor == 1.0
    assert watchdog.judge(SATURATED, step=6) is None
