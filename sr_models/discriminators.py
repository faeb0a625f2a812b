"""Discriminators of adversarial training: how real do HR patches look? SRGAN's, and a fully convolutional one.

Ledig et al. 2017 (https://arxiv.org/abs/1609.04802), section 2.1 and figure 4; Isola, Zhu, Zhou, Efros: "Image-to-Image
Translation with Conditional Adversarial Networks", CVPR 2017 (https://arxiv.org/abs/1611.07004), section 3.2.2; Miyato,
Kataoka, Koyama, Yoshida: "Spectral Normalization for Generative Adversarial Networks", ICLR 2018
(https://arxiv.org/abs/1802.05957).

Letters of tensor names: N images, C channels, H and W in pixels.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from sr_models.errors import ModelError

Kind = Literal["vgg", "patch"]

MIN_PATCH_PX_HR = 16
"""Four convolutions of stride 2 make one pixel of it."""

# (multiple of num_channels, stride) of the convolutions in figure 4.
_CONVOLUTIONS = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class DiscriminatorConfig:
    """Kind and size of a discriminator. The defaults are SRGAN's."""

    kind: Kind = "vgg"
    """"vgg": SRGAN's, one verdict on a patch of fixed size. "patch": fully convolutional, one verdict on each region of
    16×16 px."""
    num_channels: int = 64
    """Channels of the first layers, at least 1; the later ones have 2, 4 and 8 times as many."""
    spectral_norm: bool = False
    """Spectral normalisation of every layer, instead of BatchNorm."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            allowed = ", ".join(get_args(Kind))
            raise ModelError(f"discriminator.kind={self.kind} is not one of {allowed} (--discriminator.kind)")
        if self.num_channels < 1:
            raise ModelError(
                f"discriminator.num_channels={self.num_channels} must be at least 1 (--discriminator.num-channels)"
            )


class Discriminator(nn.Module):
    """Eight 3×3 convolutions, four of them with stride 2, LeakyReLU(0.2) after each; then a verdict.

    BatchNorm follows all convolutions but the first, and those have no bias (it would change nothing). With spectral
    normalisation there is no BatchNorm, as in Miyato et al.: dividing by the batch's deviation would undo the bound.
    What is bounded by 1 is the largest singular value of a layer's weights as a matrix (out channels × all else), which
    one step of power iteration at each forward pass in training mode estimates from below (the true value then is 1 to
    1.1 where singular values lie close). The iteration's vectors are buffers: a resumed run goes on with them.

    Weights start as PyTorch's default, of which the paper says nothing.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        in_channels = 3
        for index, (multiple, stride) in enumerate(_CONVOLUTIONS):
            out_channels = multiple * config.num_channels
            has_norm = index > 0 and not config.spectral_norm
            convolution = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=not has_norm)
            layers.append(_weighted(convolution, config))
            if has_norm:
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            in_channels = out_channels
        self.features = nn.Sequential(*layers)
        self.verdict = nn.Sequential()

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """RGB N×3×H×W in [0, 1] (the layers see [-1, 1], the range of SRGAN's HR images) → logits, above 0 where it
        takes the images for real; in the network's own dtype, also under autocast.
        """
        self._check(images_NCHW)
        with parametrize.cached():  # else each look at a weight would be another step of the power iteration
            # Autocast on CUDA would do the power iteration in bfloat16: 8 significant bits are too few for a norm.
            with torch.autocast(images_NCHW.device.type, enabled=False):
                weights = [layer.weight for layer in self.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
            logits: Tensor = self.verdict(self.features(images_NCHW * 2.0 - 1.0))
        return logits.to(weights[0].dtype)

    def _check(self, images_NCHW: Tensor) -> None:
        """ModelError if it can't judge images of this size."""


class VGGDiscriminator(Discriminator):
    """SRGAN's (figure 4, without the sigmoid): one logit N×1 for a patch of the size that it was built for.

    Two dense layers, 1024 wide at 64 channels, see all positions: their size follows the patch, ceil(patch / 16)²
    positions. At the paper's 96 px that makes 23.6 M parameters, at 192 px 80 M.

    At 16 px, BatchNorm's last layer has one value per image and so needs two images at least.
    """

    def __init__(self, config: DiscriminatorConfig, *, patch_px_hr: int) -> None:
        super().__init__(config)
        self.patch_px_hr = patch_px_hr
        num_positions = (-(-patch_px_hr // 16)) ** 2
        width = 16 * config.num_channels
        self.verdict = nn.Sequential(
            nn.Flatten(),
            _weighted(nn.Linear(8 * config.num_channels * num_positions, width), config),
            nn.LeakyReLU(0.2, inplace=True),
            _weighted(nn.Linear(width, 1), config),
        )

    def _check(self, images_NCHW: Tensor) -> None:
        height, width = images_NCHW.shape[-2:]
        if (height, width) != (self.patch_px_hr, self.patch_px_hr):
            raise ModelError(f"built for {self.patch_px_hr}×{self.patch_px_hr} px, the images are {width}×{height}")


class PatchDiscriminator(Discriminator):
    """Logits N×1×ceil(H/16)×ceil(W/16) for images of any size.

    Instead of the dense layers, a 1×1 convolution makes a logit from the features at each position. Logit (i, j) sees
    the 61×61 px around HR pixel (16i, 16j); Isola et al. found 70×70 best.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__(config)
        self.verdict = nn.Sequential(_weighted(nn.Conv2d(8 * config.num_channels, 1, 1), config))


def build_discriminator(config: DiscriminatorConfig, *, patch_px_hr: int, seed: int) -> Discriminator:
    """A freshly initialised discriminator on the CPU, for HR patches of this size.

    The weights depend on config, size and seed alone; PyTorch's global random state stays as it was. ModelError if the
    patches are too small.
    """
    if patch_px_hr < MIN_PATCH_PX_HR:
        raise ModelError(
            f"data.patch_px_hr={patch_px_hr} is too small for a discriminator, which needs at least {MIN_PATCH_PX_HR} "
            "(--data.patch-px-hr)"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed CUDA, which nothing restores
        if config.kind == "vgg":
            return VGGDiscriminator(config, patch_px_hr=patch_px_hr)
        return PatchDiscriminator(config)


def _weighted(layer: nn.Module, config: DiscriminatorConfig) -> nn.Module:
    return spectral_norm(layer) if config.spectral_norm else layer
