"""Small networks with the module structure, the key names and the computation of other projects, written anew."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MEAN_RGB = (0.4488, 0.4371, 0.4040)


def conv(num_in: int, num_out: int, kernel_px: int = 3, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, kernel_px, padding=kernel_px // 2, bias=bias)


def shuffle_stages(scale: int) -> list[int]:
    return [3] if scale == 3 else [2] * int(math.log2(scale))


class EdsrPyTorchBlock(nn.Module):
    def __init__(self, channels: int, res_scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(channels, channels), nn.ReLU(), conv(channels, channels))
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res_scale * self.body(x)


class EdsrPyTorch(nn.Module):
    """sanghyun-son/EDSR-PyTorch, src/model/edsr.py: images in [0, rgb_range] in and out."""

    def __init__(
        self,
        *,
        scale: int,
        num_blocks: int = 2,
        channels: int = 6,
        res_scale: float = 1.0,
        rgb_range: float = 255.0,
        mean: tuple[float, ...] = MEAN_RGB,
    ) -> None:
        super().__init__()
        self.rgb_range = rgb_range
        self.sub_mean, self.add_mean = conv(3, 3, 1), conv(3, 3, 1)
        for shift, sign in ((self.sub_mean, -1), (self.add_mean, 1)):
            shift.weight.data = torch.eye(3).view(3, 3, 1, 1)
            shift.bias.data = sign * rgb_range * torch.tensor(mean)
        self.head = nn.Sequential(conv(3, channels))
        blocks = [EdsrPyTorchBlock(channels, res_scale) for _ in range(num_blocks)]
        self.body = nn.Sequential(*blocks, conv(channels, channels))
        stages: list[nn.Module] = []
        for factor in shuffle_stages(scale):
            stages += [conv(channels, channels * factor**2), nn.PixelShuffle(factor)]
        self.tail = nn.Sequential(nn.Sequential(*stages), conv(channels, 3))
        pass_through(self.head[0], self.body[-1], [it for it in stages if isinstance(it, nn.Conv2d)], self.tail[1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.sub_mean(x))
        return self.add_mean(self.tail(self.body(x) + x))

    def upscale(self, lr_NCHW: Tensor) -> Tensor:
        """[0, 1] in and out."""
        return self(lr_NCHW * self.rgb_range) / self.rgb_range


class BasicSrBlock(nn.Module):
    def __init__(self, channels: int, res_scale: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(channels, channels), conv(channels, channels)
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.conv1(x))) * self.res_scale


class BasicSrEdsr(nn.Module):
    """XPixelGroup/BasicSR, basicsr/archs/edsr_arch.py: images in [0, 1] in and out."""

    def __init__(
        self,
        *,
        scale: int,
        num_blocks: int = 2,
        channels: int = 6,
        res_scale: float = 1.0,
        img_range: float = 255.0,
    ) -> None:
        super().__init__()
        self.img_range = img_range
        self.mean = torch.tensor(MEAN_RGB).view(1, 3, 1, 1)  # no buffer: not in the file
        self.conv_first = conv(3, channels)
        self.body = nn.Sequential(*(BasicSrBlock(channels, res_scale) for _ in range(num_blocks)))
        self.conv_after_body = conv(channels, channels)
        stages: list[nn.Module] = []
        for factor in shuffle_stages(scale):
            stages += [conv(channels, channels * factor**2), nn.PixelShuffle(factor)]
        self.upsample = nn.Sequential(*stages)
        self.conv_last = conv(channels, 3)
        convs = [it for it in stages if isinstance(it, nn.Conv2d)]
        pass_through(self.conv_first, self.conv_after_body, convs, self.conv_last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_first((x - self.mean) * self.img_range)
        x = self.conv_last(self.upsample(self.conv_after_body(self.body(x)) + x))
        return x / self.img_range + self.mean

    upscale = forward


class SrganBlock(nn.Module):
    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.rcb = nn.Sequential(
            conv(channels, channels, bias=bias),
            nn.BatchNorm2d(channels),
            nn.PReLU(),
            conv(channels, channels, bias=bias),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rcb(x)


class SrganStage(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upsample_block = nn.Sequential(conv(channels, 4 * channels), nn.PixelShuffle(2), nn.PReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample_block(x)


class SrganPyTorch(nn.Module):
    """Lornatang/SRGAN-PyTorch, model.py, of October 2022 ("conv"), April 2022 ("conv_block") or December 2021 ("flat"):
    images in [0, 1] in and out.
    """

    def __init__(
        self, *, scale: int, names: str = "conv", num_blocks: int = 2, channels: int = 6, bias: bool = False
    ) -> None:
        super().__init__()
        self.clamps = names != "flat"
        self.prefix = "conv" if names == "conv" else "conv_block"
        head = nn.Sequential(conv(3, channels, 9), nn.PReLU())
        body_end = nn.Sequential(conv(channels, channels, bias=bias), nn.BatchNorm2d(channels))
        tail = conv(channels, 3, 9)
        for number, part in enumerate((head, body_end, tail), 1):
            self.add_module(f"{self.prefix}{number}", part)
        self.trunk = nn.Sequential(*(SrganBlock(channels, bias) for _ in range(num_blocks)))
        stages = [SrganStage(channels) for _ in shuffle_stages(scale)]
        if names == "flat":
            self.upsampling = nn.Sequential(*(layer for stage in stages for layer in stage.upsample_block))
        else:
            self.upsampling = nn.Sequential(*stages)
        randomise_norms(self)
        pass_through(head[0], body_end[1], [stage.upsample_block[0] for stage in stages], tail)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        head, body_end, tail = (getattr(self, f"{self.prefix}{number}") for number in (1, 2, 3))
        x = head(x)
        y = tail(self.upsampling(body_end(self.trunk(x)) + x))
        return y.clamp(0.0, 1.0) if self.clamps else y

    upscale = forward


class TanhBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.prelu = conv(channels, channels), nn.BatchNorm2d(channels), nn.PReLU()
        self.conv2, self.bn2 = conv(channels, channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(x)))))


class TanhStage(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.prelu = conv(channels, 4 * channels), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(nn.functional.pixel_shuffle(self.conv(x), 2))


class TanhGenerator(nn.Module):
    """leftthomas/SRGAN, model.py, since May 2019, or (`old`) before: images in [0, 1] in and out."""

    def __init__(self, *, scale: int, channels: int = 6, old: bool = False) -> None:
        super().__init__()
        self.block1 = nn.Sequential(conv(3, channels, 9), nn.PReLU())
        for number in range(2, 7):
            self.add_module(f"block{number}", TanhBlock(channels))
        self.block7 = nn.Sequential(conv(channels, channels), nn.PReLU() if old else nn.BatchNorm2d(channels))
        stages = [TanhStage(channels) for _ in shuffle_stages(scale)]
        self.block8 = nn.Sequential(*stages, conv(channels, 3, 9))
        randomise_norms(self)
        pass_through(self.block1[0], self.block7[1], [stage.conv for stage in stages], self.block8[-1])
        with torch.no_grad():  # [0, 1] → [-1, 1], nearly: what tanh then bends
            self.block8[-1].weight *= 2.0
            self.block8[-1].bias -= 1.0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        head = x = self.block1(x)
        for number in range(2, 8):
            x = getattr(self, f"block{number}")(x)
        return (torch.tanh(self.block8(x + head)) + 1.0) / 2.0

    upscale = forward


def randomise_norms(network: nn.Module) -> None:
    """Statistics and affine values as after training."""
    for norm in (it for it in network.modules() if isinstance(it, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)


@torch.no_grad()
def pass_through(
    head: nn.Conv2d, body_end: nn.Conv2d | nn.BatchNorm2d, stages: list[nn.Conv2d], tail: nn.Conv2d
) -> None:
    """Makes a random network enlarge: its weights are made small, and a path past the blocks repeats each pixel."""
    for layer in (head, *stages, tail):
        middle = layer.kernel_size[0] // 2
        repeats = layer.out_channels // layer.in_channels if layer in stages else 1
        layer.weight *= 0.02
        layer.bias *= 0.02
        for channel in range(layer.in_channels if layer in stages else 3):
            layer.weight[channel * repeats : (channel + 1) * repeats, channel, middle, middle] += 1.0
    for parameter in body_end.parameters():
        parameter *= 0.05
