"""PSNR and SSIM against hand calculation, scikit-image and published numbers."""

import math

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from sr_data.resize import crop_to_multiple, imresize, upscale_bicubic
from sr_train.metrics import PAPERS_PROTOCOL, PROTOCOLS, MetricError, luma, psnr, score_image, ssim


def noise(height=40, width=52, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def noisy(image, sigma, seed=1):
    return np.clip(image + np.random.default_rng(seed).normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [
        # ITU-R BT.601: black is 16 and white 235; the primaries' weights are 65.481, 128.553, 24.966.
        ((0, 0, 0), 16.0),
        ((255, 255, 255), 235.0),
        ((255, 0, 0), 81.481),
        ((0, 255, 0), 144.553),
        ((0, 0, 255), 40.966),
    ],
)
def test_luma_is_bt601_and_not_rounded(rgb, expected):
    assert luma(np.array([[rgb]], np.uint8)).item() == pytest.approx(expected, abs=1e-9)


def test_psnr_of_a_constant_difference_is_the_formula():
    zeros = np.zeros((5, 5))
    assert psnr(zeros, zeros + 1) == pytest.approx(20 * math.log10(255))
    assert psnr(zeros, zeros + 255) == pytest.approx(0.0)
    assert psnr(zeros, zeros) == math.inf


@pytest.mark.parametrize("sigma", [0.5, 5, 60])
def test_ssim_is_that_of_scikit_image_on_the_valid_region(sigma):
    first, second = (luma(image) for image in (noise(), noisy(noise(), sigma)))
    _, everywhere = structural_similarity(
        first, second, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    assert ssim(first, second) == pytest.approx(everywhere[5:-5, 5:-5].mean(), abs=1e-12)


def test_ssim_of_equal_images_is_one():
    assert ssim(luma(noise()), luma(noise())) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("protocol", "crop_px", "channels"),
    [("psnr@y,crop=scale", 3, "y"), ("psnr@rgb,crop=scale", 3, "rgb"), ("psnr@rgb,crop=scale+6", 9, "rgb")],
)
def test_a_protocol_scores_only_what_lies_inside_its_crop(protocol, crop_px, channels):
    hr_HWC = noise()
    border = hr_HWC.copy()
    border[:crop_px], border[:, -crop_px:] = 0, 255
    inside = score_image(border, hr_HWC, scale=3, protocol=protocol)
    assert inside.psnr_db == math.inf
    assert inside.ssim == pytest.approx(1.0)
    border = hr_HWC.copy()
    border[crop_px, crop_px] ^= 255
    assert score_image(border, hr_HWC, scale=3, protocol=protocol).psnr_db < math.inf
    red_only = hr_HWC.copy()
    red_only[..., 0] ^= 1
    num_pixels_error = (65.481 / 255) ** 2 if channels == "y" else 1 / 3
    scored = score_image(red_only, hr_HWC, scale=3, protocol=protocol)
    assert scored.psnr_db == pytest.approx(10 * math.log10(255**2 / num_pixels_error))
    assert scored.ssim == score_image(red_only, hr_HWC, scale=crop_px, protocol=PAPERS_PROTOCOL).ssim, "always of Y"


def test_the_protocols_are_these_three():
    assert list(PROTOCOLS) == ["psnr@y,crop=scale", "psnr@rgb,crop=scale", "psnr@rgb,crop=scale+6"]


# Bicubic on Set5 as printed in the papers, for example EDSR's table of benchmark results: scale, PSNR, SSIM.
PUBLISHED_BICUBIC = [(2, 33.66, 0.9299), (3, 30.39, 0.8682), (4, 28.42, 0.8104)]


@pytest.mark.parametrize(("scale", "psnr_db", "ssim_mean"), PUBLISHED_BICUBIC)
def test_bicubic_of_rounded_y_on_set5_gives_the_printed_digits(shared_data, scale, psnr_db, ssim_mean):
    """As the papers computed it: Y alone, rounded, shrunk and enlarged in floating point, rounded again."""
    psnrs, ssims = [], []
    for path in sorted((shared_data / "Set5/HR").glob("*.png")):
        hr_Y = np.rint(luma(crop_to_multiple(np.array(Image.open(path).convert("RGB")), scale)))
        height, width = hr_Y.shape
        lr_HW1 = imresize(hr_Y[..., None], output_height=height // scale, output_width=width // scale, scale=1 / scale)
        sr_Y = np.rint(imresize(lr_HW1, output_height=height, output_width=width, scale=scale))[..., 0]
        inner = np.s_[scale:-scale, scale:-scale]
        psnrs.append(psnr(sr_Y[inner], hr_Y[inner]))
        ssims.append(ssim(sr_Y[inner], hr_Y[inner]))
    assert len(psnrs) == 5
    assert np.mean(psnrs) == pytest.approx(psnr_db, abs=0.005)
    assert np.mean(ssims) == pytest.approx(ssim_mean, abs=0.00005)


@pytest.mark.parametrize(("scale", "psnr_db", "ssim_mean"), PUBLISHED_BICUBIC)
def test_bicubic_on_set5_reads_as_published(shared_data, scale, psnr_db, ssim_mean):
    scores = []
    for path in sorted((shared_data / "Set5/HR").glob("*.png")):
        hr_HWC = crop_to_multiple(np.array(Image.open(path).convert("RGB")), scale)
        lr_path = shared_data / f"Set5/LR_bicubic/X{scale}/{path.stem}x{scale}.png"
        sr_HWC = upscale_bicubic(np.array(Image.open(lr_path).convert("RGB")), scale)
        scores.append(score_image(sr_HWC, hr_HWC, scale=scale, protocol=PAPERS_PROTOCOL))
    assert len(scores) == 5
    assert np.mean([score.psnr_db for score in scores]) == pytest.approx(psnr_db, abs=0.02)
    assert np.mean([score.ssim for score in scores]) == pytest.approx(ssim_mean, abs=0.001)


@pytest.mark.parametrize(
    ("sr_HWC", "message"),
    [
        (noise(40, 51), "baby: the SR image is 51x40, the HR image 52x40"),
        (noise().astype(np.float32), "baby: the SR image is float32"),
        (noise()[..., 0], r"baby: the SR image is uint8 \(40, 52\)"),
    ],
)
def test_images_that_cannot_be_compared_are_named(sr_HWC, message):
    with pytest.raises(MetricError, match=message):
        score_image(sr_HWC, noise(), scale=2, protocol=PAPERS_PROTOCOL, name="baby")


def test_an_image_smaller_than_the_window_is_refused_with_the_smallest_size():
    assert score_image(noise(15, 15), noise(15, 15), scale=2, protocol=PAPERS_PROTOCOL).psnr_db == math.inf
    with pytest.raises(MetricError, match=r"14x15 is too small .* sides from 15 px"):
        score_image(noise(15, 14), noise(15, 14), scale=2, protocol=PAPERS_PROTOCOL)


def test_an_unknown_protocol_lists_the_choices():
    with pytest.raises(MetricError, match=r"unknown protocol 'psnr'.*psnr@y,crop=scale.*--protocol"):
        score_image(noise(), noise(), scale=2, protocol="psnr")
