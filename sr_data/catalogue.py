"""Which files of a listing are HR images, and which LR image belongs to each: the official layouts of SR datasets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from sr_data.errors import DataError

Layout = Literal["auto", "div2k", "bsd500", "benchmark", "folder"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"})
SPLITS = ("train", "valid", "val", "test")
_SYNONYMS = {"valid": ("valid", "val"), "val": ("val", "valid")}
_LR_FOLDER = re.compile(r"(?:^|/)(?:[^/]*_)?LR_bicubic/X(\d+)/")
_DIV2K_HR = re.compile(r"^DIV2K_(train|valid|test)_HR/")
_BSD500_ROOTS = ("images/", "data/images/", "BSDS500/data/images/", "BSR/BSDS500/data/images/")

_FLAGS = "--data.uri, --validation.uri (--source of prepare_dataset.py)"
LOOKED_FOR = """  div2k      DIV2K_train_HR/0001.png, DIV2K_train_LR_bicubic/X2/0001x2.png (and valid)
  benchmark  HR/baby.png, LR_bicubic/X2/babyx2.png
  bsd500     images/train/100075.jpg (and val, test; or without images/)
  folder     any images below, in a subfolder named like the split if there is one"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Folders:
    """Where a layout keeps one split."""

    hr: str
    """Key prefix of the HR images; empty or with a slash at the end."""
    lr: str
    """Key prefix above the folders X2, X3, X4."""
    recursive: bool
    """Whether images in folders below count, too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CataloguedImage:
    """One HR image and the LR images that the dataset ships for it."""

    name: str
    """Its path below the split's folder, without suffix."""
    hr_key: str
    lr_keys: Mapping[int, str]
    """Scale → key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """The images of one split, sorted by name."""

    layout: str
    split: str
    folders: Folders
    images: tuple[CataloguedImage, ...]
    unpaired_lr: Mapping[int, tuple[str, ...]]
    """Scale → keys of LR images whose HR image is missing."""

    @property
    def lr_scales(self) -> tuple[int, ...]:
        """The scales that any LR image is shipped for."""
        return tuple(sorted({scale for image in self.images for scale in image.lr_keys} | set(self.unpaired_lr)))

    def check_pairs(self, uri: str, scale: int) -> None:
        """DataError with the names if LR images of this scale are shipped for some HR images only, or the reverse."""
        if scale not in self.lr_scales:
            return
        without_lr = [image.hr_key for image in self.images if scale not in image.lr_keys]
        without_hr = self.unpaired_lr.get(scale, ())
        if without_lr or without_hr:
            raise DataError(
                f"{uri}: HR and LR x{scale} don't pair up by name."
                + _names("HR without LR", without_lr)
                + _names("LR without HR", without_hr)
                + f"\n  Complete the folder {self.folders.lr}X{scale}/, or remove it and LR is made from HR."
            )


def list_images(keys: Iterable[str]) -> list[str]:
    """The keys that are images by their suffix, without hidden files and what macOS adds to archives."""
    return sorted(
        key
        for key in keys
        if PurePosixPath(key).suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(key).parts)
    )


def catalogue(keys: Iterable[str], *, uri: str, split: str, layout: Layout = "auto") -> Catalogue:
    """The images of `split` among `keys`; `uri` is for messages only.

    `train` and `valid` (or `val`) name the splits. A benchmark has none: the argument is ignored there, as it is in a
    folder without subfolders of such names.

    Raises:
        DataError: no image at all, not of this layout, no such split, an empty one, or two images of the same name.
    """
    image_keys = list_images(keys)
    if not image_keys:
        raise DataError(f"{uri}: holds no images. Looked for:\n{LOOKED_FOR}\nSee {_FLAGS}.")
    found = detect_layout(image_keys) if layout == "auto" else layout
    folders = _folders(image_keys, found, split, uri)
    hr_by_name: dict[str, str] = {}
    for key in image_keys:
        if not key.startswith(folders.hr) or _LR_FOLDER.search(key):
            continue
        name = _stem(key.removeprefix(folders.hr))
        if "/" in name and not folders.recursive:
            continue
        if name in hr_by_name:
            raise DataError(f"{uri}: {hr_by_name[name]} and {key} have the same name; LR could belong to either")
        hr_by_name[name] = key
    lr, unpaired = _pair(image_keys, folders, hr_by_name)
    if not hr_by_name:
        raise DataError(f"{uri}: the split {split!r} of layout {found} holds no HR images in {folders.hr or 'it'}; "
                        f"see {_FLAGS}, --data.split, --validation.split")  # fmt: skip
    images = tuple(
        CataloguedImage(name=name, hr_key=hr_by_name[name], lr_keys=lr.get(name, {})) for name in sorted(hr_by_name)
    )
    return Catalogue(layout=found, split=split, folders=folders, images=images, unpaired_lr=unpaired)


def detect_layout(image_keys: Sequence[str]) -> Layout:
    """The layout that the folders' names tell; a plain folder if none does."""
    if any(_DIV2K_HR.match(key) for key in image_keys):
        return "div2k"
    if any(key.startswith("HR/") for key in image_keys):
        return "benchmark"
    tops = {key.partition("/")[0] for key in image_keys}
    jpegs_only = all(key.lower().endswith((".jpg", ".jpeg")) for key in image_keys if not _LR_FOLDER.search(key))
    if _bsd500_root(image_keys) or (tops >= {"train", "val", "test"} and jpegs_only):
        return "bsd500"
    return "folder"


