"""Models × sets × scales → scores: what is to be scored, checked before the first score, and the scoring.

Each model is scored at its own scale, with bicubic beside it. Each pair of a set is decoded once and given to all
models of that scale; one image is in memory at a time.
"""

import csv
import io
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from sr_data.errors import DataError
from sr_data.manifest import Manifest, load_manifest
from sr_data.pairs import DecodedPair, load_pair
from sr_data.storage import open_store
from sr_models.inference import placed, upscale_tensor
from sr_train.metrics import ImageScore, MetricError, protocol_named, score_image, smallest_side_px
from sr_train.score_report import ScoreRow, gain_db, score_table
from sr_train.upscaler import (
    ALLOWED,
    BICUBIC,
    Upscaler,
    UpscalerError,
    device_named,
    open_network,
    open_upscaler,
    pinned,
)
from sr_train.validation import SetScore, mean_score

CSV_COLUMNS = (
    *("set", "scale", "protocol", "fingerprint", "model", "version", "self_ensemble"),
    *("image", "psnr_db", "ssim", "gain_db"),
)
_FLAG_OF_TRAINING = r"--(?:data|validation)\.[\w-]+(?: \(--source of [\w.]+\))?"
_FLAGS_OF_TRAINING = re.compile(f"{_FLAG_OF_TRAINING}(?:, {_FLAG_OF_TRAINING})*")


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenModel:
    """A model ready to be scored."""

    upscaler: Upscaler
    """Its name is MODEL as it was given."""
    registered: tuple[str, str] | None = None
    """Name and version, if it is a registered model: what its alias meant at the start."""
    self_ensemble: bool = False
    """Whether eight flips and turns are averaged."""
    is_asked_for: bool = True
    """Whether it was given as MODEL: bicubic is scored beside all models anyway."""

    @property
    def label(self) -> str:
        """For people: MODEL, the version that an alias meant, and whether it is a self-ensemble."""
        name = self.upscaler.name
        version = f" (version {self.registered[1]})" if self.registered is not None and "@" in name else ""
        return f"{name}{version}{' self-ensemble' if self.self_ensemble else ''}"


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSet:
    """A set at one scale, its images verified."""

    name: str
    """The last part of its URI."""
    manifest: Manifest


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoredImage:
    """One image, what all models made of it, and what that scored. Held no longer than it is looked at."""

    pair: DecodedPair
    upscaled: tuple[torch.Tensor, ...]
    """uint8 RGB H×W×3 of each model, bicubic first; where the model is."""
    scores: tuple[ImageScore, ...]
    """In the same order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelScore:
    """A model's scores on a set."""

    model: OpenModel
    score: SetScore
    seconds_per_image: float
    """Median time to upscale an image of the set, from LR to SR; the first, on which a GPU warms up, hardly counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetEvaluation:
    """All models' scores on one set at one scale under one protocol."""

    set: str
    scale: int
    protocol: str
    fingerprint: str
    """Of the manifest: names and contents of the images, and the scale."""
    models: tuple[ModelScore, ...]
    """Bicubic first, then the models of this scale in the order in which they were given."""

    @property
    def bicubic(self) -> SetScore:
        """What every model is compared with."""
        return self.models[0].score

    def table(self) -> str:
        """For the terminal: a row per model."""
        rows = [
            ScoreRow(label=it.model.label, score=it.score, seconds_per_image=it.seconds_per_image) for it in self.models
        ]
        return score_table(rows, self.bicubic)

    def to_json_dicts(self) -> list[dict[str, Any]]:
        """Plain values for JSON, an object per model that was given. An infinite PSNR is null."""
        return [
            {
                "model": it.model.upscaler.name,
                "version": None if it.model.registered is None else it.model.registered[1],
                "self_ensemble": it.model.self_ensemble,
                "fingerprint": self.fingerprint,
                **it.score.to_json_dict(),
            }
            for it in self.models
            if it.model.is_asked_for
        ]


Observer = Callable[[OpenSet, int, ScoredImage], None]
"""Called after each image with the set, the image's number in it, and the image."""


