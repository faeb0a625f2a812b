"""The life of a run, as the driver sees it: plan → fit → best checkpoint → registered version, and where everything
is.
"""

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sr_data.decode import encode_png
from sr_data.errors import DataError, StorageError
from sr_data.pairs import load_pair
from sr_data.resize import upscale_bicubic
from sr_data.storage import Store, open_store
from sr_models.architectures import build_model
from sr_models.errors import ModelError
from sr_models.inference import upscale_image
from sr_models.weights import save_model
from sr_train import checkpoint as ckpt
from sr_train.cli import TrainCommand
from sr_train.config import ConfigError, RunConfig, config_to_dict, flatten
from sr_train.metrics import score_image
from sr_train.model_registry import RegisteredVersion, register_model
from sr_train.plan import Plan, PlanError, make_plan
from sr_train.plan_report import describe
from sr_train.progress import Progress, ProgressUpdate
from sr_train.ray_run import FitResult, Message, TrainingFailedError, cluster_facts, connect, fit, image_stream
from sr_train.run_facts import run_facts
from sr_train.run_folder import COMPARISON_KEY, CONFIG_KEY, DATASETS_KEY, RESULT_KEY, TRACKING_KEY, checkpoint_store
from sr_train.tracking import RunHandle, Status, finish_run, replay_spool, start_run
from sr_train.tracking_server import TrackingError
from sr_train.upscaler import UpscalerError
from sr_train.validator import side_by_side
from sr_train.worker import SPOOL, Job

USER_ERRORS = (ConfigError, PlanError, DataError, StorageError, ModelError, ckpt.CheckpointError, TrackingError,
               TrainingFailedError, UpscalerError)  # fmt: skip
"""What a person can mend: shown as a message, without a traceback."""


class Interrupted(BaseException):
    """The driver was asked to stop, by Ctrl-C or `ray job stop`. No Exception: nothing may take it for a failure."""

    def __init__(self, number: int):
        self.exit_status = 128 + number
        super().__init__(signal.Signals(number).name)


def run_training(command: TrainCommand[Any], *, script_started_s: float) -> None:
    """Runs the plan on the cluster, from wherever the run stands, and registers its best checkpoint. Prints what it
    does.

    Raises PlanError before training, TrainingFailedError, TrackingError (the model could not be registered; the run is
    complete otherwise and `--resume` registers it), Interrupted.
    """
    connect()
    plan = make_plan(command.config, cluster_facts(), resume=command.resume, progress=_manifest_progress)
    print(describe(plan), flush=True)
    if command.plan_only:
        return
    store = open_store(plan.run_uri)
    store.write(
        DATASETS_KEY,
        json.dumps({"train": plan.train.fingerprint, "validation": plan.validation.fingerprint}).encode(),
    )
    store.write(CONFIG_KEY, json.dumps(config_to_dict(plan.config), indent=2).encode())
    tracking = _start_tracking(plan, store)
    status: Status = "FAILED"
    try:
        with _interruptible():
            result = _fit(plan, tracking, script_started_s)
            report = _conclude(plan, store, tracking, result)
        status = "FINISHED"
    except Interrupted as interrupted:
        status = "KILLED"
        print(f"stopped by {interrupted}; go on with {_resume_flags(plan)}", file=sys.stderr, flush=True)
        raise
    except TrainingFailedError as error:
        raise TrainingFailedError(f"{error}\nWhen that is mended, go on with {_resume_flags(plan)}") from error
    finally:
        if tracking is not None:
            _finish(tracking, status)
    print(report, flush=True)


def _fit(plan: Plan, tracking: RunHandle | None, script_started_s: float) -> FitResult:
    progress = Progress(total_steps=plan.config.optim.total_steps)
    job = Job(
        config=plan.config,
        train=plan.train,
        validation=plan.validation,
        samples=plan.samples,
        run_uri=plan.run_uri,
        tracking=tracking,
        init_state=plan.initial_weights.state if plan.initial_weights is not None else None,
        stream_pairs=image_stream(plan.config),
        script_started_s=script_started_s,
    )
    try:
        return fit(plan, job, on_message=lambda message: _show(progress, plan, message))
    finally:
        progress.close()


def _show(progress: Progress, plan: Plan, message: Message) -> None:
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
        progress.message(
            f"step {values['step']}: PSNR {values['psnr_db']:.2f} dB, SSIM {values['ssim']:.4f} "
            f"({values['psnr_db'] - values['bicubic_psnr_db']:+.2f} dB to bicubic, {values['protocol']}){best}"
        )
    elif kind == "start" and values["checkpoint"] is not None:
        progress.message(f"going on from step {values['step']} ({values['checkpoint']})")


def _manifest_progress(done: int, total: int) -> None:
    if done % 100 == 0:  # a small set is read before anyone wonders
        print(f"reading the dataset: {done}/{total} images", file=sys.stderr, flush=True)


def _start_tracking(plan: Plan, store: Store) -> RunHandle | None:
    """The MLflow run: a new one, or the one that this run began with."""
    if not plan.tracking_reachable:
        return None
    config = config_to_dict(plan.config)
    previous = json.loads(store.read_text(TRACKING_KEY)) if store.exists(TRACKING_KEY) else {}
    same_server = previous.get("tracking_uri") == plan.config.tracking.uri
    handle = start_run(
        tracking_uri=plan.tracking_uri,
        experiment=plan.config.tracking.experiment,
        run_name=plan.config.run.name or "",
        params=flatten(config),
        tags=run_facts()
        | {
            "dataset": plan.train.uri,
            "dataset_fingerprint": plan.train.fingerprint,
            "validation_fingerprint": plan.validation.fingerprint,
            "run_uri": plan.run_uri,
        },
        texts={"config.json": json.dumps(config, indent=2), "plan.txt": describe(plan)},
        run_id=previous["run_id"] if same_server else None,
    )
    store.write(TRACKING_KEY, json.dumps({"tracking_uri": plan.config.tracking.uri, "run_id": handle.run_id}).encode())
    return handle


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


