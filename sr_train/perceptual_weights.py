"""Which features a perceptual loss and LPIPS compare, and where their networks' weights come from.

The driver loads them before it asks for a GPU and hands them to the workers, which need no internet. Every file's hash
is compared with what is known of it, and nothing in a file is run.
"""

import hashlib
import io
import math
import pickle
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sr_data.storage import split_uri
from sr_train.hub_download import file_name, hash_in_name, hub_file
from sr_train.options import require

IMAGENET = "imagenet"
RANDOM = "random"
NONE = "none"

# Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, table 1,
# configuration E: 3x3 convolutions before each of the five poolings.
VGG19_CONVS_PER_BLOCK = (2, 2, 4, 4, 4)


def _number_layers() -> Iterator[tuple[str, int]]:
    index = 0
    for block, num_convs in enumerate(VGG19_CONVS_PER_BLOCK, 1):
        for conv in range(1, num_convs + 1):
            yield f"conv{block}_{conv}", index
            index += 2  # past its ReLU
        index += 1  # past the pooling


VGG19_LAYERS: Mapping[str, int] = MappingProxyType(dict(_number_layers()))
"""conv1_1 … conv5_4 → index of that convolution in torchvision's `vgg19().features`; its ReLU is the next one."""


class PerceptualWeightsError(ValueError):
    """The weights of a perceptual network can't be had; the message says what was tried and how to get them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PerceptualConfig:
    """Perceptual loss and perceptual metric."""

    layer: str = "conv5_4"
    """VGG19 convolution whose output is compared: conv1_1 to conv5_4."""
    after_relu: bool = True
    """Compare after the layer's ReLU (SRGAN) or before it (ESRGAN)."""
    weights: str = IMAGENET
    """VGG19's weights: imagenet (torchvision's download), a file (path or s3://bucket/key; .pth or .safetensors), or
    random: meaningless features for trials, tagged as such, and the model is never promoted."""
    weights_sha256: str | None = None
    """What the sha256 of the weights' file must be, or begin with (8 hex digits or more)."""
    feature_scale: float = 1 / 12.75
    """Factor on the features before they are compared (SRGAN, section 3.2)."""
    loss: Literal["mse", "l1"] = "mse"
    """How features are compared."""
    lpips_weights: str = IMAGENET
    """AlexNet's weights for LPIPS in validation: imagenet (torchvision's download), a file (path or s3://bucket/key),
    or none: no LPIPS."""

    def __post_init__(self) -> None:
        require(
            self.layer in VGG19_LAYERS,
            f"--perceptual.layer={self.layer!r} is no convolution of VGG19; there are: {' '.join(VGG19_LAYERS)}",
        )
        require(
            math.isfinite(self.feature_scale) and self.feature_scale > 0,
            f"--perceptual.feature-scale={self.feature_scale} must be greater than 0",
        )
        require(
            self.weights_sha256 is None or re.fullmatch("[0-9a-fA-F]{8,64}", self.weights_sha256) is not None,
            f"--perceptual.weights-sha256={self.weights_sha256!r} must be 8 to 64 hex digits, as sha256sum prints them",
        )
        require(
            self.weights_sha256 is None or self.weights != RANDOM,
            "--perceptual.weights-sha256 has no meaning for --perceptual.weights random: there is no file",
        )
        for flag, value in (("weights", self.weights), ("lpips-weights", self.lpips_weights)):
            require(value != "", f"--perceptual.{flag} is empty; give imagenet or a file (path or s3://bucket/key)")
        require(
            self.lpips_weights != RANDOM,
            "--perceptual.lpips-weights=random: LPIPS of random features says nothing; give imagenet, a file or none",
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PerceptualWeights:
    """Weights of a network's convolutions, and what they are."""

    state: Mapping[str, Tensor]
    """`features.N.weight` and `features.N.bias` as torchvision names them; float32, on the CPU."""
    description: str
    """For a run's tags: `imagenet (sha256 dcbb9e9d…)`, `file NAME (sha256 …)`, `random (seed 0)`."""
    sha256: str | None
    """Of the file they come from; None if they are random."""
    is_official: bool
    """The file is the one torchvision publishes, wherever it was read from."""

    @property
    def is_random(self) -> bool:
        """A model trained on these features must not be promoted."""
        return self.sha256 is None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Backbone:
    """A torchvision network of which the convolutions are used."""

    name: str
    flag: str
    url: str
    shapes: Mapping[str, torch.Size]

    def how_to_get(self) -> str:
        return (
            f"{self.name}'s ImageNet weights are {self.url} (sha256 begins with {hash_in_name(file_name(self.url))}): "
            f"fetch that file where there is internet and give {self.flag} FILE, a path or s3://bucket/key "
            "(docs/perceptual.md)"
        )


def load_vgg19_weights(config: PerceptualConfig, *, seed: int = 0) -> PerceptualWeights:
    """VGG19's convolutions up to the config's layer. `seed` decides random ones, and nothing else.

    Raises:
        PerceptualWeightsError: no network, no such file, another hash than announced, damaged, not of VGG19, or a
            pickle that would run code.
    """
    from torchvision.models import VGG19_Weights, vgg19  # here: it takes seconds to import

    with torch.device("meta"):
        features = vgg19(weights=None, init_weights=False).features
    backbone = _Backbone(
        name="VGG19", flag="--perceptual.weights", url=VGG19_Weights.IMAGENET1K_V1.url, shapes=_shapes(features)
    )
    if config.weights == RANDOM:
        loaded = _random(backbone, seed)
    else:
        loaded = _load(backbone, config.weights, sha256=config.weights_sha256)
    kept = {key: tensor for key, tensor in loaded.state.items() if _index(key) <= VGG19_LAYERS[config.layer]}
    return PerceptualWeights(
        state=kept, description=loaded.description, sha256=loaded.sha256, is_official=loaded.is_official
    )


def load_alexnet_weights(source: str = IMAGENET) -> PerceptualWeights:
    """AlexNet's convolutions: `imagenet`, or a file's path or URI. Raises what `load_vgg19_weights` raises."""
    from torchvision.models import AlexNet_Weights, alexnet

    with torch.device("meta"):
        features = alexnet(weights=None).features
    backbone = _Backbone(
        name="AlexNet",
        flag="--perceptual.lpips-weights",
        url=AlexNet_Weights.IMAGENET1K_V1.url,
        shapes=_shapes(features),
    )
    return _load(backbone, source)


def _load(backbone: _Backbone, source: str, *, sha256: str | None = None) -> PerceptualWeights:
    where = f"{backbone.flag} {source}"
    try:
        if source == IMAGENET:
            path = hub_file(backbone.url)
            where, name, data = str(path), path.name, path.read_bytes()
        else:
            store, name = split_uri(source)
            data = store.read(name)
    except OSError as error:  # StorageError and DownloadError are OSErrors too
        raise PerceptualWeightsError(f"{where}: {error}. {backbone.how_to_get()}") from error
    digest = hashlib.sha256(data).hexdigest()
    announced = {f"{backbone.flag}-sha256": sha256, "its name": hash_in_name(name)}
    for who, expected in announced.items():
        if expected is not None and not digest.startswith(expected.lower()):
            advice = "delete it, and it is downloaded again" if source == IMAGENET else "copy it again"
            raise PerceptualWeightsError(
                f"{where}: its sha256 is {digest}, but {who} says {expected}: damaged, or another file; {advice}. "
                f"{backbone.how_to_get()}"
            )
    is_official = digest.startswith(hash_in_name(file_name(backbone.url)) or "unknown")
    is_checked = is_official or any(announced.values())
    try:
        state = _convolutions(backbone, _tensors(data, name))
    except _UnfitError as error:
        raise PerceptualWeightsError(f"{where}: {error}. {backbone.how_to_get()}") from error
    origin = IMAGENET if source == IMAGENET else f"file {name}"
    unchecked = "" if is_checked else ", compared with nothing"
    description = f"{origin} (sha256 {digest[:8]}…{unchecked})"
    return PerceptualWeights(state=state, description=description, sha256=digest, is_official=is_official)


def _random(backbone: _Backbone, seed: int) -> PerceptualWeights:
    """torchvision's own initialisation, from a generator of its own."""
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.zeros(shape) for key, shape in backbone.shapes.items()}
    for tensor in state.values():
        if tensor.ndim == 4:
            nn.init.kaiming_normal_(tensor, mode="fan_out", nonlinearity="relu", generator=generator)
    return PerceptualWeights(state=state, description=f"random (seed {seed})", sha256=None, is_official=False)


