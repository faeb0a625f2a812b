"""Layouts of SRResNet's weights in other projects, and those that this project's SRResNet can't express.

| layout | its network | ours |
|---|---|---|
| SRGAN-PyTorch (Lornatang), since October 2022: `conv1`, `conv2`, `conv3` | [0, 1] in; its last convolution gives [0, 1], then clamped | gives [-1, 1], mapped by (y + 1) / 2: the last convolution's weight is doubled, its bias doubled less 1. Not clamped, so the same image once clamped to 8 bits |
| the same, April to October 2022: `conv_block1` … `conv_block3` | the same | the same |
| the same, end of 2021 to April 2022: stages of the upsampling in one `Sequential` | the same, not clamped | the same |
| SRGAN (leftthomas), since May 2019: `block1` … `block8`, five residual blocks | [0, 1] in; ends in (tanh(y) + 1) / 2; biases before BatchNorm | `output` is "tanh"; a bias before BatchNorm shifts what its mean is taken of, so the running mean takes it over |

The convolutions before BatchNorm have no bias in SRGAN-PyTorch, as here. A file with such a bias, or with a slope per
channel in PReLU, is no file of that layout and is refused.

Not expressible, and refused with the reason (`INEXPRESSIBLE`): a network that takes standardised images or [-1, 1] pads
its first convolution with another colour than black, so its borders differ whatever is done to the weights.
"""  # noqa: E501

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sr_models.foreign_layout import (
    COUNTER,
    ForeignWeightsError,
    Found,
    Given,
    Imported,
    Inexpressible,
    Layer,
    Layout,
    check_shapes,
)
from sr_models.srresnet import SRResNetConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class _Names:
    """What differs between the versions of SRGAN-PyTorch."""

    since: str
    conv: str
    """Of the three outer parts, which get 1, 2, 3 appended."""
    upsampling: Callable[[int, int], str]
    """(Upsampling stage, place in it) → a layer: the convolution is at 0, the PReLU at 2."""


def _in_blocks(stage: int, place: int) -> str:
    return f"upsampling.{stage}.upsample_block.{place}"


def _in_one_sequence(stage: int, place: int) -> str:
    return f"upsampling.{3 * stage + place}"


def _tanh_layers(num_blocks: int, num_stages: int) -> Iterator[Layer]:
    yield Layer(ours="head.0", theirs="block1.0", kind="conv")
    yield Layer(ours="head.1", theirs="block1.1", kind="prelu")
    for block in range(num_blocks):
        ours, theirs = f"blocks.{block}", f"block{block + 2}"
        yield Layer(ours=f"{ours}.conv1", theirs=f"{theirs}.conv1", kind="conv")
        yield Layer(ours=f"{ours}.norm1", theirs=f"{theirs}.bn1", kind="norm")
        yield Layer(ours=f"{ours}.activation", theirs=f"{theirs}.prelu", kind="prelu")
        yield Layer(ours=f"{ours}.conv2", theirs=f"{theirs}.conv2", kind="conv")
        yield Layer(ours=f"{ours}.norm2", theirs=f"{theirs}.bn2", kind="norm")
    yield Layer(ours="body_end.0", theirs=f"block{num_blocks + 2}.0", kind="conv")
    yield Layer(ours="body_end.1", theirs=f"block{num_blocks + 2}.1", kind="norm")
    for stage in range(num_stages):
        yield Layer(ours=f"upsampler.{3 * stage}", theirs=f"block8.{stage}.conv", kind="conv")
        yield Layer(ours=f"upsampler.{3 * stage + 2}", theirs=f"block8.{stage}.prelu", kind="prelu")
    yield Layer(ours="tail", theirs=f"block8.{num_stages}", kind="conv")


def _layers(names: _Names, num_blocks: int, num_stages: int) -> Iterator[Layer]:
    conv = names.conv
    yield Layer(ours="head.0", theirs=f"{conv}1.0", kind="conv")
    yield Layer(ours="head.1", theirs=f"{conv}1.1", kind="prelu")
    for block in range(num_blocks):
        ours, theirs = f"blocks.{block}", f"trunk.{block}.rcb"
        yield Layer(ours=f"{ours}.conv1", theirs=f"{theirs}.0", kind="conv without bias")
        yield Layer(ours=f"{ours}.norm1", theirs=f"{theirs}.1", kind="norm")
        yield Layer(ours=f"{ours}.activation", theirs=f"{theirs}.2", kind="prelu")
        yield Layer(ours=f"{ours}.conv2", theirs=f"{theirs}.3", kind="conv without bias")
        yield Layer(ours=f"{ours}.norm2", theirs=f"{theirs}.4", kind="norm")
    yield Layer(ours="body_end.0", theirs=f"{conv}2.0", kind="conv without bias")
    yield Layer(ours="body_end.1", theirs=f"{conv}2.1", kind="norm")
    for stage in range(num_stages):
        yield Layer(ours=f"upsampler.{3 * stage}", theirs=names.upsampling(stage, 0), kind="conv")
        yield Layer(ours=f"upsampler.{3 * stage + 2}", theirs=names.upsampling(stage, 2), kind="prelu")
    yield Layer(ours="tail", theirs=f"{conv}3", kind="conv")


