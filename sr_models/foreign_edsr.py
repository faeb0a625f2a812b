"""Layouts of EDSR's weights in other projects.

| layout | its network | ours |
|---|---|---|
| EDSR-PyTorch, `src/model/edsr.py` | takes and gives [0, rgb_range], 255 in all published files; subtracts the mean with a frozen 1x1 convolution `sub_mean`, adds it with `add_mean`; both are in the file | takes and gives [0, 1], multiplies by `rgb_range` after the mean is subtracted: the same numbers in every layer |
| BasicSR, `basicsr/archs/edsr_arch.py` | takes and gives [0, 1]; (x - mean) · img_range before the first convolution, / img_range + mean after the last; neither is in the file | the same |

Both pad with zeros after the mean is subtracted, as ours does, so borders are the same too. The factor on residuals
(`res_scale`) is in no file: the authors use 0.1 for 256 channels and 1 for 64.
"""  # noqa: E501

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sr_models.edsr import DIV2K_MEAN_RGB, EDSRConfig
from sr_models.foreign_layout import ForeignWeightsError, Found, Given, Imported, Layer, Layout

OFFICIAL_RANGE = 255.0
"""`--rgb_range` of EDSR-PyTorch and `img_range` of BasicSR, by default and in all published models."""
_MEAN_SHIFTS = ("sub_mean.weight", "sub_mean.bias", "add_mean.weight", "add_mean.bias")
_SIGNS = (("sub_mean", -1), ("add_mean", 1))
_TOLERANCE = 2e-5  # of the mean in [0, 1], which has 4 decimals; float32 of numbers near 114 is good to 1e-7 of that


def _edsr_pytorch_layers(num_blocks: int, num_stages: int) -> Iterator[Layer]:
    yield Layer(ours="head", theirs="head.0", kind="conv")
    for block in range(num_blocks):
        yield Layer(ours=f"blocks.{block}.conv1", theirs=f"body.{block}.body.0", kind="conv")
        yield Layer(ours=f"blocks.{block}.conv2", theirs=f"body.{block}.body.2", kind="conv")
    yield Layer(ours="body_end", theirs=f"body.{num_blocks}", kind="conv")
    for stage in range(num_stages):
        yield Layer(ours=f"upsampler.{2 * stage}", theirs=f"tail.0.{2 * stage}", kind="conv")
    yield Layer(ours="tail", theirs="tail.1", kind="conv")


def _basicsr_layers(num_blocks: int, num_stages: int) -> Iterator[Layer]:
    yield Layer(ours="head", theirs="conv_first", kind="conv")
    for block in range(num_blocks):
        for conv in ("conv1", "conv2"):
            yield Layer(ours=f"blocks.{block}.{conv}", theirs=f"body.{block}.{conv}", kind="conv")
    yield Layer(ours="body_end", theirs="conv_after_body", kind="conv")
    for stage in range(num_stages):
        yield Layer(ours=f"upsampler.{2 * stage}", theirs=f"upsample.{2 * stage}", kind="conv")
    yield Layer(ours="tail", theirs="conv_last", kind="conv")


def _finish_edsr_pytorch(found: Found, given: Given) -> Imported:
    title = EDSR_PYTORCH.title
    if not found.extras:
        note = f"no mean shift in the file: DIV2K's mean {DIV2K_MEAN_RGB} is assumed, as the authors' code has it"
        return _finish(found, given, title=title, rgb_range=None, mean_note=note)
    rgb_range = _range_of_mean_shift(found.extras)
    note = f"mean shift in the file: DIV2K's mean in the range 0…{rgb_range:g}, as ours"
    return _finish(found, given, title=title, rgb_range=rgb_range, mean_note=note)


def _finish_basicsr(found: Found, given: Given) -> Imported:
    note = f"the mean is not in the file: DIV2K's {DIV2K_MEAN_RGB} is assumed, BasicSR's default"
    return _finish(found, given, title=BASICSR.title, rgb_range=None, mean_note=note)


