"""The life of a run, as the driver sees it: plan → fit → best checkpoint → registered version, and where everything
is.
"""

import dataclasses
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sr_data.errors import DataError, StorageError
from sr_data.storage import Store
from sr_data.storage_patience import patient_store, to_stderr
from sr_models.errors import ModelError
from sr_train import checkpoint as ckpt
from sr_train.cli import TrainCommand
from sr_train.conclusion import conclude, finished_result, resume_flags
from sr_train.config import config_to_dict, flatten
from sr_train.mailbox import Message
from sr_train.options import ConfigError
from sr_train.plan import Plan, PlanError, make_plan
from sr_train.plan_report import describe
from sr_train.progress import Progress, ProgressUpdate
from sr_train.ray_cluster import cluster_facts, connect, pair_stream
from sr_train.ray_events import num_workers_text, trouble_line
from sr_train.ray_workers import FitResult, TrainingFailedError, Workers
from sr_train.run_facts import run_facts
from sr_train.run_folder import CONFIG_KEY, DATASETS_KEY, TRACKING_KEY, checkpoint_store, claim, seems_owned
from sr_train.tracking import RunHandle, RunStart, Status, begun, finish_run, pending_run, replay_spool
from sr_train.tracking_server import TrackingError
from sr_train.upscaler import UpscalerError
from sr_train.worker import SPOOL, Job

USER_ERRORS = (ConfigError, PlanError, DataError, StorageError, ModelError, ckpt.CheckpointError, TrackingError,
               TrainingFailedError, UpscalerError)  # fmt: skip
"""What a person can mend: shown as a message, without a traceback."""


_GRACE_S = 30.0
_JOB_MARK = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What `ray job submit` sets in a driver's environment."""


class Interrupted(BaseException):
    """The driver was asked to stop, by Ctrl-C or `ray job stop`. No Exception: nothing may take it for a failure."""

    def __init__(self, number: int):
        self.exit_status = 128 + number
        super().__init__(signal.Signals(number).name)


def run_training(command: TrainCommand[Any], *, script_started_s: float) -> str | None:
    """Runs the plan on the cluster, from wherever the run stands, and registers its best checkpoint. Prints what it
    does, and returns that checkpoint's URI; None if it was only to plan.

    Raises PlanError before training, TrainingFailedError, TrackingError (the model is trained and saved but could not
    be registered; `--resume` registers it), Interrupted.
    """
    with interruptible():
        plan = plan_training(command)
        print(describe(plan), flush=True)
        if not command.plan_only:
            return _run(plan, script_started_s)
        print("verdict         nothing stands against this plan; nothing was trained", flush=True)
        return None


def plan_training(command: TrainCommand[Any]) -> Plan:
    """What the command would do; connects to the cluster. PlanError lists what stands against it."""
    connect()
    plan = make_plan(
        command.config,
        cluster_facts(),
        resume=command.resume,
        resume_name=command.resume_name,
        progress=manifest_progress,
    )
    return dataclasses.replace(plan, parent_run_id=command.parent_run_id)


