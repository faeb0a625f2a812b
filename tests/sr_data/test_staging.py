"""A staged dataset equals its source, is complete or says that it is not, and costs nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sr_data import staging_journal
from sr_data.decode import decode_image, encode_png
from sr_data.errors import DataError, StorageError
from sr_data.manifest import STAGED_KEY, load_manifest
from sr_data.pairs import load_pair
from sr_data.resize import crop_to_multiple, downscale_bicubic
from sr_data.staging import StagingOptions, StagingReport, stage_dataset
from sr_data.storage import Store, open_store
from sr_data.tiling import Tiling

RNG = np.random.default_rng(0)


@pytest.fixture(params=["disk", "s3"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return open_store(str(tmp_path / "target"))
    return open_store(request.getfixturevalue("s3").new_bucket() + "/target")


@pytest.fixture
def source(tmp_path: Path) -> Store:
    """DIV2K's layout: three training and one validation image, LR for x2 only."""
    store = open_store(str(tmp_path / "source"))
    for split, number in [("train", 1), ("train", 2), ("train", 3), ("valid", 801)]:
        hr_HWC = RNG.integers(0, 256, (48, 73, 3), np.uint8)
        store.write(f"DIV2K_{split}_HR/{number:04}.png", encode_png(hr_HWC))
        lr_HWC = downscale_bicubic(crop_to_multiple(hr_HWC, 2), 2)
        store.write(f"DIV2K_{split}_LR_bicubic/X2/{number:04}x2.png", encode_png(lr_HWC))
    store.write("readme.txt", b"not an image")
    return store


def stage(source: Store, target: Store, **options: Any) -> StagingReport:
    return stage_dataset(StagingOptions(source=source.uri, target=target.uri, **options))


def images_in(store: Store) -> dict[str, bytes]:
    return {entry.key: store.read(entry.key) for entry in store.list() if entry.key.endswith(".png")}


def test_files_are_copied_byte_for_byte_and_the_manifest_is_the_same(source: Store, target: Store) -> None:
    report = stage(source, target)
    assert images_in(target) == images_in(source)
    assert (report.layout, report.num_images, report.num_files, report.lr_made) == (
        "div2k",
        {"train": 3, "valid": 1},
        8,
        0,
    )
    for split in ("train", "valid"):
        staged, read = (load_manifest(store.uri, split=split, scale=2) for store in (target, source))
        assert (staged.images, staged.fingerprint, staged.decisions) == (read.images, read.fingerprint, read.decisions)


def test_lr_is_made_where_none_is_shipped_in_the_official_place(source: Store, target: Store) -> None:
    assert stage(source, target, make_lr=(2, 3, 4)).lr_made == 8
    for scale in (2, 3, 4):
        manifest = load_manifest(target.uri, split="train", scale=scale)
        assert manifest.images[0].lr_key == f"DIV2K_train_LR_bicubic/X{scale}/0001x{scale}.png"
        for record in manifest.images:
            pair = load_pair(target, record, scale)
            np.testing.assert_array_equal(pair.lr_HWC, downscale_bicubic(pair.hr_HWC, scale))


def test_a_second_run_sends_nothing_and_a_further_one_only_what_is_new(source: Store, target: Store) -> None:
    stage(source, target, split="train")
    versions = {entry.key: entry.version for entry in target.list()}
    again = stage(source, target, split="train")
    assert (again.num_done_before, again.bytes_read, again.bytes_sent) == (3, 0, 0)
    assert {entry.key: entry.version for entry in target.list()} == versions

    more = stage(source, target, make_lr=(3,))
    assert (more.num_images, more.lr_made) == ({"train": 3, "valid": 1}, 4)
    after = {entry.key: entry.version for entry in target.list()}
    images = [key for key in versions if key.endswith(".png")]
    assert [after[key] for key in images] == [versions[key] for key in images]

    assert stage(source, target, split="train", make_lr=(4,)).lr_made == 3  # x3 is no longer asked for, and stays
    assert load_manifest(target.uri, split="train", scale=3).images[0].lr_key is not None
    assert len(load_manifest(target.uri, split="valid", scale=2).images) == 1


