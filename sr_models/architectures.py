"""The networks by name, and configs to and from plain values."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from sr_models import edsr, srresnet
from sr_models.errors import ModelError
from sr_models.network import ModelConfig, SRNetwork


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What belongs to one name in `ARCHITECTURES`."""

    config_type: type[Any]
    """Dataclass of the config."""
    network_type: Callable[[Any], SRNetwork]
    """Network class."""
    macs_per_lr_pixel: Callable[[Any], int]
    """Config → multiply-adds of a forward pass per LR pixel."""


ARCHITECTURES: dict[str, Architecture] = {
    "edsr": Architecture(config_type=edsr.EDSRConfig, network_type=edsr.EDSR, macs_per_lr_pixel=edsr.macs_per_lr_pixel),
    "srresnet": Architecture(
        config_type=srresnet.SRResNetConfig,
        network_type=srresnet.SRResNet,
        macs_per_lr_pixel=srresnet.macs_per_lr_pixel,
    ),
}


def architecture(name: str) -> Architecture:
    """`ARCHITECTURES[name]`; ModelError lists the names if there is none."""
    if name not in ARCHITECTURES:
        raise ModelError(f"unknown architecture {name!r}; there are: {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[name]


def architecture_name(config: ModelConfig) -> str:
    """The name under which a config's class is listed; ModelError if it is not."""
    for name, entry in ARCHITECTURES.items():
        if type(config) is entry.config_type:
            return name
    known = ", ".join(sorted(entry.config_type.__name__ for entry in ARCHITECTURES.values()))
    raise ModelError(f"{type(config).__name__} is no architecture's config; there are: {known}")


def build_model(config: ModelConfig, *, seed: int | None = None) -> SRNetwork:
    """A freshly initialised network on the CPU.

    With a seed the weights depend on it alone, and PyTorch's global random state stays as it was; without one they are
    drawn from that state.
    """
    network_type = ARCHITECTURES[architecture_name(config)].network_type
    if seed is None:
        return network_type(config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed CUDA, which nothing restores
        return network_type(config)


def macs_per_lr_pixel(config: ModelConfig) -> int:
    """Multiply-adds of one forward pass per LR pixel; a training step costs about three times that."""
    return ARCHITECTURES[architecture_name(config)].macs_per_lr_pixel(config)


def num_parameters(config: ModelConfig) -> int:
    """Learnable parameters, counted without allocating any."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(config).parameters())


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """A config as JSON-ready plain values, every field written out."""
    entry = ARCHITECTURES[architecture_name(config)]
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(entry.config_type)}


def config_from_dict(name: str, values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `config_to_dict`; missing fields get their defaults.

    ModelError for an unknown architecture, an unknown key, a value of the wrong type or one out of range.
    """
    config_type = architecture(name).config_type
    hints = get_type_hints(config_type)
    for key, value in values.items():
        if key not in hints:
            raise ModelError(f"config of {name!r} has the unknown key {key!r}; there are: {', '.join(sorted(hints))}")
        if not _fits(value, hints[key]):
            raise ModelError(f"config of {name!r}: {key}={value!r} is not of type {_type_name(hints[key])}")
    config: ModelConfig = config_type(**values)
    return config


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    return str(getattr(hint, "__name__", hint))
