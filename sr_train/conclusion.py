"""What becomes of a run's best checkpoint: a picture, a registered version, a result file, a report."""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from sr_data.decode import encode_png
from sr_data.pairs import load_pair, middle
from sr_data.resize import upscale_bicubic
from sr_data.storage import Store, open_store
from sr_data.storage_patience import PatientStore, patient_store, to_stderr
from sr_models.architectures import build_model
from sr_models.errors import ModelError
from sr_models.inference import upscale_image
from sr_models.weights import save_model
from sr_train import checkpoint as ckpt
from sr_train.card_facts import card_facts
from sr_train.loop import Position
from sr_train.model_card import model_card
from sr_train.model_registry import CHALLENGER, NOT_PROMOTABLE_TAG, RegisteredVersion, register_model
from sr_train.options import RunConfig
from sr_train.plan import Plan
from sr_train.ray_workers import FitResult
from sr_train.run_folder import COMPARISON_KEY, RESULT_KEY, checkpoint_store
from sr_train.tracking import RunHandle, begun
from sr_train.tracking_server import TrackingError
from sr_train.validator import side_by_side

# The driver may have no GPU: the paper's EDSR takes minutes per LR megapixel there.
_PICTURE_PX_LR = 192
_SAMPLE_PX_LR = 64


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What to tell the user."""

    report: str
    best_checkpoint: str
    """Its URI."""
    not_registered: str | None
    """Why the model could not be registered; None if it was, or if there is no tracking server."""


def finished_result(plan: Plan) -> FitResult | None:
    """The result of a run that has nothing left to train; None if there is something left."""
    if plan.goes_on_from is None:
        return None
    optim, validation = plan.config.optim, plan.config.validation
    store = patient_store(plan.run_uri, plan.config.checkpoint.patience_s, say=to_stderr)
    checkpoints = PatientStore(checkpoint_store(plan.run_uri).uri, store.patience)
    key = ckpt.newest_whole(checkpoints)
    if key is None:
        return None
    position = Position.from_meta(ckpt.read_checkpoint(checkpoints, key).meta)
    stopped = (
        validation.early_stop_after is not None and position.validations_without_gain >= validation.early_stop_after
    )
    if position.best is None or position.validation_pending or not (stopped or position.step >= optim.total_steps):
        return None
    before = json.loads(store.read_text(RESULT_KEY)) if store.exists(RESULT_KEY) else {}
    return FitResult(position=position, measures=before.get("measures", {}), num_restarts=before.get("restarts", 0))


def conclude(plan: Plan, store: PatientStore, tracking: RunHandle | None, result: FitResult) -> Conclusion:
    """Saves the picture and the result first, then registers: a server that is away costs the registration only.

    Storage that is away is waited for, as during training.
    """
    checkpoints, values = checkpoint_store(plan.run_uri), result.position.best or {}
    patience = store.patience

    read = partial(ckpt.read_checkpoint, checkpoints, values["key"])
    checkpoint, uri = patience.spend(read, on="the best checkpoint can't be read"), checkpoints.uri_of(values["key"])
    store.write(COMPARISON_KEY, patience.spend(partial(_comparison_png, plan, checkpoint), on="an image can't be read"))
    tracking, away = _begun(tracking)
    summary = {
        "run": plan.config.run.name,
        "best_checkpoint": uri,
        "protocol": plan.config.validation.protocol,
        **{name: value for name, value in values.items() if name != "key"},
        "last_step": result.position.step,
        "restarts": result.num_restarts,
        "measures": dict(result.measures),
        "registered": None,
        "mlflow_run": tracking.run_id if tracking is not None else None,
    }
    store.write(RESULT_KEY, json.dumps(summary, indent=2).encode())
    version, problem = None, None
    if tracking is not None:
        register = partial(_register, plan, tracking, checkpoint, result, uri)
        try:
            version = patience.spend(register, on="an image can't be read")
        # ModelError: what was packed did not work when it was tried. OSError: this machine's folder for temporary
        # files is full, or storage did not come back.
        except (TrackingError, ModelError, OSError) as error:
            problem = str(error)
        else:
            store.write(RESULT_KEY, json.dumps(summary | {"registered": asdict(version)}, indent=2).encode())
    report = _report(plan, store, tracking, uri, version, result, away=away)
    return Conclusion(report=report, best_checkpoint=uri, not_registered=problem)


def _begun(tracking: RunHandle | None) -> tuple[RunHandle | None, str]:
    """The MLflow run if there is one by now, and else why not."""
    if tracking is None:
        return None, "the server was not reachable"
    try:
        return begun(tracking), ""
    except TrackingError as error:
        return None, str(error)


def resume_flags(plan: Plan) -> str:
    """The flags that go on with this run."""
    run = plan.config.run
    storage = f" --run.storage {run.storage}" if run.storage != open_store(RunConfig().storage).uri else ""
    return f"--resume --run.name {plan.resume_name}{storage}"


def _comparison_png(plan: Plan, checkpoint: ckpt.Checkpoint) -> bytes:
    """LR | bicubic | SR | HR of the first validation image, or of the middle of a large one."""
    config, weights = ckpt.inference_weights(checkpoint)
    network = build_model(config)
    network.load_state_dict(weights)
    record = min(plan.validation.images, key=lambda record: record.name)
    scale, protocol = plan.validation.scale, plan.config.validation.protocol
    pair = middle(load_pair(open_store(plan.validation.uri), record, scale), _PICTURE_PX_LR)
    sr_HWC = upscale_image(network.eval(), pair.lr_HWC)
    upscaled = {"bicubic": upscale_bicubic(pair.lr_HWC, scale)}
    if (reference := plan.assets.reference) is not None:
        other = build_model(reference.config)
        other.load_state_dict(dict(reference.state))
        upscaled[reference.title] = upscale_image(other.eval(), pair.lr_HWC)
    upscaled[plan.assets.title] = sr_HWC
    return encode_png(side_by_side(pair, upscaled, scale=scale, protocol=protocol))


def _register(
    plan: Plan, tracking: RunHandle, checkpoint: ckpt.Checkpoint, result: FitResult, uri: str
) -> RegisteredVersion:
    config, weights = ckpt.inference_weights(checkpoint)
    values = result.position.best or {}
    tags = {
        "dataset_fingerprint": plan.train.fingerprint,
        "validation_fingerprint": plan.validation.fingerprint,
        "git_sha": str(checkpoint.meta.get("git_sha", "unknown")),
        "scale": str(config.scale),
        "step": str(values["step"]),
        "protocol": plan.config.validation.protocol,
        "psnr_db": f"{values['psnr_db']:.4f}",
        "ssim": f"{values['ssim']:.4f}",
        "bicubic_psnr_db": f"{values['bicubic_psnr_db']:.4f}",
        "checkpoint": uri,
        **plan.assets.tags,
    }
    if "lpips" in values:
        tags["lpips"] = f"{values['lpips']:.4f}"
    if plan.assets.not_promotable is not None:
        tags[NOT_PROMOTABLE_TAG] = plan.assets.not_promotable
    record = min(plan.validation.images, key=lambda record: record.name)
    scale = plan.validation.scale
    sample = middle(load_pair(open_store(plan.validation.uri), record, scale), _SAMPLE_PX_LR)
    facts = card_facts(plan, checkpoint, values, result.measures, samples=("lr", "bicubic", "sr", "hr"))
    with TemporaryDirectory(prefix="sr-model-") as folder:
        save_model(Path(folder) / "model", config, weights, notes=tags)
        return register_model(
            tracking,
            Path(folder) / "model",
            name=plan.config.tracking.register_as or "",
            tags=tags,
            sample_lr_HWC=sample.lr_HWC,
            sample_hr_HWC=sample.hr_HWC,
            card=model_card(facts),
            alias=None if plan.assets.not_promotable is not None else CHALLENGER,
        )


def _report(
    plan: Plan,
    store: Store,
    tracking: RunHandle | None,
    uri: str,
    version: RegisteredVersion | None,
    result: FitResult,
    *,
    away: str,
) -> str:
    values, measures = result.position.best or {}, result.measures
    gain_db = values["psnr_db"] - values["bicubic_psnr_db"]
    lpips = f", LPIPS {values['lpips']:.4f}" if "lpips" in values else ""
    score = f"PSNR {values['psnr_db']:.2f} dB, SSIM {values['ssim']:.4f}{lpips} at step {values['step']}"
    bicubic = f"{values['bicubic_psnr_db']:.2f} dB, {values['bicubic_ssim']:.4f}"
    chosen = "newest" if plan.assets.best_by == "newest" else "best"
    rows = [(chosen, f"{score}; bicubic {bicubic} ({gain_db:+.2f} dB; {plan.config.validation.protocol})")]
    if values["step"] == 0:  # only a run that goes on with a finished network is validated before its first step
        rows.append(("WARNING", "no checkpoint was better than the network that this run began with: it is unchanged"))
    if measures:
        rows += [
            (
                "speed",
                f"{measures['patches_per_s']:,.0f} patches/s, {measures['data_wait_share']:.1%} waiting for data",
            ),
            ("start", f"first step {measures['seconds_to_first_step']:.1f} s after the script's start"),
            ("memory", f"{measures['peak_memory_gib']:.1f} GiB at most in rank 0's process"),
        ]
    if missing := int(measures.get("undelivered_tracking_items", 0)):
        rows.append(("tracking", f"{missing} metrics or pictures had not reached MLflow when training ended"))
    rows += [
        ("checkpoint", uri),
        ("picture", store.uri_of(COMPARISON_KEY)),
        ("MLflow run", f"{tracking.run_name}  {tracking.url}" if tracking else f"none: {away}"),
        (
            "registered",
            _registered(plan, version),
        ),
    ]
    return "\n".join(f"{name:<10}  {text}" for name, text in rows)


def _registered(plan: Plan, version: RegisteredVersion | None) -> str:
    if version is None:
        return f"no: {resume_flags(plan)} does it"
    if plan.assets.not_promotable is not None:
        return f"{version.uri}, without an alias: {plan.assets.not_promotable}"
    return f"{version.uri} ({version.name}@{CHALLENGER})"