def splits_of(keys: Iterable[str], layout: Layout = "auto") -> tuple[str, ...]:
    """The splits there are, by their folders' names; empty if the layout (or this folder) has none."""
    image_keys = list_images(keys)
    found = detect_layout(image_keys) if layout == "auto" else layout
    if found == "benchmark":
        return ()
    if found == "div2k":
        return tuple(sorted({match[1] for key in image_keys if (match := _DIV2K_HR.match(key))}))
    root = _bsd500_root(image_keys) if found == "bsd500" else ""
    there = {key.removeprefix(root).partition("/")[0] for key in image_keys if key.startswith(root) and "/" in key}
    return tuple(name for name in SPLITS if name in there)


def is_lr(key: str) -> bool:
    """Whether a key lies in an LR folder of any scale and split."""
    return _LR_FOLDER.search(key) is not None


def lr_key(folders: Folders, name: str, scale: int) -> str:
    """Where the official layouts keep the LR image of an HR image: `DIV2K_train_LR_bicubic/X2/0001x2.png`."""
    return f"{folders.lr}X{scale}/{name}x{scale}.png"


def _folders(image_keys: Sequence[str], layout: Layout, split: str, uri: str) -> Folders:
    """Where `split` is. DataError if the layout's folders, or this split's, are not there."""
    if layout == "benchmark":
        if not any(key.startswith("HR/") for key in image_keys):
            raise DataError(f"{uri}: is not of layout benchmark, it has no folder HR/. Looked for:\n{LOOKED_FOR}")
        return Folders(hr="HR/", lr="LR_bicubic/", recursive=False)
    there = splits_of(image_keys, layout)
    if layout == "folder" and not there:
        return Folders(hr="", lr="LR_bicubic/", recursive=True)
    if not there:
        raise DataError(f"{uri}: is not of layout {layout} (--data.layout). Looked for:\n{LOOKED_FOR}")
    chosen = next((name for name in _SYNONYMS.get(split, (split,)) if name in there), None)
    if chosen is None:
        raise DataError(f"{uri}: has no split {split!r}; it has {', '.join(there)} "
                        "(--data.split, --validation.split)")  # fmt: skip
    if layout == "div2k":
        return Folders(hr=f"DIV2K_{chosen}_HR/", lr=f"DIV2K_{chosen}_LR_bicubic/", recursive=False)
    root = _bsd500_root(image_keys) if layout == "bsd500" else ""
    return Folders(hr=f"{root}{chosen}/", lr=f"{root}{chosen}_LR_bicubic/", recursive=layout == "folder")


def _bsd500_root(image_keys: Sequence[str]) -> str:
    for root in _BSD500_ROOTS:
        if any(key.startswith(tuple(root + name + "/" for name in ("train", "val", "test"))) for key in image_keys):
            return root
    return ""


def _pair(
    image_keys: Sequence[str], folders: Folders, hr_by_name: Mapping[str, str]
) -> tuple[dict[str, dict[int, str]], dict[int, tuple[str, ...]]]:
    """({name: {scale: LR key}}, {scale: LR keys without HR}). `0001x2.png` and `0001.png` both belong to `0001`."""
    paired: dict[str, dict[int, str]] = {}
    unpaired: dict[int, tuple[str, ...]] = {}
    for key in image_keys:
        match = re.match(r"X(\d+)/(.+)", key.removeprefix(folders.lr)) if key.startswith(folders.lr) else None
        if match is None:
            continue
        scale, stem = int(match[1]), _stem(match[2])
        candidates = (stem.removesuffix(f"x{scale}"), stem)
        name = next((name for name in candidates if name in hr_by_name and scale not in paired.get(name, {})), None)
        if name is None:
            unpaired[scale] = (*unpaired.get(scale, ()), key)
        else:
            paired.setdefault(name, {})[scale] = key
    return paired, unpaired


def _stem(key: str) -> str:
    return str(PurePosixPath(key).with_suffix(""))


def _names(title: str, keys: Sequence[str], shown: int = 10) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return f"\n  {title}: {', '.join(keys[:shown])}{more}"
