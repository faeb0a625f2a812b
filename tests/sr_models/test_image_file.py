"""Image files of every kind: what is read of them, what survives writing, what is refused."""

import io
import itertools
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from sr_models.errors import ImageFileError
from sr_models.image_file import output_format, read_picture, target_name, write_picture

RNG = np.random.default_rng(0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ORIENTATION, MAKER, EXIF_IFD, WIDTH, LENS = 274, 271, 34665, 40962, 42036


def levels(*shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def saved(image, file_format="PNG", **options):
    target = io.BytesIO()
    image.save(target, file_format, **options)
    return target.getvalue()


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def written_again(data, file_format="PNG"):
    return write_picture(read_picture(data, name="it"), format=file_format)


@pytest.mark.parametrize(
    ("file_format", "shape"),
    [*itertools.product(["PNG", "TIFF"], [(7, 9), (7, 9, 2), (7, 9, 3), (7, 9, 4)]), ("WEBP", (7, 9, 3))],
)
def test_8_bits_come_back_as_they_were(file_format, shape):
    pixels = levels(*shape)
    options = {"lossless": True} if file_format == "WEBP" else {}
    again = opened(written_again(saved(Image.fromarray(pixels), file_format, **options)))
    assert np.array_equal(np.asarray(again), pixels)


@pytest.mark.parametrize("num_channels", [1, 2, 3, 4])
def test_16_bits_come_back_as_they_were(num_channels):
    pixels = levels(7, 9, num_channels, dtype=np.uint16)
    file = png16(pixels)
    picture = read_picture(file, name="it")
    assert (picture.colour_HWC.dtype, picture.colour_HWC.shape[2]) == (np.uint16, 3 if num_channels > 2 else 1)
    again = written_again(file)
    assert again[24] == 16
    assert again[25] == {1: 0, 2: 4, 3: 2, 4: 6}[num_channels], "the colour type of the PNG specification"
    decoded = cv2.imdecode(np.frombuffer(again, np.uint8), cv2.IMREAD_UNCHANGED)
    expected = {1: [0], 2: [0, 0, 0, 1], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[num_channels]  # OpenCV's order
    assert np.array_equal(decoded.reshape(7, 9, -1), pixels[:, :, expected])


def test_16_bit_tiff_becomes_a_16_bit_png():
    pixels = levels(5, 6, 3, dtype=np.uint16)
    _, file = cv2.imencode(".tif", pixels[:, :, ::-1])
    picture = read_picture(file.tobytes(), name="it")
    assert np.array_equal(picture.colour_HWC, pixels)
    assert write_picture(picture, format=output_format(picture.format))[24] == 16


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_exif_orientation_is_applied_once(orientation, deep):
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKER] = orientation, "ACME"
    exif.get_ifd(EXIF_IFD).update({WIDTH: 6, LENS: "50 mm"})
    pixels = levels(4, 6, 3, dtype=np.uint16) if deep else levels(4, 6, 3)
    upper = (pixels >> 8).astype(np.uint8) if deep else pixels
    expected = np.asarray(ImageOps.exif_transpose(opened(saved(Image.fromarray(upper), exif=exif))))
    file = png16(pixels, exif=exif.tobytes()) if deep else saved(Image.fromarray(pixels), exif=exif)
    again = opened(written_again(file))
    assert np.array_equal(np.asarray(again), expected)
    tags = again.getexif()
    assert tags.get(ORIENTATION, 1) == 1
    assert tags[MAKER] == "ACME"
    assert tags.get_ifd(EXIF_IFD) == {LENS: "50 mm"}, "what is no longer true is gone"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["grey", "grey 16", "grey alpha", "RGB", "RGB 16", "palette"])
def test_a_tiff_is_turned_once_whoever_decodes_it(orientation, kind):
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKER] = orientation, "ACME"
    upright = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
               6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}  # fmt: skip
    shape = {"grey": (4, 6), "grey 16": (4, 6), "grey alpha": (4, 6, 2)}.get(kind, (4, 6, 3))
    pixels = levels(*shape, dtype=np.uint16 if "16" in kind else np.uint8)
    if kind == "RGB 16":
        file = cv2.imencode(".tif", pixels[:, :, ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 1])[1].tobytes()
        file = with_tiff_orientation(file, orientation)
    else:
        image = Image.fromarray(pixels)
        image = image.quantize(8) if kind == "palette" else image
        pixels = np.asarray(image.convert("RGB")) if kind == "palette" else pixels
        file = saved(image, "TIFF", exif=exif)
    picture = read_picture(file, name="it")
    planes = picture.colour_HWC if picture.alpha_HW is None else np.dstack([picture.colour_HWC, picture.alpha_HW])
    expected = upright[orientation](pixels)
    assert np.array_equal(planes.reshape(expected.shape), expected)
    if kind != "RGB 16":
        tags = opened(write_picture(picture, format="PNG")).getexif()
        assert dict(tags) == {MAKER: "ACME"}, "nothing of how the TIFF was stored"


