"""Pictures: what is where on the sheet, pixel by pixel."""

import numpy as np
import pytest
import torch

from sr_train.pictures import GAP_PX, MARGIN_PX, comparison, most_detailed, patch_grid

CAPTIONS = ["LR", "bicubic", "SR", "HR"]


def images(height: int = 48, width: int = 64, scale: int = 4) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(height // scale, width // scale), *[(height, width)] * 3]
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def test_the_four_images_stand_side_by_side_unchanged() -> None:
    lr, bicubic, sr, hr = images()
    sheet = comparison(lr, [bicubic, sr], hr, captions=CAPTIONS, crop_px_hr=0)
    top = sheet.shape[0] - MARGIN_PX - 48
    for column, expected in enumerate([lr.repeat(4, 0).repeat(4, 1), bicubic, sr, hr]):
        left = MARGIN_PX + column * (64 + GAP_PX)
        assert np.array_equal(sheet[top : top + 48, left : left + 64], expected)
    assert len(np.unique(sheet[:top].reshape(-1, 3), axis=0)) > 1  # the captions


def test_the_detail_shows_whole_pixels_of_the_same_place_in_each() -> None:
    lr, bicubic, sr, hr = images()
    sheet = comparison(lr, [bicubic, sr], hr, captions=CAPTIONS, crop_px_hr=16)
    top, left = most_detailed(hr, 16, stride_px=4)
    bottom_row = sheet[-MARGIN_PX - 64 : -MARGIN_PX]  # 64 // 16 = 4 times enlarged
    for column, panel in enumerate([lr.repeat(4, 0).repeat(4, 1), bicubic, sr, hr]):
        shown = bottom_row[:, MARGIN_PX + column * (64 + GAP_PX) :][:, :64]
        assert np.array_equal(shown, panel[top : top + 16, left : left + 16].repeat(4, 0).repeat(4, 1))


def test_large_images_are_reduced_and_the_sheet_is_deterministic() -> None:
    lr, *upscaled, hr = images(height=1200, width=1600)
    sheet = comparison(lr, upscaled, hr, captions=["a caption of several words that does not fit"] * 4, panel_px=200)
    assert sheet.shape[1] == 4 * 200 + 3 * GAP_PX + 2 * MARGIN_PX
    assert np.array_equal(
        sheet, comparison(lr, upscaled, hr, captions=["a caption of several words that does not fit"] * 4, panel_px=200)
    )


def test_the_most_detailed_place_is_where_the_edges_are() -> None:
    image = np.full((60, 80, 3), 100, np.uint8)
    image[20:36:2, 44:60] = 250
    assert most_detailed(image, 16, stride_px=4) == (20, 44)
    assert most_detailed(np.zeros((60, 80, 3), np.uint8), 16) == (0, 0)
    assert most_detailed(image[:, :60], 60) == (0, 0)  # as large as the image


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_sizes_that_do_not_fit_are_refused(wrong: int) -> None:
    four = images()
    four[wrong] = four[wrong][1:]
    with pytest.raises(ValueError, match="does not fit HR"):
        comparison(four[0], four[1:3], four[3], captions=CAPTIONS)


def test_as_many_captions_as_images() -> None:
    lr, *upscaled, hr = images()
    with pytest.raises(ValueError, match="3 captions"):
        comparison(lr, upscaled, hr, captions=CAPTIONS[:3])


def test_the_grid_shows_patches_as_they_are() -> None:
    lr, hr = torch.rand(10, 3, 24, 24), torch.rand(10, 3, 96, 96)
    hr[0, :, 0, 0] = torch.tensor([1.0, 0.5, 0.0])  # RGB order
    sheet = patch_grid(lr, hr)
    pitch = 96 + GAP_PX
    top = sheet.shape[0] - MARGIN_PX - 4 * pitch + GAP_PX
    expected = (hr * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(sheet[top + pitch :, MARGIN_PX:][:96, :96], expected[0])
    assert np.array_equal(sheet[top + 3 * pitch :, MARGIN_PX + pitch :][:96, :96], expected[9])
    expected_lr = (lr * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(sheet[top:, MARGIN_PX:][:96:4, :96:4], expected_lr[0])


def test_an_empty_or_uneven_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        patch_grid(torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 16, 16))
    with pytest.raises(ValueError, match="2 LR and 1 HR"):
        patch_grid(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 16, 16))
