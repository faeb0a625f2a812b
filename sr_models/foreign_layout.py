"""What a key layout of another project is, and how its tensors become those of this project's network.

Conversion is complete or fails: every tensor of the file has a place, every parameter of the network is filled.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Size, Tensor

from sr_models.errors import ModelError
from sr_models.network import ModelConfig

Kind = Literal["conv", "conv without bias", "norm", "prelu"]
"""A layer's tensors. Where ours has a convolution without bias before a BatchNorm and theirs has one with, it is a
"conv": `finish` puts the bias into the BatchNorm's mean."""
_TENSORS: Mapping[Kind, tuple[str, ...]] = {
    "conv": ("weight", "bias"),
    "conv without bias": ("weight",),
    "norm": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
    "prelu": ("weight",),
}
COUNTER = "num_batches_tracked"
"""BatchNorm's count of training batches, which nothing is computed from; PyTorch before 0.4.1 did not write it."""
_NUM_NAMED = 6


class ForeignWeightsError(ModelError):
    """Weights of another project can't become a network of this one; the message says which keys or values and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What the tensors alone can't tell, as the user said it; None where nothing was said."""

    residual_scaling: float | None = None
    """EDSR's factor on each residual."""
    rgb_range: float | None = None
    """Pixel range that EDSR's layers see."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Found:
    """The tensors of a file in a known layout, sorted out."""

    scale: int
    num_blocks: int
    num_channels: int
    state: dict[str, Tensor]
    """By our keys; shapes are not yet compared."""
    extras: Mapping[str, Tensor]
    """By their keys: those that become no parameter of ours."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Imported:
    """A network of this project that computes what the other one does."""

    layout: str
    """Title of the layout that was found."""
    config: ModelConfig
    state: Mapping[str, Tensor]
    """State dict of the config's network: float32 on the CPU, in storage of its own."""
    notes: tuple[str, ...]
    """What was converted, and what was assumed because it is not in the tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer of ours and the layer of theirs that it is."""

    ours: str
    theirs: str
    kind: Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a project names the tensors of an architecture."""

    title: str
    """Project and network, for messages."""
    marks: tuple[str, ...]
    """Keys that all files in this layout have, and no other layout has all of."""
    head: str
    """Convolution whose output channels are the network's."""
    block: str
    """A layer of residual block {}."""
    stage: Callable[[int], str]
    """Index of a pixel-shuffle stage → its convolution."""
    layers: Callable[[int, int], Iterable[Layer]]
    """(blocks, stages) → all layers."""
    finish: Callable[[Found, Given], Imported]
    """Tensors by our keys → a network that computes the same: config, and whatever values have to change."""
    first_block: int = 0
    """Number of the first residual block in `block`."""
    extras: tuple[str, ...] = ()
    """Keys beside the layers that a file has either all or none of; `finish` reads them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inexpressible:
    """A known layout whose network computes what none of this project's networks does."""

    title: str
    marks: tuple[str, ...]
    """As in `Layout`."""
    reason: str
    """What its network does that ours does not."""


def find(layout: Layout, tensors: Mapping[str, Tensor]) -> Found:
    """Sorts the tensors out by the layout's names. ForeignWeightsError lists the keys that are missing or too many."""
    num_blocks = max(0, num_indexed(layout.block + ".weight", tensors) - layout.first_block)
    stages = [key for index in range(6) if (key := layout.stage(index) + ".weight") in tensors]
    scale = math.prod(_factor(tensors[key]) for key in stages)
    names: dict[str, str] = {}
    for layer in layout.layers(num_blocks, len(stages)):
        names |= {f"{layer.theirs}.{name}": f"{layer.ours}.{name}" for name in _TENSORS[layer.kind]}
    extras = layout.extras if any(key in tensors for key in layout.extras) else ()
    expected = [*names, *extras]
    missing = [key for key in expected if key not in tensors and not key.endswith(COUNTER)]
    unknown = [key for key in tensors if key not in set(expected)]
    problems = [f"{title}: {some(keys)}" for title, keys in (("missing", missing), ("no place for", unknown)) if keys]
    if problems:
        raise ForeignWeightsError(f"these are not all and only the tensors of {layout.title}: {'; '.join(problems)}")
    return Found(
        scale=scale,
        num_blocks=num_blocks,
        num_channels=tensors[layout.head + ".bias"].numel(),
        state={ours: tensors[theirs] for theirs, ours in names.items() if theirs in tensors},
        extras={key: tensors[key] for key in extras},
    )


def check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Size], *, title: str) -> None:
    """ForeignWeightsError lists the tensors that have another shape than the network's."""
    wrong = [
        f"{key} is {tuple(tensor.shape)} instead of {tuple(expected[key])}"
        for key, tensor in state.items()
        if key in expected and tensor.shape != expected[key]
    ]
    if wrong:
        raise ForeignWeightsError(f"{title}: tensors of another shape than this project's network has: {some(wrong)}")


def num_indexed(pattern: str, keys: Iterable[str]) -> int:
    """How many there are of a key with {} in place of an index: one more than the highest index; a gap shows later."""
    before, after = pattern.split("{}")
    indices = [key[len(before) : -len(after)] for key in keys if key.startswith(before) and key.endswith(after)]
    return 1 + max((int(index) for index in indices if index.isdecimal() and len(index) < 5), default=-1)


def some(items: Iterable[str]) -> str:
    """The first few, and how many there are in all."""
    items = list(items)
    return ", ".join(items[:_NUM_NAMED]) + (f" … ({len(items)} in all)" if len(items) > _NUM_NAMED else "")


def _factor(weight: Tensor) -> int:
    """Of the pixel shuffle behind a convolution: it has the factor's square as many channels out as in."""
    return math.isqrt(weight.shape[0] // weight.shape[1]) if weight.ndim == 4 and weight.shape[1] else 0
