"""A sweep's plan: how many trials run at once, which points they are, how long they train, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sr_data.storage import open_store
from sr_models.cost import model_cost
from sr_models.edsr import EDSRConfig
from sr_train.options import CheckpointConfig, ConfigError, RunConfig
from sr_train.pareto import Limits
from sr_train.placement import ClusterFacts
from sr_train.plan import PlanError
from sr_train.sweep_config import sweep_to_json
from sr_train.sweep_plan import (
    SWEEP_KEY,
    TRIAL_KEY,
    cost_of,
    known_trials,
    make_sweep_plan,
    place_trials,
    trial_plan,
)
from sr_train.training_space import trial_name
from sr_train.trial_record import record_to_json
from tests.support.sweeps import BATCH, TINY, TRIAL_PATCHES, TWO_CPUS, planned, tiny_sweep, told_trial


def cluster(*cpus: float, gpus: tuple[float, ...] = ()) -> ClusterFacts:
    return ClusterFacts(cpus_per_node=cpus, gpus_per_node=gpus or (0.0,) * len(cpus))


@pytest.mark.parametrize(
    ("facts", "run", "expected"),
    [
        # A whole CPU for each worker: nothing is decoded beside trials.
        (cluster(2), {}, ("cpu", 1.0, 1, 2)),
        (cluster(2), {"num_workers": 2}, ("cpu", 1.0, 1, 1)),
        (cluster(2), {"cpus_per_worker": 0.5}, ("cpu", 0.5, 1, 4)),
        (cluster(8), {"cpus_per_worker": 3}, ("cpu", 3, 3, 2)),
        (cluster(2), {"threads_per_worker": 5}, ("cpu", 1.0, 5, 2)),
        # Workers of a trial may be on two nodes; a worker is on one.
        (cluster(0, 1, 1), {"num_workers": 2}, ("cpu", 1.0, 1, 1)),
        (cluster(3, 3), {"cpus_per_worker": 2}, ("cpu", 2, 2, 2)),
        # GPUs, whole or in parts.
        (cluster(8, gpus=(1,)), {}, ("cuda", 1.0, 1, 1)),
        (cluster(8, gpus=(1,)), {"gpus_per_worker": 0.25}, ("cuda", 1.0, 1, 4)),
        (cluster(8, gpus=(1,)), {"gpus_per_worker": 0.3}, ("cuda", 1.0, 1, 3)),
        (cluster(2, gpus=(1,)), {"gpus_per_worker": 0.25}, ("cuda", 1.0, 1, 2)),
        (cluster(8, gpus=(1,)), {"device": "cpu", "gpus_per_worker": 0.25}, ("cpu", 1.0, 1, 8)),
        (cluster(8, gpus=(1,)), {"num_workers": 2}, ("cpu", 1.0, 1, 4)),
        (cluster(4, 4, gpus=(2, 2)), {"num_workers": 2}, ("cuda", 1.0, 1, 2)),
    ],
)
def test_as_many_trials_at_once_as_the_cluster_holds(
    facts: ClusterFacts, run: dict[str, Any], expected: tuple[str, float, int, int]
) -> None:
    placed, slots = place_trials(RunConfig(**run), facts)
    assert (placed.device, placed.cpus_per_worker, placed.threads_per_worker, slots) == expected


@pytest.mark.parametrize(
    ("facts", "run", "message"),
    [
        (cluster(1), {"num_workers": 2}, r"2 workers with 1 CPUs each can't run .*\(1 CPUs\).*--run.num-workers"),
        (cluster(1, 1), {"cpus_per_worker": 2}, r"2 CPUs each.*\(1 CPUs \+ 1 CPUs\).*--run.cpus-per-worker"),
        (cluster(8), {"device": "cuda"}, r"1 CPUs and 1 GPUs each.*\(8 CPUs and 0 GPUs\)"),
        (cluster(8, gpus=(0.25,)), {"device": "cuda", "gpus_per_worker": 0.5}, r"0.5 GPUs.*--run.gpus-per-worker"),
        (cluster(8, 0, gpus=(0, 1)), {"device": "cuda"}, r"\(8 CPUs and 0 GPUs \+ 0 CPUs and 1 GPUs\)"),
    ],
)
def test_a_trial_that_never_fits_is_refused(facts: ClusterFacts, run: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place_trials(RunConfig(**run), facts)


def test_nothing_is_left_open(tiny_photos: Path, tmp_path: Path) -> None:
    plan = planned(tiny_photos, tmp_path / "runs")
    assert (plan.name, plan.uri) == ("mine", f"{tmp_path}/runs/mine")
    assert (plan.samples, plan.num_trials, plan.num_left_out, plan.known) == ((TINY,), 1, 0, ())
    assert plan.config.base.run == RunConfig(
        name="mine", storage=f"{tmp_path}/runs", device="cpu", cpus_per_worker=1.0, threads_per_worker=1
    )
    assert (plan.max_concurrent, plan.config.search.max_concurrent) == (2, 2)
    assert plan.config.base.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert not (tmp_path / "runs" / "mine").exists(), "a plan writes nothing there"


@pytest.mark.parametrize(("asked", "given"), [(None, 2), (1, 1), (5, 2)])
def test_no_more_trials_at_once_than_fit(tiny_photos: Path, tmp_path: Path, asked: int | None, given: int) -> None:
    assert planned(tiny_photos, tmp_path / "runs", max_concurrent=asked).max_concurrent == given


@pytest.mark.parametrize(
    ("search", "budgets"),
    [
        ({}, (900, 100)),  # a quarter of 3600, and a ninth of that
        ({"reduction_factor": 2}, (900, 225)),
        ({"trial_patches": 1800}, (1800, 200)),
        ({"grace_patches": 300}, (900, 300)),
        ({"grace_patches": 1000}, (900, 900)),
        ({"trial_patches": 5}, (5, 1)),
    ],
)
def test_budgets_that_are_not_given_follow(
    tiny_photos: Path, tmp_path: Path, search: dict[str, Any], budgets: tuple[int, int]
) -> None:
    open_ones: dict[str, Any] = {"trial_patches": None, "grace_patches": None}
    plan = planned(tiny_photos, tmp_path / "runs", total_patches=3600, **open_ones | search)
    assert (plan.trial_patches, plan.grace_patches) == budgets


def cost(num_channels: int) -> int:
    return model_cost(EDSRConfig(scale=2, num_blocks=1, num_channels=num_channels)).parameters


@pytest.mark.parametrize("search", ["grid", "random"])
def test_points_above_a_limit_are_left_out(tiny_photos: Path, tmp_path: Path, search: str) -> None:
    plan = planned(
        tiny_photos,
        tmp_path / "runs",
        space={"num_channels": "4,6,8,10"},
        limits=Limits(max_parameters=cost(6)),
        search=search,
        num_trials=4,
    )
    assert plan.samples is not None
    assert {sample["num_channels"] for sample in plan.samples} == {4, 6}
    assert (plan.num_trials, plan.num_left_out) == (2, 2)


def test_others_are_drawn_in_the_place_of_those_above_a_limit(tiny_photos: Path, tmp_path: Path) -> None:
    plan = planned(
        tiny_photos,
        tmp_path / "runs",
        space={"num_channels": "4,400", "schedule__learning_rate": "1e-4..1e-3:log"},
        limits=Limits(max_parameters=cost(4)),
        num_trials=5,
    )
    assert plan.num_trials == 5 and plan.num_left_out > 0
    assert {sample["num_channels"] for sample in plan.samples or ()} == {4}


@pytest.mark.parametrize("search", ["grid", "random"])
def test_limits_that_leave_nothing_are_refused(tiny_photos: Path, tmp_path: Path, search: str) -> None:
    with pytest.raises(ConfigError, match=rf"no point .* within the limits.*--limits.max-parameters={cost(4) - 1}"):
        planned(tiny_photos, tmp_path / "runs", limits=Limits(max_parameters=cost(4) - 1), search=search)


def test_a_grid_has_all_points_and_random_search_so_many(tiny_photos: Path, tmp_path: Path) -> None:
    space = {"num_blocks": "1,2", "num_channels": "4,6,8"}
    whole = planned(tiny_photos, tmp_path / "runs", space=space, search="grid", num_trials=2)
    some = planned(tiny_photos, tmp_path / "runs", space=space, num_trials=2)
    assert (whole.num_trials, some.num_trials) == (6, 2)
    assert {trial_name(sample) for sample in some.samples or ()} < {trial_name(it) for it in whole.samples or ()}


def test_tpe_decides_as_it_goes(tiny_photos: Path, tmp_path: Path) -> None:
    plan = planned(tiny_photos, tmp_path / "runs", search="tpe", num_trials=7)
    assert (plan.samples, plan.num_trials) == (None, 7)


def test_a_sweep_that_exists_needs_resume(tiny_photos: Path, tmp_path: Path) -> None:
    plan = planned(tiny_photos, tmp_path / "runs")
    open_store(plan.uri).write(SWEEP_KEY, sweep_to_json(plan.config).encode())
    with pytest.raises(ConfigError, match=r"sweep 'mine' exists at .*--resume.*--run.name"):
        planned(tiny_photos, tmp_path / "runs")
    assert planned(tiny_photos, tmp_path / "runs", resume=True) == plan


def test_it_knows_the_trials_of_earlier_attempts(tiny_photos: Path, tmp_path: Path) -> None:
    plan = planned(tiny_photos, tmp_path / "runs")
    known = told_trial("trial-b", 30.0), told_trial("trial-a", status="running")
    store = open_store(plan.uri)
    store.write(SWEEP_KEY, sweep_to_json(plan.config).encode())
    for record in known:
        store.write(f"trials/{record.name}/{TRIAL_KEY}", record_to_json(record).encode())
    store.write(f"trials/trial-c/{TRIAL_KEY}", b'{"name": "trial-c"')  # half of it
    store.write("trials/trial-d/config.json", b"{}")  # interrupted before its first record
    assert planned(tiny_photos, tmp_path / "runs", resume=True).known == known[::-1]
    assert known_trials(open_store(str(tmp_path / "nowhere"))) == ()


def test_a_run_of_that_name_is_no_sweep(tiny_photos: Path, tmp_path: Path) -> None:
    open_store(str(tmp_path / "runs" / "mine")).write("config.json", b"{}")
    with pytest.raises(PlanError, match="run 'mine' exists"):
        planned(tiny_photos, tmp_path / "runs", resume=True)


def test_a_trial_begins_from_nothing(tiny_photos: Path, tmp_path: Path) -> None:
    sweep = tiny_sweep(tiny_photos, tmp_path / "runs")
    sweep = replace(sweep, base=replace(sweep.base, checkpoint=CheckpointConfig(init_from="models:/x")))
    with pytest.raises(ConfigError, match="--checkpoint.init-from"):
        make_sweep_plan(sweep, TWO_CPUS, resume=False)


def test_a_space_that_has_no_such_run_is_refused(tiny_photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--space.patch-px-hr=17"):
        planned(tiny_photos, tmp_path / "runs", space={"patch_px_hr": "16,17"})


def test_all_trials_train_on_the_images_that_the_largest_patch_fits(tiny_photos: Path, tmp_path: Path) -> None:
    plan = planned(tiny_photos, tmp_path / "runs", space={"patch_px_hr": "16,74"})  # photo-0 is 96 × 72
    small = trial_plan(plan, TINY, "trial-1")
    assert {record.name for record in small.train.images} == {f"photo-{index}" for index in range(1, 6)}
    assert small.samples.num_images == 5


def test_a_trials_plan_is_the_sweeps_with_its_sample(tiny_photos: Path, tmp_path: Path) -> None:
    plan = planned(tiny_photos, tmp_path / "runs", space={"patch_px_hr": "16,32"}, run={"threads_per_worker": 2})
    sample = {**TINY, "num_channels": 6, "schedule.kind": "one-cycle", "schedule.warmup_fraction": 0.25}
    trial = trial_plan(plan, sample, "trial-1")
    config = trial.config
    assert trial.run_uri == f"{tmp_path}/runs/mine/trials/trial-1"
    assert config.model == EDSRConfig(scale=2, num_blocks=1, num_channels=6)
    assert (config.schedule.kind, config.schedule.warmup_patches) == ("one-cycle", TRIAL_PATCHES // 4)
    assert (config.optim.total_patches, config.validation.interval_patches) == (TRIAL_PATCHES, plan.grace_patches)
    assert (config.data.patch_px_hr, trial.samples.patch_px_lr) == (16, 8)
    assert trial.samples.global_batch_size == BATCH
    assert (config.run.device, config.run.cpus_per_worker, config.run.threads_per_worker) == ("cpu", 1.0, 2)
    assert cost_of(plan, sample).parameters == cost(6)
