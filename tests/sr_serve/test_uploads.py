"""What is taken of an upload, and what is said about what is not."""

import asyncio
import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sr_serve.messages import RefusedError
from sr_serve.uploads import MAX_SCANS, UploadLimits, count_scans, read_header, read_upload, wanted

LIMITS = UploadLimits(max_mb=0.01, max_mpx=0.01, upload_timeout_s=60)


class Client:
    """Sends chunks, and knows how many were read."""

    def __init__(self, *chunks, pause_s=0.0):
        self.chunks, self.pause_s, self.num_read = chunks, pause_s, 0

    async def __aiter__(self):
        for chunk in self.chunks:
            await asyncio.sleep(self.pause_s)
            self.num_read += 1
            yield chunk


def upload(client, declared=None, limits=LIMITS):
    return asyncio.run(read_upload(aiter(client), declared=declared, limits=limits))


def refusal(call, *arguments, **options):
    with pytest.raises(RefusedError) as raised:
        call(*arguments, **options)
    return raised.value.refusal


def test_an_upload_up_to_the_limit_comes_whole():
    assert upload(Client(b"a" * 4000, b"", b"b" * 6000), declared="10000") == b"a" * 4000 + b"b" * 6000


@pytest.mark.parametrize("declared", [None, "5", "10001", "99999999999999999999999"])
def test_too_large_an_upload_is_refused_whatever_it_declares_and_not_read_to_its_end(declared):
    client = Client(*[b"x" * 1000] * 1000)
    refused = refusal(upload, client, declared)
    assert (refused.status, refused.code) == (413, "too_large")
    assert "0.01 MB" in refused.message
    # A little more than the limit, so that an ordinary client gets to read the answer.
    assert client.num_read == 40


def test_a_slow_client_is_given_up():
    limits = replace(LIMITS, upload_timeout_s=0.2)
    refused = refusal(upload, Client(*[b"x"] * 1000, pause_s=0.01), limits=limits)
    assert (refused.status, refused.code) == (408, "too_slow")
    assert "0.2 s" in refused.message


def test_an_empty_body_is_refused():
    assert refusal(upload, Client(b""), "0").status == 400


def encoded(file_format, size=(40, 30), **options):
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    target = io.BytesIO()
    Image.fromarray(levels).save(target, file_format, **options)
    return target.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(extra, *, size=(40, 30)):
    """A PNG whose header is followed by the chunk `extra`."""
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    return start + extra + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_an_image_is_known_by_its_first_bytes(file_format):
    header = read_header(encoded(file_format), limits=LIMITS)
    assert (header.format, header.width_px, header.height_px) == (file_format, 40, 30)


ZEROS = zlib.compress(b"\0" * 50_000_000, 9)
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (40, 30), (level, 0, 0)) for level in (9, 99)]}


@pytest.mark.parametrize(
    ("data", "status", "code", "words"),
    [
        (b"hello world", 415, "not_an_image", "not an image; JPEG, PNG and WebP"),
        (encoded("GIF"), 415, "not_an_image", "a GIF"),
        (encoded("BMP"), 415, "not_an_image", "a BMP"),
        (b"%PDF-1.7", 415, "not_an_image", "a PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", 415, "not_an_image", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", 415, "not_an_image", "a video"),
        (b'--x\r\nContent-Disposition: form-data; name="file"', 415, "not_an_image", "--data-binary"),
        (png_with(b"", size=(101, 100)), 413, "too_many_pixels", "101 x 100 px (0.0 Mpx); up to 0.01 Mpx"),
        (png_with(b"", size=(2**31 - 1, 2**31 - 1)), 413, "too_many_pixels", "any limit"),
        (png_with(b"", size=(40, 0)), 422, "damaged", "PNG"),
        (png_with(chunk(b"iCCP", b"p\0\0" + ZEROS)), 422, "damaged", "PNG"),
        (png_with(chunk(b"zTXt", b"k\0\0" + ZEROS)), 422, "damaged", "PNG"),
        (encoded("PNG")[:20], 422, "damaged", "PNG"),
        (encoded("JPEG")[:40], 422, "damaged", "JPEG"),
        (encoded("WEBP")[:40], 422, "damaged", "WebP"),
        (b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\xff" * 50, 422, "damaged", "WebP"),
        (encoded("PNG", **FRAMES), 422, "animated", "3 pictures"),
        (encoded("WEBP", **FRAMES), 422, "animated", "3 pictures"),
    ],
)
def test_what_can_be_seen_in_the_first_bytes_is_refused_before_anything_is_decoded(data, status, code, words):
    refused = refusal(read_header, data, limits=LIMITS)
    assert (refused.status, refused.code) == (status, code), refused
    assert words in refused.message


def jpeg_with_scans(num_more):
    """A progressive JPEG whose last scan comes `num_more` times more; a decoder goes over the image for each."""
    data = encoded("JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * num_more + data[-2:]


def test_a_jpeg_of_many_scans_is_refused_whatever_else_is_in_it():
    ordinary = count_scans(encoded("JPEG", progressive=True))
    assert 5 < ordinary < 20 and count_scans(encoded("JPEG")) == 1
    most = MAX_SCANS - ordinary
    noise = b"\xff\xda" * 200  # in a profile, or a film behind the photo
    allowed = jpeg_with_scans(most)
    allowed = allowed[:2] + b"\xff\xe4\x01\x92" + noise + allowed[2:] + noise
    assert read_header(allowed, limits=LIMITS).format == "JPEG"
    refused = refusal(read_header, jpeg_with_scans(most + 1), limits=LIMITS)
    assert (refused.status, refused.code) == (422, "too_many_scans") and f"up to {MAX_SCANS}" in refused.message


def test_a_second_picture_behind_a_photo_is_left_alone():
    """As phones write them (CIPA DC-007)."""
    data = encoded("MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    assert read_header(data, limits=LIMITS).format == "JPEG"


@pytest.mark.parametrize(
    ("accept", "output", "as_json", "file_format"),
    [
        (None, None, False, None),
        ("*/*", None, False, None),
        ("application/json", None, True, None),
        ("Application/JSON; charset=utf-8", None, True, None),
        ("application/json, image/png", None, False, "PNG"),
        ("application/json;q=0.9, image/png;q=0.5", None, True, "PNG"),
        ("application/json;q=0.9, */*", None, False, None),
        ("application/json", "image", False, None),
        ("image/webp", "json", True, "WEBP"),
        ("image/avif,image/webp,image/png,image/*;q=0.8,*/*;q=0.5", None, False, "PNG"),
        ("image/webp;q=0.3, image/jpeg;q=0.4", None, False, "JPEG"),
        ("image/png;q=nonsense", None, False, None),
    ],
)
def test_the_accept_header_says_json_or_image_and_which(accept, output, as_json, file_format):
    assert wanted(accept, output) == (as_json, file_format)
