"""A checkpoint against the registered champion: scores on the same images, and what their difference is worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sr_data.manifest import Manifest
from sr_data.pairs import load_pair
from sr_data.storage import open_store
from sr_train.metrics import ImageScore, protocol_named
from sr_train.model_registry import version_at
from sr_train.tracking_server import resolve_tracking_uri
from sr_train.upscaler import REGISTRY_PREFIX, open_upscaler
from sr_train.validation import SetScore, mean_score, score_pairs

CHAMPION = "champion"
CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
MIN_IMAGES = 6
"""If both models were equally good, the differences of n images would all have one sign with probability 2^(1 - n),
which is below 5 % from 6 images on. An interval from fewer images is too narrow to stand for 95 %."""
_CHUNK = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A model and the champion on the same images under the same protocol."""

    name: str
    """Of the registered model."""
    champion_version: str
    protocol: str
    """A name in `sr_train.metrics.PROTOCOLS`."""
    psnr_db: float
    """Mean over the images, as in `SetScore`."""
    ssim: float
    champion_psnr_db: float
    champion_ssim: float
    differences_db: Mapping[str, float]
    """The model's PSNR minus the champion's by image; 0 if both images are identical to HR, infinite if one is."""
    interval_db: tuple[float, float] | None
    """95 % confidence interval of the mean difference; None for a single image, or if a difference is infinite."""

    @property
    def gain_db(self) -> float:
        """Mean of the differences in dB: above 0 if the model is better than the champion."""
        return float(np.mean(list(self.differences_db.values())))

    def verdict(self) -> str:
        """What the interval says."""
        if self.interval_db is None:
            why = "one image gives" if len(self.differences_db) == 1 else "an image without any error leaves"
            return f"{why} no confidence interval"
        low_db, high_db = self.interval_db
        if not (low_db > 0.0 or high_db < 0.0):
            return "no difference that these images show"
        if len(self.differences_db) < MIN_IMAGES:
            return f"fewer than {MIN_IMAGES} images are too few to tell"
        return "better" if low_db > 0.0 else "worse"

    def sentence(self) -> str:
        """For reports: difference, interval, images, protocol and `verdict`."""
        num_images = len(self.differences_db)
        interval = ""
        if self.interval_db is not None:
            low_db, high_db = self.interval_db
            interval = f", {100 * CONFIDENCE:.0f} % confidence {low_db:+.2f} … {high_db:+.2f} dB"
        images = f"over {num_images} image{'s' if num_images > 1 else ''} ({self.protocol})"
        champion = f"{self.name}@{CHAMPION} (version {self.champion_version})"
        return f"{self.gain_db:+.2f} dB to {champion}{interval} {images}: {self.verdict()}"


def compare_with_champion(
    checkpoint_uri: str,
    *,
    name: str,
    validation: Manifest,
    protocol: str,
    tracking_uri: str | None,
    device: str = "auto",
    tile_px_lr: int = 192,
) -> Comparison | None:
    """Scores MODEL `checkpoint_uri` (see `sr_train.upscaler`) and `models:/<name>@champion` on the manifest's images.

    None if there is no such registered model, or it has no champion. `tracking_uri`, `device` and `tile_px_lr` are as
    for `open_upscaler`. One image is in memory at a time. TrackingError if the registry can't be asked; UpscalerError,
    CheckpointError or ModelError if either can't be loaded or is for another scale; MetricError if the protocol is
    unknown or the set empty; DataError, ImageError or StorageError if an image can't be read.
    """
    protocol_named(protocol)
    tracking_uri = resolve_tracking_uri(tracking_uri)
    version = version_at(tracking_uri, name, CHAMPION)
    if version is None:
        return None
    # By version: the alias may move to another one meanwhile.
    models = (checkpoint_uri, f"{REGISTRY_PREFIX}{name}/{version}")
    scale = validation.scale
    upscalers = [
        open_upscaler(model, scale=scale, device=device, tracking_uri=tracking_uri, tile_px_lr=tile_px_lr)
        for model in models
    ]
    store = open_store(validation.uri)
    scores: tuple[list[ImageScore], list[ImageScore]] = ([], [])
    for record in validation.images:
        pair = load_pair(store, record, scale)
        for upscaler, of_model in zip(upscalers, scores, strict=True):
            of_model += score_pairs(upscaler.upscale_tensor, [pair], scale=scale, protocol=protocol)
    ours, champions = (mean_score(validation.uri, scale, protocol, of_model) for of_model in scores)
    return compare_scores(ours, champions, name=name, champion_version=version)


def compare_scores(ours: SetScore, champions: SetScore, *, name: str, champion_version: str) -> Comparison:
    """Compares two scores of the same set under one protocol; ValueError if they are of different images."""
    differences_db = {
        image.name: 0.0 if image.psnr_db == other.psnr_db else image.psnr_db - other.psnr_db
        for image, other in zip(ours.images, champions.images, strict=True)
    }
    if [image.name for image in champions.images] != list(differences_db) or ours.protocol != champions.protocol:
        raise ValueError(f"{name}: the scores are of different images or protocols")
    return Comparison(
        name=name,
        champion_version=champion_version,
        protocol=ours.protocol,
        psnr_db=ours.psnr_db,
        ssim=ours.ssim,
        champion_psnr_db=champions.psnr_db,
        champion_ssim=champions.ssim,
        differences_db=differences_db,
        interval_db=mean_interval(list(differences_db.values())),
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the values' mean; None for fewer than two, or if one is infinite.

    The percentile bootstrap (Efron, Tibshirani: "An Introduction to the Bootstrap", 1993, section 13.3) with
    `NUM_RESAMPLES` resamples and a fixed seed. It assumes no distribution; from few values it is too narrow.
    """
    known = np.asarray(values, dtype=np.float64)
    if len(known) < 2 or not np.isfinite(known).all():
        return None
    rng = np.random.default_rng(0)
    # In chunks: the resamples of a set of thousands would take hundreds of megabytes.
    means = [known[rng.integers(len(known), size=(_CHUNK, len(known)))].mean(1) for _ in range(NUM_RESAMPLES // _CHUNK)]
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return float(low), float(high)
