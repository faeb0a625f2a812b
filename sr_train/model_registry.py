"""The MLflow registered model: a folder of weights becomes a version that works without this project's checkout.

What is registered holds the weights, a copy of the package `sr_models`, the versions of the few libraries it needs, and
its parameters: images of any size, or encoded files, in, the same kind of thing out. Nothing in it is pickled. Beside
that lie the network as ONNX, a model card and sample pictures.
"""

import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import sr_models
from sr_data.decode import encode_png
from sr_data.resize import upscale_bicubic
from sr_models.onnx_export import ONNX_FILE, check_onnx, export_onnx
from sr_models.upscaling import PREDICT_DEFAULTS
from sr_models.weights import load_config, load_model, weights_digest
from sr_train.model_card import CARD_FILE, CardFacts, description_of, model_card
from sr_train.tracking import RunHandle
from sr_train.tracking_server import as_tracking_error, check_tracking, connect, sent_once

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import Model

PACKAGES = ("mlflow", "numpy", "opencv-python-headless", "pillow", "safetensors", "torch")
"""What a registered model needs to run (MLflow loads it, the rest is imported by `sr_models`)."""
CHALLENGER = "challenger"
"""Alias of the version that is next to be compared with the champion: the newest, unless someone moves it."""
WEIGHTS_TAG = "weights_sha256"
NOT_PROMOTABLE_TAG = "not_promotable"
"""On a version that must never become champion; its value is the reason."""


@dataclass(frozen=True, slots=True)
class RegisteredVersion:
    """A version of a registered model."""

    name: str
    version: str
    uri: str
    """`models:/<name>/<version>`, for `mlflow.pyfunc.load_model`."""


def register_model(
    run: RunHandle,
    folder: Path,
    *,
    name: str,
    tags: Mapping[str, str],
    sample_lr_HWC: np.ndarray,
    sample_hr_HWC: np.ndarray | None = None,
    card: str | None = None,
    alias: str | None = CHALLENGER,
) -> RegisteredVersion:
    """Register the weights in `folder` (written by `sr_models.weights.save_model`) as a new version of model `name`.

    Before anything is uploaded the packed model is loaded and has to upscale `sample_lr_HWC` (uint8 RGB), and the
    network as ONNX has to give what it gives in PyTorch. The sample goes with it: LR, bicubic, SR, and HR if given.
    `card` (of `sr_train.model_card`; without one, a card that says what config and tags do) becomes `MODEL_CARD.md` in
    it and the version's description. `tags` are set on the version, and `alias`, if any, is moved to it unless it is at
    a newer one.

    Calling again with the same run, config and weights returns the version that is there, with its tags, and its
    description if a card is given, set again. Raises TrackingError if the server refuses, and ModelError, with nothing
    registered, if the folder or the sample is not valid.
    """
    digest = weights_digest(load_model(folder))
    with tempfile.TemporaryDirectory(prefix="sr-model-") as scratch, as_tracking_error(run.tracking_uri):
        client = connect(run.tracking_uri)
        found = _find(client, run, name, digest)
        if found is None:
            card = card or model_card(
                CardFacts(name=name, config=load_config(folder), recorded=tuple(sorted(tags.items())))
            )
            packed = Path(scratch) / "model"
            pack = partial(_pack_with_extras, folder, packed, card, sample_lr_HWC, sample_hr_HWC)
            found = _create(client, run, name, digest, pack, packed)
        if card is not None:
            text = description_of(card, name=name, version=str(found.version))
            client.update_model_version(name, found.version, description=text)
        for key, value in tags.items():
            client.set_model_version_tag(name, found.version, key, value)
        # A run that is resumed late finds its old version: what was registered since stays the challenger.
        if alias and int(client.get_registered_model(name).aliases.get(alias, 0)) <= int(found.version):
            client.set_registered_model_alias(name, alias, found.version)
    return RegisteredVersion(name, str(found.version), f"models:/{name}/{found.version}")


def version_at(tracking_uri: str, name: str, alias: str) -> str | None:
    """The version of model `name` that has `alias`; None if there is no such model, or no version of it has it.

    TrackingError if the registry can't be reached or refuses.
    """
    check_tracking(tracking_uri)  # MLflow itself would try an unreachable server for minutes
    with as_tracking_error(tracking_uri):
        from mlflow.exceptions import MlflowException

        try:
            aliases = connect(tracking_uri).get_registered_model(name).aliases
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
    return str(aliases[alias]) if alias in aliases else None


def _find(client: "MlflowClient", run: RunHandle, name: str, digest: str) -> "ModelVersion | None":
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run.run_id}'")
    return next((it for it in versions if it.tags.get(WEIGHTS_TAG) == digest and it.status == "READY"), None)