def parse_scales(text: str | None) -> list[int]:
    """`"2,4"` → [2, 4]; None → []. UpscalerError names what is not a scale."""
    if text is None:
        return []
    scales = []
    for part in (part.strip() for part in text.split(",")):
        if not re.fullmatch(r"-?\d+", part):
            raise UpscalerError(f"scale={part!r} is no number; give one, or several separated by commas (--scale)")
        if int(part) < 1:
            raise UpscalerError(f"scale={part} must be at least 1 (--scale)")
        scales.append(int(part))
    return sorted(set(scales))


def open_models(
    names: Sequence[str],
    *,
    scales: Sequence[int] = (),
    device: str = "auto",
    tracking_uri: str | None = None,
    self_ensemble: bool = False,
    tile_px_lr: int = 192,
) -> dict[int, list[OpenModel]]:
    """Opens every MODEL on a device: scale → the models of that scale, bicubic first, by ascending scale.

    `scales` are those asked for: all must have a model (`bicubic` has every scale), and no model may have another.
    Without them the models say. An alias is resolved to its version here, once. Errors as for `open_upscaler`.
    """
    if not names:
        raise UpscalerError(f"no model is given; {ALLOWED}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UpscalerError(f"{twice[0]}: is given twice (MODEL)")
    if tile_px_lr < 1:
        raise UpscalerError(f"tile_px_lr={tile_px_lr} must be at least 1 (--tile-px-lr)")
    target = device_named(device)
    found: dict[int, list[OpenModel]] = {scale: [] for scale in scales}
    for name in names:
        if name == BICUBIC:
            continue
        by_version, registered = pinned(name, tracking_uri=tracking_uri)
        network = open_network(by_version, tracking_uri=tracking_uri)
        scale = network.config.scale
        if scales and scale not in scales:
            asked = " or ".join(f"x{asked}" for asked in scales)
            raise UpscalerError(f"{name}: is an x{scale} model, not {asked} (--scale)")
        upscale = partial(upscale_tensor, placed(network, target), self_ensemble=self_ensemble, tile_px_lr=tile_px_lr)
        upscaler = Upscaler(name=name, scale=scale, upscale_tensor=upscale)
        opened = OpenModel(
            upscaler=upscaler,
            registered=None if registered is None else (registered.name, registered.version),
            self_ensemble=self_ensemble,
        )
        found.setdefault(scale, []).append(opened)
    if not found:
        raise UpscalerError(f"{BICUBIC}: has no scale of its own; say which (--scale)")
    for scale, models in found.items():
        if not models and BICUBIC not in names:
            raise UpscalerError(f"scale={scale}: none of the models is an x{scale} model (--scale)")
        models.insert(0, OpenModel(upscaler=open_upscaler(BICUBIC, scale=scale), is_asked_for=BICUBIC in names))
    return dict(sorted(found.items()))


def open_sets(sets: str, *, split: str, scales: Iterable[int], protocol: str) -> list[OpenSet]:
    """Verifies every image of every set at every scale, for sets given as URIs separated by commas.

    DataError if a set can't be used as a whole: a mean over some of its images is not its score. MetricError if the
    protocol is unknown, or an image too small for it. StorageError if it can't be read.
    """
    protocol_named(protocol)
    uris = set_uris(sets)
    opened = [
        OpenSet(name=name, manifest=_read_set(uri, split=split, scale=scale))
        for name, uri in uris.items()
        for scale in scales
    ]
    for one in opened:
        smallest_px = smallest_side_px(protocol, one.manifest.scale)
        for record in one.manifest.images:
            if min(record.width, record.height) < smallest_px:
                raise MetricError(
                    f"{one.manifest.uri}/{record.hr_key}: {record.width}x{record.height} is too small for {protocol} "
                    f"at x{one.manifest.scale}: sides from {smallest_px} px (--sets, --protocol)"
                )
    return opened


def set_uris(sets: str) -> dict[str, str]:
    """Name → URI, for URIs separated by commas; a set's name is the last part of its URI."""
    uris: dict[str, str] = {}
    for uri in filter(None, (part.strip() for part in sets.split(","))):
        name = open_store(uri).uri.rpartition("/")[2]
        if name in uris:
            raise DataError(f"{uri}: a set named {name!r} is given twice (--sets)")
        uris[name] = uri
    if not uris:
        raise DataError(f"{sets!r}: names no set; give folders or URIs, separated by commas (--sets)")
    return uris


def evaluate_set(
    one: OpenSet, models: Sequence[OpenModel], *, protocol: str, observe: Observer | None = None
) -> SetEvaluation:
    """Scores models, of which bicubic is the first and all have the set's scale, on each image of the set."""
    manifest = one.manifest
    store, scale = open_store(manifest.uri), manifest.scale
    scores: list[list[ImageScore]] = [[] for _ in models]
    seconds: list[list[float]] = [[] for _ in models]
    progress = tqdm(manifest.images, desc=f"{one.name} x{scale}", unit="image", leave=False, disable=None)
    for number, record in enumerate(progress):
        pair = load_pair(store, record, scale)
        upscaled: list[torch.Tensor] = []
        for model, of_model, times in zip(models, scores, seconds, strict=True):
            start = time.perf_counter()
            sr_HWC = model.upscaler.upscale_tensor(pair.lr_HWC)
            if sr_HWC.is_cuda:
                torch.cuda.synchronize(sr_HWC.device)  # else the time is that of asking for it
            times.append(time.perf_counter() - start)
            of_model.append(score_image(sr_HWC, pair.hr_HWC, scale=scale, protocol=protocol, name=pair.name))
            upscaled.append(sr_HWC)
        if observe is not None:
            image = ScoredImage(pair=pair, upscaled=tuple(upscaled), scores=tuple(it[-1] for it in scores))
            observe(one, number, image)
    return SetEvaluation(
        set=one.name,
        scale=scale,
        protocol=protocol,
        fingerprint=manifest.fingerprint,
        models=tuple(
            ModelScore(
                model=model,
                score=mean_score(one.name, scale, protocol, of_model),
                seconds_per_image=sorted(times)[len(times) // 2],
            )
            for model, of_model, times in zip(models, scores, seconds, strict=True)
        ),
    )


def evaluate(
    models: Mapping[int, Sequence[OpenModel]],
    sets: Iterable[OpenSet],
    *,
    protocol: str,
    observe: Observer | None = None,
) -> Iterator[SetEvaluation]:
    """Scores what `open_models` and `open_sets` opened, a set whenever the next one is asked for.

    `observe` sees each image while it is in memory.
    """
    for one in sets:
        yield evaluate_set(one, models[one.manifest.scale], protocol=protocol, observe=observe)


def scores_csv(evaluations: Iterable[SetEvaluation]) -> str:
    """A row per image and model, bicubic's among them; the text of a CSV file with a header. Infinite is `inf`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for evaluation in evaluations:
        of_set = (evaluation.set, evaluation.scale, evaluation.protocol, evaluation.fingerprint)
        for it in evaluation.models:
            _, version = it.model.registered or ("", "")
            of_model = (it.model.upscaler.name, version, str(it.model.self_ensemble).lower())
            for image, bicubic in zip(it.score.images, evaluation.bicubic.images, strict=True):
                gain = gain_db(image.psnr_db, bicubic.psnr_db)
                writer.writerow([*of_set, *of_model, image.name, image.psnr_db, image.ssim, gain])
    return text.getvalue()


def _read_set(uri: str, *, split: str, scale: int) -> Manifest:
    try:
        manifest = load_manifest(uri, split=split, scale=scale, on_bad_image="skip")
    except DataError as error:
        message, replaced = _FLAGS_OF_TRAINING.subn("--sets, --split", str(error))
        raise DataError(message if replaced else f"{message} (--sets)") from error
    if manifest.left_out:
        listed = "".join(f"\n  {reason}" for reason in manifest.left_out)
        raise DataError(f"{uri}: {len(manifest.left_out)} images can't be used, repair or remove them (--sets){listed}")
    return manifest
