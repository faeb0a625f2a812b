"""Adversarial training as a method: perceptual weights and a reference prepared, learner and watchdog built."""

from typing import Any

import torch

from sr_data.errors import StorageError
from sr_models.architectures import architecture_name
from sr_models.discriminators import build_discriminator
from sr_models.errors import ModelError
from sr_models.network import SRNetwork
from sr_train.adversarial_config import AdversarialConfig
from sr_train.adversarial_learner import AdversarialLearner
from sr_train.checkpoint import CheckpointError, latest_key
from sr_train.collective import Collective
from sr_train.gan_watchdog import GanWatchdog
from sr_train.method import Assets, Method, MethodParts, Reference
from sr_train.options import ConfigError
from sr_train.perceptual_metric import LpipsMetric, open_lpips
from sr_train.perceptual_weights import PerceptualWeights, load_vgg19_weights
from sr_train.run_folder import checkpoint_store
from sr_train.step_mode import StepMode
from sr_train.tracking_server import TrackingError
from sr_train.upscaler import UpscalerError, open_network
from sr_train.vgg_features import VGGFeatures


def _prepare(config: AdversarialConfig[Any], tracking_uri: str) -> Assets:
    """Raises PerceptualWeightsError, ConfigError, and what `open_network` raises."""
    features = None
    if config.gan.perceptual_weight > 0:
        features = load_vgg19_weights(config.perceptual, seed=config.optim.seed)
    opened = open_lpips(config.perceptual.lpips_weights)
    lpips = opened if isinstance(opened, LpipsMetric) else None
    best_by = config.validation.best_by
    if best_by == "lpips" and not isinstance(opened, LpipsMetric):
        raise ConfigError(f"--validation.best-by lpips: there is no LPIPS: {opened.reason}")
    if best_by == "auto":
        best_by = "newest" if lpips is None else "lpips"
    if best_by == "newest" and config.validation.early_stop_after is not None:
        raise ConfigError(
            "--validation.early-stop-after needs a score to stop by, and the best checkpoint is the newest one: give "
            "--validation.best-by psnr, or LPIPS's weights (--perceptual.lpips-weights)"
        )
    layer = f"VGG19 {config.perceptual.layer}{'' if config.perceptual.after_relu else ' before ReLU'}"
    described = f"{layer}, {features.description}" if features is not None else "none (--gan.perceptual-weight 0)"
    reference, reference_note = _reference(config, tracking_uri)
    notes = [
        ("discriminator", _discriminator_note(config, features)),
        ("loss", _loss_note(config)),
        ("features", described),
        ("LPIPS", opened.protocol if isinstance(opened, LpipsMetric) else f"none: {opened.reason}"),
        ("best", _best_note(config, best_by)),
        *reference_note,
    ]
    tags = {"perceptual_features": described}
    if lpips is not None:
        tags["lpips_protocol"] = lpips.protocol
    not_promotable = None
    if features is not None and features.is_random:
        not_promotable = "trained on random perceptual features (--perceptual.weights random)"
        notes.append(("WARNING", f"{not_promotable}: the model gets no alias, and must not be promoted"))
    return Assets(
        best_by=best_by,
        title="SRGAN" if architecture_name(config.model) == "srresnet" else "GAN",
        features=features,
        lpips=lpips,
        reference=reference,
        tags=tags,
        notes=tuple(notes),
        not_promotable=not_promotable,
    )


def _discriminator_note(config: AdversarialConfig[Any], features: PerceptualWeights | None) -> str:
    """Its size, and what it and the perceptual loss take besides what the plan says of the generator."""
    built = build_discriminator(config.discriminator, patch_px_hr=config.data.patch_px_hr, seed=config.optim.seed)
    num_parameters = sum(parameter.numel() for parameter in built.parameters())
    # Weights and Adam's two moments, twice while a checkpoint is written; gradients.
    own_mib = num_parameters * 4 * (2 * 3 + 1) / 2**20
    vgg19_mib = sum(tensor.nbytes for tensor in features.state.values()) / 2**20 if features is not None else 0.0
    vgg19 = f", {vgg19_mib:,.3g} MiB of VGG19" if vgg19_mib else ""
    norm = "spectral norm" if config.discriminator.spectral_norm else "BatchNorm"
    return (
        f"{config.discriminator.kind} with {norm}, {num_parameters:,} parameters; besides the generator's memory "
        f"{own_mib:,.3g} MiB of its weights, gradients and optimiser{vgg19}"
    )