def _run(plan: Plan, script_started_s: float) -> str:
    store = patient_store(plan.run_uri, plan.config.checkpoint.patience_s, say=to_stderr)
    owner = claim(store)
    fingerprints = {"train": plan.train.fingerprint, "validation": plan.validation.fingerprint}
    store.write(DATASETS_KEY, json.dumps(fingerprints).encode())
    store.write(CONFIG_KEY, json.dumps(config_to_dict(plan.config), indent=2).encode())
    facts = run_facts()
    tracking: RunHandle | None = None
    status: Status = "FAILED"
    again = resume_flags(plan)
    try:
        tracking = _start_tracking(plan, store, facts)
        job = make_job(
            plan, tracking=tracking, owner=owner, git_sha=facts["git_sha"], script_started_s=script_started_s
        )
        result = finished_result(plan)
        if result is not None:
            print(f"run {plan.config.run.name} is complete: nothing is trained again", flush=True)
        else:
            result = _fit(plan, job)
        conclusion = conclude(plan, store, tracking, result)
        status = "FINISHED"
    except Interrupted as interrupted:
        status = "KILLED"
        print(f"stopped by {interrupted}; go on, from {_newest(plan)}, with {again}", file=sys.stderr, flush=True)
        raise
    except (TrainingFailedError, StorageError, ckpt.CheckpointError) as error:
        if not seems_owned(plan.run_uri, owner):
            raise
        raise TrainingFailedError(f"{error}\nWhen that is mended, go on with {again}") from error
    finally:
        if tracking is not None and seems_owned(plan.run_uri, owner):  # else the MLflow run is the other driver's, too
            _finish(tracking, status)
    print(conclusion.report, flush=True)
    if conclusion.not_registered is not None:
        raise TrackingError(
            f"the model is trained and saved, but not registered: {conclusion.not_registered}\n"
            f"When that is mended, {again} registers it"
        )
    return conclusion.best_checkpoint


def _newest(plan: Plan) -> str:
    try:
        return ckpt.latest_key(checkpoint_store(plan.run_uri)) or "the beginning: there is no checkpoint yet"
    except StorageError:  # away, perhaps the reason for which someone stops it
        return "its newest checkpoint"


def make_job(plan: Plan, *, tracking: RunHandle | None, owner: str, git_sha: str, script_started_s: float) -> Job:
    """What the plan's workers are told."""
    return Job(
        config=plan.config,
        train=plan.train,
        validation=plan.validation,
        samples=plan.samples,
        run_uri=plan.run_uri,
        owner=owner,
        git_sha=git_sha,
        tracking=tracking,
        init_state=plan.initial_weights.state if plan.initial_weights is not None else None,
        assets=plan.assets,
        stream_pairs=pair_stream(plan.config),
        script_started_s=script_started_s,
    )


def _fit(plan: Plan, job: Job) -> FitResult:
    progress = Progress(total_steps=plan.config.optim.total_steps)
    progress.message("starting the workers: the first step takes half a minute to a minute")
    places: list[tuple[str, str]] = []

    def show(message: Message) -> None:
        _show(progress, plan, message, places)

    try:
        with Workers(plan.config.run) as workers:
            try:
                return workers.fit(job, on_message=show)
            except Interrupted as interrupted:
                if workers.are_training:
                    progress.message(f"{interrupted}: the workers save a checkpoint; once more ends at once")
                    workers.stop(on_message=show, timeout_s=_grace_s())
                raise
    finally:
        progress.close()


