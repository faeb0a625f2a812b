"""One trial of a sweep: a point of the space, trained as any run is, told after every validation, and written down.

A trial's folder is a run's, with its record beside the config. The record is all that a sweep needs of a trial: one
that was interrupted goes on from its newest checkpoint, and one that is over only tells again what it told before.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sr_data.storage import Store, split_uri
from sr_data.storage_patience import PatientStore, patient_store
from sr_train import checkpoint as ckpt
from sr_train.config import config_to_dict, flatten
from sr_train.driver import make_job
from sr_train.loop import Position
from sr_train.pareto import over_limit
from sr_train.plan import Plan
from sr_train.ray_events import trouble_line
from sr_train.ray_workers import TrainingFailedError, Workers
from sr_train.run_folder import CONFIG_KEY, DATASETS_KEY, TakenOverError, checkpoint_store, claim, is_owned
from sr_train.sweep_plan import TRIAL_KEY, SweepPlan, cost_of, trial_plan, trials_uri
from sr_train.tracking import RunHandle, finish_run, nested_run, replay_spool, start_run
from sr_train.tracking_server import TrackingError
from sr_train.training_space import canonical
from sr_train.trial_record import Point, Sample, TrialRecord, record_from_json, record_to_json
from sr_train.worker import SPOOL, StreamPairs

logger = logging.getLogger(__name__)

Report = Callable[[TrialRecord], bool]
"""Tells how far a trial has come; whether it goes on."""


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """What all trials of a sweep are told: plain values and the shared images."""

    sweep: SweepPlan
    stream_pairs: StreamPairs
    """The images, decoded once for all."""
    parent: RunHandle | None
    """The sweep's MLflow run; None without a server."""
    facts: Mapping[str, str]
    """What the sweep runs on, for each trial's MLflow run."""
    owner: str | None = None
    """The driver's claim on the sweep, see `sr_train.run_folder`; None: not to be checked."""

    def check_owner(self) -> None:
        """StorageError if another driver has taken the sweep over: its trials are not this one's to write."""
        patience_s = self.sweep.base.config.checkpoint.patience_s
        if self.owner is not None and not is_owned(patient_store(self.sweep.uri, patience_s), self.owner):
            raise TakenOverError(f"{self.sweep.uri}: another driver has taken this sweep over, so this one stops")


def run_trial(
    task: TrialTask,
    name: str,
    sample: Sample,
    *,
    workers: Workers,
    report: Report,
    donor: TrialRecord | None = None,
) -> TrialRecord:
    """Trains the trial to the end of its budget, or until `report` says no, and returns its record as it was saved.

    What it told in an earlier attempt it tells again. A `donor` is a trial whose last checkpoint it goes on from
    instead, with this sample (itself, if it was only paused).
    Training that fails is the trial's result, not an error. Storage that is away is waited for;
    raises StorageError where records can't be read or written.
    """
    task.check_owner()
    store = trial_store(task.sweep, name)
    record = read_record(store) or TrialRecord(name=name, sample=dict(canonical(sample)))
    if donor is not None:
        record = _taken_over(donor, record, canonical(sample), store)
        write_record(store, record)
    else:
        told = (
            replace(record, history=record.history[:count], status="running")
            for count in range(1, len(record.history) + 1)
        )
        goes_on = all(map(report, told))  # no more after a no: nobody listens
        if not goes_on and not record.is_over:
            return _over(task, replace(record, status="stopped"), store, _handle(task, record))
        if record.is_over:
            return record
        sample = record.sample  # a member of a population has another one than it began with
    cost = record.cost or cost_of(task.sweep, sample)
    record = replace(record, cost=cost)
    reason = over_limit(cost, task.sweep.config.limits)
    if reason is not None:
        return _over(task, replace(record, status="over limit", reason=reason), store, None)
    return _Training(task, trial_plan(task.sweep, sample, name), store, record, workers, report).run()


