"""Scores and pictures of an evaluation as a folder that a browser opens from disk: index.html and images/ beside it.

Pictures are written while images are scored, as no more than one image is in memory: those of the worst images so far
of each set and scale, until worse ones take their place. Numbers are there for all images.

Each report has a folder of its own in images/, and its page lists the files in it. An earlier report is whole until the
new page takes its place; then what it lists is deleted, and nothing else ever is.
"""

import contextlib
import heapq
import io
import json
import math
import re
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sr_data.decode import encode_png
from sr_data.errors import StorageError
from sr_data.storage import Store, open_store
from sr_serve.evaluation import OpenModel, OpenSet, ScoredImage, SetEvaluation
from sr_train.metrics import ImageScore, luma, protocol_named
from sr_train.score_report import format_seconds, gain_db
from sr_train.upscaler import REGISTRY_PREFIX

INDEX_FILE = "index.html"
PICTURES_FOLDER = "images"
GENERATOR = "sr-ray evaluation report"
"""In the page's head: what may be replaced by the next report."""
_MARK = f'<meta name="generator" content="{GENERATOR}">'
_FILES = re.compile(r'<script type="application/json" id="files">(.*?)</script>', re.DOTALL)
_OWN_KEY = re.compile(rf"{PICTURES_FOLDER}/\d{{8}}-\d{{6}}-[0-9a-f]{{8}}/.+")
"""A file in a report's own folder; whatever a page lists, no other is deleted."""
CROP_PX_HR = 64
"""Side of the detail, which the page shows four times as large."""
THUMBNAIL_PX = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """What was written of one image: keys below the report's folder."""

    keys: tuple[str, ...]
    """Whole pictures: bicubic, the models, HR."""
    crop_keys: tuple[str, ...]
    """Details, in the same order."""
    thumbnail_key: str
    width: int
    """Pixels of HR."""
    height: int
    crop_top: int
    crop_left: int
    crop_px: int
    """Side of the detail."""

    def all_keys(self) -> tuple[str, ...]:
        """Every file of this image."""
        return (*self.keys, *self.crop_keys, self.thumbnail_key)


@dataclass(slots=True)
class _Kept:
    """The worst images so far of one set and scale."""

    folder: str
    """Where their pictures are: a key."""
    heap: list[tuple[float, int]] = field(default_factory=list)
    """(minus `rank_db`, minus the image's number): the first is the best of the worst, the last one of equals."""
    pictures: dict[int, Pictures] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)


