"""What a dataset holds for one split and scale: every usable image verified, and what was refused or converted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from sr_data.catalogue import Catalogue, CataloguedImage, Layout, catalogue, list_images
from sr_data.errors import DataError
from sr_data.file_facts import FileFacts, Progress, is_table, listing_digest, read_facts, table_from_json, table_to_json
from sr_data.storage import FileEntry, Store, open_store

__all__ = ["STAGED_KEY", "ImageRecord", "Layout", "Manifest", "load_manifest"]

STAGED_KEY = "manifest.json"
"""Written last by prepare_dataset: where it is, the dataset is complete and need not be read to be verified."""

TOO_SMALL = "smaller than a patch, left out"
DAMAGED = "unusable, left out"
CROPPED = "HR cropped to a multiple of the scale"
LR_MADE = "LR made by MATLAB's bicubic"
LR_OTHER_SCALES = "LR shipped for other scales only, made by MATLAB's bicubic"
_NAMED_IN_ERRORS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecord:
    """One verified HR image and its LR partner."""

    name: str
    hr_key: str
    lr_key: str | None
    """None: LR is made from HR."""
    width: int
    """Pixels of HR, cropped to a multiple of the scale."""
    height: int
    mode: str
    """Pillow's name of the HR file's pixel format."""
    hr_sha256: str
    lr_sha256: str | None
    num_bytes: int
    """Of both files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The images of one split at one scale, sorted by name."""

    uri: str
    layout: str
    split: str
    scale: int
    images: tuple[ImageRecord, ...]
    decisions: Mapping[str, int] = field(default_factory=dict)
    """What was decided without asking → how many images: conversions to RGB, crops, images left out, LR made."""
    left_out: tuple[str, ...] = ()
    """`name: reason` of each image that is in the dataset and not in `images`."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits over names, contents and scale: the same wherever the dataset lies, however it was listed."""
        rows = sorted([image.name, image.hr_sha256, image.lr_sha256] for image in self.images)
        return hashlib.sha256(json.dumps([self.scale, rows]).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Everything, and the fingerprint for whoever reads it."""
        return json.dumps({**asdict(self), "fingerprint": self.fingerprint}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The inverse of `to_json`. DataError if the text is anything else, or was edited."""
        try:
            plain = json.loads(text)
            fingerprint = plain.pop("fingerprint")
            images = tuple(ImageRecord(**image) for image in plain.pop("images"))
            manifest = cls(**{**plain, "images": images, "left_out": tuple(plain.pop("left_out"))})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not a manifest ({error!r})") from error
        if manifest.fingerprint != fingerprint:
            raise DataError(f"the manifest was changed: its fingerprint is {manifest.fingerprint}, not {fingerprint}")
        return manifest


def load_manifest(
    uri: str,
    *,
    split: str,
    scale: int,
    layout: Layout = "auto",
    min_side_px_hr: int = 0,
    cache: Store | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    num_threads: int = 8,
    progress: Progress | None = None,
) -> Manifest:
    """Lists the dataset and verifies every image of the split, unless a staged table or the cache has done that before.

    Args:
        uri: of the dataset's root, see `sr_data.storage.open_store`.
        split: `train`, `valid` (or `val`), `test`; ignored where a dataset has none.
        scale: which LR images to pair; 1 or more.
        layout: see `sr_data.catalogue`.
        min_side_px_hr: HR images with a side below it are left out and counted.
        cache: where to keep what verification has shown, keyed by the listing (keys, sizes, versions).
        on_bad_image: "error" lists all unusable images and stops; "skip" leaves them out and counts them.
        num_threads: files read and decoded at once.
        progress: called with (files done, files in all) while files are read.

    Raises:
        DataError: nothing usable, images that don't pair, unusable images, a staged dataset that was changed.
        StorageError: the storage refuses.
    """
    store = open_store(uri)
    entries = {entry.key: entry for entry in store.list()}
    facts = staged_facts(store, entries)
    found = catalogue(entries, uri=store.uri, split=split, layout=layout)
    found.check_pairs(store.uri, scale)
    if facts is None:
        keys = _keys_of(found, scale)
        facts = _verified(store, [entries[key] for key in keys], cache, num_threads, progress)
    return _assemble(store.uri, found, facts, scale=scale, min_side_px_hr=min_side_px_hr, on_bad_image=on_bad_image)


def staged_facts(store: Store, entries: Mapping[str, FileEntry]) -> dict[str, FileFacts] | None:
    """The table of a staged dataset, checked against its listing by size; None if prepare_dataset did not write here.

    Raises:
        DataError: files came, went or changed size since.
    """
    if STAGED_KEY not in entries or not is_table(text := store.read_text(STAGED_KEY)):
        return None
    facts = table_from_json(text, name=store.uri_of(STAGED_KEY))
    images = set(list_images(entries))
    wrong = [f"missing: {key}" for key in sorted(facts.keys() - images)]
    wrong += [f"not in the table: {key}" for key in sorted(images - facts.keys())]
    wrong += [
        f"{entries[key].num_bytes} bytes instead of {facts[key].num_bytes}: {key}"
        for key in sorted(images & facts.keys())
        if entries[key].num_bytes != facts[key].num_bytes
    ]
    if wrong:
        raise DataError(f"{store.uri}: its files were changed after prepare_dataset wrote {STAGED_KEY}; run it again "
                        f"(or delete {STAGED_KEY} to have every file read instead).{_lines(wrong)}")  # fmt: skip
    return facts


def _verified(
    store: Store, entries: Sequence[FileEntry], cache: Store | None, num_threads: int, progress: Progress | None
) -> dict[str, FileFacts]:
    cache_key = f"manifest-{listing_digest(store.uri, entries)[:32]}.json"
    if cache is not None and cache.exists(cache_key):
        return table_from_json(cache.read_text(cache_key), name=cache.uri_of(cache_key))
    facts = read_facts(store, [entry.key for entry in entries], num_threads=num_threads, progress=progress)
    if cache is not None:
        cache.write(cache_key, table_to_json(facts).encode())
    return facts


def _keys_of(found: Catalogue, scale: int) -> list[str]:
    lr_keys = [image.lr_keys[scale] for image in found.images if scale in image.lr_keys]
    return [image.hr_key for image in found.images] + lr_keys


def _assemble(
    uri: str,
    found: Catalogue,
    facts: Mapping[str, FileFacts],
    *,
    scale: int,
    min_side_px_hr: int,
    on_bad_image: Literal["error", "skip"],
) -> Manifest:
    records: list[ImageRecord] = []
    decisions: Counter[str] = Counter()
    bad: list[str] = []
    too_small: list[str] = []
    for image in found.images:
        hr = facts[image.hr_key]
        lr = facts[image.lr_keys[scale]] if scale in image.lr_keys else None
        problem = _problem(image, hr, lr, scale)
        width, height = hr.width - hr.width % scale, hr.height - hr.height % scale
        if problem is not None:
            bad.append(problem)
        elif min(width, height) < max(min_side_px_hr, 1):
            too_small.append(f"{image.hr_key}: {width} x {height} px, smaller than {max(min_side_px_hr, scale)} px")
        else:
            decisions.update({*hr.notes, *(lr.notes if lr else ())})
            decisions[CROPPED] += (width, height) != (hr.width, hr.height)
            decisions[LR_OTHER_SCALES if found.lr_scales else LR_MADE] += lr is None
            records.append(_record(image, hr, lr, scale, width, height))
    if bad and on_bad_image == "error":
        raise DataError(f"{uri}: {len(bad)} of {len(found.images)} images can't be used; repair or remove them, or "
                        f"leave them out with --data.on-bad-image skip.{_lines(bad)}")  # fmt: skip
    if not records:
        flags = "--data.uri, --data.split, --data.patch-px-hr, --validation.uri"
        raise DataError(f"{uri}: split {found.split!r} has no usable image left, of {len(found.images)}; see {flags}."
                        f"{_lines(bad + too_small)}")  # fmt: skip
    decisions[DAMAGED] += len(bad)
    decisions[TOO_SMALL] += len(too_small)
    return Manifest(
        uri=uri,
        layout=found.layout,
        split=found.split,
        scale=scale,
        images=tuple(sorted(records, key=lambda record: record.name)),
        decisions={decision: decisions[decision] for decision in sorted(decisions) if decisions[decision]},
        left_out=tuple(bad + too_small),
    )


def _record(
    image: CataloguedImage, hr: FileFacts, lr: FileFacts | None, scale: int, width: int, height: int
) -> ImageRecord:
    return ImageRecord(
        name=image.name,
        hr_key=image.hr_key,
        lr_key=image.lr_keys.get(scale),
        width=width,
        height=height,
        mode=hr.mode,
        hr_sha256=hr.sha256,
        lr_sha256=None if lr is None else lr.sha256,
        num_bytes=hr.num_bytes + (0 if lr is None else lr.num_bytes),
    )


def _problem(image: CataloguedImage, hr: FileFacts, lr: FileFacts | None, scale: int) -> str | None:
    if hr.error is not None:
        return f"{image.hr_key}: {hr.error}"
    if lr is None:
        return None
    if lr.error is not None:
        return f"{image.lr_keys[scale]}: {lr.error}"
    expected = (hr.width // scale, hr.height // scale)
    if (lr.width, lr.height) != expected:
        return (f"{image.lr_keys[scale]}: is {lr.width} x {lr.height} px, where 1/{scale} of {image.hr_key} "
                f"({hr.width} x {hr.height} px) is {expected[0]} x {expected[1]}")  # fmt: skip
    return None


def _lines(problems: Sequence[str]) -> str:
    more = f"\n  and {len(problems) - _NAMED_IN_ERRORS} more" if len(problems) > _NAMED_IN_ERRORS else ""
    return "".join(f"\n  {problem}" for problem in problems[:_NAMED_IN_ERRORS]) + more
