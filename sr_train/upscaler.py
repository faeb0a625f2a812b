"""The MODEL argument of the scripts: a name, a file or a URI → a function from an LR image to an SR image.

| MODEL | is |
|---|---|
| `bicubic` | MATLAB's bicubic interpolation |
| `…/step-000001234.safetensors` | a checkpoint of a run, on disk or in object storage |
| `…/folder` | a folder written by `sr_models.weights.save_model`, on disk or in object storage |
| `models:/name@alias`, `models:/name/version` | a registered model |
"""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sr_data.resize import upscale_bicubic
from sr_data.storage import Store, open_store, split_uri
from sr_models.architectures import build_model
from sr_models.errors import ModelError
from sr_models.inference import ImageHWC, as_tensor, placed, upscale_tensor
from sr_models.network import SRNetwork
from sr_models.weights import CONFIG_FILE, WEIGHTS_FILE, check_state, load_model
from sr_train.checkpoint import inference_weights, read_checkpoint, step_of_key
from sr_train.model_registry import RegisteredVersion, version_at
from sr_train.tracking_server import check_tracking, connect, redact, resolve_tracking_uri

BICUBIC = "bicubic"
REGISTRY_PREFIX = "models:/"
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
ALLOWED = (
    "MODEL is bicubic, a checkpoint (….safetensors), a saved model's folder, models:/name@alias or models:/name/version"
)


class UpscalerError(ValueError):
    """MODEL can't be opened, or is not for this scale or device; the message starts with what was given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Upscaler:
    """Something that enlarges images."""

    name: str
    """MODEL as it was given."""
    scale: int
    """Upscaling factor."""
    upscale_tensor: Callable[[ImageHWC], torch.Tensor]
    """uint8 RGB H×W×3, wherever it is → uint8 RGB sH×sW×3 where the network is, without waiting for it."""

    def upscale(self, lr_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 RGB H×W×3 → uint8 RGB sH×sW×3."""
        sr_HWC: NDArray[np.uint8] = self.upscale_tensor(lr_HWC).cpu().numpy()
        return sr_HWC


def open_upscaler(
    model: str,
    *,
    scale: int,
    device: str = "auto",
    tracking_uri: str | None = None,
    self_ensemble: bool = False,
    tile_px_lr: int = 192,
) -> Upscaler:
    """Opens MODEL on a device: "auto" is the GPU if there is one, else the CPU.

    `tracking_uri` says where registered models are; without it MLFLOW_TRACKING_URI does. `self_ensemble` and
    `tile_px_lr` as for `upscale_image`. UpscalerError, StorageError, CheckpointError, ModelError or TrackingError says
    what is missing or does not fit.
    """
    if scale < 1:
        raise UpscalerError(f"scale={scale} must be at least 1 (--scale)")
    if model == BICUBIC:
        return Upscaler(name=model, scale=scale, upscale_tensor=partial(_upscale_bicubic, scale=scale))
    target = device_named(device)
    network = open_network(model, tracking_uri=tracking_uri)
    if network.config.scale != scale:
        raise UpscalerError(f"{model}: is an x{network.config.scale} model, not x{scale} (--scale)")
    upscale = partial(upscale_tensor, placed(network, target), self_ensemble=self_ensemble, tile_px_lr=tile_px_lr)
    return Upscaler(name=model, scale=scale, upscale_tensor=upscale)


def open_network(model: str, *, tracking_uri: str | None = None) -> SRNetwork:
    """MODEL as a network in evaluation mode on the CPU; errors as `open_upscaler`."""
    if model.startswith(REGISTRY_PREFIX):
        return _registered(model, resolve_tracking_uri(tracking_uri))
    if not model or model == BICUBIC:
        raise UpscalerError(f"{model!r}: is no network; {ALLOWED.replace('bicubic, ', '')}")
    if model.endswith(".safetensors"):
        store, key = split_uri(model)
        return _saved(store, model) if key == WEIGHTS_FILE else _checkpoint(store, key, model)
    return _saved(open_store(model), model)


