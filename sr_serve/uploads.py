"""Which uploads are taken: how much is read of one, what is seen in its header, and what is said about the others."""

import asyncio
import io
import re
import warnings
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from sr_models.image_file import DECODE_FAILURES
from sr_serve.messages import RefusedError

MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
"""Formats that are taken and given; their order is that of preference where a client takes any."""
_ACCEPTED = "JPEG, PNG and WebP images are taken"
MAX_SCANS = 100
"""Most scans of a JPEG: an encoder's script has about ten, and a decoder goes over all of the image for each."""
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")  # those that have no length, and stuffing, left out
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_DRAIN_S = 3.0
_DRAIN_FACTOR = 4
# What else people drop: told apart so that the message can name it.
_OTHER_KINDS = {
    b"GIF8": "a GIF",
    b"%PDF": "a PDF",
    b"BM": "a BMP",
    b"II*\x00": "a TIFF",
    b"MM\x00*": "a TIFF",
    b"<svg": "an SVG",
    b"PK\x03\x04": "a ZIP archive",
}
_DAMAGE = (*DECODE_FAILURES, MemoryError)


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadLimits:
    """What an upload may be."""

    max_mb: float
    """Largest upload in MB (10⁶ bytes)."""
    max_mpx: float
    """Most pixels of an upload in Mpx (10⁶)."""
    upload_timeout_s: float
    """How long a client may take to send its image, in seconds."""

    @property
    def max_bytes(self) -> int:
        """`max_mb` in bytes."""
        return int(self.max_mb * 1e6)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageHeader:
    """What a file says of itself."""

    format: str
    """PNG, JPEG or WEBP."""
    width_px: int
    """As stored: EXIF may turn it."""
    height_px: int


async def read_upload(chunks: AsyncIterator[bytes], *, declared: str | None, limits: UploadLimits) -> bytes:
    """The body of a request, of which never more than `limits.max_bytes` are kept, whatever Content-Length `declared`.

    RefusedError: 413 as soon as it is too large, 408 if it takes too long, 400 if it is empty. Of one that is too large
    a little more is read and thrown away: most clients read the answer only when all is sent, and would report a
    broken connection instead.
    """
    body = bytearray()
    is_too_large = declared is not None and declared.isdecimal() and int(declared) > limits.max_bytes
    try:
        async with asyncio.timeout(limits.upload_timeout_s):
            while not is_too_large and (chunk := await anext(chunks, None)) is not None:
                body += chunk
                is_too_large = len(body) > limits.max_bytes
    except TimeoutError as error:
        message = f"the image did not arrive within {limits.upload_timeout_s:g} s; {len(body):,} bytes of it did"
        raise RefusedError(408, "too_slow", message) from error
    if is_too_large:
        num_bytes = len(body)
        del body
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while num_bytes < _DRAIN_FACTOR * limits.max_bytes and (chunk := await anext(chunks, None)) is not None:
                    num_bytes += len(chunk)
        raise RefusedError(413, "too_large", f"the upload is larger than the {limits.max_mb:g} MB that are taken")
    if not body:
        raise RefusedError(400, "empty", f"the request's body is empty; send the image itself. {_ACCEPTED}")
    return bytes(body)


def read_header(data: bytes, *, limits: UploadLimits) -> ImageHeader:
    """What can be told before anything is decoded, which costs no memory to speak of.

    RefusedError: 415 if it is no JPEG, PNG or WebP, 413 above `limits.max_mpx`, 422 if it is animated, its header is
    damaged, or a JPEG has more than `MAX_SCANS`. That the pixels are all there is seen only when they are decoded.
    """
    file_format = _format_of(data)
    if file_format is None:
        raise RefusedError(415, "not_an_image", f"{_looks_like(data)}; {_ACCEPTED}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes, which have a limit of their own
            # Only the plugin of what it begins like: Pillow has more than fifty.
            with Image.open(io.BytesIO(data), formats=[file_format]) as image:
                width, height = image.size
                # Not asked of a JPEG: phones put a second view or a depth map behind the photo.
                num_frames = 1 if file_format == "JPEG" else getattr(image, "n_frames", 1)
    except Image.DecompressionBombError as error:
        message = f"the {_shown(file_format)} image has more pixels than any limit allows"
        raise RefusedError(413, "too_many_pixels", message) from error
    except _DAMAGE as error:
        raise RefusedError(422, "damaged", f"the {_shown(file_format)} image is damaged ({error})") from error
    if width * height > limits.max_mpx * 1e6:
        size = f"{width:,} x {height:,} px ({width * height / 1e6:,.1f} Mpx)"
        message = f"the image is {size}; up to {limits.max_mpx:g} Mpx are taken"
        raise RefusedError(413, "too_many_pixels", message)
    if file_format == "JPEG" and (num_scans := count_scans(data)) > MAX_SCANS:
        message = f"the JPEG image has {num_scans:,} scans; up to {MAX_SCANS} are taken, and cameras write 1 to 10"
        raise RefusedError(422, "too_many_scans", message)
    if num_frames > 1:
        message = f"the {_shown(file_format)} image is an animation of {num_frames} pictures; send a single one"
        raise RefusedError(422, "animated", message)
    return ImageHeader(format=file_format, width_px=width, height_px=height)


def count_scans(data: bytes) -> int:
    """How many scans a JPEG has (ITU-T T.81, annex B), those of thumbnails and of what follows its end not counted.

    Each goes over the whole image, and takes a few bytes where it changes nothing.
    """
    num_scans, position = 0, 2
    while (found := _JPEG_MARKER.search(data, position)) is not None:
        marker, position = found[1][0], found.end()
        if marker == _END_OF_IMAGE:
            break
        num_scans += marker == _START_OF_SCAN
        position += int.from_bytes(data[position : position + 2], "big")  # the length counts itself
    return num_scans


def wanted(accept: str | None, output: Literal["image", "json"] | None) -> tuple[bool, str | None]:
    """Whether JSON is wanted, and the image format that Accept names, if it prefers one (RFC 9110, section 12.5.1).

    `output` decides where it is given. Where both are as welcome, it is an image.
    """
    qualities: dict[str, float] = {}
    for part in (accept or "").lower().split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        try:
            qualities[kind] = float(quality)
        except ValueError:
            qualities[kind] = 0.0
    named = {name: qualities.get(kind, 0.0) for name, kind in MEDIA_TYPES.items()}
    best_image = max(*named.values(), qualities.get("image/*", 0.0), qualities.get("*/*", 0.0))
    as_json = output == "json" if output else qualities.get("application/json", 0.0) > best_image
    general = max(qualities.get("image/*", 0.0), qualities.get("*/*", 0.0))
    file_format = max(named, key=lambda name: named[name])
    return as_json, file_format if named[file_format] > general else None


def _format_of(data: bytes) -> str | None:
    """By the first bytes, as the WHATWG's MIME sniffing standard (section 6.1) does."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def _looks_like(data: bytes) -> str:
    if data.startswith(b"--") and b"form-data" in data[:400]:
        return "the body is a form; send the image itself (curl --data-binary @photo.jpg)"
    if data[4:8] == b"ftyp":
        kind = data[8:12].decode("ascii", "replace").lower()
        return "this is a HEIC or AVIF image" if kind in ("heic", "heix", "mif1", "avif") else "this is a video"
    kind = next((kind for start, kind in _OTHER_KINDS.items() if data.startswith(start)), "not an image")
    return f"this is {kind}"


def _shown(file_format: str) -> str:
    return "WebP" if file_format == "WEBP" else file_format