def _taken_over(donor: TrialRecord, record: TrialRecord, sample: Sample, store: PatientStore) -> TrialRecord:
    """The record of a trial that goes on from the donor's last validation; the checkpoint is copied into its folder,
    and what else there was is deleted.
    """
    if (donor.name, dict(donor.sample)) == (record.name, dict(sample)):
        return replace(record, status="running")  # it was paused, and its folder is as it left it
    assert donor.newest_checkpoint is not None, "Tune takes donors from trials that were validated"
    point, origin = donor.history[-1], donor.newest_checkpoint
    origins, origin_key = split_uri(origin)
    checkpoint = ckpt.read_checkpoint(PatientStore(origins.uri, store.patience), origin_key)
    scores = {"psnr_db": point.psnr_db, "ssim": point.ssim}
    key = ckpt.key_of_step(checkpoint.step)
    best = {**(checkpoint.meta["best"] or {}), **scores, "step": checkpoint.step, "key": key}
    checkpoints = PatientStore(checkpoint_store(store.uri).uri, store.patience)
    ckpt.write_checkpoint(checkpoints, replace(checkpoint, meta={**checkpoint.meta, "best": best}))
    for other in ckpt.list_keys(checkpoints):
        if other != key:  # of a network that this trial no longer is
            checkpoints.delete(other)
    uri = checkpoints.uri_of(key)
    return replace(
        record,
        sample=dict(sample),
        status="running",
        history=(point,),
        checkpoint=uri,
        newest_checkpoint=uri,
        cost=donor.cost,
    )


def trial_store(sweep: SweepPlan, name: str) -> PatientStore:
    """A trial's folder; while storage is away the trial waits, and its workers with it."""
    return patient_store(f"{trials_uri(sweep.uri)}/{name}", sweep.base.config.checkpoint.patience_s)


def read_record(store: Store) -> TrialRecord | None:
    """The record in a trial's folder; None if there is none that can be read."""
    if not store.exists(TRIAL_KEY):
        return None
    try:
        return record_from_json(store.read_text(TRIAL_KEY))
    except ValueError:
        return None


def write_record(store: Store, record: TrialRecord) -> None:
    """Replaces the record in a trial's folder."""
    store.write(TRIAL_KEY, record_to_json(record).encode())


