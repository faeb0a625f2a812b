"""Score a model on benchmark sets, with bicubic beside it.

    python pipelines/evaluate_model.py models:/edsr-x4@challenger --sets Set5,Set14 --scale 4 --json scores.json

A set is a folder or URI: HR/ and LR_bicubic/X2, X3, X4 below it, or any folder of HR images (their LR images are then
made by bicubic).
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import tyro
from tqdm import tqdm

from sr_data.errors import DataError, StorageError
from sr_data.manifest import Manifest, load_manifest
from sr_data.pairs import load_pair
from sr_data.resize import upscale_bicubic
from sr_data.storage import open_store
from sr_models.errors import ModelError
from sr_train.checkpoint import CheckpointError
from sr_train.cli import exit_with
from sr_train.metrics import PAPERS_PROTOCOL, ImageScore, MetricError, protocol_named
from sr_train.score_report import check_scores_writable, score_table, write_scores
from sr_train.tracking_server import TrackingError
from sr_train.upscaler import Upscaler, UpscalerError, open_upscaler
from sr_train.validation import SetScore, mean_score, score_pairs

USER_ERRORS = (DataError, StorageError, ModelError, CheckpointError, MetricError, UpscalerError, TrackingError)
_FLAG_OF_TRAINING = r"--(?:data|validation)\.[\w-]+(?: \(--source of [\w.]+\))?"
_FLAGS_OF_TRAINING = re.compile(f"{_FLAG_OF_TRAINING}(?:, {_FLAG_OF_TRAINING})*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The command line."""

    model: tyro.conf.Positional[str]
    """bicubic, a checkpoint (….safetensors), a saved model's folder, models:/name@alias or models:/name/version."""
    sets: str
    """Folders or URIs of the sets, separated by commas."""
    scale: int
    """Upscaling factor."""
    split: str = "test"
    """Which part of a dataset that has several: test, valid or train."""
    protocol: str = PAPERS_PROTOCOL
    """psnr@y,crop=scale (the papers'), psnr@rgb,crop=scale or psnr@rgb,crop=scale+6 (EDSR on DIV2K)."""
    json: str | None = None
    """File or URI to write the scores to, image by image."""
    self_ensemble: tyro.conf.FlagCreatePairsOff[bool] = False
    """Average over the eight flips and quarter turns: a little better, eight times slower."""
    tile_px_lr: int = 192
    """Largest tile, in LR pixels: bounds the memory, does not change the result."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:N."""
    tracking_uri: str | None = None
    """Where models:/… are; MLFLOW_TRACKING_URI when not given."""


def main(arguments: Sequence[str]) -> None:
    """Parses, scores, prints. Exits with 2 and a message on what the user can mend."""
    options = tyro.cli(Options, args=list(arguments), prog="evaluate_model.py", description=__doc__)
    try:
        evaluate(options)
    except USER_ERRORS as error:
        exit_with(error)


def evaluate(options: Options) -> None:
    """Scores each set, prints the table, writes the JSON file. What can be wrong is found before the first score."""
    protocol_named(options.protocol)
    uris = _set_uris(options.sets)
    if options.json is not None:
        check_scores_writable(options.json)
    upscaler = open_upscaler(
        options.model,
        scale=options.scale,
        device=options.device,
        tracking_uri=options.tracking_uri,
        self_ensemble=options.self_ensemble,
        tile_px_lr=options.tile_px_lr,
    )
    sets = {name: _read_set(uri, split=options.split, scale=options.scale) for name, uri in uris.items()}
    both = [_score_set(name, manifest, upscaler, protocol=options.protocol) for name, manifest in sets.items()]
    scores, bicubic = [score for score, _ in both], [baseline for _, baseline in both]
    print(score_table(options.model, scores, bicubic))
    if options.json is not None:
        write_scores(options.json, scores)


def _set_uris(sets: str) -> dict[str, str]:
    """Name → URI; a set's name is the last part of its URI."""
    uris: dict[str, str] = {}
    for uri in filter(None, (part.strip() for part in sets.split(","))):
        name = open_store(uri).uri.rpartition("/")[2]
        if name in uris:
            raise DataError(f"{uri}: a set named {name!r} is given twice (--sets)")
        uris[name] = uri
    if not uris:
        raise DataError(f"{sets!r}: names no set; give folders or URIs, separated by commas (--sets)")
    return uris


def _read_set(uri: str, *, split: str, scale: int) -> Manifest:
    """Verifies every image of a set. A mean over some of them is not the set's score: DataError lists unusable ones."""
    try:
        manifest = load_manifest(uri, split=split, scale=scale, on_bad_image="skip")
    except DataError as error:
        message, replaced = _FLAGS_OF_TRAINING.subn("--sets, --split", str(error))
        raise DataError(message if replaced else f"{message} (--sets)") from error
    if manifest.left_out:
        listed = "".join(f"\n  {reason}" for reason in manifest.left_out)
        raise DataError(f"{uri}: {len(manifest.left_out)} images can't be used, repair or remove them (--sets){listed}")
    return manifest


def _score_set(name: str, manifest: Manifest, upscaler: Upscaler, *, protocol: str) -> tuple[SetScore, SetScore]:
    """The model's score and bicubic's; one image is in memory at a time."""
    scale = upscaler.scale
    store = open_store(manifest.uri)
    scores: list[ImageScore] = []
    bicubic: list[ImageScore] = []
    for record in tqdm(manifest.images, desc=name, unit="image", leave=False, disable=None):
        pair = load_pair(store, record, scale)
        scores += score_pairs(upscaler.upscale_tensor, [pair], scale=scale, protocol=protocol)
        bicubic += score_pairs(partial(upscale_bicubic, scale=scale), [pair], scale=scale, protocol=protocol)
    return mean_score(name, scale, protocol, scores), mean_score(name, scale, protocol, bicubic)


if __name__ == "__main__":
    main(sys.argv[1:])