def _loss_note(config: AdversarialConfig[Any]) -> str:
    gan, perceptual = config.gan, config.perceptual
    relativistic = "relativistic " if gan.relativistic else ""
    terms = {
        config.optim.loss.upper(): gan.pixel_weight,
        f"{perceptual.loss.upper()} of features × {perceptual.feature_scale:.3g}": gan.perceptual_weight,
        f"{relativistic}adversarial": gan.adversarial_weight,
    }
    return " + ".join(f"{weight:g} · {term}" for term, weight in terms.items() if weight > 0)


def _best_note(config: AdversarialConfig[Any], best_by: str) -> str:
    if best_by == "newest":
        return "the newest checkpoint" + (", for want of LPIPS" if config.validation.best_by == "auto" else "")
    by = "lowest LPIPS" if best_by == "lpips" else f"highest PSNR ({config.validation.protocol})"
    return f"the checkpoint of {by}"


def _reference(config: AdversarialConfig[Any], tracking_uri: str) -> tuple[Reference | None, list[tuple[str, str]]]:
    """The generator before the GAN, what it is to be compared with; and for the plan, why there is none.

    A run that has begun needs it for pictures only, and goes on without.
    """
    origin = config.checkpoint.init_from
    if origin is None:
        return None, []
    try:
        network = open_network(origin, tracking_uri=tracking_uri)
        if network.config.scale != config.model.scale:
            # Other differences are found by those who take over its weights; for EDSR, these may be of another scale.
            raise ConfigError(
                f"--init {origin}: is an x{network.config.scale} model, and a GAN goes on with a whole generator, "
                f"upsampler included: give one for x{config.model.scale}, or --model.scale {network.config.scale}"
            )
        if network.config != config.model and _has_begun(config):
            raise ConfigError(f"--init {origin}: is now a model of another kind or size")
    except (UpscalerError, ModelError, CheckpointError, StorageError, TrackingError, ConfigError) as error:
        if not _has_begun(config):
            raise
        return None, [("WARNING", f"pictures without the generator that the GAN began with: {error}")]
    title = {"srresnet": "SRResNet"}.get(architecture_name(network.config), architecture_name(network.config).upper())
    return Reference(title=title, config=network.config, state=network.state_dict()), []


def _has_begun(config: AdversarialConfig[Any]) -> bool:
    """Whether the run has a checkpoint to go on from."""
    return latest_key(checkpoint_store(f"{config.run.storage.rstrip('/')}/{config.run.name}")) is not None


def _build(
    config: AdversarialConfig[Any],
    network: SRNetwork,
    assets: Assets,
    device: torch.device,
    mode: StepMode,
    collective: Collective,
) -> MethodParts:
    features = None
    if assets.features is not None:
        features = VGGFeatures(
            assets.features.state, layer=config.perceptual.layer, after_relu=config.perceptual.after_relu
        )
    learner = AdversarialLearner(
        network,
        build_discriminator(config.discriminator, patch_px_hr=config.data.patch_px_hr, seed=config.optim.seed),
        features,
        optim=config.optim,
        gan=config.gan,
        perceptual=config.perceptual,
        device=device,
        mode=mode,
        collective=collective,
    )
    watchdog = None
    if config.watchdog.enabled:
        watchdog = GanWatchdog(learner, config.watchdog, global_batch_size=config.optim.global_batch_size)
    return MethodParts(learner=learner, watchdog=watchdog)


ADVERSARIAL = Method(
    model_name=lambda config: {"srresnet": "srgan"}.get(name := architecture_name(config.model), f"{name}-gan"),
    prepare=_prepare,
    build=_build,
)
"""A generator against a discriminator, with a perceptual loss: SRGAN, ESRGAN's losses."""