def test_a_changed_source_image_replaces_everything_made_of_it(source: Store, target: Store) -> None:
    stage(source, target, make_lr=(3, 4))
    hr_HWC = RNG.integers(0, 256, (40, 60, 3), np.uint8)
    source.write("DIV2K_train_HR/0002.png", encode_png(hr_HWC))
    source.write("DIV2K_train_LR_bicubic/X2/0002x2.png", encode_png(downscale_bicubic(hr_HWC, 2)))
    report = stage(source, target, make_lr=(4,))
    assert (report.num_done_before, report.lr_made) == (0, 4)
    assert target.exists("DIV2K_train_LR_bicubic/X3/0001x3.png")
    assert not target.exists("DIV2K_train_LR_bicubic/X3/0002x3.png")  # it was made of the old one
    np.testing.assert_array_equal(
        decode_image(target.read("DIV2K_train_LR_bicubic/X4/0002x4.png"), name="")[0], downscale_bicubic(hr_HWC, 4)
    )


def test_tiles_of_hr_and_lr_cover_the_same_scene(source: Store, target: Store) -> None:
    report = stage(source, target, make_lr=(4,), tiling=Tiling(tile_px=32, step_px=16))
    whole = {
        record.name: load_pair(source, record, 2) for record in load_manifest(source.uri, split="train", scale=2).images
    }
    for scale in (2, 4):
        manifest = load_manifest(target.uri, split="train", scale=scale)
        # Tops 0, 16; lefts 0, 16, 32 and, moved back to the edge of the 72 px that 4 divides, 40.
        assert [record.name for record in manifest.images[:8]] == [f"0001_s{number:03}" for number in range(1, 9)]
        assert len(manifest.images) == 24
        pair = load_pair(target, manifest.images[6], scale)
        np.testing.assert_array_equal(pair.hr_HWC, whole["0001"].hr_HWC[16:48, 32:64])
        lr_HWC = downscale_bicubic(crop_to_multiple(whole["0001"].hr_HWC, scale), scale)
        np.testing.assert_array_equal(pair.lr_HWC, lr_HWC[16 // scale : 48 // scale, 32 // scale : 64 // scale])
    assert report.num_files == 4 * 8 * 3
    assert stage(source, target, make_lr=(4,), tiling=Tiling(tile_px=32, step_px=16)).bytes_read == 0


@pytest.mark.parametrize("wrong", [{"tile_px": 30, "step_px": 30}, {"tile_px": 24, "step_px": 10}])
def test_tiles_must_fit_the_scales(source: Store, target: Store, wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"is not a multiple of 12, which the scales 2, 3, 4 need; use \d+ or \d+"):
        stage(source, target, make_lr=(3, 4), tiling=Tiling(**wrong))
    with pytest.raises(DataError, match="parts of the images would be lost"):
        stage(source, target, tiling=Tiling(tile_px=24, step_px=48))


def test_unusable_images_are_all_listed_and_the_target_is_not_called_complete(source: Store, target: Store) -> None:
    stage(source, target)
    source.write("DIV2K_train_HR/0001.png", source.read("DIV2K_train_HR/0001.png")[:-99])
    source.write("DIV2K_train_LR_bicubic/X2/0003x2.png", encode_png(np.zeros((9, 9, 3), np.uint8)))
    with pytest.raises(DataError, match="2 of 4 images can't be used") as caught:
        stage(source, target)
    assert "0001.png: the image is truncated" in str(caught.value)
    assert "0003x2.png: is 9 x 9 px, where 1/2 of DIV2K_train_HR/0003.png (73 x 48 px) is 36 x 24" in str(caught.value)
    assert not target.exists(STAGED_KEY)


def test_unusable_images_can_be_left_out(source: Store, target: Store) -> None:
    source.write("DIV2K_train_HR/0001.png", b"text")
    report = stage(source, target, on_bad_image="skip")
    assert [problem.partition(":")[0] for problem in report.left_out] == ["DIV2K_train_HR/0001.png"]
    assert len(load_manifest(target.uri, split="train", scale=2).images) == 2


def test_a_target_with_other_images_is_refused(source: Store, target: Store, tiny_photos: Path) -> None:
    target.write("holiday.png", b"x")
    with pytest.raises(DataError, match=r"holds 1 images that this command does not put there(.|\n)*holiday.png"):
        stage(source, target)
    target.delete("holiday.png")
    stage(source, target)
    with pytest.raises(DataError, match="cut into other tiles"):
        stage(source, target, tiling=Tiling(tile_px=32, step_px=32))
    source.delete("DIV2K_train_HR/0001.png")
    source.delete("DIV2K_train_LR_bicubic/X2/0001x2.png")
    with pytest.raises(DataError, match="removed from the source"):
        stage(source, target)
    for key in ("DIV2K_train_HR/0001.png", "DIV2K_train_LR_bicubic/X2/0001x2.png"):
        target.delete(key)
    assert stage(source, target).num_files == 6
    assert len(load_manifest(target.uri, split="train", scale=2).images) == 2


def test_what_was_changed_in_the_target_is_mended_by_running_again(source: Store, target: Store) -> None:
    stage(source, target)
    target.write("DIV2K_train_HR/0001.png", b"short")
    target.delete("DIV2K_train_LR_bicubic/X2/0002x2.png")
    with pytest.raises(DataError, match="run it again"):
        load_manifest(target.uri, split="train", scale=2)
    assert stage(source, target).num_done_before == 2
    assert images_in(target) == images_in(source)
    assert len(load_manifest(target.uri, split="train", scale=2).images) == 3


def test_a_copy_that_another_tool_has_begun_is_not_sent_again(source: Store, target: Store) -> None:
    for key in list(images_in(source))[:5]:
        target.write(key, source.read(key))
    report = stage(source, target)
    assert report.bytes_sent == sum(len(data) for data in list(images_in(source).values())[5:])


def test_what_was_done_before_an_interruption_is_kept(
    source: Store, target: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_journal, "FLUSH_INTERVAL_S", 0.0)

    def interrupt(done: int, total: int, bytes_sent: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    options = StagingOptions(source=source.uri, target=target.uri, num_workers=1)
    with pytest.raises(KeyboardInterrupt):
        stage_dataset(options, progress=interrupt)
    assert not target.exists(STAGED_KEY)
    assert stage_dataset(options).num_done_before >= 2
    assert images_in(target) == images_in(source)


def test_layouts_without_splits(tiny_photos: Path, target: Store) -> None:
    report = stage(open_store(str(tiny_photos)), target, make_lr=(2,))
    assert (report.layout, report.num_images) == ("folder", {"all": 6})
    manifest = load_manifest(target.uri, split="train", scale=2)
    assert [record.lr_key for record in manifest.images] == [f"LR_bicubic/X2/photo-{n}x2.png" for n in range(6)]


def test_the_built_in_photos_can_be_staged(target: Store) -> None:
    assert stage(open_store("builtin://photos"), target).num_images == {"train": 4, "valid": 1}


def test_options_that_can_not_work(tmp_path: Path) -> None:
    for options, says in [
        ({"target": str(tmp_path) + "/"}, "--source and --target are both"),
        ({"target": "t", "make_lr": (1,)}, "--make-lr 1"),
        ({"target": "t", "num_workers": 0}, "--num-workers 0"),
    ]:
        with pytest.raises(DataError, match=says):
            StagingOptions(source=str(tmp_path), **options)


def test_a_target_that_can_not_be_written_is_known_before_anything_is_read(source: Store, s3: Any) -> None:
    with pytest.raises(StorageError, match="no bucket 'not-made-yet'"):
        stage(source, open_store("s3://not-made-yet/x"))
    with pytest.raises(StorageError, match="part of the package"):
        stage(source, open_store("builtin://photos"))