@dataclass(frozen=True, kw_only=True)
class _Best:
    checkpoint: ckpt.Checkpoint
    values: Mapping[str, Any]
    uri: str


def _conclude(plan: Plan, store: Store, tracking: RunHandle | None, result: FitResult) -> str:
    """Picture, registered version and result file of the best checkpoint; returns what to tell the user."""
    checkpoints = checkpoint_store(plan.run_uri)
    values = result.position.best or {}
    best = _Best(
        checkpoint=ckpt.read_checkpoint(checkpoints, values["key"]),
        values=values,
        uri=checkpoints.uri_of(values["key"]),
    )
    comparison_png, sample_lr = _comparison(plan, best.checkpoint)
    store.write(COMPARISON_KEY, comparison_png)
    version = _register(plan, tracking, best, sample_lr) if tracking is not None else None
    summary = {
        "run": plan.config.run.name,
        "best_checkpoint": best.uri,
        "protocol": plan.config.validation.protocol,
        **{name: value for name, value in values.items() if name != "key"},
        "last_step": result.position.step,
        "restarts": result.num_restarts,
        "measures": dict(result.measures),
        "registered": asdict(version) if version is not None else None,
        "mlflow_run": tracking.run_id if tracking is not None else None,
    }
    store.write(RESULT_KEY, json.dumps(summary, indent=2).encode())
    return _report(plan, store, tracking, best, version, result)


def _comparison(plan: Plan, checkpoint: ckpt.Checkpoint) -> tuple[bytes, Any]:
    """LR | bicubic | SR | HR of the first validation image as PNG, and that image's LR."""
    config, weights = ckpt.inference_weights(checkpoint)
    network = build_model(config)
    network.load_state_dict(weights)
    record = min(plan.validation.images, key=lambda record: record.name)
    scale, protocol = plan.validation.scale, plan.config.validation.protocol
    pair = load_pair(open_store(plan.validation.uri), record, scale)
    sr_HWC = upscale_image(network.eval(), pair.lr_HWC)
    bicubic, sr = (
        score_image(image_HWC, pair.hr_HWC, scale=scale, protocol=protocol).psnr_db
        for image_HWC in (upscale_bicubic(pair.lr_HWC, scale), sr_HWC)
    )
    return encode_png(side_by_side(pair, sr_HWC, bicubic, sr)), pair.lr_HWC


def _register(plan: Plan, tracking: RunHandle, best: _Best, sample_lr: Any) -> RegisteredVersion:
    config, weights = ckpt.inference_weights(best.checkpoint)
    protocol = plan.config.validation.protocol
    tags = {
        "dataset_fingerprint": plan.train.fingerprint,
        "validation_fingerprint": plan.validation.fingerprint,
        "git_sha": run_facts()["git_sha"],
        "scale": str(config.scale),
        "step": str(best.values["step"]),
        "protocol": protocol,
        "psnr_db": f"{best.values['psnr_db']:.4f}",
        "ssim": f"{best.values['ssim']:.4f}",
        "bicubic_psnr_db": f"{best.values['bicubic_psnr_db']:.4f}",
        "checkpoint": best.uri,
    }
    with TemporaryDirectory(prefix="sr-model-") as folder:
        save_model(Path(folder) / "model", config, weights, notes=tags)
        return register_model(
            tracking,
            Path(folder) / "model",
            name=plan.config.tracking.register_as or "",
            tags=tags,
            sample_lr_HWC=sample_lr,
        )


def _report(
    plan: Plan,
    store: Store,
    tracking: RunHandle | None,
    best: _Best,
    version: RegisteredVersion | None,
    result: FitResult,
) -> str:
    values, measures = best.values, result.measures
    gain_db = values["psnr_db"] - values["bicubic_psnr_db"]
    score = f"PSNR {values['psnr_db']:.2f} dB, SSIM {values['ssim']:.4f} at step {values['step']}"
    bicubic = f"{values['bicubic_psnr_db']:.2f} dB, {values['bicubic_ssim']:.4f}"
    again = _resume_flags(plan)
    rows = [
        ("best", f"{score}; bicubic {bicubic} ({gain_db:+.2f} dB; {plan.config.validation.protocol})"),
        ("speed", f"{measures['patches_per_s']:,.0f} patches/s, {measures['data_wait_share']:.1%} waiting for data"),
        ("start", f"first step {measures['seconds_to_first_step']:.1f} s after the script's start"),
        ("memory", f"{measures['peak_memory_gib']:.1f} GiB at most in rank 0's process"),
        ("checkpoint", best.uri),
        ("picture", store.uri_of(COMPARISON_KEY)),
        ("MLflow run", f"{tracking.run_name}  {tracking.url}" if tracking else "none: the server was not reachable"),
        (
            "registered",
            f"{version.uri} ({version.name}@challenger)" if version else f"no: when MLflow is back, {again}",
        ),
    ]
    return "\n".join(f"{name:<10}  {text}" for name, text in rows)


def _resume_flags(plan: Plan) -> str:
    run = plan.config.run
    storage = f" --run.storage {run.storage}" if run.storage != open_store(RunConfig().storage).uri else ""
    return f"--resume --run.name {run.name}{storage}"


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and Ctrl-C as Interrupted, so that the run is closed in MLflow and its user told how to go on."""

    def stop(number: int, _frame: object) -> None:
        raise Interrupted(number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