class _UnfitError(ValueError):
    """A file's content is not what it must be."""


# What torch.load and safetensors answer damaged bytes with, found by cutting and changing files at random places.
_DAMAGED = (
    pickle.UnpicklingError, safetensors.SafetensorError, struct.error, RuntimeError, ValueError, EOFError, LookupError,
    TypeError, AttributeError, AssertionError, ArithmeticError,
)  # fmt: skip


def _tensors(data: bytes, name: str) -> dict[Any, Any]:
    try:
        if name.endswith(".safetensors"):
            return safetensors.torch.load(data)
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise _UnfitError(f"refused, because loading it would run code ({refused[1]}); nothing was run") from error
        raise _UnfitError("damaged, or not a file of weights (.pth or .safetensors); nothing in it was run") from error
    if not isinstance(loaded, dict):
        raise _UnfitError(f"holds one {type(loaded).__name__}, not the tensors of a network by name")
    return loaded


def _convolutions(backbone: _Backbone, loaded: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The `features` of a whole network's state, or a state of `features` alone, as float32 copies."""
    names = {key: key for key in loaded if isinstance(key, str) and key.startswith("features.")}
    # Without a prefix it can only be what `network.features.state_dict()` gives.
    names = names or {f"features.{key}": key for key in loaded if isinstance(key, str)}
    tensors = {key: tensor for key, own in names.items() if isinstance(tensor := loaded[own], Tensor)}
    problems = [
        f"{title}: {', '.join(keys[:4])}" + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        for title, keys in (
            ("missing", [key for key in backbone.shapes if key not in tensors]),
            ("not of this network", [key for key in tensors if key not in backbone.shapes]),
            (
                "wrong shape",
                [
                    f"{key} is {tuple(tensors[key].shape)} instead of {tuple(shape)}"
                    for key, shape in backbone.shapes.items()
                    if key in tensors and tensors[key].shape != shape
                ],
            ),
            ("not finite", [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]),
        )
        if keys
    ]
    if problems:
        raise _UnfitError(f"these are not {backbone.name}'s weights: {'; '.join(problems)}")
    # Copies: a tensor can be a view of a storage that holds the whole file.
    return {key: tensors[key].to(torch.float32, copy=True).contiguous() for key in backbone.shapes}


def _shapes(features: nn.Module) -> dict[str, torch.Size]:
    return {f"features.{key}": tensor.shape for key, tensor in features.state_dict().items()}


def _index(key: str) -> int:
    return int(key.split(".")[1])
