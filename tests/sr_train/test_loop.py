"""The loop: resumes bit for bit, counts in patches, stops on a bad loss, keeps the best, survives a full disk."""

import dataclasses
import errno
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from sr_data.batch_feed import BatchFeed
from sr_data.errors import StorageError
from sr_data.storage import Store, open_store
from sr_models.architectures import architecture_name, build_model, config_to_dict
from sr_models.edsr import EDSRConfig
from sr_train import checkpoint as ckpt
from sr_train.collective import Collective
from sr_train.learner import NonFiniteLossError, PixelLearner
from sr_train.loop import CheckpointWriteError, GoesOn, Leave, Left, LoopPlan, Position, train
from sr_train.options import OptimConfig, ScheduleConfig
from sr_train.schedule import learning_rate_at
from sr_train.step_mode import REFERENCE

TINY = EDSRConfig(scale=2, num_blocks=2, num_channels=8)
BATCH = 4

T = TypeVar("T")


class RandomPatches:
    """Patches that depend on the step alone, as the pool's do."""

    def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        hr_NCHW = torch.rand(BATCH, 3, 16, 16, generator=generator)
        lr_NCHW = nn.functional.avg_pool2d(hr_NCHW, 2)
        part = slice(micro * BATCH // num_micro, (micro + 1) * BATCH // num_micro)
        return lr_NCHW[part], hr_NCHW[part]


class Recorder:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, Mapping[str, float]]] = []
        self.validations: list[tuple[int, bool]] = []
        self.checkpoints: list[str] = []
        self.recoveries: list[tuple[int, str]] = []

    def on_steps(self, values: Mapping[str, float], *, step: int, num_steps: int, seconds: float) -> None:
        self.steps.append((step, num_steps, values))

    def on_validation(self, values: Mapping[str, float], *, step: int, is_best: bool) -> None:
        self.validations.append((step, is_best))

    def on_checkpoint(self, key: str, *, step: int, seconds: float, stalled_s: float) -> None:
        self.checkpoints.append(key)

    def on_recovery(self, message: str, *, step: int) -> None:
        self.recoveries.append((step, message))

    def on_trouble(self, message: str, step: int) -> None:
        raise AssertionError(message)


class Scores:
    """A validation whose PSNR is given, per call."""

    def __init__(self, *psnr_db: float):
        self._values = iter(psnr_db)

    def __call__(self, network: nn.Module, step: int) -> Mapping[str, float]:
        assert not network.training
        return {"psnr_db": next(self._values, 0.0)}


class TellsToLeave:
    """A function for `leave` that says so from its `at`-th call on."""

    def __init__(self, at: int):
        self._at, self._calls = at, 0

    def __call__(self) -> str | None:
        self._calls += 1
        return "the node goes" if self._calls >= self._at else None


class InterruptedScores(Scores):
    """A validation that is given up the first time, as a worker was told to leave meanwhile."""

    def __init__(self, *psnr_db: float):
        super().__init__(*psnr_db)
        self.told = False

    def __call__(self, network: nn.Module, step: int) -> Mapping[str, float] | None:  # type: ignore[override]
        if not self.told:
            self.told = True
            return None
        return super().__call__(network, step)


def loop_plan(*, total_steps: int, interval_steps: int = 100, **changes: object) -> LoopPlan:
    optim = OptimConfig(total_patches=total_steps * BATCH, global_batch_size=BATCH, ema_decay=0.5)
    schedule = ScheduleConfig(kind="cosine", learning_rate=1e-3, warmup_patches=BATCH)
    plan = LoopPlan(
        optim=optim,
        schedule=schedule,
        validation_interval_patches=interval_steps * BATCH,
        checkpoint_interval_patches=interval_steps * BATCH,
        keep_last=2,
        early_stop_after=None,
        early_stop_min_gain_db=0.01,
    )
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]


def new_learner(optim: OptimConfig) -> PixelLearner:
    network = build_model(TINY, seed=0)
    return PixelLearner(network, optim, device=torch.device("cpu"), mode=REFERENCE, collective=Collective())


