"""Serve a model as a web page and an HTTP API.

    python pipelines/serve_model.py models:/edsr-x4@champion

A new champion is picked up while it runs. Ctrl-C ends it.
"""

import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from sr_data.errors import StorageError
from sr_models.errors import ModelError
from sr_serve.serve_app import serving
from sr_serve.serve_options import ServeError, ServeOptions
from sr_train.checkpoint import CheckpointError
from sr_train.cli import exit_with
from sr_train.options import ConfigError
from sr_train.tracking_server import TrackingError
from sr_train.upscaler import UpscalerError

USER_ERRORS = (ServeError, ConfigError, ModelError, CheckpointError, StorageError, UpscalerError, TrackingError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The command line."""

    model: tyro.conf.Positional[str]
    """A checkpoint (….safetensors), a saved model's folder, models:/name@alias or models:/name/version."""
    serving: Annotated[ServeOptions, tyro.conf.arg(name="")] = field(default_factory=ServeOptions)
    """How it is served."""
    tracking_uri: str | None = None
    """Where models:/… are; MLFLOW_TRACKING_URI when not given."""


def main(arguments: Sequence[str]) -> None:
    """Parses, serves until Ctrl-C or SIGTERM. Exits with 2 and a message on what the user can mend."""
    try:
        options = tyro.cli(Options, args=list(arguments), prog="serve_model.py", description=__doc__)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # both ways of ending it are one
        with serving(options.model, options.serving, tracking_uri=options.tracking_uri) as url:
            print(f"{options.model} is at {url}  (API: {url}docs; Ctrl-C ends it)", flush=True)
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own in place
            threading.Event().wait()
    except KeyboardInterrupt:
        print("ended", flush=True)
    except USER_ERRORS as error:
        exit_with(error)


if __name__ == "__main__":
    main(sys.argv[1:])
