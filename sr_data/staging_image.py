"""One HR image of a source dataset → its files in the target: verified, with LR made, cut into tiles if asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sr_data.catalogue import CataloguedImage, Folders, lr_key
from sr_data.decode import encode_png
from sr_data.errors import ImageError
from sr_data.file_facts import FileFacts, decode_with_facts
from sr_data.resize import crop_to_multiple, downscale_bicubic
from sr_data.storage import FileEntry, Store
from sr_data.tiling import Tiling

_File = tuple[bytes, FileFacts]


@dataclass(frozen=True, kw_only=True, slots=True)
class StagingJob:
    """One HR image and what is to be made of it."""

    image: CataloguedImage
    folders: Folders
    """Where its layout keeps HR and LR, in the target as in the source."""
    scales: tuple[int, ...]
    """All LR scales that the target shall have for it."""
    signature: str
    """Of the source files and the options, see `sr_data.staging_journal`."""


@dataclass(kw_only=True, slots=True)
class StagedImage:
    """What became of it."""

    outputs: dict[str, FileFacts] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_sent: int = 0
    lr_made: int = 0
    notes: set[str] = field(default_factory=set)
    problem: str | None = None


def stage_image(
    job: StagingJob, tiling: Tiling | None, source: Store, target: Store, there: Mapping[str, FileEntry]
) -> StagedImage:
    """Reads, verifies, makes and sends; `there` is the target's listing. An unusable image gives `problem`."""
    one = StagedImage()
    try:
        files = _files_of(job, tiling, source, one)
    except ImageError as error:
        one.problem = str(error)
        return one
    for key, (data, facts) in files.items():
        one.bytes_sent += _send(target, key, data, facts, there)
        one.outputs[key] = facts
    return one


def _files_of(job: StagingJob, tiling: Tiling | None, source: Store, one: StagedImage) -> dict[str, _File]:
    hr_key = job.image.hr_key
    hr, hr_HWC = _read(source, hr_key, one)
    height, width = hr_HWC.shape[:2]
    files = {hr_key: hr}
    lr_by_scale: dict[int, NDArray[np.uint8]] = {}
    for scale in job.scales:
        if min(height, width) < scale:
            raise ImageError(f"{hr_key}: {width} x {height} px are too few for LR x{scale}")
        if scale in job.image.lr_keys:
            key = job.image.lr_keys[scale]
            files[key], lr_by_scale[scale] = _read(source, key, one)
            lr_height, lr_width = lr_by_scale[scale].shape[:2]
            if (lr_height, lr_width) != (height // scale, width // scale):
                raise ImageError(f"{key}: is {lr_width} x {lr_height} px, where 1/{scale} of {hr_key} "
                                 f"({width} x {height} px) is {width // scale} x {height // scale}")  # fmt: skip
        else:
            lr_by_scale[scale] = downscale_bicubic(crop_to_multiple(hr_HWC, scale), scale)
            one.lr_made += 1
            if tiling is None:
                files[lr_key(job.folders, job.image.name, scale)] = _encoded(lr_by_scale[scale])
    return files if tiling is None else _tiles(job, tiling, hr_HWC, lr_by_scale)


def _tiles(
    job: StagingJob, tiling: Tiling, hr_HWC: NDArray[np.uint8], lr_by_scale: Mapping[int, NDArray[np.uint8]]
) -> dict[str, _File]:
    height, width = hr_HWC.shape[:2]
    files: dict[str, _File] = {}
    for number, box in enumerate(tiling.boxes(height, width, job.scales or (1,)), start=1):
        name = f"{job.image.name}_s{number:03}"
        files[f"{job.folders.hr}{name}.png"] = _encoded(_cut(hr_HWC, box, 1))
        for scale, lr_HWC in lr_by_scale.items():
            # Cut from the whole image's LR: made from the tile, its border would show the tile's mirrored edge.
            files[lr_key(job.folders, name, scale)] = _encoded(_cut(lr_HWC, box, scale))
    if not files:
        raise ImageError(f"{job.image.hr_key}: {width} x {height} px are too few for a tile at scales {job.scales}")
    return files


def _cut(image_HWC: NDArray[np.uint8], box: tuple[int, int, int, int], scale: int) -> NDArray[np.uint8]:
    top, left, height, width = (value // scale for value in box)
    return image_HWC[top : top + height, left : left + width]


def _read(source: Store, key: str, one: StagedImage) -> tuple[_File, NDArray[np.uint8]]:
    data = source.read(key)
    one.bytes_read += len(data)
    facts, image_HWC = decode_with_facts(data)
    if image_HWC is None:
        raise ImageError(f"{key}: {facts.error}")
    one.notes.update(facts.notes)
    return (data, facts), image_HWC


def _encoded(image_HWC: NDArray[np.uint8]) -> tuple[bytes, FileFacts]:
    data = encode_png(image_HWC)
    height, width = image_HWC.shape[:2]
    sha256 = hashlib.sha256(data).hexdigest()
    return data, FileFacts(num_bytes=len(data), sha256=sha256, width=width, height=height, mode="RGB")


def _send(target: Store, key: str, data: bytes, facts: FileFacts, there: Mapping[str, FileEntry]) -> int:
    """Writes a file unless exactly it is there already; returns the bytes sent."""
    before = there.get(key)
    same_size = before is not None and before.num_bytes == facts.num_bytes
    if same_size and hashlib.sha256(target.read(key)).hexdigest() == facts.sha256:
        return 0
    target.write(key, data)
    return len(data)
