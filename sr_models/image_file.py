"""An image file ↔ its pixels and all else of it that must survive: depth, grey, alpha, colour profile, EXIF."""

import io
import math
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from sr_models.errors import ImageFileError
from sr_models.png16 import decode_16_bits, encode_png16, is_png16

FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
"""What can be written, and its suffix."""
MAX_MPX = 64.0
"""Megapixels (10⁶) of an image that is read unless told otherwise. Pillow itself opens none above 178."""
LOSSY_QUALITY = 95

MAX_SIDE_PX = {"WEBP": 16_383, "JPEG": 65_500}
"""What their encoders end at."""

# Pillow opens fifty kinds, one of which runs Ghostscript on the file: these hold pixels and nothing that is run.
_READ = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA", "JPEG2000")
_WRITABLE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
_BITS_PER_SAMPLE = 258  # TIFF's tag
_ORIENTATION = ExifTags.Base.Orientation
# Of a TIFF's tags, those that say something of the picture and not of how this file stores it: description, maker,
# model, resolution and its unit, software, date, artist, host, copyright, and the blocks of EXIF and GPS.
_KEPT_OF_TIFF = {270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 33432, ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo}
_STALE_TAGS = (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)  # sizes in pixels: no longer true
_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
DECODE_FAILURES = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, OverflowError, TypeError,
                   AttributeError, RuntimeError, SystemError, struct.error, zlib.error)  # fmt: skip
"""What Pillow's plugins raise on damaged files; SyntaxError is its word for a broken PNG or TIFF header."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Picture:
    """An image upright, as its file meant it to be seen."""

    colour_HWC: np.ndarray
    """uint8 or uint16, H×W×3 RGB or H×W×1 grey; all levels of its dtype."""
    alpha_HW: np.ndarray | None
    """Opacity, of the same dtype; None if the file has none."""
    format: str
    """Of its file, in Pillow's words: PNG, JPEG, WEBP, TIFF, …"""
    icc_profile: bytes | None
    """Which colours the levels are."""
    exif: bytes | None
    """Without orientation, size and thumbnail."""


def read_picture(data: bytes, *, name: str, max_mpx: float = MAX_MPX) -> Picture:
    """Decodes a file of any kind that Pillow reads, or a PNG or TIFF of 16 bits per channel.

    Grey stays grey and 16 bits stay 16; palettes become RGB, black and white becomes grey, CMYK becomes sRGB by its
    profile. Of an animation it is the first frame. An orientation in EXIF is applied, and no longer in `exif`.

    ImageFileError: it starts with `name`; empty, not an image, truncated, damaged, floating-point, or above `max_mpx`
    megapixels, which is seen before anything is decoded.
    """
    if not data:
        raise ImageFileError(f"{name}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, and about sizes, which have a limit of their own
            image = Image.open(io.BytesIO(data), formats=_READ)
            if not image.width * image.height <= max_mpx * 1e6:  # NaN allows nothing
                raise ImageFileError(f"{name}: {image.width} x {image.height} px are more than {max_mpx:g} Mpx")
            return _picture(image, data, name)
    except UnidentifiedImageError as error:
        raise ImageFileError(f"{name}: is not an image, or of a kind that can't be read here") from error
    except Image.DecompressionBombError as error:
        raise ImageFileError(f"{name}: has more pixels than any limit allows ({error})") from error
    except ImageFileError:
        raise
    except DECODE_FAILURES as error:
        raise ImageFileError(f"{name}: the image is truncated or damaged ({error})") from error


def write_picture(picture: Picture, *, format: str, name: str = "image") -> bytes:  # noqa: A002  Pillow's word
    """The picture as a PNG, JPEG or WEBP file, with its profile and EXIF.

    ImageFileError as `check_writable`.
    """
    check_writable(picture, format=format, name=name)
    planes_HWC = picture.colour_HWC
    if picture.alpha_HW is not None:
        planes_HWC = np.dstack([planes_HWC, picture.alpha_HW])
    if planes_HWC.dtype == np.uint16:
        return encode_png16(np.asarray(planes_HWC, np.uint16), icc_profile=picture.icc_profile, exif=picture.exif)
    options = {key: value for key in ("icc_profile", "exif") if (value := getattr(picture, key)) is not None}
    if format != "PNG":
        options["quality"] = LOSSY_QUALITY
    if format == "JPEG":
        options["subsampling"] = 0  # colour at full resolution: what was upscaled is not halved again
    target = io.BytesIO()
    try:
        pixels = planes_HWC[:, :, 0] if planes_HWC.shape[2] == 1 else planes_HWC
        Image.fromarray(np.ascontiguousarray(pixels)).save(target, format, **options)
    except (OSError, ValueError) as error:
        raise ImageFileError(f"{name}: can't be written as {format} ({error})") from error
    return target.getvalue()


def check_writable(picture: Picture, *, format: str, name: str = "image", scale: int = 1) -> None:  # noqa: A002
    """Whether the picture, `scale` times as large, can be written without losing anything: known before it is computed.

    ImageFileError, which starts with `name`, for a format that is not in `FORMATS`, transparency in JPEG, 16 bits in
    JPEG or WEBP, or more pixels a side than `MAX_SIDE_PX`.
    """
    height, width, _ = picture.colour_HWC.shape
    if format not in FORMATS:
        raise ImageFileError(f"{name}: {format!r} can't be written; allowed are {', '.join(FORMATS)}")
    if format == "JPEG" and picture.alpha_HW is not None:
        raise ImageFileError(f"{name}: has transparency, which JPEG can't hold; PNG and WEBP can")
    if format != "PNG" and picture.colour_HWC.dtype == np.uint16:
        raise ImageFileError(f"{name}: has 16 bits per channel, of which {format} holds 8; PNG holds all")
    if scale * max(height, width) > MAX_SIDE_PX.get(format, math.inf):
        size = f"{scale * width} x {scale * height} px"
        raise ImageFileError(f"{name}: {size} can't be written as {format}, which ends at {MAX_SIDE_PX[format]} a side")


def output_format(source_format: str) -> str:
    """The format in which an upscaled file is written if nobody says otherwise: its own, or PNG."""
    return source_format if source_format in FORMATS else "PNG"


def target_name(source: str, format: str | None = None) -> str:  # noqa: A002  Pillow's word
    """The name of what is made of the file `source` in `format`, or in its own (None): `a/b.tif` → `a/b.png`."""
    path = PurePosixPath(source)
    if format is None:
        return source if path.suffix.lower() in _WRITABLE_SUFFIXES else str(path.with_suffix(".png"))
    same = path.suffix.lower() == FORMATS[format] or (format == "JPEG" and path.suffix.lower() == ".jpeg")
    return source if same else str(path.with_suffix(FORMATS[format]))


def _picture(image: Image.Image, data: bytes, name: str) -> Picture:
    icc_profile: bytes | None = image.info.get("icc_profile") or None
    if _has_16_bit_colour(image, data):
        deep_HWC = decode_16_bits(data)
        if deep_HWC is None:
            raise ImageFileError(f"{name}: the image is truncated or damaged, or its 16-bit pixels are of a rare kind")
        orientation, exif = _exif_of(image)
        pixels_HWC: np.ndarray = deep_HWC
    else:
        image.load()
        orientation, exif = _exif_of(image)
        if image.mode == "CMYK":
            image, icc_profile = _as_srgb(image, icc_profile), None
        pixels_HWC = _pixels(image, name)
    pixels_HWC = _upright(pixels_HWC, orientation)
    num_colours = 1 if pixels_HWC.shape[2] < 3 else 3
    has_alpha = pixels_HWC.shape[2] in (2, 4)
    return Picture(
        colour_HWC=np.ascontiguousarray(pixels_HWC[:, :, :num_colours]),
        alpha_HW=np.ascontiguousarray(pixels_HWC[:, :, -1]) if has_alpha else None,
        # MPO is a JPEG with more pictures behind the first, as phones make them.
        format="JPEG" if image.format == "MPO" else image.format or "",
        icc_profile=icc_profile,
        exif=exif,
    )


def _has_16_bit_colour(image: Image.Image, data: bytes) -> bool:
    """Whether Pillow would give its upper 8 bits only."""
    if image.format == "TIFF" and image.mode.startswith("RGB"):
        return bool(max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,))) == 16)  # type: ignore[attr-defined]
    return is_png16(data)


