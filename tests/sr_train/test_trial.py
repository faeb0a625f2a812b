"""A sweep's trial, really trained, on this process's CPU: told, stopped, resumed, failed, refused, taken over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from sr_data.errors import StorageError
from sr_data.manifest import ImageRecord
from sr_data.pairs import DecodedPair
from sr_data.storage import open_store
from sr_models.cost import model_cost
from sr_models.edsr import EDSRConfig
from sr_train.mailbox import Message
from sr_train.pareto import Limits
from sr_train.ray_workers import FitResult
from sr_train.run_folder import CONFIG_KEY, checkpoint_store, claim
from sr_train.sweep_plan import TRIAL_KEY, SweepPlan
from sr_train.tracking import RunHandle, start_run
from sr_train.trial import read_record, trial_store, write_record
from sr_train.trial_record import Sample, TrialRecord
from sr_train.upscaler import open_upscaler
from sr_train.worker import Job
from tests.support.process import free_ports
from tests.support.sweeps import (
    BATCH,
    GRACE_PATCHES,
    TINY,
    TRIAL_PATCHES,
    Told,
    WorkersHere,
    checkpoints_of,
    planned,
    tensors_of,
    tried,
)

VALIDATIONS = [GRACE_PATCHES, 2 * GRACE_PATCHES, TRIAL_PATCHES]
STEPS = [patches // BATCH for patches in VALIDATIONS]


@pytest.fixture
def sweep(tiny_photos: Path, tmp_path: Path) -> SweepPlan:
    return planned(tiny_photos, tmp_path / "runs")


def saved(sweep: SweepPlan, name: str = "trial-1") -> TrialRecord:
    record = read_record(trial_store(sweep, name))
    assert record is not None
    return record


def seen(records: Iterable[TrialRecord]) -> list[int]:
    return [record.patches_seen for record in records]


def rate_of(sweep: SweepPlan, name: str) -> float:
    """The learning rate that a trial was last trained with."""
    config = json.loads(trial_store(sweep, name).read_text(CONFIG_KEY))
    return float(config["schedule"]["learning_rate"])


def never(uri: str, records: Iterable[ImageRecord], scale: int) -> Iterator[DecodedPair]:
    raise AssertionError("nothing was to be trained")


def test_it_tells_each_validation_once_it_is_written_down(sweep: SweepPlan) -> None:
    told = Told()

    def report(record: TrialRecord) -> bool:
        assert saved(sweep) == record and record.status == "running"
        newest = f"step-{record.patches_seen // BATCH:09d}.safetensors"
        assert record.newest_checkpoint == checkpoint_store(trial_store(sweep, "trial-1").uri).uri_of(newest)
        assert checkpoints_of(sweep)[-1] == record.patches_seen // BATCH
        return told(record)

    record = tried(sweep, report=report)
    assert seen(told.records) == VALIDATIONS
    assert record == saved(sweep) and record.status == "finished"
    assert [point.patches_seen for point in record.history] == VALIDATIONS
    assert record.cost == model_cost(EDSRConfig(scale=2, num_blocks=1, num_channels=4))
    assert set(record.seconds) == {"start_up", "training"} and min(record.seconds.values()) > 0


def test_what_keeps_it_from_training_is_said_with_its_name(sweep: SweepPlan, caplog: pytest.LogCaptureFixture) -> None:
    class Troubled(WorkersHere):
        def fit(self, job: Job, *, on_message: Callable[[Message], None], **how: Any) -> FitResult:
            on_message(("lost", {"ranks": [0], "ips": {0: "10.0.0.7"}, "message": "its node is gone"}))
            on_message(("trouble", {"step": 3, "message": "storage is away"}))
            return super().fit(job, on_message=on_message, **how)

    tried(sweep, workers=Troubled())
    assert "trial-1: lost: worker 0 on 10.0.0.7: its node is gone" in caplog.messages
    assert "trial-1: step 3: storage is away" in caplog.messages


def test_the_best_checkpoint_is_that_of_the_best_validation(sweep: SweepPlan) -> None:
    told = Told()
    record = tried(sweep, {**TINY, "schedule.learning_rate": 0.3}, report=told)  # so large that it gets worse
    best = max(record.history, key=lambda point: point.psnr_db)
    assert best.patches_seen < TRIAL_PATCHES, "else the test shows nothing"
    assert record.checkpoint is not None and record.newest_checkpoint != record.checkpoint
    assert record.checkpoint.endswith(f"step-{best.patches_seen // BATCH:09d}.safetensors")


def test_a_no_stops_it_and_its_best_checkpoint_opens(sweep: SweepPlan) -> None:
    told = Told(stop_at=2)
    record = tried(sweep, report=told)
    assert (record.status, seen(told.records)) == ("stopped", VALIDATIONS[:2])
    assert checkpoints_of(sweep) == STEPS[:2]
    assert record.checkpoint is not None
    lr_HWC = np.zeros((5, 7, 3), dtype=np.uint8)
    assert open_upscaler(record.checkpoint, scale=2, device="cpu").upscale(lr_HWC).shape == (10, 14, 3)


def test_a_no_at_the_last_validation_stops_nothing(sweep: SweepPlan) -> None:
    assert tried(sweep, report=Told(stop_at=3)).status == "finished"


def test_one_that_is_over_tells_its_history_again_and_trains_nothing(sweep: SweepPlan) -> None:
    first, again, workers = Told(), Told(), WorkersHere()
    ended = tried(sweep, report=first)
    assert tried(sweep, report=again, workers=workers, stream_pairs=never) == ended
    assert [record.history for record in again.records] == [record.history for record in first.records]
    assert {record.status for record in again.records} == {"running"}
    assert workers.jobs == []


def test_one_that_is_over_and_told_no_says_no_more(sweep: SweepPlan) -> None:
    """Tune hears nothing of a trial that it stopped, so a further report would wait for an answer without end."""
    ended, again = tried(sweep), Told(stop_at=1)
    assert tried(sweep, report=again, stream_pairs=never) == ended
    assert seen(again.records) == VALIDATIONS[:1]


def test_one_that_was_interrupted_ends_bit_for_bit_as_if_it_had_not_been(sweep: SweepPlan) -> None:
    straight = tried(sweep, name="straight")
    with pytest.raises(InterruptedError):
        tried(sweep, report=Told(fail_at=2))
    assert (saved(sweep).status, seen([saved(sweep)])) == ("running", VALIDATIONS[1:2])
    told, workers = Told(), WorkersHere()
    record = tried(sweep, report=told, workers=workers)
    assert seen(told.records) == VALIDATIONS and len(workers.jobs) == 1
    assert (record.status, record.history) == ("finished", straight.history)
    expected, got = tensors_of(sweep, STEPS[-1], "straight"), tensors_of(sweep, STEPS[-1])
    assert expected.keys() == got.keys() and any(name.startswith("optimizer/") for name in got)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_one_that_goes_on_does_not_train_again_what_it_has_trained(sweep: SweepPlan) -> None:
    with pytest.raises(InterruptedError):
        tried(sweep, report=Told(fail_at=2))
    before_s = saved(sweep).seconds["training"]
    untouched = checkpoint_store(trial_store(sweep, "trial-1").uri)
    first = untouched.read(f"step-{STEPS[1]:09d}.safetensors")
    record = tried(sweep)
    assert untouched.read(f"step-{STEPS[1]:09d}.safetensors") == first
    assert record.seconds["training"] > before_s, "what both attempts took together"


def test_a_no_while_it_tells_again_stops_it_before_it_trains(sweep: SweepPlan) -> None:
    with pytest.raises(InterruptedError):
        tried(sweep, report=Told(fail_at=2))
    told = Told(stop_at=1)
    record = tried(sweep, report=told, stream_pairs=never)
    assert (record.status, seen(told.records)) == ("stopped", VALIDATIONS[:1])
    assert saved(sweep) == record


def test_a_record_that_cannot_be_read_is_a_trial_that_begins_with_its_sample(sweep: SweepPlan) -> None:
    trial_store(sweep, "trial-1").write(TRIAL_KEY, b"{half a rec")
    record = tried(sweep)
    assert (record.status, dict(record.sample)) == ("finished", dict(TINY))


def test_a_loss_that_is_not_finite_is_the_trials_result(sweep: SweepPlan) -> None:
    told = Told()
    record = tried(sweep, {**TINY, "schedule.learning_rate": 1e30}, report=told)
    assert record == saved(sweep) and record.status == "failed"
    assert record.reason is not None and "learning rate 1e+30" in record.reason
    again = Told()
    assert tried(sweep, report=again, stream_pairs=never) == record
    assert seen(again.records) == seen(told.records)


def test_one_over_a_static_limit_is_not_trained(tiny_photos: Path, tmp_path: Path) -> None:
    cost = model_cost(EDSRConfig(scale=2, num_blocks=1, num_channels=4))
    sweep = planned(tiny_photos, tmp_path / "runs", limits=Limits(max_parameters=cost.parameters))
    larger: Sample = {**TINY, "num_channels": 5}
    told, workers = Told(), WorkersHere()
    record = tried(sweep, larger, report=told, workers=workers)
    assert record == saved(sweep) and record.status == "over limit"
    assert record.reason is not None and f"--limits.max-parameters={cost.parameters}" in record.reason
    assert (told.records, workers.jobs, checkpoints_of(sweep)) == ([], [], [])


def test_one_over_the_latency_limit_is_measured_and_not_trained(tiny_photos: Path, tmp_path: Path) -> None:
    sweep = planned(tiny_photos, tmp_path / "runs", limits=Limits(max_latency_ms=0.001))
    told = Told()
    record = tried(sweep, report=told, stream_pairs=never)
    assert record == saved(sweep) and record.status == "over limit"
    assert record.cost is not None and record.cost.latency_s is not None and record.cost.latency_s > 1e-6
    assert record.reason is not None and "--limits.max-latency-ms=0.001" in record.reason
    assert (told.records, checkpoints_of(sweep)) == ([], [])


def test_a_latency_that_the_table_asks_for_is_measured_once(tiny_photos: Path, tmp_path: Path) -> None:
    sweep = planned(tiny_photos, tmp_path / "runs", cost="latency_ms")
    with pytest.raises(InterruptedError):
        tried(sweep, report=Told(fail_at=1))
    measured = saved(sweep).cost
    assert measured is not None and measured.latency_s is not None and measured.latency_s > 0
    workers = WorkersHere()
    record = tried(sweep, workers=workers)
    assert (record.status, record.cost) == ("finished", measured)
    assert [job.measures_latency for job in workers.jobs] == [False]


def test_a_member_goes_on_from_its_donor_with_its_own_learning_rate(sweep: SweepPlan) -> None:
    donor = tried(sweep, report=Told(stop_at=1), name="member-1")
    slow: Sample = {**TINY, "schedule.learning_rate": 1e-5}
    other = tried(sweep, slow, report=Told(stop_at=2), name="member-2")
    assert checkpoints_of(sweep, "member-2") == STEPS[:2]
    changed: Sample = {**TINY, "schedule.learning_rate": 2e-3}
    weights = tensors_of(sweep, STEPS[0], "member-1")

    with pytest.raises(InterruptedError):  # at its next validation
        tried(sweep, changed, name="member-2", donor=donor, report=Told(fail_at=1))
    record = saved(sweep, "member-2")
    assert dict(record.sample) == changed and record.history[0] == donor.history[0] != other.history[0]
    assert seen([record]) == [VALIDATIONS[1]]
    taken = tensors_of(sweep, STEPS[0], "member-2")
    assert all(torch.equal(value, taken[name]) for name, value in weights.items())
    assert rate_of(sweep, "member-2") == 2e-3

    # From here on it is a trial like any other, with what it took over as its beginning.
    told = Told()
    ended = tried(sweep, slow, name="member-2", report=told)
    assert (ended.status, dict(ended.sample)) == ("finished", changed)
    assert seen(told.records) == VALIDATIONS and told.records[0].history == donor.history
    assert rate_of(sweep, "member-2") == 2e-3, "not the one that it began with"


def test_a_donors_weights_go_on_as_the_donors_own_would(sweep: SweepPlan) -> None:
    straight = tried(sweep, name="straight")
    donor = tried(sweep, report=Told(stop_at=1), name="member-1")
    record = tried(sweep, name="member-2", donor=donor)
    assert record.history == straight.history
    expected, got = tensors_of(sweep, STEPS[-1], "straight"), tensors_of(sweep, STEPS[-1], "member-2")
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_old_checkpoints_of_the_network_that_it_was_are_gone(sweep: SweepPlan) -> None:
    donor = tried(sweep, report=Told(stop_at=1), name="member-1")
    tried(sweep, {**TINY, "num_channels": 5}, name="member-2")
    assert checkpoints_of(sweep, "member-2") == STEPS

    def stop(record: TrialRecord) -> bool:
        assert checkpoints_of(sweep, "member-2") == STEPS[:2]
        assert record.checkpoint is not None and "/member-2/" in record.checkpoint
        return False

    tried(sweep, name="member-2", donor=donor, report=stop)
    assert tensors_of(sweep, STEPS[1], "member-2").keys() == tensors_of(sweep, STEPS[0], "member-1").keys()


def test_a_member_that_was_only_paused_goes_on_where_it_was(sweep: SweepPlan) -> None:
    straight = tried(sweep, name="straight")
    paused = tried(sweep, report=Told(stop_at=2))
    told = Told()
    record = tried(sweep, report=told, donor=replace(paused, status="running"))
    assert seen(told.records) == VALIDATIONS[2:]
    assert (record.status, record.history) == ("finished", straight.history)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Made once: MLflow takes seconds to make one."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"


@pytest.fixture
def parent(database: str) -> RunHandle:
    """The sweep's own run."""
    return start_run(tracking_uri=database, experiment="sweeps", run_name="mine", params={}, tags={}, texts={})


