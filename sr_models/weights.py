"""Weights and config of a network to and from a folder: `config.json` and `weights.safetensors`, no pickle."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sr_models.architectures import architecture_name, build_model, config_from_dict, config_to_dict
from sr_models.errors import ModelError
from sr_models.network import ModelConfig, SRNetwork

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "weights.safetensors"
_NO_NOTES: Mapping[str, str] = MappingProxyType({})


def save_model(
    folder: Path, config: ModelConfig, state: Mapping[str, Tensor], *, notes: Mapping[str, str] = _NO_NOTES
) -> None:
    """Writes a folder that `load_model` reads.

    `state` is the network's state dict, on any device; `notes` are free text about its origin. ModelError, and nothing
    written, if the state is not that of the config's network.
    """
    name = architecture_name(config)
    with torch.device("meta"):
        check_state(build_model(config), state, origin="the state to save")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in state.items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)
    document = {"architecture": name, "config": config_to_dict(config), "notes": dict(notes)}
    (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path) -> SRNetwork:
    """The network in a folder written by `save_model`, in evaluation mode on the CPU.

    ModelError names the folder and what does not fit: a missing or damaged file, an unknown architecture or config key,
    missing or extra tensors, a shape.
    """
    config = load_config(folder)
    weights_path = folder / WEIGHTS_FILE
    try:
        state = safetensors.torch.load_file(weights_path)
    except FileNotFoundError as error:
        raise ModelError(f"{folder} has no {WEIGHTS_FILE}") from error
    except safetensors.SafetensorError as error:
        raise ModelError(f"{weights_path} is not a whole safetensors file: {error}") from error
    model = build_model(config, seed=0)
    check_state(model, state, origin=str(weights_path))
    model.load_state_dict(state)
    model.eval()
    return model


def load_config(folder: Path) -> ModelConfig:
    """The config in a folder written by `save_model`; ModelError if it is missing or not valid."""
    path = folder / CONFIG_FILE
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{folder} is no saved model: it has no {CONFIG_FILE}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict) or not {"architecture", "config"} <= document.keys():
        raise ModelError(f'{path} must be an object with the keys "architecture" and "config"')
    if not isinstance(document["architecture"], str) or not isinstance(document["config"], dict):
        raise ModelError(f'{path}: "architecture" must be a string and "config" an object')
    try:
        return config_from_dict(document["architecture"], document["config"])
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def weights_digest(network: SRNetwork) -> str:
    """16 hex digits over what makes a network: architecture, config and weights, wherever it came from."""
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    weights = hashlib.sha256(safetensors.torch.save(state)).hexdigest()
    parts = [architecture_name(network.config), config_to_dict(network.config), weights]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def check_state(model: SRNetwork, state: Mapping[str, Tensor], *, origin: str) -> None:
    """ModelError, listing the tensors, unless `state` has exactly the names and shapes of the model's state dict."""
    own = model.state_dict()
    shapes = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{title}: {_some(keys)}"
        for title, keys in (
            ("missing", [key for key in own if key not in state]),
            ("not of this network", [key for key in state if key not in own]),
            ("wrong shape", shapes),
        )
        if keys
    ]
    if problems:
        raise ModelError(f"{origin} does not fit {type(model).__name__}: {'; '.join(problems)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What `load_matching` did with each tensor."""

    loaded: tuple[str, ...]
    """Taken over from the other network."""
    fresh: tuple[str, ...]
    """Left as this network's initialisation made them."""
    unused: tuple[str, ...]
    """Of the other network, without a place in this one."""


def load_matching(model: SRNetwork, state: Mapping[str, Tensor], *, config: ModelConfig | None = None) -> LoadReport:
    """Starts a network from one of another scale, as the EDSR paper starts x3 and x4 from x2 ("Single-scale model").

    Copies in place every tensor of equal name and shape. Only the upsampler (`upsampler_prefixes` of the network) may
    differ; ModelError, and nothing copied, if anything else does. With the other network's `config`, values that show
    in no tensor are compared too (the residuals' factor, the pixel range).
    """
    if config is not None:
        _check_same_but_scale(model, config)
    own = model.state_dict()
    loaded = [key for key in own if key in state and state[key].shape == own[key].shape]
    fresh = [key for key in own if key not in loaded]
    unused = [key for key in state if key not in loaded]
    differing = [key for key in dict.fromkeys((*fresh, *unused)) if not key.startswith(model.upsampler_prefixes)]
    if differing:
        raise ModelError(
            f"can't start {type(model).__name__} from these weights: besides the upsampler, {_some(differing)} differ; "
            "both networks need the same blocks and channels"
        )
    model.load_state_dict({key: state[key] for key in loaded}, strict=False)
    return LoadReport(loaded=tuple(loaded), fresh=tuple(fresh), unused=tuple(unused))


def _check_same_but_scale(model: SRNetwork, other: ModelConfig) -> None:
    own = model.config
    if architecture_name(own) != architecture_name(other):
        raise ModelError(f"can't start {architecture_name(own)!r} from the weights of {architecture_name(other)!r}")
    values = config_to_dict(other)
    for key, value in config_to_dict(own).items():
        if key != "scale" and value != values[key]:
            raise ModelError(f"can't start from weights of {key}={values[key]}: the network has {key}={value}")


def _some(keys: Iterable[str], limit: int = 6) -> str:
    keys = list(keys)
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
