"""The resize against LR files that MATLAB wrote, and against properties that hold for any correct kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sr_data.errors import DataError
from sr_data.resize import crop_to_multiple, downscale_bicubic, imresize, upscale_bicubic


def pixels(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_reproduces_every_lr_file_of_set5_bit_for_bit(shared_data: Path, scale: int) -> None:
    hr_paths = sorted((shared_data / "Set5/HR").glob("*.png"))
    assert len(hr_paths) == 5
    for hr_path in hr_paths:
        official = pixels(shared_data / f"Set5/LR_bicubic/X{scale}/{hr_path.stem}x{scale}.png")
        ours = downscale_bicubic(crop_to_multiple(pixels(hr_path), scale), scale)
        np.testing.assert_array_equal(ours, official, err_msg=hr_path.name)


def test_reproduces_the_official_lr_file_of_div2k_bit_for_bit(shared_data: Path) -> None:
    hr_HWC = pixels(shared_data / "DIV2K/DIV2K_train_HR/0004.png")
    official = pixels(shared_data / "DIV2K/DIV2K_train_LR_bicubic/X2/0004x2.png")
    np.testing.assert_array_equal(downscale_bicubic(hr_HWC, 2), official)


@pytest.mark.parametrize(("scale", "expected_db"), [(2, 33.66), (3, 30.39), (4, 28.42)])
def test_upscale_gives_the_published_bicubic_psnr_of_set5(shared_data: Path, scale: int, expected_db: float) -> None:
    """33.66 / 30.39 / 28.42 dB: table 2 of the EDSR paper and others; BT.601 Y, `scale` border pixels left out."""

    def luma(image_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
        y = image_HWC / 255.0 @ np.array([65.481, 128.553, 24.966]) + 16.0
        return y[scale:-scale, scale:-scale]

    psnr_db = []
    for hr_path in sorted((shared_data / "Set5/HR").glob("*.png")):
        hr_HWC = crop_to_multiple(pixels(hr_path), scale)
        lr_HWC = pixels(shared_data / f"Set5/LR_bicubic/X{scale}/{hr_path.stem}x{scale}.png")
        error = luma(upscale_bicubic(lr_HWC, scale)) - luma(hr_HWC)
        psnr_db.append(20 * np.log10(255.0) - 10 * np.log10((error**2).mean()))
    assert np.mean(psnr_db) == pytest.approx(expected_db, abs=0.02)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
def test_a_constant_image_stays_constant_up_and_down(scale: int, level: int) -> None:
    image_HWC = np.full((4 * scale, 5 * scale, 3), level, np.uint8)
    assert (downscale_bicubic(image_HWC, scale) == level).all()
    assert (upscale_bicubic(image_HWC, scale) == level).all()


def test_does_not_depend_on_a_transpose_or_a_mirror_image() -> None:
    noise_HWC = np.random.default_rng(0).random((24, 36, 3))
    small = imresize(noise_HWC, output_height=8, output_width=12)
    turned = imresize(noise_HWC.swapaxes(0, 1), output_height=12, output_width=8)
    np.testing.assert_allclose(turned.swapaxes(0, 1), small, atol=1e-12)
    mirrored = imresize(noise_HWC[:, ::-1], output_height=8, output_width=12)
    np.testing.assert_allclose(mirrored[:, ::-1], small, atol=1e-12)


def test_one_tap_per_distance_matches_keys_kernel() -> None:
    """A unit impulse enlarged twice shows the kernel at odd quarters, from eq. 15 of Keys (1981) with a = -1/2."""
    impulse_HWC = np.zeros((1, 9, 1))
    impulse_HWC[0, 4, 0] = 1
    enlarged = imresize(impulse_HWC, output_height=1, output_width=18)[0, :, 0]
    quarters = np.array([1.75, 1.25, 0.75, 0.25])
    kernel = np.where(
        quarters <= 1,
        1.5 * quarters**3 - 2.5 * quarters**2 + 1,
        -0.5 * quarters**3 + 2.5 * quarters**2 - 4 * quarters + 2,
    )
    np.testing.assert_allclose(enlarged[5:13], [*kernel, *kernel[::-1]], atol=1e-12)


def test_uint8_overshoot_is_clipped_and_float_overshoot_is_kept() -> None:
    edge_HWC = np.zeros((1, 8, 1))
    edge_HWC[:, 4:] = 255
    assert imresize(edge_HWC, output_height=2, output_width=16).max() > 255
    clipped = imresize(edge_HWC.astype(np.uint8), output_height=2, output_width=16)
    assert clipped.dtype == np.uint8 and clipped.max() == 255 and clipped.min() == 0


def test_crop_keeps_the_origin() -> None:
    image_HWC = np.arange(7 * 9 * 3, dtype=np.uint8).reshape(7, 9, 3)
    np.testing.assert_array_equal(crop_to_multiple(image_HWC, 4), image_HWC[:4, :8])


@pytest.mark.parametrize(
    ("image_HWC", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4), np.uint8), r"\(4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), "non-empty"),
    ],
)
def test_refuses_what_matlab_would_treat_differently(image_HWC: NDArray[np.generic], message: str) -> None:
    with pytest.raises(DataError, match=message):
        imresize(image_HWC, output_height=2, output_width=2)


def test_downscale_refuses_a_size_that_the_scale_does_not_divide() -> None:
    with pytest.raises(DataError, match="9 x 8 px.*scale=4"):
        downscale_bicubic(np.zeros((8, 9, 3), np.uint8), 4)
