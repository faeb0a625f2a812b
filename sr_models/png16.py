"""PNG files of 16 bits per channel, which Pillow reads as 8: OpenCV decodes them, the writer is here.

OpenCV's own writer has no grey with alpha, and neither profile nor EXIF in the version that models are packed with.
"""

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}
"""Channels → PNG's colour type: grey, grey with alpha, RGB, RGBA."""
_BAND_BYTES = 2**20
_UP = 2
"""Filter type: each byte minus the one above (PNG specification, 9.2); most of a photo's redundancy, without a loop."""


def is_png16(data: bytes) -> bool:
    """Whether it starts as a PNG of 16 bits per channel."""
    return data.startswith(_SIGNATURE) and len(data) > 25 and data[24] == 16


def decode_16_bits(data: bytes) -> NDArray[np.uint16] | None:
    """uint16 H×W×C, C = 1, 2, 3 or 4 (grey, grey with alpha, RGB, RGBA), of a PNG or TIFF; None if it can't be decoded.

    A TIFF is turned as it asks to be; a PNG is as it is stored.
    """
    import cv2  # 0.2 s, for files that are rare

    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if pixels is None or pixels.dtype != np.uint16:
        return None
    if pixels.ndim == 2:
        return np.ascontiguousarray(pixels[:, :, None], dtype=np.uint16)
    if pixels.shape[2] == 4 and is_png16(data) and data[25] in (0, 4):  # grey, which OpenCV widens to give it alpha
        return np.ascontiguousarray(pixels[:, :, [0, 3]], dtype=np.uint16)
    return np.ascontiguousarray(pixels[:, :, [2, 1, 0, *range(3, pixels.shape[2])]], dtype=np.uint16)  # it reads BGR


def encode_png16(pixels_HWC: NDArray[np.uint16], *, icc_profile: bytes | None, exif: bytes | None) -> bytes:
    """A PNG of uint16 H×W×C, C as above, with a colour profile and an EXIF block (TIFF structure) if given."""
    height, width, channels = pixels_HWC.shape
    header = struct.pack(">IIBBBBB", width, height, 16, _COLOUR_TYPE[channels], 0, 0, 0)
    target = io.BytesIO()
    target.write(_SIGNATURE + _chunk(b"IHDR", header))
    if icc_profile is not None:
        target.write(_chunk(b"iCCP", b"ICC Profile\x00\x00" + zlib.compress(icc_profile)))
    if exif is not None:
        target.write(_chunk(b"eXIf", exif.removeprefix(b"Exif\x00\x00")))
    compressor = zlib.compressobj(6)
    above = np.zeros((1, 2 * width * channels), np.uint8)
    band_rows = max(1, _BAND_BYTES // above.size)
    for start in range(0, height, band_rows):  # in bands: the rest of what is written may be gigabytes
        band = np.ascontiguousarray(pixels_HWC[start : start + band_rows], dtype=">u2").view(np.uint8)
        rows = band.reshape(len(band), -1)
        filtered = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
        filtered[:, 0] = _UP
        np.subtract(rows, np.concatenate([above, rows[:-1]]), out=filtered[:, 1:])  # modulo 256, as the filter is
        above = rows[-1:]
        if compressed := compressor.compress(filtered.data):
            target.write(_chunk(b"IDAT", compressed))
    target.write(_chunk(b"IDAT", compressor.flush()) + _chunk(b"IEND", b""))
    return target.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
