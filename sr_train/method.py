"""What a way of training adds to a run: what its driver prepares, and what its workers build.

The loop, the data and the registry know no method; `sr_train.methods` lists them by the type of their config.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sr_models.architectures import architecture_name
from sr_models.network import ModelConfig, SRNetwork
from sr_train.collective import Collective
from sr_train.config import TrainConfig
from sr_train.learner import Learner, PixelLearner
from sr_train.loop import Watchdog
from sr_train.perceptual_metric import LpipsMetric
from sr_train.perceptual_weights import PerceptualWeights
from sr_train.step_mode import StepMode


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A finished network that validation's pictures show beside the one in training."""

    title: str
    config: ModelConfig
    state: Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Assets:
    """What the workers need besides data and config, loaded by the driver before any GPU is asked for; picklable."""

    best_by: Literal["psnr", "lpips", "newest"] = "psnr"
    """What `validation.best_by` means in this run."""
    title: str = "SR"
    """What pictures call the network in training."""
    features: PerceptualWeights | None = None
    """The perceptual loss's network."""
    lpips: LpipsMetric | None = None
    """The perceptual metric's; None where it can't be had."""
    reference: Reference | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    """For the MLflow run and the registered version."""
    notes: tuple[tuple[str, str], ...] = ()
    """Rows for the plan: (name, fact)."""
    not_promotable: str | None = None
    """Why the model must never be used for real; None if nothing forbids it."""


@dataclass(frozen=True, kw_only=True)
class MethodParts:
    """What a worker's loop calls."""

    learner: Learner
    watchdog: Watchdog | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of training, as functions of its config."""

    model_name: Callable[[Any], str]
    """What its models are called when the user gives no name, without the scale."""
    prepare: Callable[[Any, str], Assets]
    """(config, tracking URI) → what the workers need. Errors are the user's to mend, and listed by the plan."""
    build: Callable[[Any, SRNetwork, Assets, torch.device, StepMode, Collective], MethodParts]
    """(config, network, assets, device, mode, collective) → what the loop calls."""


def _prepare_pixel(config: TrainConfig[Any], tracking_uri: str) -> Assets:
    del tracking_uri
    return Assets(best_by="newest" if config.validation.best_by == "newest" else "psnr")


def _build_pixel(
    config: TrainConfig[Any],
    network: SRNetwork,
    assets: Assets,
    device: torch.device,
    mode: StepMode,
    collective: Collective,
) -> MethodParts:
    del assets
    return MethodParts(learner=PixelLearner(network, config.optim, device=device, mode=mode, collective=collective))


PIXEL = Method(model_name=lambda config: architecture_name(config.model), prepare=_prepare_pixel, build=_build_pixel)
"""One network and one pixel loss: EDSR, SRResNet, and what else is trained like them."""