def with_tiff_orientation(file, orientation):
    """OpenCV writes none: its number of planes, always 1, becomes one (tag 284, little-endian, short)."""
    entry = struct.pack("<HHI", 284, 3, 1)
    start = file.index(entry)
    moved = struct.pack("<HHIHH", ORIENTATION, 3, 1, orientation, 0)
    count = struct.unpack("<H", file[(first := struct.unpack("<I", file[4:8])[0]) : first + 2])[0]
    entries = [file[first + 2 + 12 * i : first + 14 + 12 * i] for i in range(count)]
    entries = sorted(moved if first + 2 + 12 * i == start else entry for i, entry in enumerate(entries))
    entries.sort(key=lambda entry: struct.unpack("<H", entry[:2]))
    return file[: first + 2] + b"".join(entries) + file[first + 2 + 12 * count :]


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_profile_and_exif_survive_in_every_format(file_format):
    exif = Image.Exif()
    exif[MAKER] = "ACME"
    file = saved(Image.fromarray(levels(8, 8, 3)), file_format, icc_profile=SRGB, exif=exif)
    again = opened(written_again(file, file_format))
    assert again.format == file_format
    assert again.info["icc_profile"] == SRGB
    assert again.getexif()[MAKER] == "ACME"


def test_the_profile_of_16_bits_survives():
    again = written_again(png16(levels(4, 4, 3, dtype=np.uint16), icc_profile=SRGB))
    assert opened(again).info["icc_profile"] == SRGB


def test_rarer_kinds():
    grey = levels(6, 5)
    palette = Image.fromarray(levels(6, 5, 3)).quantize(8)
    picture = read_picture(saved(palette), name="it")
    assert np.array_equal(picture.colour_HWC, np.asarray(palette.convert("RGB")))
    bilevel = Image.fromarray(grey).convert("1")
    assert np.array_equal(read_picture(saved(bilevel), name="it").colour_HWC[:, :, 0], np.asarray(bilevel) * 255)
    see_through = read_picture(saved(Image.fromarray(grey), transparency=int(grey[0, 0])), name="it")
    assert np.array_equal(see_through.colour_HWC[:, :, 0], grey)
    assert np.array_equal(see_through.alpha_HW, np.where(grey == grey[0, 0], 0, 255))
    cmyk = Image.fromarray(levels(6, 5, 4), "CMYK")
    assert read_picture(saved(cmyk, "TIFF"), name="it").colour_HWC.shape == (6, 5, 3)
    frames = [Image.fromarray(levels(6, 5)) for _ in range(2)]
    animated = read_picture(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), name="it")
    assert np.array_equal(animated.colour_HWC[:, :, 0], np.asarray(frames[0]))


def test_a_jpeg_with_more_pictures_behind_the_first_is_a_jpeg():
    first, second = (Image.fromarray(levels(8, 8, 3)) for _ in range(2))
    picture = read_picture(saved(first, "MPO", save_all=True, append_images=[second]), name="it")
    assert (picture.format, picture.colour_HWC.shape) == ("JPEG", (8, 8, 3))


def test_kinds_that_run_programs_are_not_opened():
    with pytest.raises(ImageFileError, match="of a kind that can't be read"):
        read_picture(saved(Image.new("RGB", (4, 4)), "EPS"), name="x.eps")


