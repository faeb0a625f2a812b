"""A checkpoint against the registered champion: scores on the same images, and what their difference is worth."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sr_data.manifest import Manifest
from sr_data.pairs import load_pair
from sr_data.storage import open_store
from sr_train.metrics import ImageScore, protocol_named
from sr_train.model_registry import version_at
from sr_train.paired import CONFIDENCE, Interval, interval_verdict, mean_interval, paired_differences
from sr_train.tracking_server import resolve_tracking_uri
from sr_train.upscaler import REGISTRY_PREFIX, open_upscaler
from sr_train.validation import SetScore, mean_score, score_pairs

CHAMPION = "champion"


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
    interval_db: Interval | None
    """95 % confidence interval of the mean difference; None for fewer than five images, or if a difference is infinite.
    """

    @property
    def gain_db(self) -> float:
        """Mean of the differences in dB: above 0 if the model is better than the champion."""
        return float(np.mean(list(self.differences_db.values())))

    def verdict(self) -> str:
        """What the interval says."""
        return interval_verdict(self.interval_db, len(self.differences_db))

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
    differences_db = paired_differences(ours, champions)
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