class CriesOnce:
    """A watchdog that finds step 5 wrong, the first time, and takes the learner back."""

    def __init__(self, learner: PixelLearner):
        self._learner = learner
        self.went_back_to: Mapping[str, Mapping[str, torch.Tensor]] | None = None

    def judge(self, values: Mapping[str, float], *, step: int) -> str | None:
        return "a wolf" if step == 5 and self.went_back_to is None else None

    def recover(self, saved: Mapping[str, Mapping[str, torch.Tensor]], *, step: int, reason: str) -> str:
        self.went_back_to = saved
        self._learner.load_state(saved)
        return "the sheep are counted"


def run(
    plan: LoopPlan,
    store: Store,
    *,
    watchdog: CriesOnce | None = None,
    learner: PixelLearner | None = None,
    position: Position | None = None,
    validate: Scores | None = None,
    source: object = None,
    goes_on: GoesOn | None = None,
    collective: Collective | None = None,
    leave: Leave = lambda: None,
    recorder: Recorder | None = None,
) -> tuple[Position, PixelLearner, Recorder]:
    learner, recorder = learner or new_learner(plan.optim), recorder or Recorder()
    meta = {"architecture": architecture_name(TINY), "model_config": config_to_dict(TINY)}
    ended = train(
        plan,
        learner=learner,
        feed=BatchFeed(
            source or RandomPatches(),  # type: ignore[arg-type]
            num_micro=plan.optim.accumulation_steps,
            device=torch.device("cpu"),
            ahead=False,
        ),
        validate=validate or Scores(),
        store=store,
        meta=meta,
        position=position or Position(),
        observer=recorder,
        collective=collective or Collective(),
        watchdog=watchdog,
        goes_on=goes_on,
        leave=leave,
    )
    return ended, learner, recorder


def flat(learner: PixelLearner) -> dict[str, torch.Tensor]:
    return {f"{group}/{name}": value for group, values in learner.state().items() for name, value in values.items()}


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    plan = loop_plan(total_steps=6, interval_steps=3)
    _, straight, _ = run(plan, open_store(str(tmp_path / "straight")))

    store = open_store(str(tmp_path / "stopped"))

    class Stops(RandomPatches):
        def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
            if step == 5:
                raise KeyboardInterrupt
            return super().batch(step, micro, num_micro)

    with pytest.raises(KeyboardInterrupt):
        run(plan, store, source=Stops())
    saved = ckpt.read_checkpoint(store, ckpt.latest_key(store) or "")
    assert saved.step == 3
    resumed = new_learner(plan.optim)
    resumed.load_state(saved.tensors)
    ended, _, _ = run(plan, store, learner=resumed, position=Position.from_meta(saved.meta))

    assert ended.step == 6
    expected, got = flat(straight), flat(resumed)
    assert expected.keys() == got.keys()
    assert any(name.startswith("optimizer/") for name in got) and any(name.startswith("ema/") for name in got)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_accumulation_changes_memory_and_not_the_training(tmp_path: Path) -> None:
    whole = loop_plan(total_steps=3)
    split = dataclasses.replace(whole, optim=dataclasses.replace(whole.optim, accumulation_steps=4))
    _, one, _ = run(whole, open_store(str(tmp_path / "a")))
    _, four, _ = run(split, open_store(str(tmp_path / "b")))
    for name, value in one.state()["model"].items():
        assert torch.allclose(value, four.state()["model"][name], atol=1e-5), name