class EvaluationReport:
    """A report in the making: `check`, then `observe` each image, then `write`; `discard` if it comes to nothing."""

    def __init__(self, uri: str, *, protocol: str, num_pictured: int) -> None:
        """`num_pictured`: of how many images of each set and scale, the worst ones, there are pictures."""
        self._store: Store = open_store(uri)
        self._protocol = protocol
        self._num_pictured = num_pictured
        self._kept: dict[tuple[str, int], _Kept] = {}
        self._folder = f"{PICTURES_FOLDER}/{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}"
        self._written: set[str] = set()
        """Keys of all files in the folder."""
        self._is_shown = False
        """Whether a page may be there that shows them."""

    def check(self) -> None:
        """StorageError if the report could not be written, or would replace a page that is no such report."""
        if self._num_pictured < 0:
            raise StorageError(f"{self._num_pictured} images can't have pictures; give 0 or more (--html-images)")
        try:
            self._earlier_page()
            self._store.check_writable()
        except StorageError as error:
            raise StorageError(f"{error} (--html)") from error

    def observe(self, one: OpenSet, number: int, image: ScoredImage) -> None:
        """Writes the pictures of an image that is among the worst of its set so far, and deletes the one it ousts."""
        of_set = one.name, one.manifest.scale
        if of_set not in self._kept:
            # Numbered, as names that differ may have one slug.
            folder = f"{self._folder}/{len(self._kept) + 1:02d}-{_slug(one.name)}-x{one.manifest.scale}"
            self._kept[of_set] = _Kept(folder=folder)
        kept = self._kept[of_set]
        rank = rank_db(image.scores)
        if len(kept.heap) >= self._num_pictured and not (kept.heap and rank < -kept.heap[0][0]):
            return
        prefix = f"{kept.folder}/{number + 1:04d}-{_slug(image.pair.name)}"
        kept.pictures[number] = self._write_pictures(prefix, image, one.manifest.scale)
        kept.names[number] = image.pair.name
        heapq.heappush(kept.heap, (-rank, -number))
        if len(kept.heap) > self._num_pictured:
            ousted = -heapq.heappop(kept.heap)[1]
            del kept.names[ousted]
            for key in kept.pictures.pop(ousted).all_keys():
                self._store.delete(key)
                self._written.remove(key)

    def write(self, evaluations: Sequence[SetEvaluation]) -> str:
        """Writes the page, which completes the report, and deletes the files of an earlier one. Returns its URI.

        StorageError if it can't be written, or there is another page by now.
        """
        page = self._page(evaluations)
        earlier = _listed_keys(self._earlier_page()) - self._written
        self._is_shown = True  # even if writing fails: an answer that is lost may follow a page that is there
        self._store.write(INDEX_FILE, page.encode())
        for key in sorted(earlier):
            self._store.delete(key)
        self._remove_empty_folders(earlier)
        return self._store.uri_of(INDEX_FILE)

    def discard(self) -> None:
        """Deletes what was written, if no page shows it. No error: the failure before it is the one to hear of."""
        if self._is_shown:
            return
        for key in self._written:
            with contextlib.suppress(StorageError):
                self._store.delete(key)
        self._remove_empty_folders(self._written)

    def _earlier_page(self) -> str:
        """The text of the report that is there; empty if there is none. StorageError if it is another page."""
        if not self._store.exists(INDEX_FILE):
            return ""
        page = self._store.read_text(INDEX_FILE)
        if _MARK not in page:
            raise StorageError(f"{self._store.uri}: holds another {INDEX_FILE}; choose another folder")
        return page

    def _write_file(self, key: str, data: bytes) -> None:
        self._written.add(key)  # before: a failure may leave it behind
        self._store.write(key, data)

    def _remove_empty_folders(self, keys: Collection[str]) -> None:
        """Of a report that is gone; a disk keeps them, object storage has none."""
        if "://" in self._store.uri:
            return
        parents = {parent for key in keys for parent in PurePosixPath(key).parents if len(parent.parts) > 1}
        for parent in sorted(parents, key=lambda it: len(it.parts), reverse=True):
            with contextlib.suppress(OSError):  # not empty: something else is in it
                (Path(self._store.uri) / parent).rmdir()

    def _write_pictures(self, prefix: str, image: ScoredImage, scale: int) -> Pictures:
        hr_HWC = image.pair.hr_HWC
        shown_HWC = [*(sr_HWC.cpu().numpy() for sr_HWC in image.upscaled), hr_HWC]
        top, left, side = worst_crop(
            shown_HWC[_main(image.scores)], hr_HWC, border_px=protocol_named(self._protocol).crop_px(scale)
        )
        names = [*("bicubic" if number == 0 else f"model-{number}" for number in range(len(image.upscaled))), "hr"]
        pictures = Pictures(
            keys=tuple(f"{prefix}-{name}.png" for name in names),
            crop_keys=tuple(f"{prefix}-{name}-crop.png" for name in names),
            thumbnail_key=f"{prefix}-thumbnail.jpg",
            width=hr_HWC.shape[1],
            height=hr_HWC.shape[0],
            crop_top=top,
            crop_left=left,
            crop_px=side,
        )
        for image_HWC, key, crop_key in zip(shown_HWC, pictures.keys, pictures.crop_keys, strict=True):
            self._write_file(key, encode_png(image_HWC))
            self._write_file(crop_key, encode_png(image_HWC[top : top + side, left : left + side]))
        self._write_file(pictures.thumbnail_key, _thumbnail(hr_HWC))
        return pictures

    def _page(self, evaluations: Sequence[SetEvaluation]) -> str:
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        template = environment.from_string(files("sr_serve").joinpath("evaluation_report.html").read_text("utf-8"))
        groups = [self._group(number, evaluation) for number, evaluation in enumerate(evaluations, 1)]
        return template.render(
            generator=GENERATOR,
            files=sorted(self._written),
            groups=groups,
            num_pictured=self._num_pictured,
            num_without=sum(max(0, len(group["images"]) - self._num_pictured) for group in groups),
            created=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        )

    def _group(self, number: int, evaluation: SetEvaluation) -> dict[str, Any]:
        """What the page shows of one set at one scale, as the template takes it."""
        kept = self._kept.get((evaluation.set, evaluation.scale), _Kept(folder=""))
        pictures = {kept.names[at]: of_image for at, of_image in kept.pictures.items()}
        short = _short([it.model for it in evaluation.models])
        per_image = list(zip(*(it.score.images for it in evaluation.models), strict=True))
        per_image.sort(key=lambda scores: (rank_db(scores), scores[0].name))
        main = _main(per_image[0])
        return {
            "id": f"set-{number}",
            "title": f"{evaluation.set} ×{evaluation.scale}",
            "set": evaluation.set,
            "scale": evaluation.scale,
            "protocol": evaluation.protocol,
            "fingerprint": evaluation.fingerprint,
            "main": main,
            "ranked_by": f"gain of {short[main]} over bicubic" if main else "PSNR of bicubic",
            "models": [
                {
                    "label": it.model.label,
                    "short": name,
                    **_cells(it.score.psnr_db, it.score.ssim, evaluation.bicubic.psnr_db),
                    "seconds": format_seconds(it.seconds_per_image),
                }
                for it, name in zip(evaluation.models, short, strict=True)
            ],
            "images": [
                {
                    "name": scores[0].name,
                    "id": f"set-{number}-image-{rank}",
                    "rank": rank,
                    "scores": [_cells(it.psnr_db, it.ssim, scores[0].psnr_db) for it in scores],
                    "pictures": pictures.get(scores[0].name),
                }
                for rank, scores in enumerate(per_image, 1)
            ],
        }


