"""EDSR: the enhanced deep residual network for single-image super-resolution, and its config.

Lim, Son, Kim, Nah, Lee: "Enhanced Deep Residual Networks for Single Image Super-Resolution", CVPR Workshops 2017
(https://arxiv.org/abs/1707.02921), section 3 and table 1, as in the authors' PyTorch code (sanghyun-son/EDSR-PyTorch).

Letters of tensor names: N images, C channels, H and W in pixels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sr_models.errors import ModelError
from sr_models.network import SRNetwork

# Mean of the 800 DIV2K training images, RGB in [0, 1]: the paper's code subtracts it from the input and adds it to the
# output.
DIV2K_MEAN_RGB = (0.4488, 0.4371, 0.4040)

UPSAMPLER_STAGES: dict[int, tuple[int, ...]] = {2: (2,), 3: (3,), 4: (2, 2)}
"""Scale → the factors of its pixel-shuffle stages: x4 is two x2 stages, as in the paper's code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EDSRConfig:
    """Size of an EDSR network. The defaults are the paper's baseline; EDSR itself is 32 blocks, 256 channels, 0.1."""

    scale: Literal[2, 3, 4] = 4
    """Upscaling factor."""
    num_blocks: int = 16
    """Residual blocks, at least 1."""
    num_channels: int = 64
    """Feature channels, at least 1."""
    residual_scaling: float = 1.0
    """Factor on each residual before it is added (the paper: 0.1 for 256 channels, where 1.0 is unstable), above 0."""
    rgb_range: float = 255.0
    """Pixel range that the layers see, above 0; images are [0, 1] outside whatever it is. The paper's is 255, and its
    learning rates and weights belong to it: biases don't scale with the input, and Adam's steps have a fixed size."""

    def __post_init__(self) -> None:
        if self.scale not in UPSAMPLER_STAGES:
            raise ModelError(f"model.scale={self.scale} is not one of 2, 3, 4 (--model.scale)")
        for name, count in (("num_blocks", self.num_blocks), ("num_channels", self.num_channels)):
            if count < 1:
                raise ModelError(f"model.{name}={count} must be at least 1 (--model.{name.replace('_', '-')})")
        for name, factor in (("residual_scaling", self.residual_scaling), ("rgb_range", self.rgb_range)):
            if not 0.0 < factor < float("inf"):
                raise ModelError(f"model.{name}={factor} must be above 0 and finite (--model.{name.replace('_', '-')})")


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class ResidualBlock(nn.Module):
    """Convolution, ReLU, convolution, times `residual_scaling`, plus the input; no batch normalisation (figure 2c)."""

    def __init__(self, num_channels: int, residual_scaling: float) -> None:
        super().__init__()
        self.conv1 = _conv3x3(num_channels, num_channels)
        self.conv2 = _conv3x3(num_channels, num_channels)
        self.residual_scaling = residual_scaling

    def forward(self, features_NCHW: Tensor) -> Tensor:
        """Features of any size, of the same shape in and out."""
        residual_NCHW: Tensor = self.conv2(torch.relu(self.conv1(features_NCHW)))
        return torch.add(features_NCHW, residual_NCHW, alpha=self.residual_scaling)


class EDSR(SRNetwork):
    """EDSR (figure 3). Weights start as PyTorch's default for convolutions, like the authors' code.

    The mean is a non-persistent buffer: it is never trained, moves with the network, and is not part of its weights.
    """

    upsampler_prefixes = ("upsampler.",)
    config: EDSRConfig
    mean_1C11: Tensor

    def __init__(self, config: EDSRConfig) -> None:
        super().__init__()
        channels = config.num_channels
        self.config = config
        self.register_buffer("mean_1C11", torch.tensor(DIV2K_MEAN_RGB).view(1, 3, 1, 1), persistent=False)
        self.head = _conv3x3(3, channels)
        blocks = [ResidualBlock(channels, config.residual_scaling) for _ in range(config.num_blocks)]
        self.blocks = nn.Sequential(*blocks)
        self.body_end = _conv3x3(channels, channels)
        stages: list[nn.Module] = []
        for factor in UPSAMPLER_STAGES[config.scale]:
            stages += [_conv3x3(channels, channels * factor**2), nn.PixelShuffle(factor)]
        self.upsampler = nn.Sequential(*stages)
        self.tail = _conv3x3(channels, 3)

    @property
    def receptive_radius_px_lr(self) -> int:
        """One for each convolution up to the end of the body, one for the upsampler's first, and one for all later ones
        together: they work on pixels finer than an LR pixel.
        """
        return 2 * self.config.num_blocks + 4

    def forward(self, lr_NCHW: Tensor) -> Tensor:
        """RGB N×3×H×W in [0, 1] → RGB N×3×sH×sW, not clamped.

        The output has the network's own dtype, also under autocast: bfloat16's 8 significant bits can't hold the sum
        with the mean.
        """
        input_NCHW = (lr_NCHW - self.mean_1C11) * self.config.rgb_range
        head_NCHW: Tensor = self.head(input_NCHW)
        body_NCHW: Tensor = self.body_end(self.blocks(head_NCHW)) + head_NCHW
        output_NCHW: Tensor = self.tail(self.upsampler(body_NCHW))
        return output_NCHW.to(self.mean_1C11.dtype) / self.config.rgb_range + self.mean_1C11


def macs_per_lr_pixel(config: EDSRConfig) -> int:
    """Multiply-adds of the convolutions in one forward pass, per LR pixel (biases and additions not counted)."""
    channels = config.num_channels
    body = 9 * 3 * channels + (2 * config.num_blocks + 1) * 9 * channels**2
    upsampler, pixels = 0, 1
    for factor in UPSAMPLER_STAGES[config.scale]:
        upsampler += pixels * 9 * channels**2 * factor**2
        pixels *= factor**2
    return body + upsampler + pixels * 9 * channels * 3
