"""The life of a sweep, as its driver sees it: plan → one decode → trials → table and pictures → registered winner.

What is known of a trial lies in its own folder, so a sweep that was interrupted, however hard, goes on by `--resume`.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any

from sr_data.storage import Store, open_store
from sr_data.storage_patience import patient_store, to_stderr
from sr_train import checkpoint as ckpt
from sr_train.champion import compare_with_champion
from sr_train.cli import TrainCommand
from sr_train.conclusion import Conclusion, conclude
from sr_train.config import flatten
from sr_train.driver import USER_ERRORS, Interrupted, interruptible, manifest_progress, run_training
from sr_train.loop import Position
from sr_train.pareto import best_trial
from sr_train.plan import default_name
from sr_train.ray_cluster import cluster_facts, connect
from sr_train.ray_sweep import decode_shared, run_sweep
from sr_train.ray_workers import FitResult
from sr_train.run_facts import run_facts
from sr_train.run_folder import CONFIG_KEY, DATASETS_KEY, TRACKING_KEY, checkpoint_store, claim, seems_owned
from sr_train.sweep_config import SweepConfig, sweep_to_json
from sr_train.sweep_plan import SWEEP_KEY, SweepPlan, known_trials, make_sweep_plan, trial_plan
from sr_train.sweep_progress import SweepProgress
from sr_train.sweep_report import SweepTimes, describe_sweep, outcome_files, outcome_metrics, outcome_report
from sr_train.sweep_table import value_text
from sr_train.tracking import RunHandle, Status, finish_run, record_outcome, start_run
from sr_train.tracking_server import TrackingError
from sr_train.training_space import configure
from sr_train.trial import TrialTask, end_tracking, trial_store, write_record
from sr_train.trial_record import TrialRecord


class SweepFailedError(RuntimeError):
    """The sweep ended without a model; the message says why. What its trials saved is still there."""


SWEEP_ERRORS = (*USER_ERRORS, SweepFailedError)
"""What a person can mend: shown as a message, without a traceback."""


@dataclass(frozen=True, kw_only=True)
class SweepCommand:
    """What was asked for."""

    config: SweepConfig[Any, Any]
    plan_only: bool
    resume: bool
    retrain: bool
    """Whether to train the winner anew with the full budget, and register that."""


def run_tuning(command: SweepCommand, *, script_started_s: float) -> None:
    """Runs the sweep from wherever it stands, registers its winner and compares it with the champion. Prints what it
    does. Raises what `run_training` raises, and SweepFailedError.
    """
    with interruptible():
        connect()
        plan = make_sweep_plan(
            _named(command.config), cluster_facts(), resume=command.resume, progress=manifest_progress
        )
        print(describe_sweep(plan), flush=True)
        if command.plan_only:
            print("verdict  nothing stands against this sweep; nothing was trained", flush=True)
            return
        parent = _Sweep(plan, script_started_s).run()
        if command.retrain:
            _retrain(command, plan, parent)


class _Sweep:
    """A sweep while it runs."""

    def __init__(self, plan: SweepPlan, script_started_s: float) -> None:
        self._plan, self._script_started_s = plan, script_started_s
        self._store = patient_store(plan.uri, plan.base.config.checkpoint.patience_s, say=to_stderr)
        self._facts = run_facts()
        self._records = {record.name: record for record in plan.known}

    def run(self) -> RunHandle | None:
        """The sweep's MLflow run, or None without a server."""
        plan = self._plan
        fingerprints = {"train": plan.base.train.fingerprint, "validation": plan.base.validation.fingerprint}
        self._store.write(DATASETS_KEY, json.dumps(fingerprints).encode())
        self._owner = claim(self._store)
        self._store.write(SWEEP_KEY, sweep_to_json(plan.asked).encode())
        parent: RunHandle | None = None
        status: Status = "FAILED"
        try:
            parent = self._start_tracking()
            times = self._run_trials(parent)
            self._conclude(parent, times)
            status = "FINISHED"
        except Interrupted as interrupted:
            status = "KILLED"
            over = f"{sum(record.is_over for record in self._records.values())} of {plan.num_trials} trials are over"
            print(f"stopped by {interrupted}; {over}, go on with {resume_flags(plan)}", file=sys.stderr, flush=True)
            raise
        finally:
            if parent is not None and seems_owned(plan.uri, self._owner):  # else it is the other driver's, too
                _finish(parent, status)
        return parent

    def _run_trials(self, parent: RunHandle | None) -> SweepTimes:
        plan = self._plan
        progress = SweepProgress(num_trials=plan.num_trials, trial_patches=plan.trial_patches)

        over_before = {record.name for record in plan.known if record.is_over}

        def note(record: TrialRecord) -> None:
            if record.name not in over_before:  # those only tell Tune again what they told before
                self._records[record.name] = record
                progress.update(record)
                if record.status == "failed":  # as all that follow would be, if this sweep is another driver's by now
                    task.check_owner()

        try:
            progress.known(plan.known)
            progress.message("decoding the images, once for all trials")
            stream_pairs, shared = decode_shared(plan)
            task = TrialTask(sweep=plan, stream_pairs=stream_pairs, parent=parent, facts=self._facts, owner=self._owner)
            began_s = time.time()
            run_sweep(task, on_record=note)
            ended_s = time.time()
            del shared
        finally:
            progress.close()
        task.check_owner()
        self._settle(parent)
        return SweepTimes(before_trials=began_s - self._script_started_s, trials=ended_s - began_s)

    def _settle(self, parent: RunHandle | None) -> None:
        """What trials wrote last is in storage. A trial whose actor was lost as it ended has not written its end."""
        for record in known_trials(self._store):
            heard = self._records.get(record.name)
            if not record.is_over and heard is not None and heard.is_over:
                record = replace(record, status=heard.status, reason=heard.reason)
                write_record(trial_store(self._plan, record.name), record)
                if parent is not None and record.mlflow_run is not None:
                    end_tracking(replace(parent, run_id=record.mlflow_run), record)
            self._records[record.name] = record

    def _conclude(self, parent: RunHandle | None, times: SweepTimes) -> None:
        plan, records = self._plan, list(self._records.values())
        best = best_trial(records, plan.config.limits)
        files = outcome_files(plan, records)
        for name, content in files.items():
            self._store.write(name, content)
        if parent is not None:
            try:
                record_outcome(parent, metrics=outcome_metrics(records, best), files=files)
            except TrackingError as error:
                print(f"warning: MLflow lacks the sweep's table and pictures: {error}", file=sys.stderr, flush=True)
        print(outcome_report(plan, records, times), flush=True)
        print(
            f"pictures    {', '.join(self._store.uri_of(name) for name in files if name.endswith('.png'))}", flush=True
        )
        if best is None:
            reasons = sorted({record.reason for record in records if record.reason})
            raise SweepFailedError("no trial has a model to register: " + ("; ".join(reasons) or "none was validated"))
        conclusion = self._register(best, parent)
        options = ", ".join(f"{name} {value_text(value)}" for name, value in best.sample.items())
        print(f"winner      {best.name}: {options}", flush=True)
        print(conclusion.report, flush=True)
        if conclusion.not_registered is not None:
            raise TrackingError(
                f"the winner is trained and saved, but not registered: {conclusion.not_registered}\n"
                f"When that is mended, {resume_flags(plan)} registers it"
            )
        compare(plan, conclusion.best_checkpoint)

    def _register(self, best: TrialRecord, parent: RunHandle | None) -> Conclusion:
        plan = trial_plan(self._plan, best.sample, best.name)
        patience_s = plan.config.checkpoint.patience_s
        checkpoints = patient_store(checkpoint_store(plan.run_uri).uri, patience_s, say=to_stderr)
        newest = ckpt.newest_whole(checkpoints)
        assert newest is not None, "a trial with a score has a checkpoint"
        position = Position.from_meta(ckpt.read_checkpoint(checkpoints, newest).meta)
        tracking = None
        if parent is not None:
            tracking = replace(parent, run_id=best.mlflow_run or parent.run_id, run_name=best.name)
        result = FitResult(position=position, measures={}, num_restarts=0)
        return conclude(plan, patient_store(plan.run_uri, patience_s, say=to_stderr), tracking, result)

    def _start_tracking(self) -> RunHandle | None:
        plan, base = self._plan, self._plan.base
        if not base.tracking_reachable:
            return None
        text = sweep_to_json(plan.config)
        values: dict[str, Any] = json.loads(text)
        previous = _read_json(self._store, TRACKING_KEY)
        same_server = previous.get("tracking_uri") == base.config.tracking.uri
        begin = partial(
            start_run,
            tracking_uri=base.tracking_uri,
            experiment=base.config.tracking.experiment,
            run_name=plan.name,
            params=flatten(values),
            tags={
                **self._facts,
                "dataset": base.train.uri,
                "dataset_fingerprint": base.train.fingerprint,
                "validation_fingerprint": base.validation.fingerprint,
                "run_uri": plan.uri,
                "kind": "sweep",
            },
            texts={"sweep.json": text, "plan.txt": describe_sweep(plan)},
        )
        handle = None
        if same_server:
            try:
                handle = begin(run_id=previous["run_id"])
            except TrackingError as error:
                print(
                    f"warning: a new MLflow run begins, the earlier one is gone: {error}", file=sys.stderr, flush=True
                )
        handle = handle or begin()
        known = {"tracking_uri": base.config.tracking.uri, "run_id": handle.run_id}
        self._store.write(TRACKING_KEY, json.dumps(known).encode())
        return handle