def _create(
    client: "MlflowClient",
    run: RunHandle,
    name: str,
    digest: str,
    pack: Callable[["Model"], None],
    packed: Path,
) -> "ModelVersion":
    """Pack to the folder `packed`, upload, register: what `mlflow.pyfunc.log_model` does, without its process-wide run
    and URI.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    logged = client.create_logged_model(
        run.experiment_id,
        name=name,
        source_run_id=run.run_id,
        tags={WEIGHTS_TAG: digest},
        model_type="super-resolution",
    )
    try:
        description = Model(
            artifact_path=logged.artifact_location,
            run_id=run.run_id,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
        )
        pack(description)
        client.log_model_artifacts(logged.model_id, str(packed))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")  # never READY with half of its files
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run.run_id, [LoggedModelOutput(logged.model_id, step=0)])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    try:
        with sent_once():
            return client.create_model_version(
                name,
                source=logged.artifact_location,  # "models:/<id>" would be looked up in the process-wide registry
                run_id=run.run_id,
                model_id=logged.model_id,
                tags={WEIGHTS_TAG: digest},
                await_creation_for=0,  # it is READY when the call returns
            )
    except (MlflowException, OSError):
        # The server may have made it and gone before it could say so.
        if (found := _find(client, run, name, digest)) is not None:
            return found
        raise


def pack_model(folder: Path, target: Path, *, description: "Model | None" = None) -> None:
    """Write an MLflow model to the new folder `target`: `mlflow.pyfunc.load_model(target)` works anywhere.

    `description` carries what the tracking server says of it. Raises ModelError if `folder` holds no valid model.
    """
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ParamSchema, ParamSpec

    # No schema of the input: one of MLflow's can't say "an array, or files". The model checks what it is given itself,
    # and its parameters are here.
    types: dict[type, str] = {bool: "boolean", int: "long", float: "double", str: "string"}
    options = ParamSchema([ParamSpec(key, types[type(value)], value) for key, value in PREDICT_DEFAULTS.items()])
    package = Path(sr_models.__file__).parent
    with tempfile.TemporaryDirectory(prefix="sr-code-") as scratch, _import_path_kept(), _no_advice():
        code = Path(scratch) / package.name
        shutil.copytree(package, code, ignore=shutil.ignore_patterns("__pycache__"))
        save_model(
            target,
            python_model=str(code / "pyfunc.py"),
            artifacts={"model": str(folder.absolute())},
            code_paths=[str(code)],
            pip_requirements=[
                f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES
            ],  # no "+cpu" build tags
            signature=ModelSignature(params=options),
            mlflow_model=description,
        )


def _pack_with_extras(
    folder: Path,
    packed: Path,
    card: str,
    sample_lr_HWC: np.ndarray,
    sample_hr_HWC: np.ndarray | None,
    description: "Model",
) -> None:
    """`pack_model`, and what lies beside the model for people and for programs without PyTorch."""
    pack_model(folder, packed, description=description)
    network = load_model(folder)
    (packed / "onnx").mkdir()
    export_onnx(network, packed / "onnx" / ONNX_FILE)
    check_onnx(network, packed / "onnx" / ONNX_FILE)
    (packed / CARD_FILE).write_text(card, encoding="utf-8")
    samples = {
        "lr": sample_lr_HWC,
        "bicubic": upscale_bicubic(sample_lr_HWC, network.config.scale),
        "sr": _upscaled_by(packed, sample_lr_HWC),
    }
    if sample_hr_HWC is not None:
        samples["hr"] = sample_hr_HWC
    (packed / "samples").mkdir()
    for name, image_HWC in samples.items():
        (packed / "samples" / f"{name}.png").write_bytes(encode_png(image_HWC))


def _upscaled_by(packed: Path, sample_lr_HWC: np.ndarray) -> np.ndarray:
    """The sample upscaled with the packed model, as its users will load it."""
    from mlflow.pyfunc import load_model as load_pyfunc

    with _import_path_kept():
        sample_sr_HWC: np.ndarray = np.asarray(load_pyfunc(str(packed)).predict(sample_lr_HWC))
    for cache in packed.rglob("__pycache__"):  # loading imported from its code folder
        shutil.rmtree(cache)
    return sample_sr_HWC


@contextmanager
def _import_path_kept() -> Iterator[None]:
    """Undo what MLflow does to sys.path when it loads a model with code: the folder is gone soon after."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def _no_advice() -> Iterator[None]:
    """Silence MLflow's advice on what is done on purpose.

    It wants an input example, which would fix the signature to its size (the sample is tried, see `_upscaled_by`), and
    pip's version, which an environment made by uv does not have.
    """
    environment = logging.getLogger("mlflow.utils.environment")
    level = environment.level
    environment.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*input example was not provided.*")
            yield
    finally:
        environment.setLevel(level)
