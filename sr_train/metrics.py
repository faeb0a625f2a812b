"""PSNR and SSIM of an image under named protocols, computed on the device where the image is.

A number without its protocol means nothing: the same images read up to 1.5 dB apart. A protocol's name says which
channels the PSNR is of and how many pixels are cut off each border before anything is computed. SSIM is always that of
Y, the form the super-resolution papers print. Everything is computed in float64 from the 8-bit RGB images. The reasons
are in docs/metrics.md.

Only `read_scores` waits for a GPU, once for all the images it is given.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from sr_models.inference import ImageHWC, as_tensor, describe, is_rgb_uint8

# ITU-R BT.601 luma in studio range: R, G, B in [0, 1] → Y in [16, 235], as MATLAB's rgb2ycbcr computes it.
BT601_Y_RGB = (65.481, 128.553, 24.966)
BT601_Y_OFFSET = 16.0
_Y_WEIGHTS = tuple(weight / 255.0 for weight in BT601_Y_RGB)  # of 8-bit values

# Wang, Bovik, Sheikh, Simoncelli: "Image Quality Assessment: From Error Visibility to Structural Similarity",
# IEEE TIP 13(4), 2004, section III.B and III.C: Gaussian window 11 x 11, sigma 1.5; K1 = 0.01, K2 = 0.03; L = 255.
SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5
SSIM_C1 = (0.01 * 255.0) ** 2
SSIM_C2 = (0.03 * 255.0) ** 2


class MetricError(ValueError):
    """Images that can't be compared, or an unknown protocol; the message starts with the image's name if it has one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How two images are compared."""

    channels: Literal["y", "rgb"]
    """What the PSNR's squared error is averaged over: unrounded Y, or R, G and B together."""
    extra_crop_px: int
    """Pixels cut off each border besides `scale`."""

    def crop_px(self, scale: int) -> int:
        """Pixels cut off each border."""
        return scale + self.extra_crop_px


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        "psnr@y,crop=scale": Protocol(channels="y", extra_crop_px=0),
        "psnr@rgb,crop=scale": Protocol(channels="rgb", extra_crop_px=0),
        "psnr@rgb,crop=scale+6": Protocol(channels="rgb", extra_crop_px=6),
    }
)
"""Name → protocol: the papers' benchmarks (Set5, Set14, B100, Urban100), BasicSR's RGB, EDSR's on DIV2K."""

PAPERS_PROTOCOL = "psnr@y,crop=scale"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageScore:
    """Scores of one image."""

    name: str
    """The image's name in its set."""
    psnr_db: float
    """PSNR; infinite for identical images."""
    ssim: float
    """SSIM, at most 1."""


def protocol_named(name: str) -> Protocol:
    """`PROTOCOLS[name]`; MetricError lists the names if there is none."""
    if name not in PROTOCOLS:
        raise MetricError(f"unknown protocol {name!r}; there are: {'  '.join(PROTOCOLS)} (--protocol)")
    return PROTOCOLS[name]