def rank_db(scores: Sequence[ImageScore]) -> float:
    """What images are ranked by, the lowest being the worst: the first model's gain over bicubic, which is the first of
    the scores; bicubic's PSNR if there is no model.
    """
    return gain_db(scores[1].psnr_db, scores[0].psnr_db) if len(scores) > 1 else scores[0].psnr_db


def worst_crop(
    sr_HWC: NDArray[np.uint8], hr_HWC: NDArray[np.uint8], *, border_px: int, side_px: int = CROP_PX_HR
) -> tuple[int, int, int]:
    """Top, left and side of the square where the squared error of Y is largest, not within `border_px` of the border.

    The side is `side_px`, or less in a smaller image.
    """
    height, width = hr_HWC.shape[:2]
    border_px = min(border_px, (min(height, width) - 1) // 2)
    side_px = min(side_px, height - 2 * border_px, width - 2 * border_px)
    error_HW = np.square(luma(sr_HWC).numpy() - luma(hr_HWC).numpy())
    error_HW = error_HW[border_px : height - border_px, border_px : width - border_px]
    integral = np.pad(error_HW.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = integral[side_px:, side_px:] - integral[:-side_px, side_px:]
    sums -= integral[side_px:, :-side_px] - integral[:-side_px, :-side_px]
    row, column = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(row) + border_px, int(column) + border_px, side_px


def _main(scores: Sequence[Any]) -> int:
    """Which of bicubic and the models the report is mainly about: the first model, if there is one."""
    return min(1, len(scores) - 1)


def _cells(psnr_db: float, ssim: float, bicubic_psnr_db: float) -> dict[str, Any]:
    gain = gain_db(psnr_db, bicubic_psnr_db)
    return {
        "psnr_db": psnr_db,
        "psnr": "∞" if math.isinf(psnr_db) else f"{psnr_db:.2f}",
        "ssim": ssim,
        "gain_db": gain,
        "gain": f"{gain:+.2f}".replace("inf", "∞").replace("-", "−"),
    }


def _short(models: Sequence[OpenModel]) -> list[str]:
    """What tells the models apart in headings and buttons, which have little room: the last parts of a path, as many as
    it takes, and a registered model without the version that its alias meant.
    """
    names = [model.upscaler.name.rstrip("/") for model in models]
    longest = max(name.count("/") for name in names) + 1
    for num_parts in range(1, longest + 1):
        short = [
            name.removeprefix(REGISTRY_PREFIX) if model.registered else "/".join(name.split("/")[-num_parts:])
            for model, name in zip(models, names, strict=True)
        ]
        if len(set(short)) == len(short):
            return short
    return names


def _thumbnail(image_HWC: NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(image_HWC)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    target = io.BytesIO()
    image.save(target, "JPEG", quality=80)
    return target.getvalue()


def _listed_keys(page: str) -> set[str]:
    """The files of the report that a page shows; none if the list is not there or was edited."""
    found = _FILES.search(page)
    try:
        keys = json.loads(found[1]) if found else []
    except json.JSONDecodeError:
        return set()
    if not isinstance(keys, list):
        return set()
    return {key for key in keys if isinstance(key, str) and _OWN_KEY.fullmatch(key) and ".." not in key}


def _slug(name: str) -> str:
    """Of letters that neither a file system nor a URL minds."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)[-60:].strip("-") or "image"