def _finish(found: Found, given: Given, *, title: str, rgb_range: float | None, mean_note: str) -> Imported:
    notes = [mean_note]
    if rgb_range is not None and given.rgb_range is not None and abs(rgb_range - given.rgb_range) > 1e-3 * rgb_range:
        raise ForeignWeightsError(
            f"the file's mean shift is that of the pixel range 0…{rgb_range:g}, not 0…{given.rgb_range:g} (--rgb-range)"
        )
    if rgb_range is None:
        rgb_range = OFFICIAL_RANGE if given.rgb_range is None else given.rgb_range
        notes.append(f"rgb_range {rgb_range:g}: {_said(given.rgb_range, 'that of all published models', 'rgb-range')}")
    usual = 0.1 if found.num_channels == 256 else 1.0
    residual_scaling = usual if given.residual_scaling is None else given.residual_scaling
    why = f"the authors' for {found.num_channels} channels" if found.num_channels in (64, 256) else "the default"
    notes.append(f"residual_scaling {residual_scaling:g}: {_said(given.residual_scaling, why, 'residual-scaling')}")
    config = EDSRConfig(
        scale=found.scale,  # type: ignore[arg-type]  # checked by the config itself
        num_blocks=found.num_blocks,
        num_channels=found.num_channels,
        residual_scaling=residual_scaling,
        rgb_range=rgb_range,
    )
    return Imported(layout=title, config=config, state=found.state, notes=tuple(notes))


def _said(given: float | None, default: str, flag: str) -> str:
    return f"--{flag}" if given is not None else f"{default}; it is not in the file (--{flag})"


def _range_of_mean_shift(shifts: Mapping[str, Tensor]) -> float:
    """The pixel range for which these 1x1 convolutions subtract and add DIV2K's mean, and do nothing else."""
    mean = torch.tensor(DIV2K_MEAN_RGB, dtype=torch.float64)
    for key in ("sub_mean", "add_mean"):
        weight, bias = shifts[f"{key}.weight"].double(), shifts[f"{key}.bias"].double()
        if (
            weight.shape != (3, 3, 1, 1)
            or bias.shape != (3,)
            or not torch.equal(weight.view(3, 3), torch.eye(3).double())
        ):
            raise ForeignWeightsError(f"{key} does more than shift by three means; this project's EDSR can't do that")
    added = shifts["add_mean.bias"].double()
    rgb_range = float(added @ mean / (mean @ mean))
    if rgb_range > 0:
        rgb_range = round(rgb_range, 3)  # 255 again, not 254.99999
        off = max(float((shifts[f"{key}.bias"].double() - sign * rgb_range * mean).abs().max()) for key, sign in _SIGNS)
        if off <= _TOLERANCE * rgb_range:
            return rgb_range
    raise ForeignWeightsError(
        f"the file's network shifts by another mean than DIV2K's {DIV2K_MEAN_RGB}, which this project's EDSR has: "
        f"sub_mean.bias {_listed(shifts['sub_mean.bias'])}, add_mean.bias {_listed(added)}"
    )


def _listed(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values.tolist()) + ")"


EDSR_PYTORCH = Layout(
    title="EDSR-PyTorch's EDSR (sanghyun-son)",
    marks=("head.0.weight", "body.0.body.0.weight", "tail.0.0.weight", "tail.1.weight"),
    head="head.0",
    block="body.{}.body.0",
    stage=lambda index: f"tail.0.{2 * index}",
    layers=_edsr_pytorch_layers,
    extras=_MEAN_SHIFTS,
    finish=_finish_edsr_pytorch,
)
BASICSR = Layout(
    title="BasicSR's EDSR",
    marks=("conv_first.weight", "body.0.conv1.weight", "conv_after_body.weight", "upsample.0.weight"),
    head="conv_first",
    block="body.{}.conv1",
    stage=lambda index: f"upsample.{2 * index}",
    layers=_basicsr_layers,
    finish=_finish_basicsr,
)
