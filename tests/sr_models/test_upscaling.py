"""Files through a network: what is in them stays what it is."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.errors import ImageFileError
from sr_models.image_file import read_picture
from sr_models.inference import upscale_image
from sr_models.upscaling import upscale_alpha, upscale_file, upscale_picture

MODEL = build_model(EDSRConfig(scale=2, num_blocks=1, num_channels=4), seed=0)


def file_of(pixels):
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def photo(*shape):
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def test_colours_are_the_networks_and_alpha_is_kept_beside_them():
    pixels = photo(12, 10, 4)
    picture = read_picture(upscale_file(MODEL, file_of(pixels), name="it"), name="it")
    assert np.array_equal(picture.colour_HWC, upscale_image(MODEL, pixels[:, :, :3]))
    assert np.array_equal(picture.alpha_HW, upscale_alpha(pixels[:, :, 3], 2))


def test_grey_is_the_mean_of_the_three_and_stays_one():
    pixels = photo(12, 10)
    picture = read_picture(upscale_file(MODEL, file_of(pixels), name="it"), name="it")
    rgb_HWC = upscale_image(MODEL, np.dstack([pixels] * 3))
    assert picture.colour_HWC.shape == (24, 20, 1)
    assert np.abs(picture.colour_HWC[:, :, 0] - rgb_HWC.astype(float).mean(2)).max() <= 0.5


def test_16_bits_are_those_of_the_network():
    shallow = read_picture(file_of(photo(12, 10, 3)), name="it")
    deep = replace(shallow, colour_HWC=shallow.colour_HWC.astype(np.uint16) * 257)
    sixteen, eight = (upscale_picture(MODEL, picture).colour_HWC for picture in (deep, shallow))
    assert np.abs(sixteen / 257.0 - eight).max() <= 0.51
    assert np.any(sixteen % 257), "finer than 8 bits"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_is_as_torch_interpolates_it_whatever_the_bands(dtype, monkeypatch):
    alpha_HW = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (70, 9), dtype)
    whole = upscale_alpha(alpha_HW, 3)
    monkeypatch.setattr("sr_models.upscaling._BAND_PX", 16)
    in_bands = upscale_alpha(alpha_HW, 3)
    assert np.abs(in_bands.astype(int) - whole).max() <= np.iinfo(dtype).max // 65535, "float32's rounding, of 16 bits"
    resized = Image.fromarray(alpha_HW.astype(np.float32)).resize((27, 210), Image.Resampling.BICUBIC)  # Pillow: a=-0.5
    expected = np.clip(np.asarray(resized), 0, np.iinfo(dtype).max)
    assert np.abs(whole - expected).max() <= 0.51 + 1e-5 * np.iinfo(dtype).max, "float32 weights"


def test_what_is_opaque_stays_opaque():
    assert np.all(upscale_alpha(np.full((5, 4), 255, np.uint8), 4) == 255)
    half = np.full((20, 20), 255, np.uint8)
    half[:, :10] = 0
    larger = upscale_alpha(half, 2)
    assert np.all(larger[:, :16] == 0)
    assert np.all(larger[:, 24:] == 255)


@pytest.mark.parametrize(
    ("pixels", "file_format", "message"),
    [(photo(4, 4, 4), "JPEG", "transparency"), (photo(1, 9_000, 3), "WEBP", "18000 x 2 px can't be written as WEBP")],
)
def test_what_can_not_be_written_is_said_before_it_is_computed(pixels, file_format, message):
    class Unused(torch.nn.Module):
        config = MODEL.config

        def forward(self, lr_NCHW):
            raise AssertionError("computed")

    with pytest.raises(ImageFileError, match=message):
        upscale_file(Unused(), file_of(pixels), name="it", format=file_format)


def test_options_reach_the_network():
    file = file_of(photo(20, 18, 3))
    plain = upscale_file(MODEL, file, name="it")
    assert upscale_file(MODEL, file, name="it", self_ensemble=True) != plain
    assert upscale_file(MODEL, file, name="it", autocast=torch.bfloat16) != plain
    assert upscale_file(MODEL, file, name="it", format="JPEG")[:2] == b"\xff\xd8"