def _finish_linear(title: str, found: Found, given: Given) -> Imported:
    state = dict(found.state)
    # Theirs ends in y, ours in (z + 1) / 2: z = 2y - 1.
    state["tail.weight"] = 2.0 * state["tail.weight"]
    state["tail.bias"] = 2.0 * state["tail.bias"] - 1.0
    note = "its last convolution gives [0, 1], ours [-1, 1]: weight doubled, bias doubled less 1"
    return _finish(title, found, given, state, output="linear", notes=[note])


def _finish_tanh(title: str, found: Found, given: Given) -> Imported:
    state = dict(found.state)
    norms = {f"blocks.{block}.conv{i}": f"blocks.{block}.norm{i}" for block in range(found.num_blocks) for i in (1, 2)}
    norms["body_end.0"] = "body_end.1"
    means = {f"{conv}.bias": state[f"{norm}.running_mean"].shape for conv, norm in norms.items()}
    check_shapes(state, means, title=title)  # else a row less a column would be a square
    for conv, norm in norms.items():
        state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] - state.pop(f"{conv}.bias")
    note = "biases before BatchNorm, which ours does not have, taken into BatchNorm's mean"
    return _finish(title, found, given, state, output="tanh", notes=["ends in tanh", note])


def _finish(
    title: str,
    found: Found,
    given: Given,
    state: dict[str, Tensor],
    *,
    output: Literal["linear", "tanh"],
    notes: list[str],
) -> Imported:
    for name, value in (("residual-scaling", given.residual_scaling), ("rgb-range", given.rgb_range)):
        if value is not None:
            raise ForeignWeightsError(f"--{name} {value:g}: is of EDSR; an SRResNet has no such value")
    norms = [key.removesuffix("running_mean") for key in state if key.endswith(".running_mean")]
    without = [norm for norm in norms if norm + COUNTER not in state]
    if without:
        state |= {norm + COUNTER: torch.zeros((), dtype=torch.int64) for norm in without}
        notes = [
            *notes,
            f"{COUNTER} of {len(without)} BatchNorms set to 0: the file has none, and nothing depends on it",
        ]
    config = SRResNetConfig(
        scale=found.scale,  # type: ignore[arg-type]  # checked by the config itself
        num_blocks=found.num_blocks,
        num_channels=found.num_channels,
        output=output,
    )
    return Imported(layout=title, config=config, state=state, notes=tuple(notes))


def _layout(names: _Names) -> Layout:
    title = f"SRGAN-PyTorch's SRResNet (Lornatang, {names.since})"
    return Layout(
        title=title,
        marks=(
            f"{names.conv}1.0.weight",
            "trunk.0.rcb.0.weight",
            f"{names.upsampling(0, 0)}.weight",
            f"{names.conv}3.weight",
        ),
        head=f"{names.conv}1.0",
        block="trunk.{}.rcb.0",
        stage=lambda index: names.upsampling(index, 0),
        layers=partial(_layers, names),
        finish=partial(_finish_linear, title),
    )


SRGAN_PYTORCH = _layout(_Names(since="since October 2022", conv="conv", upsampling=_in_blocks))
SRGAN_PYTORCH_2022 = _layout(_Names(since="April to October 2022", conv="conv_block", upsampling=_in_blocks))
SRGAN_PYTORCH_2021 = _layout(_Names(since="end of 2021 to April 2022", conv="conv_block", upsampling=_in_one_sequence))

_LEFTTHOMAS = "SRGAN's generator (leftthomas, since May 2019)"
SRGAN_LEFTTHOMAS = Layout(
    title=_LEFTTHOMAS,
    # Always five residual blocks, so that the upsampling is the eighth block.
    marks=("block1.0.weight", "block2.conv1.weight", "block7.1.running_mean", "block8.0.conv.weight"),
    head="block1.0",
    block="block{}.conv1",
    first_block=2,
    stage=lambda index: f"block8.{index}.conv",
    layers=_tanh_layers,
    finish=partial(_finish_tanh, _LEFTTHOMAS),
)

INEXPRESSIBLE = (
    Inexpressible(
        title="SRGAN's generator (leftthomas, before May 2019)",
        marks=("block1.0.weight", "block2.conv1.weight", "block8.0.conv.weight"),
        reason="its residual blocks are followed by a PReLU, where this project's SRResNet, like the paper's, has a "
        "BatchNorm",
    ),
    Inexpressible(
        title="the SRResNet of a-PyTorch-Tutorial-to-Super-Resolution (sgrvinod)",
        marks=("conv_block1.conv_block.0.weight", "residual_blocks.0.conv_block1.conv_block.0.weight"),
        reason="it takes images standardised by ImageNet's mean and deviation, so its first convolution pads with "
        "another colour than black; this project's SRResNet takes [0, 1]",
    ),
    Inexpressible(
        title="BasicSR's MSRResNet",
        marks=("conv_first.weight", "body.0.conv1.weight", "upconv1.weight", "conv_hr.weight"),
        reason="it is another network: no BatchNorm, leaky ReLUs, one more convolution, and the image enlarged "
        "bilinearly is added to its output",
    ),
    Inexpressible(
        title="pytorch-SRResNet (twtygqyy)",
        marks=("conv_input.weight", "residual.0.conv1.weight", "conv_mid.weight"),
        reason="it normalises each image by itself (InstanceNorm) and has leaky ReLUs; this project's SRResNet has "
        "BatchNorm and PReLU",
    ),
)