def _retrain(command: SweepCommand, plan: SweepPlan, parent: RunHandle | None) -> None:
    """The winner with the full budget, as any training run; one that was stopped goes on."""
    records = known_trials(open_store(plan.uri))
    best = best_trial(records, plan.config.limits)
    assert best is not None, "the sweep has found one"
    base = command.config.base
    config = configure(base, best.sample, total_patches=base.optim.total_patches)
    # Named after the winner: more trials may bring another one. It has the cluster to itself.
    name = f"{plan.name}-{best.name}-retrained"
    run = replace(base.run, name=name, storage=plan.base.config.run.storage, cpus_per_worker=None)
    print(f"training {best.name} anew with the full budget of {base.optim.total_patches:,} patches", flush=True)
    checkpoint = run_training(
        TrainCommand(
            config=replace(config, run=run),
            plan_only=False,
            resume=open_store(f"{run.storage}/{run.name}").exists(CONFIG_KEY),
            parent_run_id=parent.run_id if parent is not None else None,
        ),
        script_started_s=time.time(),
    )
    assert checkpoint is not None, "it was not only planned"
    compare(plan, checkpoint)


def compare(plan: SweepPlan, checkpoint_uri: str) -> None:
    """Prints how the model at `checkpoint_uri` stands to the champion."""
    config = plan.base.config
    if not plan.base.tracking_reachable:
        return
    name = config.tracking.register_as or ""
    try:
        comparison = compare_with_champion(
            checkpoint_uri,
            name=name,
            validation=plan.base.validation,
            protocol=config.validation.protocol,
            tracking_uri=plan.base.tracking_uri,
            tile_px_lr=config.validation.tile_px_lr,
        )
    except USER_ERRORS as error:
        print(f"champion    not compared: {error}", flush=True)
    else:
        none = f"{name} has no champion to compare with"
        print(f"champion    {none if comparison is None else comparison.sentence()}", flush=True)


def resume_flags(plan: SweepPlan) -> str:
    """The flags that go on with this sweep."""
    return f"--resume --run.name {plan.name} --run.storage {plan.base.config.run.storage}"


def _named(config: SweepConfig[Any, Any]) -> SweepConfig[Any, Any]:
    base = config.base
    name = base.run.name or f"sweep-{default_name(base, datetime.now())}"
    return dataclasses.replace(config, base=replace(base, run=replace(base.run, name=name)))


def _read_json(store: Store, key: str) -> Mapping[str, Any]:
    values: Mapping[str, Any] = json.loads(store.read_text(key)) if store.exists(key) else {}
    return values


def _finish(parent: RunHandle, status: Status) -> None:
    try:
        finish_run(parent, status)
    except TrackingError as error:
        print(f"warning: the sweep's MLflow run stays open: {error}", file=sys.stderr, flush=True)