def test_a_bad_loss_stops_before_the_weights_change(tmp_path: Path) -> None:
    class OneNan(RandomPatches):
        def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
            lr_NCHW, hr_NCHW = super().batch(step, micro, num_micro)
            if step == 2:
                hr_NCHW[0, 0, 0, 0] = torch.nan
            return lr_NCHW, hr_NCHW

    _, after_two_steps, _ = run(
        loop_plan(total_steps=2, schedule=ScheduleConfig(kind="constant")), open_store(str(tmp_path / "a"))
    )
    plan = loop_plan(total_steps=5, schedule=ScheduleConfig(kind="constant"))
    learner = new_learner(plan.optim)
    with pytest.raises(NonFiniteLossError, match="loss nan"):
        run(plan, open_store(str(tmp_path / "b")), learner=learner, source=OneNan())
    for name, value in flat(after_two_steps).items():
        assert torch.equal(value, flat(learner)[name]), name


def test_the_best_checkpoint_outlives_the_newest(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    ended, _, recorder = run(loop_plan(total_steps=8, interval_steps=2), store, validate=Scores(20.0, 30.0, 25.0, 24.0))
    assert recorder.validations == [(2, True), (4, True), (6, False), (8, False)]
    assert ended.best is not None and (ended.best["step"], ended.best["psnr_db"]) == (4, 30.0)
    assert ckpt.list_keys(store) == [ckpt.key_of_step(step) for step in (4, 6, 8)]
    assert ckpt.read_checkpoint(store, ckpt.key_of_step(8)).meta["best"]["key"] == ckpt.key_of_step(4)


def test_it_stops_early_when_validation_no_longer_gains(tmp_path: Path) -> None:
    plan = loop_plan(total_steps=20, interval_steps=2, early_stop_after=2)
    scores = (20.0, 21.0, 21.005, 21.002, 30.0)
    ended, _, _ = run(plan, open_store(str(tmp_path)), validate=Scores(*scores))
    assert ended.step == 8
    assert ended.best is not None and ended.best["psnr_db"] == 21.005


def test_a_failed_checkpoint_ends_the_run_and_leaves_the_earlier_ones(tmp_path: Path) -> None:
    class FillsUp(Store):
        __slots__ = ()

        def write(self, key: str, data: bytes) -> None:
            if key == ckpt.key_of_step(4):
                raise StorageError(errno.ENOSPC, f"{self.uri_of(key)}: no space left")
            Store.write(self, key, data)

    store = FillsUp(str(tmp_path))
    with pytest.raises(CheckpointWriteError, match=r"step-000000004.*no space left"):
        run(loop_plan(total_steps=8, interval_steps=2), store)
    assert ckpt.read_checkpoint(store, ckpt.latest_key(store) or "").step == 2


def test_every_step_is_reported_once(tmp_path: Path) -> None:
    _, _, recorder = run(loop_plan(total_steps=7, interval_steps=3), open_store(str(tmp_path)))
    assert [step for step, _, _ in recorder.steps] == [1, 3, 6, 7]
    assert sum(count for _, count, _ in recorder.steps) == 7
    assert {"loss", "grad_norm", "learning_rate", "patches_per_s", "data_wait_share"} == set(recorder.steps[0][2])


def test_old_checkpoints_that_cannot_be_deleted_cost_no_training(tmp_path: Path) -> None:
    class NeverDeletes(Store):
        __slots__ = ()

        def delete(self, key: str) -> None:
            raise StorageError(errno.EACCES, f"{self.uri_of(key)}: not allowed to delete")

    store = NeverDeletes(str(tmp_path))
    ended, _, _ = run(loop_plan(total_steps=8, interval_steps=2), store)
    assert ended.step == 8
    assert len(ckpt.list_keys(store)) == 4


def test_a_budget_cut_to_an_unvalidated_checkpoint_is_validated_then(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    often = loop_plan(total_steps=4, checkpoint_interval_patches=BATCH, validation_interval_patches=100 * BATCH)

    class Stops(RandomPatches):
        def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
            if step == 2:
                raise KeyboardInterrupt
            return super().batch(step, micro, num_micro)

    with pytest.raises(KeyboardInterrupt):
        run(often, store, source=Stops())
    saved = ckpt.read_checkpoint(store, key_of_last := ckpt.latest_key(store) or "")
    cut = dataclasses.replace(often, optim=dataclasses.replace(often.optim, total_patches=2 * BATCH))
    learner = new_learner(cut.optim)
    learner.load_state(saved.tensors)
    ended, _, _ = run(cut, store, learner=learner, position=Position.from_meta(saved.meta), validate=Scores(25.0))
    assert ended.best is not None and ended.best["key"] == key_of_last
    assert ckpt.read_checkpoint(store, key_of_last).meta["best"]["psnr_db"] == 25.0


@pytest.mark.parametrize("seed", [0, 20261121, 2**62])
def test_any_seed_trains(tmp_path: Path, seed: int) -> None:
    plan = loop_plan(total_steps=1)
    ended, _, _ = run(
        dataclasses.replace(plan, optim=dataclasses.replace(plan.optim, seed=seed)), open_store(str(tmp_path))
    )
    assert ended.step == 1


def test_a_run_resumed_after_its_early_stop_stays_stopped(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    plan = loop_plan(total_steps=20, interval_steps=2, early_stop_after=2)
    run(plan, store, validate=Scores(21.0, 20.0, 20.0))
    saved = ckpt.read_checkpoint(store, ckpt.latest_key(store) or "")
    ended, _, recorder = run(plan, store, position=Position.from_meta(saved.meta), validate=Scores(30.0))
    assert ended.step == saved.step == 6 and recorder.validations == []


def test_a_collapse_goes_back_to_the_last_checkpoint_that_was_judged_good(tmp_path: Path) -> None:
    """Not to step 4's, which nobody has looked at, though all but one of the others are deleted meanwhile."""
    plan = loop_plan(
        total_steps=8,
        checkpoint_interval_patches=BATCH,
        validation_interval_patches=3 * BATCH,
        keep_last=1,
        best_by="newest",
    )
    learner = new_learner(plan.optim)
    watchdog = CriesOnce(learner)
    ended, _, recorder = run(plan, open_store(str(tmp_path)), learner=learner, watchdog=watchdog)
    assert [step for step, _ in recorder.validations] == [0, 3, 6, 8]
    assert watchdog.went_back_to is not None
    three_steps = new_learner(plan.optim)
    for step in range(3):
        rate = learning_rate_at(plan.schedule, patches_seen=step * BATCH, total_patches=plan.optim.total_patches)
        three_steps.step([RandomPatches().batch(step)], learning_rate=rate)
    for name, value in three_steps.state()["model"].items():
        assert torch.equal(value, watchdog.went_back_to["model"][name]), name
    ((step, message),) = recorder.recoveries
    assert step == 5 and message == f"a wolf: back to {ckpt.key_of_step(3)}, the sheep are counted"
    assert ended.step == 8 and ended.good_step == 8


def test_a_recovery_is_saved_at_once(tmp_path: Path) -> None:
    """A worker that is lost right after it must not go back to the collapse, nor forget that there was one."""
    plan = loop_plan(total_steps=8, interval_steps=5, best_by="newest")
    store = open_store(str(tmp_path))
    learner = new_learner(plan.optim)

    class Stops(RandomPatches):
        def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
            if step == 5:
                raise KeyboardInterrupt
            return super().batch(step, micro, num_micro)

    with pytest.raises(KeyboardInterrupt):
        run(plan, store, learner=learner, watchdog=CriesOnce(learner), source=Stops())
    saved = ckpt.read_checkpoint(store, ckpt.latest_key(store) or "")
    assert (saved.step, saved.meta["good_step"]) == (5, 0)
    for name, value in new_learner(plan.optim).state()["model"].items():
        assert torch.equal(value, saved.tensors["model"][name]), name


def test_a_run_that_went_on_where_lpips_can_be_had_compares_from_there_on(tmp_path: Path) -> None:
    class Both(Scores):
        def __call__(self, network: nn.Module, step: int) -> Mapping[str, float]:
            return {**super().__call__(network, step), "lpips": {6: 0.3, 8: 0.4}[step]}

    store = open_store(str(tmp_path))
    run(loop_plan(total_steps=4, interval_steps=2, best_by="newest"), store)
    saved = ckpt.read_checkpoint(store, ckpt.latest_key(store) or "")
    plan = loop_plan(total_steps=8, interval_steps=2, best_by="lpips")
    ended, _, _ = run(plan, store, position=Position.from_meta(saved.meta), validate=Both())
    assert ended.best is not None and (ended.best["step"], ended.best["lpips"]) == (6, 0.3)


class Asked:
    """Says no to the question of `stop_at`, and remembers what was asked and which checkpoints were there."""

    def __init__(self, store: Store, *, stop_at: int) -> None:
        self._store, self._stop_at = store, stop_at
        self.values: list[Mapping[str, Any]] = []
        self.newest: list[int] = []

    def __call__(self, values: Mapping[str, Any]) -> bool:
        self.values.append(values)
        self.newest.append(ckpt.read_checkpoint(self._store, ckpt.latest_key(self._store) or "").step)
        return bool(values["step"] != self._stop_at)


def test_it_asks_after_each_validation_once_the_checkpoint_is_there(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    plan = loop_plan(total_steps=6, validation_interval_patches=2 * BATCH, checkpoint_interval_patches=BATCH)
    asked = Asked(store, stop_at=99)
    ended, _, _ = run(plan, store, goes_on=asked, validate=Scores(20.0, 22.0, 21.0))
    assert [(it["step"], it["psnr_db"]) for it in asked.values] == [(2, 20.0), (4, 22.0), (6, 21.0)]
    assert asked.newest == [2, 4, 6]
    assert ended.step == 6


def test_a_run_that_a_no_stopped_goes_on_from_there_as_if_it_had_not(tmp_path: Path) -> None:
    plan = loop_plan(total_steps=6, interval_steps=2)
    _, straight, _ = run(plan, open_store(str(tmp_path / "straight")))
    store = open_store(str(tmp_path / "stopped"))
    stopped, _, recorder = run(plan, store, goes_on=Asked(store, stop_at=4))
    assert stopped.step == 4 and [step for step, _ in recorder.validations] == [2, 4]
    saved = ckpt.read_checkpoint(store, ckpt.latest_key(store) or "")
    assert saved.step == 4
    resumed = new_learner(plan.optim)
    resumed.load_state(saved.tensors)
    asked = Asked(store, stop_at=99)
    ended, _, _ = run(plan, store, learner=resumed, position=Position.from_meta(saved.meta), goes_on=asked)
    assert ended.step == 6 and asked.newest == [6]
    for name, value in flat(straight).items():
        assert torch.equal(value, flat(resumed)[name]), name


class Together:
    """What the workers of `Thread` share."""

    def __init__(self, num_workers: int) -> None:
        self.values: list[Any] = [None] * num_workers
        self.barrier = threading.Barrier(num_workers, timeout=60)


@dataclasses.dataclass(frozen=True)
class Thread(Collective):
    """A worker that is a thread of this process."""

    together: Together = dataclasses.field(kw_only=True)

    def gather(self, value: T) -> list[T]:
        self.together.values[self.rank] = value
        self.together.barrier.wait()
        values = list(self.together.values)
        self.together.barrier.wait()
        return values

    def first(self, value: T) -> T:
        return self.gather(value)[0]


def test_only_rank_0_asks_and_a_no_ends_all_workers_at_that_step(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    plan, together = loop_plan(total_steps=8, interval_steps=2), Together(2)
    asked = [Asked(store, stop_at=4), Asked(store, stop_at=99)]

    def work(rank: int) -> Position:
        return run(plan, store, goes_on=asked[rank], collective=Thread(rank, 2, together=together))[0]

    with ThreadPoolExecutor(2) as workers:
        ended = list(workers.map(work, range(2)))
    assert [position.step for position in ended] == [4, 4]
    assert [it["step"] for it in asked[0].values] == [2, 4] and asked[1].values == []


def resumed(store: Store, optim: OptimConfig) -> tuple[Position, PixelLearner]:
    """What a worker that begins now finds."""
    key = ckpt.latest_key(store)
    assert key is not None
    saved = ckpt.read_checkpoint(store, key)
    learner = new_learner(optim)
    learner.load_state(saved.tensors)
    return Position.from_meta(saved.meta), learner


def test_told_to_leave_it_saves_that_very_step_and_goes_on_from_there_bit_for_bit(tmp_path: Path) -> None:
    plan = loop_plan(total_steps=12, report_interval_s=0.0)  # a report at every step
    _, undisturbed, _ = run(plan, open_store(str(tmp_path / "undisturbed")))
    store = open_store(str(tmp_path / "left"))
    with pytest.raises(Left, match="left at step 7: the node goes") as left:
        run(plan, store, leave=TellsToLeave(at=7))
    position, learner = resumed(store, plan.optim)
    assert (position.step, left.value.step) == (7, 7)
    ended, learner, _ = run(plan, store, position=position, learner=learner)
    assert ended.step == 12
    got = flat(learner)
    assert [name for name, value in flat(undisturbed).items() if not torch.equal(value, got[name])] == []


@pytest.mark.parametrize("when", ["as the validation is due", "during the validation"])
def test_a_validation_that_leaving_prevented_is_made_up_for(tmp_path: Path, when: str) -> None:
    plan, store = loop_plan(total_steps=12, interval_steps=6, report_interval_s=0.0), open_store(str(tmp_path))
    before, after = Recorder(), Recorder()
    during = when == "during the validation"
    scores = InterruptedScores() if during else Scores(31.0)
    with pytest.raises(Left, match="left at step 6"):
        run(plan, store, leave=TellsToLeave(at=99 if during else 6), validate=scores, recorder=before)
    position, learner = resumed(store, plan.optim)
    assert position.step == 6 and before.validations == []
    ended, *_ = run(plan, store, position=position, learner=learner, validate=Scores(31.0, 30.0), recorder=after)
    assert after.validations == [(6, True), (12, False)]
    assert ended.best is not None and ended.best["step"] == 6
    # What is registered is that checkpoint's weights: it must know that it is the best.
    assert ckpt.read_checkpoint(store, ended.best["key"]).meta["best"]["psnr_db"] == 31.0


def test_it_leaves_only_after_the_checkpoint_is_in_storage(tmp_path: Path) -> None:
    """A refused write is an error even then: nobody is told that all is saved."""

    class FullDisk(Store):
        def write(self, key: str, data: bytes) -> None:
            raise StorageError(errno.ENOSPC, "the disk is full")

    store = FullDisk(str(tmp_path))
    with pytest.raises(CheckpointWriteError):
        run(loop_plan(total_steps=12, report_interval_s=0.0), store, leave=TellsToLeave(at=3))


def test_a_run_that_becomes_slow_all_at_once_still_hears_in_time(tmp_path: Path) -> None:
    """However many steps would fit between two reports at the speed so far."""
    recorder = Recorder()
    run(loop_plan(total_steps=130, report_interval_s=1e9), open_store(str(tmp_path)), recorder=recorder)
    assert max(num_steps for _, num_steps, _ in recorder.steps) == 50


def test_nothing_is_gone_back_to_before_the_first_good_validation(tmp_path: Path) -> None:
    """Told to leave in its very first validation, it makes that one up, and it is what training is compared with."""

    class CriesAtOnce(CriesOnce):
        def judge(self, values: Mapping[str, float], *, step: int) -> str | None:
            return "a wolf" if step == 0 else None

    plan, position = loop_plan(total_steps=3), Position(validation_pending=True)
    learner, recorder = new_learner(plan.optim), Recorder()
    store = open_store(str(tmp_path))
    ended, *_ = run(plan, store, watchdog=CriesAtOnce(learner), learner=learner, position=position, recorder=recorder)
    assert ended.step == 3 and recorder.recoveries == []
