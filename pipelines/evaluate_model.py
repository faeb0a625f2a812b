"""Score models on benchmark sets, with bicubic beside them.

    python pipelines/evaluate_model.py models:/edsr-x4@champion models:/edsr-x4/7 --sets Set5,Set14 --html report

A set is a folder or URI: HR/ and LR_bicubic/X2, X3, X4 below it, or any folder of HR images (their LR images are then
made by bicubic). Each model is scored at its own scale. The scores of a registered version become its tags.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from sr_data.errors import DataError, StorageError
from sr_models.errors import ModelError
from sr_serve.evaluation import SetEvaluation, evaluate, open_models, open_sets, parse_scales, scores_csv
from sr_serve.evaluation_report import EvaluationReport
from sr_serve.score_tags import score_tags, write_score_tags
from sr_train.checkpoint import CheckpointError
from sr_train.cli import exit_with
from sr_train.metrics import PAPERS_PROTOCOL, MetricError
from sr_train.score_report import check_scores_writable, write_scores, write_text
from sr_train.tracking_server import TrackingError, resolve_tracking_uri
from sr_train.upscaler import UpscalerError

USER_ERRORS = (DataError, StorageError, ModelError, CheckpointError, MetricError, UpscalerError, TrackingError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The command line."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL …]")]
    """bicubic, a checkpoint (….safetensors), a saved model's folder, models:/name@alias or models:/name/version."""
    sets: str
    """Folders or URIs of the sets, separated by commas."""
    scale: str | None = None
    """Upscaling factors, separated by commas: no model may have another. The models' own when not given."""
    split: str = "test"
    """Which part of a dataset that has several: test, valid or train."""
    protocol: str = PAPERS_PROTOCOL
    """psnr@y,crop=scale (the papers'), psnr@rgb,crop=scale or psnr@rgb,crop=scale+6 (EDSR on DIV2K)."""
    json: str | None = None
    """File or URI to write the scores to, image by image."""
    csv: str | None = None
    """File or URI to write the scores to, a row per image and model."""
    html: str | None = None
    """Folder or URI to write a report to, with pictures: index.html in it opens from disk. Replaces an earlier one."""
    html_images: int = 20
    """How many images of each set and scale, the worst ones, the report has pictures of; it has the scores of all."""
    tags: bool = True
    """Set the scores of registered models as tags of the version."""
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
        run(options)
    except USER_ERRORS as error:
        exit_with(error)


def run(options: Options) -> None:
    """Scores each set, prints tables, writes what was asked for. What can be wrong is found before the first score."""
    scales = parse_scales(options.scale)
    for flag, uri in (("--json", options.json), ("--csv", options.csv)):
        if uri is not None:
            check_scores_writable(uri, flag=flag)
    report = None
    if options.html is not None:
        report = EvaluationReport(options.html, protocol=options.protocol, num_pictured=options.html_images)
        report.check()
    models = open_models(
        options.models,
        scales=scales,
        device=options.device,
        tracking_uri=options.tracking_uri,
        self_ensemble=options.self_ensemble,
        tile_px_lr=options.tile_px_lr,
    )
    sets = open_sets(options.sets, split=options.split, scales=models, protocol=options.protocol)
    evaluations = evaluate(models, sets, protocol=options.protocol, observe=None if report is None else report.observe)
    print("\n\n".join(evaluation.table() for evaluation in evaluations))
    if options.json is not None:
        write_scores(options.json, [scores for evaluation in evaluations for scores in evaluation.to_json_dicts()])
    if options.csv is not None:
        write_text(options.csv, scores_csv(evaluations))
    if report is not None:
        print(f"\nreport: {report.write(evaluations)}")
    if options.tags:
        _tag(evaluations, tracking_uri=options.tracking_uri)


def _tag(evaluations: Sequence[SetEvaluation], *, tracking_uri: str | None) -> None:
    """Last, so that what was scored is not lost to a registry that refuses."""
    for (name, version), tags in score_tags(evaluations).items():
        write_score_tags(resolve_tracking_uri(tracking_uri), name=name, version=version, tags=tags)
        print(f"models:/{name}/{version} is tagged: {', '.join(tag.key for tag in tags)}")


if __name__ == "__main__":
    main(sys.argv[1:])
