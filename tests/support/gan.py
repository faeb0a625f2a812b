"""Tiny networks of adversarial training: a step takes milliseconds. VGG19's weights are random, which is enough to see
that gradients flow; no perceptual quality is measured with them.
"""

from typing import Any

import torch
from torch import nn

from sr_models.architectures import build_model
from sr_models.discriminators import DiscriminatorConfig, build_discriminator
from sr_models.edsr import EDSRConfig
from sr_models.srresnet import SRResNetConfig
from sr_train.adversarial_learner import AdversarialLearner
from sr_train.collective import Collective
from sr_train.gan_options import GanConfig
from sr_train.graphed_step import Batch
from sr_train.options import OptimConfig
from sr_train.perceptual_weights import PerceptualConfig
from sr_train.step_mode import REFERENCE, StepMode
from sr_train.vgg_features import VGGFeatures

PATCH_PX_HR = 32
PERCEPTUAL = PerceptualConfig(layer="conv1_2", weights="random", feature_scale=1.0)

SRRESNET = SRResNetConfig(scale=2, num_blocks=1, num_channels=8)
EDSR = EDSRConfig(scale=2, num_blocks=1, num_channels=8)
WITH_BATCH_NORM = (SRRESNET, DiscriminatorConfig(kind="vgg", num_channels=4))
WITHOUT_BATCH_NORM = (EDSR, DiscriminatorConfig(kind="patch", num_channels=4, spectral_norm=True))
Networks = tuple[Any, DiscriminatorConfig]

# Adam divides by the gradient's size: where that is rounding noise, so is the step. This epsilon lets two ways of
# computing the same gradient be compared by the weights they lead to.
CALM = OptimConfig(loss="l1", adam_epsilon=1e-2)
ALL_TERMS = GanConfig(pixel_weight=0.5, perceptual_weight=0.2, adversarial_weight=0.1)


def features() -> VGGFeatures:
    """VGG19 up to its second convolution, randomly initialised."""
    draw = torch.Generator().manual_seed(0)
    state = {}
    for index, in_channels in ((0, 3), (2, 64)):
        weight = torch.randn(64, in_channels, 3, 3, generator=draw) * (2 / (9 * in_channels)) ** 0.5
        state |= {f"features.{index}.weight": weight, f"features.{index}.bias": torch.zeros(64)}
    return VGGFeatures(state, layer="conv1_2")


def networks(configs: Networks, *, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    model, discriminator = configs
    return build_model(model, seed=seed), build_discriminator(discriminator, patch_px_hr=PATCH_PX_HR, seed=seed)


def adversarial_learner(
    configs: Networks,
    *,
    gan: GanConfig = ALL_TERMS,
    optim: OptimConfig = CALM,
    mode: StepMode = REFERENCE,
    collective: Collective | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> AdversarialLearner:
    generator, discriminator = networks(configs, seed=seed)
    return AdversarialLearner(
        generator,
        discriminator,
        features() if gan.perceptual_weight > 0 else None,
        optim=optim,
        gan=gan,
        perceptual=PERCEPTUAL,
        device=torch.device(device),
        mode=mode,
        collective=collective or Collective(),
    )


def patches(step: int, num: int = 4) -> Batch:
    """Smooth random patches (lr_NCHW, hr_NCHW) that depend on the step alone."""
    coarse = torch.rand(num, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    hr_NCHW = nn.functional.interpolate(coarse, size=(PATCH_PX_HR, PATCH_PX_HR), mode="bicubic").clamp(0, 1)
    return nn.functional.avg_pool2d(hr_NCHW, 2), hr_NCHW


def flat_state(learner: AdversarialLearner) -> dict[str, torch.Tensor]:
    """Copies of all tensors, as GROUP/NAME. NaN equals nothing, so a PSNR that is not known yet becomes -1."""
    state = learner.state()
    state["control"]["psnr_at_start_db"] = state["control"]["psnr_at_start_db"].nan_to_num(-1.0)
    return {f"{group}/{name}": tensor.clone() for group, named in state.items() for name, tensor in named.items()}
