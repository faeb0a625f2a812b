"""SRResNet: the generator of SRGAN, and its config.

Ledig, Theis, Huszár, Caballero, Cunningham, Acosta, Aitken, Tejani, Totz, Wang, Shi: "Photo-Realistic Single Image
Super-Resolution Using a Generative Adversarial Network", CVPR 2017 (https://arxiv.org/abs/1609.04802), section 2.1 and
figure 4. The authors published no code. What the paper leaves open, or what is done differently here:

- Convolutions that a BatchNorm follows have no bias. It would change nothing, since the mean is subtracted; its
  gradient would be rounding noise, and Adam's steps don't get smaller with the gradient.
- A PReLU learns one slope, PyTorch's default, as the reimplementations in PyTorch do.
- Scale 3, which the paper does not have, is one pixel-shuffle stage of factor 3, as in EDSR.

Letters of tensor names: N images, C channels, H and W in pixels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sr_models.edsr import UPSAMPLER_STAGES
from sr_models.errors import ModelError
from sr_models.network import SRNetwork


@dataclass(frozen=True, kw_only=True, slots=True)
class SRResNetConfig:
    """Size of an SRResNet. The defaults are the paper's."""

    scale: Literal[2, 3, 4] = 4
    """Upscaling factor."""
    num_blocks: int = 16
    """Residual blocks, at least 1."""
    num_channels: int = 64
    """Feature channels, at least 1."""
    output: Literal["linear", "tanh"] = "linear"
    """Whether the last layer's values pass through tanh: the paper says nothing of it, some reimplementations do so."""

    def __post_init__(self) -> None:
        if self.scale not in UPSAMPLER_STAGES:
            raise ModelError(f"model.scale={self.scale} is not one of 2, 3, 4 (--model.scale)")
        for name, count in (("num_blocks", self.num_blocks), ("num_channels", self.num_channels)):
            if count < 1:
                raise ModelError(f"model.{name}={count} must be at least 1 (--model.{name.replace('_', '-')})")
        if self.output not in ("linear", "tanh"):
            raise ModelError(f"model.output={self.output!r} is not one of linear, tanh (--model.output)")


def _conv(in_channels: int, out_channels: int, *, kernel_px: int = 3, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=kernel_px, padding=kernel_px // 2, bias=bias)


class ResidualBlock(nn.Module):
    """Convolution, BatchNorm, PReLU, convolution, BatchNorm, plus the input."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(num_channels, num_channels, bias=False)
        self.norm1 = nn.BatchNorm2d(num_channels)
        self.activation = nn.PReLU()
        self.conv2 = _conv(num_channels, num_channels, bias=False)
        self.norm2 = nn.BatchNorm2d(num_channels)

    def forward(self, features_NCHW: Tensor) -> Tensor:
        """Features of any size, of the same shape in and out."""
        inner_NCHW = self.activation(self.norm1(self.conv1(features_NCHW)))
        residual_NCHW: Tensor = self.norm2(self.conv2(inner_NCHW))
        return features_NCHW + residual_NCHW


class SRResNet(SRNetwork):
    """SRResNet (figure 4). Weights start as PyTorch's default, of which the paper says nothing: PReLU's slope 0.25,
    BatchNorm the identity.

    Its last layer gives [-1, 1], the range in which the paper trains; `forward` maps that to [0, 1]. So a mean squared
    error is a quarter of the paper's, which Adam does not notice.

    In training mode BatchNorm takes its statistics from the batch, so there an SR pixel depends on all LR pixels of all
    images.
    """

    upsampler_prefixes = ("upsampler.",)
    config: SRResNetConfig

    def __init__(self, config: SRResNetConfig) -> None:
        super().__init__()
        channels = config.num_channels
        self.config = config
        self.head = nn.Sequential(_conv(3, channels, kernel_px=9), nn.PReLU())
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(config.num_blocks)))
        self.body_end = nn.Sequential(_conv(channels, channels, bias=False), nn.BatchNorm2d(channels))
        stages: list[nn.Module] = []
        for factor in UPSAMPLER_STAGES[config.scale]:
            stages += [_conv(channels, channels * factor**2), nn.PixelShuffle(factor), nn.PReLU()]
        self.upsampler = nn.Sequential(*stages)
        self.tail = _conv(channels, 3, kernel_px=9)

    @property
    def receptive_radius_px_lr(self) -> int:
        """In evaluation mode: 4 of the head, 2 of each block, 1 of the body's end, and 3 of upsampler and tail
        together, at every scale.
        """
        return 2 * self.config.num_blocks + 8

    def forward(self, lr_NCHW: Tensor) -> Tensor:
        """RGB N×3×H×W in [0, 1] → RGB N×3×sH×sW, not clamped; in the network's own dtype, also under autocast."""
        head_NCHW: Tensor = self.head(lr_NCHW)
        body_NCHW: Tensor = self.body_end(self.blocks(head_NCHW)) + head_NCHW
        output_NCHW: Tensor = self.tail(self.upsampler(body_NCHW))
        if self.config.output == "tanh":
            output_NCHW = torch.tanh(output_NCHW)
        return torch.add(0.5, output_NCHW.to(self.tail.weight.dtype), alpha=0.5)


def macs_per_lr_pixel(config: SRResNetConfig) -> int:
    """Multiply-adds of the convolutions in one forward pass, per LR pixel (biases, BatchNorm and PReLU not counted)."""
    channels = config.num_channels
    body = 81 * 3 * channels + (2 * config.num_blocks + 1) * 9 * channels**2
    upsampler, pixels = 0, 1
    for factor in UPSAMPLER_STAGES[config.scale]:
        upsampler += pixels * 9 * channels**2 * factor**2
        pixels *= factor**2
    return body + upsampler + pixels * 81 * channels * 3