def test_16_bits_of_more_than_one_band(monkeypatch):
    monkeypatch.setattr("sr_models.png16._BAND_BYTES", 1000)
    pixels = levels(60, 50, 3, dtype=np.uint16)
    again = written_again(png16(pixels))
    assert again.count(b"IDAT") > 1
    assert np.array_equal(read_picture(again, name="it").colour_HWC, pixels)


def test_a_grey_jpeg_stays_grey_and_close():
    smooth = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8) * 4
    again = opened(written_again(saved(Image.fromarray(smooth), "JPEG", quality=95), "JPEG"))
    assert again.mode == "L"
    assert np.abs(np.asarray(again).astype(int) - smooth).max() <= 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x.png: the file is empty"),
        (b"a letter", "x.png: is not an image"),
        (saved(Image.new("RGB", (40, 40)))[:-30], "x.png: the image is truncated or damaged"),
        (saved(Image.fromarray(levels(4, 4).astype(np.float32)), "TIFF"), "x.png: pixels of kind 'F'"),
        (saved(Image.new("RGB", (40, 30))), "x.png: 40 x 30 px are more than 0.001 Mpx"),
    ],
)
def test_what_can_not_be_read_is_said(data, message):
    with pytest.raises(ImageFileError, match=message):
        read_picture(data, name="x.png", max_mpx=0.001 if "Mpx" in message else 64)


@pytest.mark.parametrize("side", [30_000, 2**31 - 1])
def test_a_bomb_is_refused_by_its_header(side):
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99)))]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    with pytest.raises(ImageFileError, match="bomb.png: .*(Mpx|pixels)"):
        read_picture(bomb, name="bomb.png")


@pytest.mark.parametrize("cut", [60, 400])
def test_truncated_16_bits_are_refused(cut):
    file = png16(levels(40, 40, 3, dtype=np.uint16))
    with pytest.raises(ImageFileError, match=r"x\.png: the image is truncated or damaged"):
        read_picture(file[:cut], name="x.png")


@pytest.mark.parametrize(
    ("pixels", "file_format", "message"),
    [
        (levels(4, 4, 4), "JPEG", "transparency"),
        (levels(4, 4, 3, dtype=np.uint16), "WEBP", "16 bits"),
        (levels(4, 4, 3), "GIF", "'GIF' can't be written; allowed are PNG, JPEG, WEBP"),
        (levels(1, 17_000, 3), "WEBP", "17000 x 1 px can't be written as WEBP, which ends at 16383"),
    ],
)
def test_nothing_is_lost_in_silence(pixels, file_format, message):
    file = png16(pixels) if pixels.dtype == np.uint16 else saved(Image.fromarray(pixels))
    with pytest.raises(ImageFileError, match=message):
        written_again(file, file_format)


@pytest.mark.parametrize(
    ("source", "file_format", "target"),
    [
        ("a/b.jpg", None, "a/b.jpg"),
        ("a/b.JPEG", None, "a/b.JPEG"),
        ("a/b.tif", None, "a/b.png"),
        ("a.b/c.bmp", None, "a.b/c.png"),
        ("a/b.jpeg", "JPEG", "a/b.jpeg"),
        ("a/b.png", "JPEG", "a/b.jpg"),
        ("a/b.jpg", "WEBP", "a/b.webp"),
    ],
)
def test_names_of_what_is_made(source, file_format, target):
    assert target_name(source, file_format) == target


def png16(pixels_HWC, *, exif=None, icc_profile=None):
    """Written by OpenCV, with chunks added; grey with alpha, which it can't write, by the specification."""
    height, width, channels = pixels_HWC.shape
    if channels == 2:
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels_HWC)
        body = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 4, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    else:
        order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
        file = cv2.imencode(".png", pixels_HWC[:, :, order])[1].tobytes()
        body = [(b"IHDR", file[16:29]), (b"", file[33:-12])]
    extra = []
    if icc_profile is not None:
        extra.append((b"iCCP", b"x\0\0" + zlib.compress(icc_profile)))
    if exif is not None:
        extra.append((b"eXIf", exif.removeprefix(b"Exif\0\0")))
    written = b"\x89PNG\r\n\x1a\n"
    for kind, data in [body[0], *extra, *body[1:], (b"IEND", b"")]:
        whole = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        written += whole if kind else data
    return written
