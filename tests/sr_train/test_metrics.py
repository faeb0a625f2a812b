"""PSNR and SSIM against hand calculation, scikit-image and published numbers."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from sr_data.resize import crop_to_multiple, imresize, upscale_bicubic
from sr_train.metrics import (
    PAPERS_PROTOCOL,
    PROTOCOLS,
    MetricError,
    luma,
    mean_squared_error,
    measure_image,
    psnr_db,
    read_scores,
    score_image,
    ssim,
)


def noise(height=40, width=52, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def psnr(first, second):
    return psnr_db(mean_squared_error(first, second).item())


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
    zeros = torch.zeros((5, 5))
    assert psnr(zeros, zeros + 1) == pytest.approx(20 * math.log10(255))
    assert psnr(zeros, zeros + 255) == pytest.approx(0.0)
    assert psnr(zeros, zeros) == math.inf


@pytest.mark.parametrize("sigma", [0.5, 5, 60])
def test_ssim_is_that_of_scikit_image_on_the_valid_region(sigma):
    first, second = (luma(image) for image in (noise(), noisy(noise(), sigma)))
    _, everywhere = structural_similarity(
        first.numpy(),
        second.numpy(),
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    assert ssim(first, second).item() == pytest.approx(everywhere[5:-5, 5:-5].mean(), abs=1e-12)


def test_ssim_of_equal_images_is_one_exactly():
    assert ssim(luma(noise()), luma(noise())).item() == 1.0


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


def per_pixel(protocol, sr_HWC, hr_HWC, crop_px):
    """PSNR and SSIM written down once more: whole images, plain numpy, scikit-image's SSIM."""
    sr, hr = (image[crop_px:-crop_px, crop_px:-crop_px].astype(np.float64) for image in (sr_HWC, hr_HWC))
    sr_Y, hr_Y = (image @ np.array([65.481, 128.553, 24.966]) / 255 + 16 for image in (sr, hr))
    error = sr_Y - hr_Y if "@y" in protocol else sr - hr
    _, ssim_map = structural_similarity(
        sr_Y, hr_Y, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    return 10 * math.log10(255**2 / np.mean(error**2)), ssim_map[5:-5, 5:-5].mean()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(("height", "width"), [(700, 500), (40, 9000), (31, 33)])
def test_images_that_are_worked_on_in_strips_score_as_whole_ones(protocol, height, width):
    """Strips that end with the image, one of a few rows, one strip alone, rows wider than the strip's share."""
    hr_HWC = noise(height, width)
    sr_HWC = noisy(hr_HWC, 20)
    scored = score_image(sr_HWC, hr_HWC, scale=2, protocol=protocol)
    expected_db, expected_ssim = per_pixel(protocol, sr_HWC, hr_HWC, PROTOCOLS[protocol].crop_px(2))
    assert scored.psnr_db == pytest.approx(expected_db, rel=0, abs=1e-11)
    assert scored.ssim == pytest.approx(expected_ssim, rel=0, abs=1e-12)


@pytest.fixture
def num_threads():
    """Sets the number of threads; puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_number_of_threads_changes_no_bit(protocol, num_threads):
    """Workers that share a machine have fewer threads each, and a set's score must not depend on their number."""
    hr_HWC = noise(413, 617)
    sr_HWC = noisy(hr_HWC, 10)
    scores = []
    for threads in (1, 2, 3, 5):
        num_threads(threads)
        scores.append(score_image(sr_HWC, hr_HWC, scale=2, protocol=protocol))
    assert len(set(scores)) == 1


def test_the_squared_error_of_8_bit_images_is_exact():
    first, second = (torch.from_numpy(noise(700, 501, seed)) for seed in (0, 1))
    errors = first.to(torch.int64) - second.to(torch.int64)
    assert mean_squared_error(first, second).item() == int((errors**2).sum()) / first.numel()


def test_tensors_and_arrays_of_any_layout_score_alike():
    hr_HWC = noise()
    sr_HWC = noisy(hr_HWC, 10)
    read_only = sr_HWC.copy()
    read_only.flags.writeable = False
    expected = score_image(sr_HWC, hr_HWC, scale=2, protocol=PAPERS_PROTOCOL)
    layouts = [
        (torch.from_numpy(sr_HWC), hr_HWC),
        (read_only, torch.from_numpy(hr_HWC)),
        (torch.from_numpy(sr_HWC).permute(2, 0, 1).contiguous().permute(1, 2, 0), hr_HWC),
        (sr_HWC[::-1].copy()[::-1], np.asfortranarray(hr_HWC)),
    ]
    for sr, hr in layouts:
        assert score_image(sr, hr, scale=2, protocol=PAPERS_PROTOCOL) == expected
    assert np.array_equal(read_only, sr_HWC), "nothing is written to the images"


def test_images_are_measured_first_and_read_together_in_order():
    hr_HWC = noise()
    srs = [noisy(hr_HWC, sigma) for sigma in (5, 50)] + [hr_HWC]
    arguments = {"scale": 2, "protocol": PAPERS_PROTOCOL}
    measured = [measure_image(sr, hr_HWC, name=f"{i}", **arguments) for i, sr in enumerate(srs)]
    assert all(image.values.shape == (2,) and image.values.dtype == torch.float64 for image in measured)
    expected = [score_image(sr, hr_HWC, name=f"{i}", **arguments) for i, sr in enumerate(srs)]
    assert read_scores(measured) == expected
    assert read_scores([]) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_gpu_scores_as_the_cpu_does_and_waits_only_when_read(protocol):
    hr_HWC = noise(1356, 2040)
    sr_HWC = noisy(hr_HWC, 10)
    on_cpu = score_image(sr_HWC, hr_HWC, scale=4, protocol=protocol)
    sr, hr = (torch.from_numpy(image).cuda() for image in (sr_HWC, hr_HWC))
    torch.cuda.set_sync_debug_mode("error")
    try:
        measured = measure_image(sr, hr, scale=4, protocol=protocol)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_gpu = read_scores([measured, measure_image(sr, hr_HWC, scale=4, protocol=protocol)])
    assert on_gpu[0] == on_gpu[1], "an image that is elsewhere is sent"
    assert on_gpu[0].psnr_db == pytest.approx(on_cpu.psnr_db, abs=1e-9)
    assert on_gpu[0].ssim == pytest.approx(on_cpu.ssim, abs=1e-12)


def test_the_protocols_are_these_three():
    assert list(PROTOCOLS) == ["psnr@y,crop=scale", "psnr@rgb,crop=scale", "psnr@rgb,crop=scale+6"]


# Bicubic on Set5 as printed in the papers, for example EDSR's table of benchmark results: scale, PSNR, SSIM.
PUBLISHED_BICUBIC = [(2, 33.66, 0.9299), (3, 30.39, 0.8682), (4, 28.42, 0.8104)]


@pytest.mark.parametrize(("scale", "psnr_db", "ssim_mean"), PUBLISHED_BICUBIC)
def test_bicubic_of_rounded_y_on_set5_gives_the_printed_digits(shared_data, scale, psnr_db, ssim_mean):
    """As the papers computed it: Y alone, rounded, shrunk and enlarged in floating point, rounded again."""
    psnrs, ssims = [], []
    for path in sorted((shared_data / "Set5/HR").glob("*.png")):
        hr_Y = luma(crop_to_multiple(np.array(Image.open(path).convert("RGB")), scale)).round()
        height, width = hr_Y.shape
        lr_HW1 = imresize(
            hr_Y[..., None].numpy(), output_height=height // scale, output_width=width // scale, scale=1 / scale
        )
        sr_Y = torch.from_numpy(imresize(lr_HW1, output_height=height, output_width=width, scale=scale)).round()[..., 0]
        inner = np.s_[scale:-scale, scale:-scale]
        psnrs.append(psnr(sr_Y[inner], hr_Y[inner]))
        ssims.append(ssim(sr_Y[inner], hr_Y[inner]).item())
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
        (torch.zeros(40, 52, 4, dtype=torch.uint8), r"baby: the SR image is uint8 \(40, 52, 4\)"),
        (torch.zeros(40, 52, 3), r"baby: the SR image is float32 \(40, 52, 3\)"),
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