def pinned(model: str, *, tracking_uri: str | None = None) -> tuple[str, RegisteredVersion | None]:
    """MODEL, and which registered version it is: `models:/name@alias` becomes `models:/name/version`, as an alias may
    move while it is worked with; anything else stays as it is.

    UpscalerError if there is no such model or alias, TrackingError if the registry can't be asked.
    """
    named = _REGISTERED.fullmatch(model)
    if named is None:
        return model, None
    name, version = named["name"], named["version"]
    if version is None:
        uri = resolve_tracking_uri(tracking_uri)
        version = version_at(uri, name, named["alias"])
        if version is None:
            raise UpscalerError(
                f"{model}: there is no such model, or no version of it has this alias ({redact(uri)}; "
                "MLFLOW_TRACKING_URI, --tracking-uri)"
            )
    registered = RegisteredVersion(name, version, f"{REGISTRY_PREFIX}{name}/{version}")
    return registered.uri, registered


def _checkpoint(store: Store, key: str, model: str) -> SRNetwork:
    if not store.exists(key):
        raise UpscalerError(f"{model}: there is no such file; {ALLOWED}")
    config, weights = inference_weights(read_checkpoint(store, key))
    network = build_model(config, seed=0)
    check_state(network, weights, origin=model)
    network.load_state_dict(weights)
    network.eval()
    return network


def _saved(store: Store, model: str) -> SRNetwork:
    if not store.exists(WEIGHTS_FILE):
        keys = [entry.key for entry in store.list() if step_of_key(entry.key.rpartition("/")[2]) is not None]
        hint = f"it holds the checkpoint {store.uri_of(max(keys))}" if keys else ALLOWED
        raise UpscalerError(f"{model}: is no saved model, it has no {WEIGHTS_FILE}; {hint}")
    if "://" not in store.uri:
        return load_model(Path(store.uri))
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            (Path(folder) / name).write_bytes(store.read(name))
        return _load(Path(folder), model)


def _registered(model: str, tracking_uri: str) -> SRNetwork:
    named = _REGISTERED.fullmatch(model)
    if named is None:
        raise UpscalerError(f"{model}: is neither models:/name@alias nor models:/name/version")
    check_tracking(tracking_uri)  # MLflow itself would try an unreachable server for minutes
    client = connect(tracking_uri)
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        try:
            name, alias, version = named["name"], named["alias"], named["version"]
            version = version or client.get_model_version_by_alias(name, alias).version
            # Resolved here: for models:/ URIs download_artifacts asks the process-wide registry, not this one.
            source = client.get_model_version_download_uri(name, version)
            download = partial(mlflow.artifacts.download_artifacts, dst_path=folder, tracking_uri=tracking_uri)
            flavors: dict[str, Any] = Model.load(download(f"{source.rstrip('/')}/MLmodel")).flavors
            # Only the weights: the rest of a version, its ONNX file above all, is as large again.
            artifact = flavors.get("python_function", {}).get("artifacts", {}).get("model", {}).get("path")
            if artifact is None:
                raise UpscalerError(f"{model}: is not a model of this project: it carries no artefact named 'model'")
            weights = download(f"{source.rstrip('/')}/{artifact}")
        except (MlflowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise UpscalerError(
                f"{model}: {reason} ({redact(tracking_uri)}; MLFLOW_TRACKING_URI, --tracking-uri)"
            ) from error
        return _load(Path(weights), model)


def _load(folder: Path, model: str) -> SRNetwork:
    """`load_model`, naming the model in place of a temporary folder."""
    try:
        return load_model(folder)
    except ModelError as error:
        raise ModelError(str(error).replace(str(folder), model)) from error


def _upscale_bicubic(lr_HWC: ImageHWC, scale: int) -> torch.Tensor:
    return as_tensor(upscale_bicubic(as_tensor(lr_HWC).cpu().numpy(), scale))


def device_named(name: str) -> torch.device:
    """ "auto" is the GPU if there is one, else the CPU; UpscalerError if the machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UpscalerError(f"{name}: is no device; allowed are auto, cpu, cuda, cuda:N (--device)") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UpscalerError(f"{name}: this machine has {torch.cuda.device_count()} CUDA devices (--device)")
    return device