def _grace_s() -> float:
    """How long a driver that was told to stop may wait for its workers' checkpoint."""
    if _JOB_MARK not in os.environ:
        return _GRACE_S
    # `ray job stop` kills after that long; a second of it is for ending the MLflow run.
    return max(0.0, float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", 3)) - 1)


def _show(progress: Progress, plan: Plan, message: Message, places: list[tuple[str, str]]) -> None:
    """`places` of the workers, by rank, machine and address, are kept from one message to the next."""
    kind, values = message
    if kind == "progress":
        progress.update(
            ProgressUpdate(
                step=values["step"],
                total_steps=plan.config.optim.total_steps,
                loss=values["loss"],
                patches_per_s=values["patches_per_s"],
                data_wait_share=values["data_wait_share"],
                learning_rate=values["learning_rate"],
                psnr_db=values["psnr_db"],
            )
        )
    elif kind == "validation":
        best = ", best so far" if values["is_best"] else ""
        lpips = f", LPIPS {values['lpips']:.4f}" if "lpips" in values else ""
        progress.message(
            f"step {values['step']}: PSNR {values['psnr_db']:.2f} dB, SSIM {values['ssim']:.4f}{lpips} "
            f"({values['psnr_db'] - values['bicubic_psnr_db']:+.2f} dB to bicubic, {values['protocol']}){best}"
        )
    elif kind == "start":
        is_first, places[:] = not places, zip(values["hosts"], values["ips"], strict=True)
        machines: Counter[str] = Counter(values["hosts"])
        on = ", ".join(host if num == 1 else f"{host} ({num})" for host, num in machines.items())
        begins = f"{num_workers_text(len(places))} on {on}"
        if values["checkpoint"] is not None:
            progress.message(f"going on from step {values['step']} ({values['checkpoint']}, {begins})")
        elif not is_first or len(places) > 1:
            progress.message(f"training begins with {begins}")
    elif line := trouble_line(message, places, plan.config.run.fewest_workers):
        progress.message(line)


def manifest_progress(done: int, total: int) -> None:
    """Says how far the reading of a large dataset is."""
    if done % 100 == 0:  # a small set is read before anyone wonders
        print(f"reading the dataset: {done}/{total} images", file=sys.stderr, flush=True)


def _start_tracking(plan: Plan, store: Store, facts: Mapping[str, str]) -> RunHandle:
    """The MLflow run: the one that this run began with where it is still there, else a new one; a pending one without
    a server (only with --tracking.allow-offline: the plan says so else).
    """
    config = config_to_dict(plan.config)
    start = RunStart(
        experiment=plan.config.tracking.experiment,
        run_name=plan.config.run.name or "",
        params=flatten(config),
        tags={
            **facts,
            "dataset": plan.train.uri,
            "dataset_fingerprint": plan.train.fingerprint,
            "validation_fingerprint": plan.validation.fingerprint,
            **plan.assets.tags,
            "run_uri": plan.run_uri,
        },
        texts={"config.json": json.dumps(config, indent=2), "plan.txt": describe(plan)},
        parent_run_id=plan.parent_run_id,
    )
    previous = json.loads(store.read_text(TRACKING_KEY)) if store.exists(TRACKING_KEY) else {}
    if previous.get("tracking_uri") != plan.config.tracking.uri:
        previous = {}
    pending = pending_run(plan.tracking_uri, start, run_id=previous.get("run_id"), key=previous.get("key"))
    known = {"tracking_uri": plan.config.tracking.uri, "run_id": pending.run_id, "key": pending.key}
    store.write(TRACKING_KEY, json.dumps(known).encode())  # before it is made: what is lost now is found by its key
    handle = _begun(pending, reachable=plan.tracking_reachable, may_wait=plan.config.tracking.allow_offline)
    store.write(TRACKING_KEY, json.dumps(known | {"run_id": handle.run_id}).encode())
    return handle


def _begun(pending: RunHandle, *, reachable: bool, may_wait: bool) -> RunHandle:
    if not reachable:
        return pending
    try:
        return begun(pending)
    except TrackingError as error:
        if pending.run_id:
            say = f"warning: a new MLflow run begins, the earlier one is gone: {error}"
            print(say, file=sys.stderr, flush=True)
            return _begun(dataclasses.replace(pending, run_id=""), reachable=True, may_wait=may_wait)
        if may_wait:  # gone since the plan was made
            return pending
        raise


def _finish(tracking: RunHandle, status: Status) -> None:
    """Sends what workers on this machine could not, and ends the MLflow run; a server that is away costs a warning."""
    try:
        unsent = replay_spool(tracking, SPOOL)
        finish_run(tracking, status, spool=SPOOL)
    except TrackingError as error:
        print(f"warning: the MLflow run stays open: {error}", file=sys.stderr, flush=True)
    else:
        if unsent:
            print(f"warning: {unsent} metrics or pictures did not reach MLflow", file=sys.stderr, flush=True)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and Ctrl-C as Interrupted, so that the run is closed in MLflow and its user told how to go on."""

    def stop(number: int, _frame: object) -> None:
        raise Interrupted(number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