def smallest_side_px(protocol: str, scale: int) -> int:
    """The side that an HR image must have at least: SSIM's window after the crop."""
    return SSIM_WINDOW_PX + 2 * protocol_named(protocol).crop_px(scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredImage:
    """What the scores of one image will be read from."""

    name: str
    """The image's name in its set."""
    values: Tensor
    """Mean squared error under the protocol, and SSIM: float64 of shape (2,), on the device of the images."""


def score_image(sr_HWC: ImageHWC, hr_HWC: ImageHWC, *, scale: int, protocol: str, name: str = "") -> ImageScore:
    """`measure_image`, read at once: on a GPU it waits for the result."""
    return read_scores([measure_image(sr_HWC, hr_HWC, scale=scale, protocol=protocol, name=name)])[0]


def measure_image(sr_HWC: ImageHWC, hr_HWC: ImageHWC, *, scale: int, protocol: str, name: str = "") -> MeasuredImage:
    """Compares two uint8 RGB H×W×3 images of one size where the SR image is, without waiting for the result.

    The result depends on the device, but not on the number of threads, to the last bit. MetricError if the images are
    not as above, or too small for SSIM's window after the crop.
    """
    chosen = protocol_named(protocol)
    at = f"{name}: " if name else ""
    for label, image_HWC in (("SR", sr_HWC), ("HR", hr_HWC)):
        if not is_rgb_uint8(image_HWC):
            raise MetricError(f"{at}the {label} image is {describe(image_HWC)}, not uint8 RGB (H, W, 3)")
    if sr_HWC.shape != hr_HWC.shape:
        raise MetricError(f"{at}the SR image is {_size(sr_HWC)}, the HR image {_size(hr_HWC)}; they must be equal")
    crop_px = chosen.crop_px(scale)
    smallest_px = smallest_side_px(protocol, scale)
    height, width, _ = hr_HWC.shape
    if min(height, width) < smallest_px:
        raise MetricError(f"{at}{_size(hr_HWC)} is too small for {protocol} at x{scale}: sides from {smallest_px} px")
    rows, columns = slice(crop_px, height - crop_px), slice(crop_px, width - crop_px)
    sr_HWC, hr_HWC = as_tensor(sr_HWC), as_tensor(hr_HWC)
    sr_HWC, hr_HWC = sr_HWC[rows, columns], hr_HWC.to(sr_HWC.device, non_blocking=True)[rows, columns]
    sr_Y, hr_Y = luma(sr_HWC), luma(hr_HWC)
    mse = mean_squared_error(sr_Y, hr_Y) if chosen.channels == "y" else mean_squared_error(sr_HWC, hr_HWC)
    return MeasuredImage(name=name, values=torch.stack([mse, ssim(sr_Y, hr_Y)]))


def read_scores(measured: Sequence[MeasuredImage]) -> list[ImageScore]:
    """The scores of images that were measured on one device, in the order given; waits for the device, once."""
    values = torch.stack([image.values for image in measured]).tolist() if measured else []
    return [
        ImageScore(name=image.name, psnr_db=psnr_db(mse), ssim=mean_ssim)
        for image, (mse, mean_ssim) in zip(measured, values, strict=True)
    ]


def psnr_db(mse: float) -> float:
    """10 log10(255² / mean squared error on the 8-bit scale); infinite if there is no error."""
    return math.inf if mse == 0.0 else 10.0 * math.log10(255.0**2 / mse)


def luma(image_HWC: ImageHWC) -> Tensor:
    """uint8 RGB H×W×3 → BT.601 Y, H×W float64 in [16, 235], not rounded; on the image's device."""
    image_HWC = as_tensor(image_HWC)
    luma_HW = image_HWC.new_empty(image_HWC.shape[:2], dtype=torch.float64)
    for rows in _strips(luma_HW):
        red, green, blue = (image_HWC[rows, :, channel].to(torch.float64) for channel in range(3))
        weighted = red.mul_(_Y_WEIGHTS[0]).add_(green, alpha=_Y_WEIGHTS[1]).add_(blue, alpha=_Y_WEIGHTS[2])
        torch.add(weighted, BT601_Y_OFFSET, out=luma_HW[rows])
    return luma_HW


def mean_squared_error(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference of two tensors of one shape, any dtype: a float64 scalar on their device.

    Exact for 8-bit values, whose squares add up to an integer below 2⁵³.
    """
    sums = []
    for rows in _strips(first):
        difference = first[rows].to(torch.float64) - second[rows].to(torch.float64)
        sums.append(difference.square_().flatten(1).sum(1))
    return torch.cat(sums).sum() / first.numel()


def ssim(first_HW: Tensor, second_HW: Tensor) -> Tensor:
    """Mean SSIM (Wang et al. 2004) of two single-channel float64 images on the 8-bit scale, sides from 11 px: a float64
    scalar on their device.

    The mean is over the positions where the whole window lies in the image, as in the authors' ssim.m with its
    downsampling off, which is how the super-resolution papers use it.

    Equation 13 is written with the means m and variances v of the images' sum s and difference d: as 2 μ₁μ₂ is
    (m_s² - m_d²) / 2, μ₁² + μ₂² is (m_s² + m_d²) / 2, and the same holds for covariance and variances,
        SSIM = (m_s² - m_d² + 2 C₁) (v_s - v_d + 2 C₂) / ((m_s² + m_d² + 2 C₁) (v_s + v_d + 2 C₂)).
    That is four maps to blur instead of five, and exactly 1 for equal images.
    """
    height, width = (side - SSIM_WINDOW_PX + 1 for side in first_HW.shape)
    sums = []
    for rows in _strips(first_HW[:height]):
        reach = slice(rows.start, rows.stop + SSIM_WINDOW_PX - 1)
        total_HW, difference_HW = first_HW[reach] + second_HW[reach], first_HW[reach] - second_HW[reach]
        maps_CHW = torch.stack([total_HW, difference_HW, total_HW.square(), difference_HW.square()])
        mean_s, mean_d, variance_s, variance_d = _blur(maps_CHW)
        mean_s.square_(), mean_d.square_()
        variance_s -= mean_s
        variance_d -= mean_d
        numerator = (mean_s - mean_d).add_(2 * SSIM_C1).mul_((variance_s - variance_d).add_(2 * SSIM_C2))
        denominator = mean_s.add_(mean_d).add_(2 * SSIM_C1).mul_(variance_s.add_(variance_d).add_(2 * SSIM_C2))
        sums.append(numerator.div_(denominator).sum(1))
    return torch.cat(sums).sum() / (height * width)


def _strips(image: Tensor) -> Iterator[slice]:
    """The image's rows, as many at a time as are worked on best. The results don't depend on it: every sum is of a
    row's sums, and a row is never split between threads.

    On a CPU each of a strip's float64 maps takes a megabyte and stays in the cache: 2.5 times as fast as whole 2K
    images. A GPU gets few large pieces, which bound its memory: 32 MiB for each map.
    """
    height, width = image.shape[:2]
    num_rows = max(SSIM_WINDOW_PX, (2**17 if image.device.type == "cpu" else 2**22) // width)
    for start in range(0, height, num_rows):
        yield slice(start, min(start + num_rows, height))


def _gaussian_window() -> tuple[float, ...]:
    weights = [math.exp(-((i - SSIM_WINDOW_PX // 2) ** 2) / (2.0 * SSIM_SIGMA_PX**2)) for i in range(SSIM_WINDOW_PX)]
    return tuple(weight / math.fsum(weights) for weight in weights)


def _blur(maps_CHW: Tensor) -> Tensor:
    """The Gaussian window at every position where it fits; separable, so one pass down and one across.

    Sums of weighted slices: `conv2d` of float64 takes 1.7 times as long on a CPU, with strips of the size it likes best
    (16 rows; 10 times with these), and matrix products with a banded matrix are no faster, but add in an order of their
    own.
    """
    height, width = (side - SSIM_WINDOW_PX + 1 for side in maps_CHW.shape[1:])
    weights = _gaussian_window()
    down = maps_CHW[:, :height] * weights[0]
    for i, weight in enumerate(weights[1:], start=1):
        down.add_(maps_CHW[:, i : i + height], alpha=weight)
    blurred = down[:, :, :width] * weights[0]
    for i, weight in enumerate(weights[1:], start=1):
        blurred.add_(down[:, :, i : i + width], alpha=weight)
    return blurred


def _size(image_HWC: ImageHWC) -> str:
    return f"{image_HWC.shape[1]}x{image_HWC.shape[0]}"
