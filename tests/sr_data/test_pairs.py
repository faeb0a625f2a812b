"""From a manifest record to two aligned images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sr_data.decode import encode_png
from sr_data.errors import DataError, ImageError
from sr_data.manifest import load_manifest
from sr_data.pairs import DecodedPair, load_pair, middle
from sr_data.resize import downscale_bicubic
from sr_data.storage import open_store


def test_lr_that_is_shipped_equals_lr_that_is_made(shared_data: Path) -> None:
    store = open_store(str(shared_data / "Set5"))
    for record in load_manifest(store.uri, split="valid", scale=3).images:
        shipped = load_pair(store, record, 3)
        made = load_pair(store, replace(record, lr_key=None, lr_sha256=None), 3)
        assert shipped.hr_HWC.shape == (*tuple(3 * side for side in shipped.lr_HWC.shape[:2]), 3)
        np.testing.assert_array_equal(made.lr_HWC, shipped.lr_HWC)
        np.testing.assert_array_equal(made.hr_HWC, shipped.hr_HWC)


def test_lr_is_made_from_the_cropped_hr(tiny_photos: Path) -> None:
    store = open_store(str(tiny_photos))
    for record in load_manifest(store.uri, split="train", scale=4).images:
        pair = load_pair(store, record, 4)
        assert pair.hr_HWC.shape == (record.height, record.width, 3)
        assert pair.hr_HWC.flags.c_contiguous
        np.testing.assert_array_equal(pair.lr_HWC, downscale_bicubic(pair.hr_HWC, 4))


@pytest.mark.parametrize(("size", "kept"), [((40, 9), (20, 9)), ((41, 60), (20, 20)), ((39, 25), (39, 25))])
def test_the_middle_of_a_large_pair_is_that_of_both_images(size: tuple[int, int], kept: tuple[int, int]) -> None:
    lr_HWC = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    part = middle(DecodedPair("a", lr_HWC.repeat(3, 0).repeat(3, 1), lr_HWC), 20)
    assert part.lr_HWC.shape == (*kept, 3)
    np.testing.assert_array_equal(part.hr_HWC[::3, ::3], part.lr_HWC)
    top, left = ((side - part) // 2 for side, part in zip(size, kept, strict=True))
    np.testing.assert_array_equal(part.lr_HWC, lr_HWC[top : top + kept[0], left : left + kept[1]])


def test_a_file_that_was_replaced_is_noticed(tiny_photos: Path) -> None:
    store = open_store(str(tiny_photos))
    record = load_manifest(store.uri, split="train", scale=2).images[0]
    store.write(record.hr_key, encode_png(np.zeros((record.height, record.width, 3), np.uint8)))
    with pytest.raises(DataError, match=f"^{store.uri_of(record.hr_key)}: was replaced"):
        load_pair(store, record, 2)


def test_a_record_of_another_scale_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    rng = np.random.default_rng(0)
    store.write("HR/a.png", encode_png(rng.integers(0, 256, (14, 14, 3), np.uint8)))
    store.write("LR_bicubic/X2/a.png", encode_png(rng.integers(0, 256, (7, 7, 3), np.uint8)))
    record = load_manifest(store.uri, split="train", scale=2).images[0]
    with pytest.raises(DataError, match="14 x 14: it was made for another scale"):
        load_pair(store, record, 4)
    with pytest.raises(ImageError, match="7 x 7 px is not 1/7 of HR's 14 x 14"):
        load_pair(store, record, 7)
