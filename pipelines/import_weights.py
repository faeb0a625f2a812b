"""Import EDSR or SRResNet weights of another project: convert, try, score, register.

    python pipelines/import_weights.py edsr_baseline_x4-6b446fab.pt --architecture edsr --scale 4

FILE is a path or s3://bucket/key (.pt, .pth, .safetensors); nothing in it is run. Read are the layouts of EDSR-PyTorch
and BasicSR for EDSR, of SRGAN-PyTorch (Lornatang) and SRGAN (leftthomas) for SRResNet: docs/importing.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import tyro

from sr_data.errors import DataError, StorageError
from sr_models.errors import ModelError
from sr_models.foreign_layout import Given
from sr_serve.evaluation import open_sets
from sr_serve.import_weights import (
    ImportRefusedError,
    check_request,
    import_file,
    save_import,
    score_import,
    score_warnings,
    try_out,
    work_folder,
)
from sr_serve.imported_version import register_import, registered_line
from sr_serve.weight_file import WeightFileError, check_sha256, read_weight_file
from sr_train.cli import exit_with
from sr_train.metrics import PAPERS_PROTOCOL, MetricError, protocol_named
from sr_train.model_registry import CHALLENGER
from sr_train.tracking_server import TrackingError, check_tracking, resolve_tracking_uri
from sr_train.upscaler import UpscalerError, device_named

USER_ERRORS = (
    DataError, StorageError, ModelError, MetricError, UpscalerError, TrackingError, WeightFileError, ImportRefusedError
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The command line."""

    file: tyro.conf.Positional[str]
    """Path or URI of the weights."""
    architecture: Literal["edsr", "srresnet"]
    """What network the weights are of."""
    scale: int
    """Upscaling factor: 2, 3 or 4."""
    residual_scaling: float | None = None
    """EDSR's factor on residuals, which is in no file; 0.1 for 256 channels, else 1, when not given."""
    rgb_range: float | None = None
    """Pixel range of EDSR's layers; that of the file's mean shift, else 255, when not given."""
    entry: str | None = None
    """Under which key of the file the tensors are: params_ema, params, state_dict, …; found when not given."""
    sha256: str | None = None
    """What the file's sha256 must be, or begin with (8 digits or more)."""
    sets: str = "builtin://photos"
    """Folders or URIs of the sets to score it on, separated by commas."""
    split: str = "valid"
    """Which part of a set that has several: test, valid or train."""
    protocol: str = PAPERS_PROTOCOL
    """psnr@y,crop=scale (the papers'), psnr@rgb,crop=scale or psnr@rgb,crop=scale+6 (EDSR on DIV2K)."""
    device: str = "auto"
    """What it is scored on: auto (the GPU if there is one), cpu, cuda or cuda:N."""
    register_as: str | None = None
    """Name of the registered model; ARCHITECTURE-xSCALE when not given."""
    alias: str | None = CHALLENGER
    """Alias that the version gets; None for none."""
    licence: str | None = None
    """What the authors allow, for the version's card and tags."""
    invents_detail: tyro.conf.FlagCreatePairsOff[bool] = False
    """Say on the card that it was trained to look right: a GAN's weights, or those of a perceptual loss."""
    no_register: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only look: convert, try, score."""
    save: str | None = None
    """New folder to write the converted model to, for any MODEL argument."""
    allow_poor: tyro.conf.FlagCreatePairsOff[bool] = False
    """Import a network that does not give back a smooth picture; it gets no alias."""
    tracking_uri: str | None = None
    """Where to register; MLFLOW_TRACKING_URI, then sqlite:///mlflow.db in the current folder, when not given."""
    experiment: str = "super-resolution"
    """MLflow experiment of the import's run."""


def main(arguments: Sequence[str]) -> None:
    """Parses, imports, prints. Exits with 2 and a message on what the user can mend."""
    options = tyro.cli(Options, args=list(arguments), prog="import_weights.py", description=__doc__)
    try:
        import_weights(options)
    except USER_ERRORS as error:
        exit_with(error)


def import_weights(options: Options) -> None:
    """Says what the file is and what was assumed, then how good it is, then where it is registered."""
    check_request(register_as=options.register_as, licence=options.licence, save=options.save, alias=options.alias)
    check_sha256(options.sha256)
    protocol_named(options.protocol)
    device_named(options.device)
    file = read_weight_file(options.file, sha256=options.sha256)
    given = Given(residual_scaling=options.residual_scaling, rgb_range=options.rgb_range)
    model = import_file(file, architecture=options.architecture, scale=options.scale, given=given, entry=options.entry)
    print(model.describe())
    model = try_out(model, allow_poor=options.allow_poor)
    print(model.doubts())
    sets = open_sets(options.sets, split=options.split, scales=[options.scale], protocol=options.protocol)
    if not options.no_register:
        check_tracking(resolve_tracking_uri(options.tracking_uri))
    with work_folder(options.save) as folder:
        save_import(model, folder, licence=options.licence)
        evaluations = score_import(
            folder, sets, protocol=options.protocol, device=options.device, label=model.file.name
        )
        poor = score_warnings(evaluations)
        for evaluation in evaluations:
            print(f"\n{evaluation.table()}")
        print("".join(f"\nWARNING     {warning}" for warning in poor))
        if not options.no_register:
            version = register_import(
                replace(model, warnings=(*model.warnings, *poor)),
                folder,
                evaluations,
                sets,
                name=options.register_as or f"{options.architecture}-x{options.scale}",
                tracking_uri=resolve_tracking_uri(options.tracking_uri),
                experiment=options.experiment,
                alias=options.alias,
                licence=options.licence,
                invents_detail=options.invents_detail,
            )
            print(f"registered  {registered_line(version, model, options.alias)}")
    if options.save is not None:
        print(f"saved       {options.save}")


if __name__ == "__main__":
    main(sys.argv[1:])
