"""MATLAB's `imresize(image, …, 'bicubic')`, reproduced to the last bit.

Super-resolution papers make their low-resolution images with this one function. Pillow, OpenCV and torch widen, pad or
round differently; a network evaluated on their images loses several dB, so nothing else may make an LR image here.

Source: `imresize.m` of MATLAB's Image Processing Toolbox (R2017b). The kernel is Keys, "Cubic convolution interpolation
for digital image processing", IEEE Trans. ASSP 29 (1981), eq. 15, with a = -1/2. No known deviation: the LR files of
DIV2K and Set5 come out bit for bit (`tests/sr_data/test_resize.py`).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sr_data.errors import DataError

_KERNEL_WIDTH = 4.0


def imresize(
    image_HWC: NDArray[np.generic], *, output_height: int, output_width: int, scale: float | None = None
) -> NDArray[np.generic]:
    """The image resized with an antialiased cubic kernel.

    Args:
        image_HWC: uint8 in [0, 255] or float64 in any range, any number of channels.
        output_height: in pixels, at least 1.
        output_width: in pixels, at least 1.
        scale: output pixels per input pixel in both directions, as in MATLAB's `imresize(image, scale)`; without it
            each direction's is output / input, as in `imresize(image, [height width])`.

    Returns:
        HWC of the same dtype. uint8 is rounded half away from zero and clipped after each of the two passes, as MATLAB
        does; float64 is neither rounded nor clipped.

    Raises:
        DataError: another dtype, not three axes, or an empty input or output.
    """
    if image_HWC.ndim != 3 or image_HWC.dtype not in (np.uint8, np.float64) or 0 in image_HWC.shape:
        raise DataError(f"imresize takes a non-empty HWC image, uint8 or float64, not {image_HWC.dtype} "
                        f"of shape {image_HWC.shape}")  # fmt: skip
    if min(output_height, output_width) < 1 or (scale is not None and not 0 < scale < math.inf):
        raise DataError(f"imresize to {output_width} x {output_height} px with scale {scale}: all must be positive")
    height, width = image_HWC.shape[:2]
    scale_height = output_height / height if scale is None else scale
    scale_width = output_width / width if scale is None else scale

    def rows(image: NDArray[np.generic]) -> NDArray[np.generic]:
        return _resize_rows(image, output_height, scale_height)

    def columns(image: NDArray[np.generic]) -> NDArray[np.generic]:
        turned = np.ascontiguousarray(image.swapaxes(0, 1))
        return _resize_rows(turned, output_width, scale_width).swapaxes(0, 1)

    # MATLAB goes through the directions by ascending scale, rows first if they are equal. uint8 is rounded in between,
    # so the order shows in the result.
    resized = columns(rows(image_HWC)) if scale_height <= scale_width else rows(columns(image_HWC))
    return np.ascontiguousarray(resized)


def downscale_bicubic(hr_HWC: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """The LR image that SR papers pair with `hr_HWC`: uint8 HWC in, uint8 HWC of 1/`scale` the size out.

    Raises:
        DataError: height or width is not a multiple of `scale`; see `crop_to_multiple`.
    """
    height, width = hr_HWC.shape[:2]
    if scale < 1 or height % scale or width % scale:
        raise DataError(f"{width} x {height} px can't be divided by scale={scale}; crop it first (crop_to_multiple)")
    resized = imresize(hr_HWC, output_height=height // scale, output_width=width // scale, scale=1 / scale)
    return resized.astype(np.uint8, copy=False)


def upscale_bicubic(lr_HWC: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """The image enlarged `scale` times, uint8 HWC to uint8 HWC: the "bicubic" that papers compare with."""
    height, width = lr_HWC.shape[:2]
    resized = imresize(lr_HWC, output_height=height * scale, output_width=width * scale, scale=float(scale))
    return resized.astype(np.uint8, copy=False)


def crop_to_multiple(hr_HWC: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """The image without the rows at the bottom and columns at the right that `scale` does not divide (a view).

    It is the papers' `modcrop`. The origin stays: LR pixel (0, 0) covers HR pixels (0, 0) to (scale-1, scale-1).
    """
    height, width = hr_HWC.shape[:2]
    return hr_HWC[: height - height % scale, : width - width % scale]


def _resize_rows(image_HWC: NDArray[np.generic], output_length: int, scale: float) -> NDArray[np.generic]:
    weights_OT, indices_OT = _contributions(image_HWC.shape[0], output_length, scale)
    source = image_HWC.reshape(image_HWC.shape[0], -1)
    total = np.zeros((output_length, source.shape[1]))
    # One tap after the other, in MATLAB's order of summation. A matrix product may sum in another order, and a sum that
    # should be exactly n + 1/2 would then round to the other side.
    for weights_O, indices_O in zip(weights_OT.T, indices_OT.T, strict=True):
        total += source[indices_O] * weights_O[:, None]
    if image_HWC.dtype == np.uint8:
        np.clip(total + 0.5, 0, 255, out=total)  # after the clip, truncation rounds half away from zero
        return total.astype(np.uint8).reshape(output_length, *image_HWC.shape[1:])
    return total.reshape(output_length, *image_HWC.shape[1:])


@lru_cache(maxsize=64)
def _contributions(input_length: int, output_length: int, scale: float) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """`contributions` of imresize.m: what each of O output pixels takes from which T input pixels, in float64."""
    stretch = min(scale, 1.0)  # antialiasing: when shrinking, the kernel is as wide as 4 output pixels
    width = _KERNEL_WIDTH / stretch
    # MATLAB counts pixels from 1, and so does this function: the same arithmetic gives the same rounding errors.
    centres_O = np.arange(1, output_length + 1) / scale + 0.5 * (1 - 1 / scale)
    first_O = np.floor(centres_O - width / 2)
    indices_OT = first_O[:, None] + np.arange(math.ceil(width) + 2)
    weights_OT = stretch * _cubic(stretch * (centres_O[:, None] - indices_OT))
    weights_OT = weights_OT / weights_OT.sum(axis=1, keepdims=True)
    mirrored = np.concatenate([np.arange(input_length), np.arange(input_length)[::-1]])
    sources_OT = mirrored[np.mod(indices_OT.astype(np.intp) - 1, 2 * input_length)]
    used_T = weights_OT.any(axis=0)
    weights_OT, sources_OT = weights_OT[:, used_T], sources_OT[:, used_T]
    weights_OT.flags.writeable = sources_OT.flags.writeable = False  # the cache hands the same arrays to every thread
    return weights_OT, sources_OT


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel with a = -1/2, written as in imresize.m."""
    ax = np.abs(x)
    ax2, ax3 = ax**2, ax**3
    near: NDArray[np.float64] = (1.5 * ax3 - 2.5 * ax2 + 1) * (ax <= 1)
    far: NDArray[np.float64] = (-0.5 * ax3 + 2.5 * ax2 - 4 * ax + 2) * ((ax > 1) & (ax <= 2))
    return near + far
