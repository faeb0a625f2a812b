"""Every kind of file becomes the RGB image that it shows, or an error that names it."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sr_data import decode
from sr_data.decode import decode_image, encode_png
from sr_data.errors import ImageError

RNG = np.random.default_rng(0)
RGB_HWC = RNG.integers(0, 256, (20, 30, 3), np.uint8)
GREY_HW = RGB_HWC[:, :, 0]
ALPHA_HW = RNG.integers(0, 2, (20, 30), np.uint8) * 200
GREY_HWC = np.repeat(GREY_HW[:, :, None], 3, 2)


def file_of(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, file_format, **options)
    return target.getvalue()


def png_16_bit(pixels_HWC: NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits per colour, which Pillow reads and can't write: section 11.2.2 of the PNG specification."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = pixels_HWC.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels_HWC)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def palette_image() -> tuple[Image.Image, NDArray[np.uint8]]:
    image = Image.fromarray(RGB_HWC).quantize(16)
    return image, np.asarray(image.convert("RGB"))


SIXTEEN_BITS = GREY_HW.astype(np.uint16) * 256 + 77


@pytest.mark.parametrize(
    ("data", "expected_HWC", "mode", "notes"),
    [
        (file_of(Image.fromarray(RGB_HWC)), RGB_HWC, "RGB", ()),
        (file_of(Image.fromarray(GREY_HW)), GREY_HWC, "L", ("grey to RGB",)),
        (
            file_of(Image.fromarray(np.dstack([GREY_HW, ALPHA_HW]))),
            GREY_HWC,
            "LA",
            ("grey to RGB", "alpha dropped"),
        ),
        (file_of(Image.fromarray(np.dstack([RGB_HWC, ALPHA_HW]))), RGB_HWC, "RGBA", ("alpha dropped",)),
        (file_of(palette_image()[0]), palette_image()[1], "P", ("palette to RGB",)),
        (
            file_of(palette_image()[0], transparency=3),
            palette_image()[1],
            "P",
            ("palette to RGB", "alpha dropped"),
        ),
        (file_of(Image.fromarray(SIXTEEN_BITS)), GREY_HWC, "I;16", ("grey to RGB", "16-bit to 8-bit")),
        (file_of(Image.fromarray(SIXTEEN_BITS), "TIFF"), GREY_HWC, "I;16", ("grey to RGB", "16-bit to 8-bit")),
        (png_16_bit(RGB_HWC.astype(np.uint16) * 256 + 200), RGB_HWC, "RGB;16", ("16-bit to 8-bit",)),
        (
            file_of(Image.fromarray(GREY_HW > 99)),
            np.repeat(((GREY_HW > 99) * np.uint8(255))[:, :, None], 3, 2),
            "1",
            ("black and white to RGB",),
        ),
        (
            file_of(Image.fromarray(RGB_HWC).convert("CMYK"), "TIFF"),
            RGB_HWC,
            "CMYK",
            ("CMYK to RGB",),
        ),
    ],
    ids=["RGB", "grey", "LA", "RGBA", "palette", "palette-alpha", "grey16", "grey16-tiff", "rgb16", "1", "CMYK"],
)
def test_modes(data: bytes, expected_HWC: NDArray[np.uint8], mode: str, notes: tuple[str, ...]) -> None:
    image_HWC, facts = decode_image(data, name="x")
    np.testing.assert_array_equal(image_HWC, expected_HWC)
    assert image_HWC.dtype == np.uint8
    assert image_HWC.flags.c_contiguous
    assert (facts.width, facts.height, facts.mode, facts.notes) == (30, 20, mode, notes)
    assert set(notes) <= set(decode.CONVERSIONS)


def test_a_photo_held_sideways_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by a quarter clockwise to show
    image_HWC, facts = decode_image(file_of(Image.fromarray(RGB_HWC), exif=exif), name="x")
    np.testing.assert_array_equal(image_HWC, np.rot90(RGB_HWC, -1))
    assert (facts.width, facts.height, facts.notes) == (20, 30, ("EXIF rotation applied",))


def test_of_an_animation_the_first_frame_is_taken() -> None:
    first, second = Image.fromarray(RGB_HWC).quantize(8), Image.fromarray(255 - RGB_HWC).quantize(8)
    image_HWC, facts = decode_image(file_of(first, "GIF", save_all=True, append_images=[second]), name="x")
    np.testing.assert_array_equal(image_HWC, np.asarray(first.convert("RGB")))
    assert "first of several frames taken" in facts.notes


def test_jpeg_keeps_its_format() -> None:
    assert decode_image(file_of(Image.fromarray(RGB_HWC), "JPEG"), name="x")[1].format == "JPEG"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"hello, this is a note\n", "not an image; it begins with the text 'hello, this is a note"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (bytes(range(128, 228)), "begins with bytes 80 81"),
        (file_of(Image.fromarray(RGB_HWC))[:-300], "truncated or damaged"),
        (file_of(Image.fromarray(RGB_HWC), "JPEG")[:-200], "truncated or damaged"),
        (file_of(Image.fromarray(RGB_HWC))[:20], ""),
        (file_of(Image.new("F", (4, 4)), "TIFF"), "'F'"),
    ],
    ids=["empty", "text", "lfs", "binary", "cut-png", "cut-jpeg", "cut-header", "float"],
)
def test_what_is_not_a_whole_image_is_refused_by_name(data: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=f"^s3://b/x.png: .*{says}"):
        decode_image(data, name="s3://b/x.png")


def test_every_truncation_of_a_png_is_noticed() -> None:
    data = file_of(Image.fromarray(RGB_HWC))
    for num_bytes in range(0, len(data) - 16, 37):  # the last 16 bytes hold no pixels
        with pytest.raises(ImageError, match=r"^x: "):
            decode_image(data[:num_bytes], name="x")


def test_a_flipped_bit_in_a_png_is_noticed() -> None:
    data = bytearray(file_of(Image.fromarray(RGB_HWC)))
    data[len(data) // 2] ^= 1
    with pytest.raises(ImageError, match="damaged"):
        decode_image(bytes(data), name="x")


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 500)
    with pytest.raises(ImageError, match="x: 30 x 20 px are more"):
        decode_image(file_of(Image.fromarray(RGB_HWC)), name="x")
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = bytearray(file_of(Image.fromarray(RGB_HWC)))
    data[16:29] = header
    data[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(ImageError, match=r"^x: "):
        decode_image(bytes(data), name="x")


def test_png_round_trip_of_a_view() -> None:
    view_HWC = RGB_HWC[::-1, 3:17]
    data = encode_png(view_HWC)
    np.testing.assert_array_equal(decode_image(data, name="x")[0], view_HWC)
    assert encode_png(view_HWC.copy()) == data
