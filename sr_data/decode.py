"""Bytes of an image file ↔ uint8 HWC RGB, whatever the file holds."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sr_data.errors import ImageError

MAX_PIXELS = 512 * 2**20  # 1.5 GiB decoded; DIV2K's images have 2.8 Mpx, gigapixel scans need tiling first

GREY = "grey to RGB"
ALPHA = "alpha dropped"
DEPTH = "16-bit to 8-bit"
PALETTE = "palette to RGB"
CMYK = "CMYK to RGB"
BILEVEL = "black and white to RGB"
OTHER = "other colour space to RGB"
ROTATED = "EXIF rotation applied"
FRAMES = "first of several frames taken"
CONVERSIONS = (GREY, ALPHA, DEPTH, PALETTE, CMYK, BILEVEL, OTHER, ROTATED, FRAMES)

_NOTES_OF_MODE = {
    "RGB": (),
    "L": (GREY,),
    "LA": (GREY, ALPHA),
    "RGBA": (ALPHA,),
    "RGBX": (),
    "P": (PALETTE,),
    "PA": (PALETTE, ALPHA),
    "1": (BILEVEL,),
    "I;16": (GREY, DEPTH),
    "I;16B": (GREY, DEPTH),
    "I;16L": (GREY, DEPTH),
    "I;16N": (GREY, DEPTH),
    "CMYK": (CMYK,),
    "YCbCr": (OTHER,),
    "LAB": (OTHER,),
    "HSV": (OTHER,),
}
_PNG_START = b"\x89PNG\r\n\x1a\n"
_FAILURES = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, OverflowError, MemoryError, struct.error,
             zlib.error, Image.DecompressionBombError)  # fmt: skip
# What Pillow's plugins raise on damaged files; SyntaxError is its word for a broken PNG or TIFF header.


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFacts:
    """What a file was before it became uint8 HWC RGB."""

    width: int
    """As decoded, after the EXIF rotation."""
    height: int
    mode: str
    """Pillow's name of the pixel format; "RGB;16" for a PNG of 16 bits per colour, which Pillow reads as 8."""
    format: str
    """PNG, JPEG, …"""
    notes: tuple[str, ...]
    """What was converted, from CONVERSIONS. Empty: the pixels are the file's."""


def decode_image(data: bytes, *, name: str) -> tuple[NDArray[np.uint8], ImageFacts]:
    """A file's pixels, uint8 HWC RGB in [0, 255], C-contiguous, and what had to be converted to get there.

    Transparency is dropped, not blended: what lies under it is part of the picture. 16 bits become 8 by their upper
    byte, which is what Pillow does with 16-bit RGB.

    Raises:
        ImageError: it starts with `name`; not an image, truncated, damaged, floating-point, or above MAX_PIXELS.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata; the pixels are checked, and size has a limit of its own
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{name}: {image.width} x {image.height} px are more than {MAX_PIXELS // 10**6} Mpx")
            image.load()
            return _as_rgb(image, data, name)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: is not an image{_what_else(data)}") from error
    except ImageError:
        raise
    except _FAILURES as error:
        raise ImageError(f"{name}: the image is truncated or damaged ({error})") from error


def encode_png(image_HWC: NDArray[np.uint8]) -> bytes:
    """A PNG of a uint8 HWC RGB image, lossless. The same pixels give the same bytes."""
    target = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_HWC)).save(target, "PNG", compress_level=6)
    return target.getvalue()


def _as_rgb(image: Image.Image, data: bytes, name: str) -> tuple[NDArray[np.uint8], ImageFacts]:
    mode, file_format = image.mode, image.format or "?"
    sixteen_bit_rgb = file_format == "PNG" and _png_bit_depth(data) == 16 and mode in ("RGB", "RGBA")
    if sixteen_bit_rgb:
        mode += ";16"
    notes = list(_notes_of(image, name)) + [DEPTH] * sixteen_bit_rgb
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        # Training would not mind, but an LR file made by a viewer that rotates would not fit.
        image = ImageOps.exif_transpose(image)
        notes.append(ROTATED)
    if getattr(image, "n_frames", 1) > 1:
        notes.append(FRAMES)
    if image.mode.startswith("I"):  # 16-bit grey; convert("L") would clip at 255
        upper = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        pixels_HWC = np.repeat(upper[:, :, None], 3, axis=2)
    else:
        pixels_HWC = np.array(image.convert("RGBA" if "transparency" in image.info else "RGB"))[:, :, :3]
    height, width = pixels_HWC.shape[:2]
    facts = ImageFacts(width=width, height=height, mode=mode, format=file_format, notes=tuple(dict.fromkeys(notes)))
    return np.ascontiguousarray(pixels_HWC), facts


def _notes_of(image: Image.Image, name: str) -> tuple[str, ...]:
    notes: tuple[str, ...] | None = _NOTES_OF_MODE.get(image.mode)
    if image.mode == "I" and image.format in ("PNG", "PPM", "TIFF") and _fits_16_bits(image):
        notes = (GREY, DEPTH)
    if notes is None:
        raise ImageError(f"{name}: pixels of kind {image.mode!r} have no known range; save it as 8- or 16-bit RGB")
    return (*notes, ALPHA) if "transparency" in image.info and ALPHA not in notes else notes


def _fits_16_bits(image: Image.Image) -> bool:
    pixels = np.asarray(image)
    return bool(pixels.min() >= 0 and pixels.max() < 2**16)


def _png_bit_depth(data: bytes) -> int:
    return data[24] if data.startswith(_PNG_START) and len(data) > 24 else 0


def _what_else(data: bytes) -> str:
    """A guess at what a file that is not an image is, for whoever has to find out why."""
    start = data[:64]
    if start.startswith(b"version https://git-lfs"):
        return ", but a Git LFS pointer: run `git lfs pull`"
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError:
        return f" that can be read here (it begins with bytes {start[:8].hex(' ')})"
    return f"; it begins with the text {text[:24]!r}" if text.isprintable() or "\n" in text else ""
