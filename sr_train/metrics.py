"""PSNR and SSIM of an image under named protocols.

A number without its protocol means nothing: the same images read up to 1.5 dB apart. A protocol's name says which
channels the PSNR is of and how many pixels are cut off each border before anything is computed. SSIM is always that of
Y, the form the super-resolution papers print. Everything is computed in float64 from the 8-bit RGB images. The reasons
are in docs/metrics.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
UInt8Array = NDArray[np.uint8]

# ITU-R BT.601 luma in studio range: R, G, B in [0, 1] → Y in [16, 235], as MATLAB's rgb2ycbcr computes it.
BT601_Y_RGB = (65.481, 128.553, 24.966)
BT601_Y_OFFSET = 16.0

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


def score_image(sr_HWC: UInt8Array, hr_HWC: UInt8Array, *, scale: int, protocol: str, name: str = "") -> ImageScore:
    """Compares two uint8 RGB H×W×3 images of one size.

    MetricError if they are not that, or too small for SSIM's window after the crop.
    """
    chosen = protocol_named(protocol)
    at = f"{name}: " if name else ""
    for label, image_HWC in (("SR", sr_HWC), ("HR", hr_HWC)):
        if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
            raise MetricError(f"{at}the {label} image is {image_HWC.dtype} {image_HWC.shape}, not uint8 RGB (H, W, 3)")
    if sr_HWC.shape != hr_HWC.shape:
        raise MetricError(f"{at}the SR image is {_size(sr_HWC)}, the HR image {_size(hr_HWC)}; they must be equal")
    crop_px = chosen.crop_px(scale)
    smallest_px = smallest_side_px(protocol, scale)
    if min(hr_HWC.shape[:2]) < smallest_px:
        raise MetricError(f"{at}{_size(hr_HWC)} is too small for {protocol} at x{scale}: sides from {smallest_px} px")
    height, width, _ = hr_HWC.shape
    inner = np.s_[crop_px : height - crop_px, crop_px : width - crop_px]
    sr_Y, hr_Y = luma(sr_HWC[inner]), luma(hr_HWC[inner])
    if chosen.channels == "y":
        psnr_db = psnr(sr_Y, hr_Y)
    else:
        psnr_db = psnr(sr_HWC[inner].astype(np.float64), hr_HWC[inner].astype(np.float64))
    return ImageScore(name=name, psnr_db=psnr_db, ssim=ssim(sr_Y, hr_Y))


def luma(image_HWC: UInt8Array) -> Float64Array:
    """uint8 RGB H×W×3 → BT.601 Y, H×W float64 in [16, 235], not rounded."""
    return image_HWC @ (np.array(BT601_Y_RGB) / 255.0) + BT601_Y_OFFSET


def psnr(first: Float64Array, second: Float64Array) -> float:
    """10 log10(255² / mean squared difference) of two arrays of one shape on the 8-bit scale; infinite if equal."""
    mse = float(np.mean(np.square(first - second)))
    return math.inf if mse == 0.0 else 10.0 * math.log10(255.0**2 / mse)


def ssim(first_HW: Float64Array, second_HW: Float64Array) -> float:
    """Mean SSIM (Wang et al. 2004) of two single-channel images on the 8-bit scale, sides from 11 px.

    The mean is over the positions where the whole window lies in the image, as in the authors' ssim.m with its
    downsampling off, which is how the super-resolution papers use it.
    """
    mean_1, mean_2 = _blur(first_HW), _blur(second_HW)
    variance_1 = _blur(first_HW * first_HW) - mean_1 * mean_1
    variance_2 = _blur(second_HW * second_HW) - mean_2 * mean_2
    covariance = _blur(first_HW * second_HW) - mean_1 * mean_2
    numerator = (2.0 * mean_1 * mean_2 + SSIM_C1) * (2.0 * covariance + SSIM_C2)
    denominator = (mean_1 * mean_1 + mean_2 * mean_2 + SSIM_C1) * (variance_1 + variance_2 + SSIM_C2)
    return float(np.mean(numerator / denominator))


def _gaussian_window() -> Float64Array:
    offsets_px = np.arange(SSIM_WINDOW_PX) - SSIM_WINDOW_PX // 2
    weights = np.exp(-(offsets_px**2) / (2.0 * SSIM_SIGMA_PX**2))
    window: Float64Array = weights / weights.sum()
    return window


def _blur(image_HW: Float64Array) -> Float64Array:
    """The Gaussian window at every position where it fits; separable, so one pass down and one across."""
    weights = _gaussian_window()
    height, width = (side - SSIM_WINDOW_PX + 1 for side in image_HW.shape)
    rows = sum((weight * image_HW[i : i + height] for i, weight in enumerate(weights)), np.zeros((height, 1)))
    return sum((weight * rows[:, i : i + width] for i, weight in enumerate(weights)), np.zeros((1, width)))


def _size(image_HWC: UInt8Array) -> str:
    return f"{image_HWC.shape[1]}x{image_HWC.shape[0]}"
