"""Which files are found and paired, from nothing but their names."""

from __future__ import annotations

import pytest

from sr_data.catalogue import Layout, catalogue, lr_key, splits_of
from sr_data.errors import DataError

DIV2K = [f"DIV2K_{split}_HR/{n:04}.png" for split, n in [("train", 1), ("train", 2), ("valid", 801)]] + [
    f"DIV2K_{split}_LR_bicubic/X{scale}/{n:04}x{scale}.png"
    for split, n in [("train", 1), ("train", 2), ("valid", 801)]
    for scale in (2, 3, 4)
]
BSD500 = [f"images/{split}/{n}.jpg" for split, n in [("train", 100075), ("val", 3096), ("test", 2018)]]
BENCHMARK = ["HR/baby.png", "HR/bird.png", "LR_bicubic/X2/babyx2.png", "LR_bicubic/X2/birdx2.png"]


@pytest.mark.parametrize(
    ("keys", "split", "layout", "hr_keys"),
    [
        (DIV2K, "train", "div2k", ["DIV2K_train_HR/0001.png", "DIV2K_train_HR/0002.png"]),
        (DIV2K, "valid", "div2k", ["DIV2K_valid_HR/0801.png"]),
        (DIV2K, "val", "div2k", ["DIV2K_valid_HR/0801.png"]),
        (BSD500, "train", "bsd500", ["images/train/100075.jpg"]),
        (BSD500, "valid", "bsd500", ["images/val/3096.jpg"]),
        (BSD500, "test", "bsd500", ["images/test/2018.jpg"]),
        ([key.removeprefix("images/") for key in BSD500], "valid", "bsd500", ["val/3096.jpg"]),
        (["BSDS500/data/" + key for key in BSD500], "val", "bsd500", ["BSDS500/data/images/val/3096.jpg"]),
        (BENCHMARK, "anything", "benchmark", ["HR/baby.png", "HR/bird.png"]),
        (["b/1.png", "2.JPG", "notes.txt"], "train", "folder", ["2.JPG", "b/1.png"]),
        (["train/a/1.png", "valid/2.png"], "train", "folder", ["train/a/1.png"]),
        (["train/1.png", "val/2.png"], "valid", "folder", ["val/2.png"]),
    ],
)
def test_layouts_and_splits(keys: list[str], split: str, layout: str, hr_keys: list[str]) -> None:
    found = catalogue(reversed(keys), uri="u", split=split)
    assert (found.layout, [image.hr_key for image in found.images]) == (layout, hr_keys)


def test_lr_belongs_to_hr_by_name_with_or_without_the_suffix() -> None:
    found = catalogue(DIV2K, uri="u", split="train")
    assert found.images[0].lr_keys == {
        2: "DIV2K_train_LR_bicubic/X2/0001x2.png",
        3: "DIV2K_train_LR_bicubic/X3/0001x3.png",
        4: "DIV2K_train_LR_bicubic/X4/0001x4.png",
    }
    same_names = catalogue(
        ["HR/a.png", "HR/ax2.png", "LR_bicubic/X2/a.png", "LR_bicubic/X2/ax2.png"], uri="u", split=""
    )
    assert [image.lr_keys[2] for image in same_names.images] == ["LR_bicubic/X2/a.png", "LR_bicubic/X2/ax2.png"]


def test_lr_folders_are_never_taken_for_hr_images() -> None:
    found = catalogue(["1.png", "LR_bicubic/X2/1x2.png"], uri="u", split="train")
    assert [(image.name, dict(image.lr_keys)) for image in found.images] == [("1", {2: "LR_bicubic/X2/1x2.png"})]
    split = catalogue(["train/1.png", "train_LR_bicubic/X4/1x4.png"], uri="u", split="train")
    assert [(image.name, dict(image.lr_keys)) for image in split.images] == [("1", {4: "train_LR_bicubic/X4/1x4.png"})]


def test_lr_is_written_where_it_is_looked_for() -> None:
    for keys in (DIV2K[:3], BSD500, ["HR/a.png"], ["a.png"], ["train/a/b.png"]):
        found = catalogue(keys, uri="u", split="train")
        made = [lr_key(found.folders, image.name, 3) for image in found.images]
        again = catalogue([*keys, *made], uri="u", split="train")
        assert [image.lr_keys[3] for image in again.images] == made
    assert lr_key(catalogue(DIV2K, uri="u", split="train").folders, "0001", 4) == "DIV2K_train_LR_bicubic/X4/0001x4.png"


def test_files_that_do_not_pair_are_named_for_the_scale_in_question_only() -> None:
    keys = [key for key in DIV2K if key not in ("DIV2K_train_LR_bicubic/X2/0002x2.png", "DIV2K_train_HR/0001.png")]
    found = catalogue(keys, uri="s3://b", split="train")
    with pytest.raises(DataError, match="HR without LR: DIV2K_train_HR/0002.png") as caught:
        found.check_pairs("s3://b", 2)
    assert "LR without HR: DIV2K_train_LR_bicubic/X2/0001x2.png" in str(caught.value)
    catalogue([*DIV2K, "DIV2K_train_LR_bicubic/X8/0009x8.png"], uri="u", split="train").check_pairs("u", 4)


def test_a_scale_without_lr_needs_no_pairs() -> None:
    catalogue(BENCHMARK, uri="u", split="").check_pairs("u", 4)


def test_splits_of() -> None:
    assert splits_of(DIV2K) == ("train", "valid")
    assert splits_of(BSD500) == ("train", "val", "test")
    assert splits_of(BENCHMARK) == ()
    assert splits_of(["a/1.png"]) == ()
    assert splits_of(["train/1.png"]) == ("train",)


@pytest.mark.parametrize(
    ("keys", "split", "layout", "says"),
    [
        ([], "train", "auto", r"s3://b: holds no images. Looked for:(.|\n)*DIV2K_train_HR(.|\n)*--data.uri"),
        (["readme.md", ".hidden.png", "__MACOSX/1.png"], "train", "auto", "holds no images"),
        (DIV2K, "test", "auto", r"has no split 'test'; it has train, valid \(--data.split"),
        (["train/1.png"], "valid", "auto", "has no split 'valid'; it has train"),
        (BENCHMARK, "train", "div2k", r"not of layout div2k \(--data.layout"),
        (BSD500, "train", "benchmark", "not of layout benchmark"),
        (["DIV2K_train_LR_bicubic/X2/0001x2.png"], "train", "auto", "no HR images"),
        (["1.png", "1.jpg"], "train", "auto", "1.jpg and 1.png have the same name"),
    ],
)
def test_errors_say_what_was_looked_for(keys: list[str], split: str, layout: Layout, says: str) -> None:
    with pytest.raises(DataError, match=says):
        catalogue(keys, uri="s3://b", split=split, layout=layout)