def _pixels(image: Image.Image, name: str) -> np.ndarray:
    """H×W×C, C = 1, 2, 3 or 4."""
    if image.mode.startswith("I"):
        levels_HW = np.asarray(image)
        if image.mode == "I" and (levels_HW.min() < 0 or levels_HW.max() >= 2**16):
            raise ImageFileError(f"{name}: pixels of 32 bits have no known range; save it with 8 or 16 bits")
        return levels_HW.astype(np.uint16)[:, :, None]
    if image.mode not in _EIGHT_BITS:
        raise ImageFileError(f"{name}: pixels of kind {image.mode!r} have no known range; save it as 8- or 16-bit RGB")
    grey = image.mode in ("1", "L", "LA")
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
        # Pillow turns a transparent grey level into alpha only on the way to RGBA.
        rgba_HWC = np.asarray(image if image.mode == "LA" else image.convert("RGBA"))
        return rgba_HWC if image.mode == "LA" or not grey else np.ascontiguousarray(rgba_HWC[:, :, [0, 3]])
    levels = np.asarray(image.convert("L" if grey else "RGB"))
    return levels[:, :, None] if grey else levels


def _as_srgb(image: Image.Image, icc_profile: bytes | None) -> Image.Image:
    """CMYK as RGB: by its profile, or, without a usable one, by Pillow's plain arithmetic."""
    file_format = image.format
    converted: Image.Image | None = None
    if icc_profile is not None:
        try:
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, io.BytesIO(icc_profile), srgb, outputMode="RGB")
        except ImageCms.PyCMSError:
            converted = None
    converted = converted or image.convert("RGB")
    converted.format = file_format
    return converted


def _exif_of(image: Image.Image) -> tuple[int, bytes | None]:
    """Orientation (1 is upright) of the pixels, and the EXIF block without it; an unreadable one is left out."""
    try:
        exif = image.getexif()
        orientation = exif.pop(_ORIENTATION, 1)
        if image.format == "TIFF":
            orientation = 1  # both decoders turn TIFFs by themselves
            for tag in exif.keys() - _KEPT_OF_TIFF:
                del exif[tag]
        if ExifTags.IFD.Exif in exif:  # asking for it would add an empty one
            for tag in _STALE_TAGS:
                exif.get_ifd(ExifTags.IFD.Exif).pop(tag, None)
        block = exif.tobytes() if len(exif) else None
    except DECODE_FAILURES:
        return 1, None
    return (orientation if orientation in range(1, 9) else 1), block


def _upright(pixels_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """As EXIF (JEITA CP-3451, tag Orientation) says that the stored rows and columns are to be seen."""
    if orientation >= 5:
        pixels_HWC = pixels_HWC.swapaxes(0, 1)  # the stored rows are columns
    if orientation in (2, 3, 6, 7):
        pixels_HWC = pixels_HWC[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels_HWC = pixels_HWC[::-1]
    return pixels_HWC
