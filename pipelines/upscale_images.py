"""Upscale images with a trained model: one file, or all below a folder or URI prefix.

    python pipelines/upscale_images.py models:/edsr-x4@champion photo.jpg larger/
    python pipelines/upscale_images.py models:/edsr-x4@champion s3://bucket/photos s3://bucket/photos-x4

Many images are shared among the actors of a Ray cluster: the one that RAY_ADDRESS names, or one that is started here.
Give the same command again after an interruption: what is finished is not made again.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Annotated

import tyro

from sr_serve.upscale_options import UpscaleOptions
from sr_serve.upscale_plan import UpscaleError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The command line."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint (….safetensors), a saved model's folder, models:/name@alias or models:/name/version."""
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """An image, a folder or a URI prefix (s3://bucket/photos); folders in it are kept."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """An image file, a folder or a URI prefix."""
    how: Annotated[UpscaleOptions, tyro.conf.arg(name="")] = field(default_factory=UpscaleOptions)


def main(arguments: Sequence[str]) -> None:
    """Exits with 1 if some images could not be upscaled, with 2 and a message on what else the user can mend."""
    try:
        options = tyro.cli(
            Options,
            args=list(arguments),
            prog="upscale_images.py",
            description=__doc__,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except UpscaleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    # After the flags, which should not wait 2 s for PyTorch.
    from sr_serve.upscale_run import USER_ERRORS, upscale
    from sr_train.cli import exit_with

    try:
        failures = upscale(options.model, options.source, options.target, options.how)
    except USER_ERRORS as error:
        exit_with(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if failures:
        sys.exit(1)


def _stop(signal_number: int, frame: FrameType | None) -> None:
    """Says at once that it was heard: the images under way are finished first."""
    print("\nstopping when the images under way are finished …", file=sys.stderr, flush=True)
    signal.default_int_handler(signal_number, frame)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _stop)
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        # A thread of Ray Data's may still ask a cluster that is gone; Ray then ends the process with status 1.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
