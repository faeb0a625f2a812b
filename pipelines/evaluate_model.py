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
    protocol: str = "psnr@y,crop=scale"
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
    # After the flags, which should not wait 3 s for PyTorch.
    from sr_serve.evaluation_outputs import USER_ERRORS
    from sr_train.cli import exit_with

    try:
        run(options)
    except USER_ERRORS as error:
        exit_with(error)


def run(options: Options) -> None:
    """Scores each set, prints tables, writes what was asked for. What can be wrong is found before the first score."""
    from sr_serve.evaluation import evaluate, open_models, open_sets, parse_scales
    from sr_serve.evaluation_outputs import EvaluationOutputs
    from sr_serve.evaluation_report import EvaluationReport

    scales = parse_scales(options.scale)
    report = None
    if options.html is not None:
        report = EvaluationReport(options.html, protocol=options.protocol, num_pictured=options.html_images)
    outputs = EvaluationOutputs(
        json=options.json, csv=options.csv, report=report, tags=options.tags, tracking_uri=options.tracking_uri
    )
    outputs.check()
    models = open_models(
        options.models,
        scales=scales,
        device=options.device,
        tracking_uri=options.tracking_uri,
        self_ensemble=options.self_ensemble,
        tile_px_lr=options.tile_px_lr,
    )
    sets = open_sets(options.sets, split=options.split, scales=models, protocol=options.protocol)
    observe = None if report is None else outputs.observe
    outputs.write(evaluate(models, sets, protocol=options.protocol, observe=observe))


if __name__ == "__main__":
    main(sys.argv[1:])
