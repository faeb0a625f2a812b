"""What a run's plan and best checkpoint say for its model card: data, method, scores, licences, limits."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from sr_data.manifest import Manifest
from sr_train.adversarial_config import AdversarialConfig
from sr_train.checkpoint import Checkpoint
from sr_train.model_card import LICENCE_UNKNOWN, CardFacts, CardScore, CardScores, Row
from sr_train.options import ScheduleConfig
from sr_train.plan import Plan
from sr_train.plan_report import dataset_line
from sr_train.progress import format_duration
from sr_train.run_facts import run_facts
from sr_train.run_folder import checkpoint_store
from sr_train.tracking_server import redact

FEW_TRAINED_ON, FEW_SCORED_ON = 100, 6
"""Fewer images than these are named as a limit."""

_PHOTOS = (
    "Trained on this project's built-in photos: public domain (NASA, SpaceX), CC0 (Rachel Michetti, Stéfan van der "
    "Walt) and CC BY 2.0 (`china.jpg` by danielbuechele, <https://www.flickr.com/photos/danielbuechele/6061409035/>). "
    "All may be used commercially; the last asks for its author's name."
)
_UNSETTLED = "Whether that binds weights trained on them is not settled: ask before any other use."
_DIV2K = (
    "Trained on images that by layout and names are DIV2K's (Agustsson and Timofte 2017): its authors make them "
    f"available for academic research only, and copyright stays with the images' owners. {_UNSETTLED}"
)
_BSDS500 = (
    "Trained on images that by layout and names are BSDS500's (Martin et al. 2001, Arbeláez et al. 2011): photographs "
    "of the Corel collection, which Berkeley offers for non-commercial research and education. "
    f"{_UNSETTLED}"
)


def card_facts(
    plan: Plan,
    checkpoint: Checkpoint,
    best: Mapping[str, Any],
    measures: Mapping[str, float],
    *,
    samples: tuple[str, ...],
) -> CardFacts:
    """The facts of the checkpoint that becomes a version.

    `best` holds its validation's values by name, `measures` what the run cost (empty if that is not known), `samples`
    the names of the pictures that lie beside the card.
    """
    config = plan.config
    return CardFacts(
        name=config.tracking.register_as or "",
        config=config.model,
        trained_on=_trained_on(plan, checkpoint, best, measures),
        method=_method(plan),
        scores=(_scores(plan, best),),
        invents_detail=isinstance(config, AdversarialConfig),
        samples=samples,
        licences=_licences(plan),
        limits=_limits(plan, best),
        not_promotable=plan.assets.not_promotable,
    )


def dataset_licence(manifest: Manifest) -> str | None:
    """What is known of the licence of a dataset that is recognised by its place, or by layout and names; else None."""
    stems = [PurePosixPath(record.name).stem for record in manifest.images]
    if manifest.uri.startswith("builtin://photos"):
        return _PHOTOS
    if manifest.layout == "div2k" and all(re.match(r"0\d{3}(_|x|$)", stem) for stem in stems):
        return _DIV2K
    if manifest.layout == "bsd500" and all(re.match(r"\d{4,6}(_|x|$)", stem) for stem in stems):
        return _BSDS500
    return None


def _trained_on(
    plan: Plan, checkpoint: Checkpoint, best: Mapping[str, Any], measures: Mapping[str, float]
) -> tuple[Row, ...]:
    config, facts = plan.config, run_facts()
    patches_seen = int(best["step"]) * config.optim.global_batch_size
    window, num_images = plan.samples.window_images, len(plan.train.images)
    rows = [
        ("training set", redact(dataset_line(plan.train))),
        ("patches seen", f"{patches_seen:,} of {config.data.patch_px_hr}² HR px, in {best['step']:,} steps"),
        ("run", f"{config.run.name}, checkpoint {redact(checkpoint_store(plan.run_uri).uri_of(best['key']))}"),
        ("commit", str(checkpoint.meta.get("git_sha", "unknown"))),
        ("workers", f"{config.run.num_workers} on {config.run.device}"),
        ("registered from", f"{facts['platform']}, {facts['cpus']} CPUs, GPUs: {facts['gpus']}"),
        ("versions", ", ".join(f"{name} {facts[name]}" for name in ("python", "torch", "ray", "mlflow", "numpy"))),
    ]
    if window < num_images:
        rows.insert(1, ("rolling window", f"{window} of {num_images} images at once"))
    if plan.initial_weights is not None:
        rows.insert(0, ("began with", redact(str(plan.initial_weights))))
    elif config.checkpoint.init_from is not None:
        rows.insert(0, ("began with", redact(config.checkpoint.init_from)))
    if patches_per_s := measures.get("patches_per_s"):
        rows.append(
            ("duration", f"{format_duration(patches_seen / patches_per_s)} of steps at {patches_per_s:,.0f} patches/s")
        )
    return tuple(rows)


def _method(plan: Plan) -> tuple[Row, ...]:
    config, optim, data = plan.config, plan.config.optim, plan.config.data
    adam = f"Adam (β {optim.adam_beta1:g}, {optim.adam_beta2:g}; ε {optim.adam_epsilon:g})"
    extras = {
        f"weight decay {optim.weight_decay:g}": optim.weight_decay > 0,
        f"gradients clipped to norm {optim.clip_grad_norm}": optim.clip_grad_norm is not None,
        f"moving average of the weights, decay {optim.ema_decay}": optim.ema_decay is not None,
    }
    patch_px_lr = data.patch_px_hr // config.model.scale
    rows: list[Row] = [
        ("batch", f"{optim.global_batch_size} patches of {patch_px_lr}² LR px"),
        ("augmentation", "flips and quarter turns" if data.augment else "none"),
        ("optimiser", ", ".join([adam, *(text for text, used in extras.items() if used)])),
        ("schedule", _schedule(config.schedule)),
        ("budget", f"{optim.total_patches:,} patches; seed {optim.seed}"),
        ("arithmetic", str(plan.step_mode)),
        ("chosen", {"psnr": "highest PSNR", "lpips": "lowest LPIPS", "newest": "newest"}[plan.assets.best_by]),
    ]
    notes = [(name, redact(text)) for name, text in plan.assets.notes if name not in ("WARNING", "best")]
    loss = [] if any(name == "loss" for name, _ in notes) else [("loss", f"{optim.loss.upper()} on RGB")]
    return (*loss, *notes, *rows)


def _schedule(schedule: ScheduleConfig) -> str:
    text = f"{schedule.kind}, learning rate {schedule.learning_rate:g}"
    if schedule.warmup_patches:
        text += f", warm-up {schedule.warmup_patches:,} patches"
    if schedule.kind == "step":
        text += f", times {schedule.decay_factor:g} every {schedule.decay_every_patches:,} patches"
    return text


def _scores(plan: Plan, best: Mapping[str, Any]) -> CardScores:
    return CardScores(
        dataset=f"{redact(plan.validation.uri)} [{plan.validation.split}]",
        fingerprint=plan.validation.fingerprint,
        num_images=len(plan.validation.images),
        protocol=plan.config.validation.protocol,
        lpips_protocol=plan.assets.tags.get("lpips_protocol"),
        rows=(
            CardScore(name="this model", psnr_db=best["psnr_db"], ssim=best["ssim"], lpips=best.get("lpips")),
            CardScore(name="bicubic", psnr_db=best["bicubic_psnr_db"], ssim=best["bicubic_ssim"]),
        ),
    )


def _licences(plan: Plan) -> tuple[str, ...]:
    texts = []
    if said := plan.config.tracking.licence_note:
        texts.append(f"Whoever trained it says: {said}")
    if (known := dataset_licence(plan.train)) is not None:
        texts.append(known)
    if plan.config.checkpoint.init_from is not None:
        texts = texts or [LICENCE_UNKNOWN]
        texts.append("It began with another model's weights, whose licence and training images count too.")
    return tuple(texts)


def _limits(plan: Plan, best: Mapping[str, Any]) -> tuple[str, ...]:
    num_train, num_valid = len(plan.train.images), len(plan.validation.images)
    shared = {it.hr_sha256 for it in plan.train.images} & {it.hr_sha256 for it in plan.validation.images}
    texts = {
        f"Trained on few images ({num_train}): what they don't show it has not learnt.": num_train < FEW_TRAINED_ON,
        f"Scored on few images ({num_valid}): on others its lead over bicubic may be another.": num_valid
        < FEW_SCORED_ON,
        f"{len(shared)} of the images that it was scored on are training images: the scores flatter.": bool(shared),
        "No better than bicubic in PSNR on the validation set.": best["psnr_db"] <= best["bicubic_psnr_db"],
        "No checkpoint was better than the weights that the run began with: these are those.": best["step"] == 0,
    }
    return tuple(text for text, applies in texts.items() if applies)
