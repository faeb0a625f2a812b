"""Score images that someone else's program made, against their originals.

    python pipelines/score_images.py --sr results/Set5 --hr data/Set5/HR --scale 4 --json scores.json

An SR image belongs to the HR image of its name, with or without x4 or _x4 behind it: baby.png or babyx4.png, for
baby.png. HR images are cropped to a multiple of the scale, as they are before LR images are made of them.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from sr_data.catalogue import IMAGE_SUFFIXES
from sr_data.decode import decode_image
from sr_data.errors import DataError, ImageError, StorageError
from sr_data.resize import crop_to_multiple, downscale_bicubic, upscale_bicubic
from sr_data.storage import Store, open_store
from sr_train.cli import exit_with
from sr_train.metrics import PAPERS_PROTOCOL, ImageScore, MetricError, protocol_named, score_image
from sr_train.score_report import ScoreRow, check_scores_writable, score_table, write_scores
from sr_train.upscaler import BICUBIC
from sr_train.validation import mean_score


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The command line."""

    sr: str
    """Folder or URI of the upscaled images."""
    hr: str
    """Folder or URI of the originals."""
    scale: int
    """Upscaling factor."""
    protocol: str = PAPERS_PROTOCOL
    """psnr@y,crop=scale (the papers'), psnr@rgb,crop=scale or psnr@rgb,crop=scale+6 (EDSR on DIV2K)."""
    json: str | None = None
    """File or URI to write the scores to, image by image."""


def main(arguments: Sequence[str]) -> None:
    """Parses, scores, prints. Exits with 2 and a message on what the user can mend."""
    options = tyro.cli(Options, args=list(arguments), prog="score_images.py", description=__doc__)
    try:
        score(options)
    except (DataError, StorageError, MetricError) as error:
        exit_with(error)


def score(options: Options) -> None:
    """Scores each pair, prints the table, writes the JSON file."""
    protocol_named(options.protocol)
    if options.scale < 1:
        raise DataError(f"scale={options.scale} must be at least 1 (--scale)")
    if options.json is not None:
        check_scores_writable(options.json)
    sr_store, hr_store = open_store(options.sr), open_store(options.hr)
    scores: list[ImageScore] = []
    bicubic: list[ImageScore] = []
    for name, sr_key, hr_key in tqdm(pair_by_name(sr_store, hr_store, options.scale), leave=False, disable=None):
        hr_HWC = crop_to_multiple(_read(hr_store, hr_key), options.scale)
        sr_HWC = _read(sr_store, sr_key)
        if sr_HWC.shape != hr_HWC.shape:
            raise ImageError(
                f"{sr_store.uri_of(sr_key)}: is {_size(sr_HWC)}; {hr_key} cropped to a multiple of {options.scale} is "
                f"{_size(hr_HWC)} (--scale, --sr, --hr)"
            )
        bicubic_HWC = upscale_bicubic(downscale_bicubic(hr_HWC, options.scale), options.scale)
        for list_of_scores, image_HWC in ((scores, sr_HWC), (bicubic, bicubic_HWC)):
            list_of_scores.append(
                score_image(image_HWC, hr_HWC, scale=options.scale, protocol=options.protocol, name=name)
            )
    set_name = sr_store.uri.rpartition("/")[2]
    total, baseline = (mean_score(set_name, options.scale, options.protocol, images) for images in (scores, bicubic))
    print(score_table([ScoreRow(label=options.sr, score=total), ScoreRow(label=BICUBIC, score=baseline)], baseline))
    if options.json is not None:
        write_scores(options.json, [total.to_json_dict()])


def pair_by_name(sr_store: Store, hr_store: Store, scale: int) -> list[tuple[str, str, str]]:
    """(name, SR key, HR key) of every image; DataError lists what has no partner, or more than one."""
    hr_keys, sr_keys = _images(hr_store, "--hr"), _images(sr_store, "--sr")
    pairs: list[tuple[str, str, str]] = []
    missing: list[str] = []
    for name, hr_key in hr_keys.items():
        found = [sr_keys.pop(stem) for stem in (name, f"{name}x{scale}", f"{name}_x{scale}") if stem in sr_keys]
        if len(found) > 1:
            raise DataError(f"{sr_store.uri}: {' and '.join(found)} are both the SR image of {hr_key} (--sr)")
        if found:
            pairs.append((name, found[0], hr_key))
        else:
            missing.append(hr_key)
    problems = []
    if missing:
        problems.append(f"no SR image in {sr_store.uri} for {_some(missing)}")
    if sr_keys:
        problems.append(f"no HR image in {hr_store.uri} for {_some(list(sr_keys.values()))}")
    if problems:
        raise DataError(f"{'; '.join(problems)} (--sr, --hr)")
    return pairs


def _images(store: Store, flag: str) -> dict[str, str]:
    """Path without suffix → key, of all images in a folder."""
    keys: dict[str, str] = {}
    for entry in store.list():
        path = PurePosixPath(entry.key)
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        name = str(path.with_suffix(""))
        if name in keys:
            raise DataError(f"{store.uri}: {keys[name]} and {entry.key} have one name ({flag})")
        keys[name] = entry.key
    if not keys:
        raise DataError(f"{store.uri}: there are no images, or no such folder ({flag})")
    return keys


def _read(store: Store, key: str) -> NDArray[np.uint8]:
    image_HWC, _ = decode_image(store.read(key), name=store.uri_of(key))
    return image_HWC


def _size(image_HWC: NDArray[np.uint8]) -> str:
    return f"{image_HWC.shape[1]}x{image_HWC.shape[0]}"


def _some(keys: Sequence[str], limit: int = 5) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


if __name__ == "__main__":
    main(sys.argv[1:])