class _Training:
    """A trial while it is trained."""

    def __init__(
        self, task: TrialTask, plan: Plan, store: Store, record: TrialRecord, workers: Workers, report: Report
    ):
        self._task, self._plan, self._store, self._workers, self._report = task, plan, store, workers, report
        self._record = record
        self._started_s = time.time()
        self._seconds_before = dict(record.seconds)
        self._first_step_s: float | None = None
        self._places: list[tuple[str, str]] = []

    def run(self) -> TrialRecord:
        plan, store = self._plan, self._store
        tracking = self._start_tracking()
        if tracking is not None:
            self._record = replace(self._record, mlflow_run=tracking.run_id)
        write_record(store, self._record)
        owner = claim(store)
        fingerprints = {"train": plan.train.fingerprint, "validation": plan.validation.fingerprint}
        store.write(DATASETS_KEY, json.dumps(fingerprints).encode())
        store.write(CONFIG_KEY, json.dumps(config_to_dict(plan.config), indent=2).encode())
        job = make_job(
            plan,
            tracking=tracking,
            owner=owner,
            git_sha=self._task.facts.get("git_sha", "unknown"),
            script_started_s=self._started_s,
        )
        job = replace(job, stream_pairs=self._task.stream_pairs, measures_latency=self._wants_latency())
        try:
            result = self._workers.fit(job, on_message=self._hear, goes_on=self._goes_on)
        except TrainingFailedError as error:
            return _over(self._task, replace(self._timed(), status="failed", reason=str(error)), store, tracking)
        record = self._with_best(self._timed(), result.position)
        if record.status == "running":
            finished = result.position.step >= plan.config.optim.total_steps
            if not finished and self._task.sweep.config.search.scheduler == "pbt":
                return record  # paused, or made to go on from another: it may be trained elsewhere by now
            record = replace(record, status="finished" if finished else "stopped")
        return _over(self._task, record, store, tracking)

    def _goes_on(self, values: Mapping[str, Any]) -> bool:
        """After a validation, whose checkpoint is in storage, or with the latency that was measured."""
        if "latency_s" in values:
            return self._is_affordable(values["latency_s"])
        if not math.isfinite(values["psnr_db"]):
            self._record = replace(self._record, status="failed", reason=f"PSNR is {values['psnr_db']} dB")
            return False
        patches_seen = values["step"] * self._plan.config.optim.global_batch_size
        point = Point(patches_seen=patches_seen, psnr_db=values["psnr_db"], ssim=values["ssim"])
        newest = self._checkpoint_uri(ckpt.key_of_step(values["step"]))
        record = replace(self._timed().with_point(point), newest_checkpoint=newest)
        if point.psnr_db == record.psnr_db:
            record = replace(record, checkpoint=newest)
        self._record = record
        write_record(self._store, record)
        return self._report(record)

    def _is_affordable(self, latency_s: float) -> bool:
        assert self._record.cost is not None  # computed before training
        cost = replace(self._record.cost, latency_s=latency_s)
        reason = over_limit(cost, self._task.sweep.config.limits)
        self._record = replace(self._record, cost=cost)
        if reason is not None:
            self._record = replace(self._record, status="over limit", reason=reason)
        return reason is None

    def _hear(self, message: tuple[str, Mapping[str, Any]]) -> None:
        kind, values = message
        if kind == "progress" and self._first_step_s is None:
            self._first_step_s = time.time()
        elif kind == "start":
            self._places = list(zip(values["hosts"], values["ips"], strict=True))
        elif line := trouble_line(message, self._places, self._plan.config.run.fewest_workers):
            logger.warning("%s: %s", self._record.name, line)

    def _wants_latency(self) -> bool:
        sweep = self._task.sweep.config
        asked = sweep.limits.max_latency_ms is not None or sweep.search.cost == "latency_ms"
        return asked and self._record.cost is not None and self._record.cost.latency_s is None

    def _timed(self) -> TrialRecord:
        """The record with what the trial's time went into, over all attempts."""
        now_s = time.time()
        first_s = self._first_step_s or now_s
        seconds = {"start_up": first_s - self._started_s, "training": now_s - first_s}
        before = self._seconds_before
        return replace(self._record, seconds={name: before.get(name, 0.0) + value for name, value in seconds.items()})

    def _with_best(self, record: TrialRecord, position: Position) -> TrialRecord:
        """With the best validation, also where the worker was lost between its checkpoint and its telling."""
        best = position.best
        if best is None:
            return record
        patches_seen = best["step"] * self._plan.config.optim.global_batch_size
        if all(point.patches_seen != patches_seen for point in record.history):
            point = Point(patches_seen=patches_seen, psnr_db=best["psnr_db"], ssim=best["ssim"])
            history = sorted([*record.history, point], key=lambda one: one.patches_seen)
            record = replace(record, history=tuple(history))
        return replace(record, checkpoint=self._checkpoint_uri(best["key"]))

    def _checkpoint_uri(self, key: str) -> str:
        return checkpoint_store(self._store.uri).uri_of(key)

    def _start_tracking(self) -> RunHandle | None:
        parent, plan = self._task.parent, self._plan
        if parent is None:
            return None
        options = {f"space.{name}": str(value) for name, value in self._record.sample.items()}
        begin = partial(
            start_run,
            tracking_uri=parent.tracking_uri,
            experiment=plan.config.tracking.experiment,
            run_name=self._record.name,
            params=flatten(config_to_dict(plan.config)) | options,
            tags={**self._task.facts, "run_uri": self._store.uri, "dataset_fingerprint": plan.train.fingerprint},
            texts={},
            parent_run_id=parent.run_id,
        )
        try:
            # A driver that is killed may leave a run that no record names yet.
            known = self._record.mlflow_run or nested_run(parent, self._record.name)
            if known is not None:
                return begin(run_id=known)
        except TrackingError as error:
            logger.warning("the earlier run of %s in MLflow is gone: %s", self._record.name, error)
        try:
            return begin()
        except TrackingError as error:
            logger.warning("%s is trained without a run in MLflow: %s", self._record.name, error)
            return None


def _handle(task: TrialTask, record: TrialRecord) -> RunHandle | None:
    if task.parent is None or record.mlflow_run is None:
        return None
    return replace(task.parent, run_id=record.mlflow_run, run_name=record.name)


def _over(task: TrialTask, record: TrialRecord, store: Store, tracking: RunHandle | None) -> TrialRecord:
    """Saves a trial's last record and ends its MLflow run."""
    task.check_owner()
    write_record(store, record)
    if tracking is not None:
        end_tracking(tracking, record)
    return record


def end_tracking(tracking: RunHandle, record: TrialRecord) -> None:
    """Ends a trial's MLflow run; a server that is away is told from the spool, when the trial's machine next sends."""
    try:
        replay_spool(tracking, SPOOL)
        finish_run(tracking, "FAILED" if record.status == "failed" else "FINISHED", spool=SPOOL)
    except TrackingError:
        pass