def test_its_mlflow_run_is_nested_and_ends_as_it_does(sweep: SweepPlan, parent: RunHandle) -> None:
    ends = {
        "FINISHED": tried(sweep, parent=parent),
        "FAILED": tried(sweep, {**TINY, "schedule.learning_rate": 1e30}, name="trial-2", parent=parent),
    }
    client = MlflowClient(parent.tracking_uri)
    for status, record in ends.items():
        run = client.get_run(record.mlflow_run or "")
        assert (run.info.status, run.info.run_name) == (status, record.name)
        assert run.data.tags["mlflow.parentRunId"] == parent.run_id
        assert run.data.tags["run_uri"] == trial_store(sweep, record.name).uri
        assert run.data.tags["git_sha"] == "abc"
        assert run.data.params["optim.total_patches"] == str(TRIAL_PATCHES)
        assert run.data.params["space.schedule.learning_rate"] == str(record.sample["schedule.learning_rate"])
        assert saved(sweep, record.name).mlflow_run == record.mlflow_run
    finished = ends["FINISHED"]
    curve = client.get_metric_history(finished.mlflow_run or "", "validation/psnr_db")
    assert [(it.step, it.value) for it in curve] == [
        (point.patches_seen // BATCH, pytest.approx(point.psnr_db)) for point in finished.history
    ]


def test_one_that_goes_on_goes_on_with_its_mlflow_run(sweep: SweepPlan, parent: RunHandle) -> None:
    client = MlflowClient(parent.tracking_uri)
    with pytest.raises(InterruptedError):
        tried(sweep, parent=parent, report=Told(fail_at=2))
    begun = saved(sweep).mlflow_run
    assert begun is not None and client.get_run(begun).info.status == "RUNNING"
    stopped = tried(sweep, parent=parent, report=Told(stop_at=1), stream_pairs=never)
    assert (stopped.status, stopped.mlflow_run) == ("stopped", begun)
    assert client.get_run(begun).info.status == "FINISHED"

    write_record(trial_store(sweep, "trial-1"), replace(stopped, status="running"))
    assert tried(sweep, parent=parent).mlflow_run == begun
    assert client.get_run(begun).info.status == "FINISHED"


def test_a_trial_that_costs_too_much_has_no_mlflow_run(tiny_photos: Path, tmp_path: Path, parent: RunHandle) -> None:
    sweep = planned(tiny_photos, tmp_path / "runs", limits=Limits(max_gflops=1.0))
    assert tried(sweep, {**TINY, "num_channels": 64}, parent=parent).mlflow_run is None


def test_one_whose_last_validation_was_the_interrupted_one_finishes(sweep: SweepPlan) -> None:
    with pytest.raises(InterruptedError):
        tried(sweep, report=Told(fail_at=3))
    told = Told()
    record = tried(sweep, report=told)
    assert (record.status, seen(told.records)) == ("finished", VALIDATIONS)


def test_a_driver_that_lost_the_sweep_writes_no_result(sweep: SweepPlan) -> None:
    store = open_store(sweep.uri)
    owner, validations = claim(store), Told()

    def another_driver_comes(record: TrialRecord) -> bool:
        if len(validations.records) == 1:
            claim(store)
        return validations(record)

    with pytest.raises(StorageError, match="another driver has taken this sweep over"):
        tried(sweep, report=another_driver_comes, owner=owner)
    left = read_record(trial_store(sweep, "trial-1"))
    assert left is not None and left.status == "running"
    with pytest.raises(StorageError, match="another driver"):
        tried(sweep, owner=owner)


def test_one_is_trained_without_mlflow_where_that_is_away(sweep: SweepPlan, parent: RunHandle) -> None:
    away = replace(parent, tracking_uri=f"http://127.0.0.1:{free_ports(1)[0]}")
    record = tried(sweep, parent=away)
    assert (record.status, record.mlflow_run) == ("finished", None)


def test_one_whose_mlflow_run_is_gone_gets_another(sweep: SweepPlan, parent: RunHandle) -> None:
    with pytest.raises(InterruptedError):
        tried(sweep, parent=parent, report=Told(fail_at=1))
    before = read_record(trial_store(sweep, "trial-1"))
    assert before is not None
    MlflowClient(parent.tracking_uri).delete_run(before.mlflow_run)
    after = tried(sweep, parent=parent)
    assert after.status == "finished" and after.mlflow_run not in (None, before.mlflow_run)


def test_a_run_that_a_killed_driver_began_but_did_not_write_down_is_gone_on_with(
    sweep: SweepPlan, parent: RunHandle
) -> None:
    begun = start_run(
        tracking_uri=parent.tracking_uri,
        experiment="sweeps",
        run_name="trial-1",
        params={},
        tags={},
        texts={},
        parent_run_id=parent.run_id,
    )
    assert tried(sweep, parent=parent).mlflow_run == begun.run_id
