"""What a manifest says of good and bad datasets, on disk and in object storage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sr_data import file_facts
from sr_data.decode import encode_png
from sr_data.errors import DataError, StorageError
from sr_data.file_facts import facts_of, table_to_json
from sr_data.manifest import STAGED_KEY, Manifest, load_manifest
from sr_data.resize import downscale_bicubic
from sr_data.storage import Store, open_store

RNG = np.random.default_rng(0)


def noise(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return open_store(str(tmp_path / "dataset"))
    return open_store(request.getfixturevalue("s3").new_bucket() + "/dataset")


@pytest.fixture
def paired(store: Store) -> Store:
    """A benchmark of three pairs at x2."""
    for name, (height, width) in {"a": (24, 32), "b": (25, 33), "c": (24, 24)}.items():
        hr_HWC = noise(height, width)
        store.write(f"HR/{name}.png", encode_png(hr_HWC))
        cropped = hr_HWC[: height // 2 * 2, : width // 2 * 2]
        store.write(f"LR_bicubic/X2/{name}x2.png", encode_png(downscale_bicubic(cropped, 2)))
    return store


def load(store: Store, **options: Any) -> Manifest:
    return load_manifest(store.uri, **{"split": "train", "scale": 2, **options})


def test_a_paired_dataset(paired: Store) -> None:
    seen: list[tuple[int, int]] = []
    manifest = load(paired, progress=lambda done, total: seen.append((done, total)))
    assert [(image.name, image.width, image.height, image.lr_key) for image in manifest.images] == [
        ("a", 32, 24, "LR_bicubic/X2/ax2.png"),
        ("b", 32, 24, "LR_bicubic/X2/bx2.png"),
        ("c", 24, 24, "LR_bicubic/X2/cx2.png"),
    ]
    assert (manifest.layout, manifest.decisions) == ("benchmark", {"HR cropped to a multiple of the scale": 1})
    assert seen == [(done, 6) for done in range(1, 7)]
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_lr_shipped_for_another_scale_is_said_and_made(paired: Store) -> None:
    manifest = load(paired, scale=3)
    assert all(image.lr_key is None and image.lr_sha256 is None for image in manifest.images)
    assert manifest.decisions["LR shipped for other scales only, made by MATLAB's bicubic"] == 3


def test_the_fingerprint_depends_on_contents_names_and_scale_only(paired: Store, tmp_path: Path, s3: Any) -> None:
    fingerprint = load(paired).fingerprint
    elsewhere = open_store(s3.new_bucket() + "/other/place")
    for entry in reversed(paired.list()):
        elsewhere.write(entry.key, paired.read(entry.key))
    cache = open_store(str(tmp_path / "cache"))
    assert load(elsewhere).fingerprint == load(elsewhere, cache=cache).fingerprint == fingerprint
    assert load(elsewhere, cache=cache).fingerprint == fingerprint
    assert load(elsewhere, scale=3).fingerprint != fingerprint
    data = paired.read("HR/a.png")
    elsewhere.write("HR/a.png", data + b"\0")
    assert load(elsewhere).fingerprint != fingerprint


def test_all_unusable_files_are_listed_in_one_error(paired: Store) -> None:
    paired.write("HR/a.png", paired.read("HR/a.png")[:-600])
    paired.write("HR/b.png", b"hello\n")
    paired.write("LR_bicubic/X2/cx2.png", encode_png(noise(11, 12)))
    with pytest.raises(DataError, match=r"3 of 3 images can't be used.*--data.on-bad-image skip") as caught:
        load(paired)
    message = str(caught.value)
    assert message.startswith(paired.uri)
    assert "HR/a.png: the image is truncated or damaged" in message
    assert "HR/b.png: is not an image" in message
    assert "LR_bicubic/X2/cx2.png: is 12 x 11 px, where 1/2 of HR/c.png (24 x 24 px) is 12 x 12" in message


def test_unusable_files_can_be_skipped_and_are_counted_and_named(paired: Store) -> None:
    paired.write("LR_bicubic/X2/ax2.png", b"")
    manifest = load(paired, on_bad_image="skip")
    assert [image.name for image in manifest.images] == ["b", "c"]
    assert manifest.decisions["unusable, left out"] == 1
    assert manifest.left_out == ("LR_bicubic/X2/ax2.png: the file is empty",)


def test_of_many_unusable_files_twenty_are_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for number in range(25):
        store.write(f"{number:02}.png", b"")
    with pytest.raises(DataError, match="25 of 25") as caught:
        load(store)
    assert str(caught.value).count("\n") == 21
    assert str(caught.value).endswith("and 5 more")


def test_images_smaller_than_a_patch_are_left_out_counted_and_named(paired: Store) -> None:
    paired.write("HR/d.png", encode_png(noise(16, 40)))
    paired.write("LR_bicubic/X2/dx2.png", encode_png(noise(8, 20)))
    manifest = load(paired, min_side_px_hr=24)
    assert [image.name for image in manifest.images] == ["a", "b", "c"]
    assert manifest.decisions["smaller than a patch, left out"] == 1
    assert manifest.left_out == ("HR/d.png: 40 x 16 px, smaller than 24 px",)
    with pytest.raises(DataError, match=r"no usable image left, of 4.*--data.patch-px-hr"):
        load(paired, min_side_px_hr=100)


def test_an_image_smaller_than_the_scale_has_no_lr(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("tiny.png", encode_png(noise(1, 9)))
    with pytest.raises(DataError, match="no usable image left"):
        load(store)


def test_conversions_are_counted_once_per_pair(paired: Store) -> None:
    grey = encode_png(np.asarray(Image.fromarray(noise(24, 32)).convert("L")))
    paired.write("HR/a.png", grey)
    paired.write("LR_bicubic/X2/ax2.png", encode_png(np.asarray(Image.fromarray(noise(12, 16)).convert("L"))))
    manifest = load(paired)
    assert manifest.decisions["grey to RGB"] == 1
    assert manifest.images[0].mode == "L"


def test_unpaired_files_are_an_error(paired: Store) -> None:
    paired.delete("LR_bicubic/X2/bx2.png")
    with pytest.raises(DataError, match="HR without LR: HR/b.png"):
        load(paired)


def test_the_cache_saves_reading_until_a_file_changes(
    paired: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_store(str(tmp_path / "cache"))
    first = load(paired, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(file_facts, "facts_of", lambda _: pytest.fail("read although it is in the cache"))
        assert load(paired, cache=cache) == first
    paired.write("HR/a.png", encode_png(noise(24, 32)))
    assert load(paired, cache=cache).fingerprint != first.fingerprint


def test_a_staged_table_is_believed_as_long_as_the_sizes_agree(paired: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read = load(paired)
    paired.write(STAGED_KEY, table_to_json({e.key: facts_of(paired.read(e.key)) for e in paired.list()}).encode())
    monkeypatch.setattr(file_facts, "facts_of", lambda _: pytest.fail("read although it is staged"))
    assert load(paired) == read
    paired.write("HR/a.png", b"shorter")
    paired.write("HR/e.png", b"new")
    paired.delete("LR_bicubic/X2/cx2.png")
    paired.delete("HR/c.png")
    with pytest.raises(DataError, match="prepare_dataset wrote manifest.json; run it again") as caught:
        load(paired)
    message = str(caught.value)
    assert "missing: HR/c.png" in message
    assert "not in the table: HR/e.png" in message
    assert "7 bytes instead of" in message


def test_someone_elses_manifest_json_is_no_concern_of_ours(paired: Store) -> None:
    paired.write(STAGED_KEY, b'{"pages": []}')
    assert len(load(paired).images) == 3


def test_a_damaged_table_names_its_file(paired: Store) -> None:
    paired.write(STAGED_KEY, b'{"format": "sr-dataset-files-1", "files": {"HR/a.png"')
    with pytest.raises(DataError, match=r"manifest.json: is not a table of files"):
        load(paired)


def test_a_manifest_that_was_edited_is_refused(paired: Store) -> None:
    text = load(paired).to_json()
    with pytest.raises(DataError, match="was changed"):
        Manifest.from_json(text.replace('"scale": 2', '"scale": 3'))
    with pytest.raises(DataError, match="not a manifest"):
        Manifest.from_json("{}")


def test_a_folder_that_does_not_exist_and_a_bucket_that_does_not(tmp_path: Path, s3: Any) -> None:
    with pytest.raises(DataError, match=r"nowhere: holds no images.*"):
        load(open_store(str(tmp_path / "nowhere")))
    with pytest.raises(StorageError, match="no bucket"):
        load(open_store("s3://this-bucket-is-missing"))
    with pytest.raises(DataError, match="holds no images"):
        load(open_store(s3.new_bucket() + "/typo"))


def test_every_kind_of_photo_in_one_folder(tiny_photos: Path) -> None:
    assert len(load(open_store(str(tiny_photos)), min_side_px_hr=48).images) == 6


def test_official_datasets(shared_data: Path, tmp_path: Path) -> None:
    sizes = {"train": 200, "val": 100, "valid": 100, "test": 200}
    for split, number in sizes.items():
        assert len(load_manifest(str(shared_data / "BSDS500"), split=split, scale=4).images) == number
    for scale in (2, 3, 4):
        set5 = load_manifest(str(shared_data / "Set5"), split="valid", scale=scale)
        assert [image.name for image in set5.images] == ["baby", "bird", "butterfly", "head", "woman"]
        assert all(image.lr_key == f"LR_bicubic/X{scale}/{image.name}x{scale}.png" for image in set5.images)
    div2k = load_manifest(str(shared_data / "DIV2K"), split="train", scale=2)
    assert [(image.name, image.lr_key) for image in div2k.images] == [("0004", "DIV2K_train_LR_bicubic/X2/0004x2.png")]
    shutil.copytree(shared_data / "Set5/HR", tmp_path / "plain")
    plain = load_manifest(str(tmp_path / "plain"), split="valid", scale=4)
    assert (plain.layout, len(plain.images)) == ("folder", 5)
