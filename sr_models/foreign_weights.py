"""Weights of other projects' EDSR and SRResNet as weights of this project's, computing the same.

Pure: tensors by name in, a config and a state dict out. What each layout's network computes, and how it maps, is said
where the layouts are: `foreign_edsr`, `foreign_srresnet`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sr_models.architectures import architecture, build_model
from sr_models.edsr import UPSAMPLER_STAGES
from sr_models.foreign_edsr import BASICSR, EDSR_PYTORCH
from sr_models.foreign_layout import (
    ForeignWeightsError,
    Found,
    Given,
    Imported,
    Inexpressible,
    Layout,
    check_shapes,
    find,
    some,
)
from sr_models.foreign_srresnet import (
    INEXPRESSIBLE,
    SRGAN_LEFTTHOMAS,
    SRGAN_PYTORCH,
    SRGAN_PYTORCH_2021,
    SRGAN_PYTORCH_2022,
)

LAYOUTS: dict[str, dict[str, Layout]] = {
    "edsr": {"edsr-pytorch": EDSR_PYTORCH, "basicsr": BASICSR},
    "srresnet": {
        "srgan-pytorch": SRGAN_PYTORCH,
        "srgan-pytorch-2022": SRGAN_PYTORCH_2022,
        "srgan-pytorch-2021": SRGAN_PYTORCH_2021,
        "srgan-leftthomas": SRGAN_LEFTTHOMAS,
    },
}
"""Architecture → name of a layout → the layout."""

ENTRIES = ("params_ema", "params", "ema_state_dict", "state_dict", "model_state_dict", "model")
"""Under what projects put a network's tensors in a file, the preferred first: averaged weights before plain ones
(BasicSR's params_ema is what its validation scores)."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and a wrapping class put before every key."""
NOTHING_GIVEN = Given()
_OWN_MARKS = ("body_end.weight", "body_end.0.weight")


def unwrap(loaded: Any, *, entry: str | None = None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of a network by name, out of what `torch.load` gives, and notes on what was taken and left.

    `entry` says under which key they are; without it the first of `ENTRIES` that is there. Prefixes that all keys share
    are taken off. ForeignWeightsError if it holds no tensors by name.
    """
    notes = []
    if not isinstance(loaded, Mapping):
        raise ForeignWeightsError(f"holds one {type(loaded).__name__}, not the tensors of a network by name")
    inner = {key: value for key, value in loaded.items() if isinstance(value, Mapping)}
    if entry is not None and entry not in inner:
        raise ForeignWeightsError(
            f"has no tensors under {entry!r}; there are: {some(map(str, inner)) or 'none'} (--entry)"
        )
    chosen = entry if entry is not None else next((name for name in ENTRIES if name in inner), None)
    if chosen is not None:
        left = [str(key) for key in loaded if key != chosen]
        notes.append(f"taken: {chosen!r}" + (f"; left: {some(left)} (--entry)" if left else ""))
        loaded = inner[chosen]
    others = [str(key) for key, value in loaded.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others or not loaded:
        known = f"known wrappers are {', '.join(ENTRIES)} (--entry)"
        raise ForeignWeightsError(f"is not only tensors by name: {some(others) or 'it is empty'}; {known}")
    tensors = dict(loaded)
    while prefix := next((it for it in PREFIXES if all(key.startswith(it) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        notes.append(f"prefix {prefix!r} taken off all keys")
    return tensors, tuple(notes)


def convert(
    tensors: Mapping[str, Tensor], *, architecture_name: str, scale: int, given: Given = NOTHING_GIVEN
) -> Imported:
    """The network of this project that computes what the tensors' network does.

    Every tensor is used and every parameter filled. ForeignWeightsError if the layout is unknown, of another
    architecture or not expressible, if keys are missing or too many, a shape or the scale is another, a value is not
    finite, or the mean shift or the pixel range is not ours. ModelError for an unknown architecture or a value out of
    range.
    """
    architecture(architecture_name)
    layout = recognised(tensors, architecture_name=architecture_name)
    _check_plain(tensors)
    found = find(layout, tensors)  # only keys and shapes
    if found.scale != scale:
        raise ForeignWeightsError(f"it is an x{found.scale} network, not x{scale} (--scale)")
    if scale not in UPSAMPLER_STAGES:
        allowed = ", ".join(f"x{factor}" for factor in UPSAMPLER_STAGES)
        raise ForeignWeightsError(f"it is an x{scale} network; this project's are {allowed} (--scale)")
    _check_finite(tensors)
    imported = layout.finish(_widened(found), given)
    with torch.device("meta"):
        expected = build_model(imported.config).state_dict()
    check_shapes(imported.state, {key: tensor.shape for key, tensor in expected.items()}, title=layout.title)
    # Copies: a tensor may be a view of a storage that holds the whole file.
    state = {key: imported.state[key].to(tensor.dtype, copy=True).contiguous() for key, tensor in expected.items()}
    return Imported(
        layout=imported.layout, config=imported.config, state=state, notes=(*_dtypes(tensors), *imported.notes)
    )


def recognised(tensors: Mapping[str, Tensor], *, architecture_name: str) -> Layout:
    """The layout that the keys are in; ForeignWeightsError says what they are instead."""
    for layout in LAYOUTS.get(architecture_name, {}).values():
        if _is(layout, tensors):
            return layout
    for other, layouts in LAYOUTS.items():
        for layout in layouts.values():
            if _is(layout, tensors):
                raise ForeignWeightsError(f"it is {layout.title}, not {architecture_name!r}: --architecture {other}")
    for inexpressible in INEXPRESSIBLE:
        if _is(inexpressible, tensors):
            raise ForeignWeightsError(f"it is {inexpressible.title}, which can't be imported: {inexpressible.reason}")
    if "tail.weight" in tensors and any(mark in tensors for mark in _OWN_MARKS):
        raise ForeignWeightsError(
            "its keys are this project's own: there is nothing to import; the folder or checkpoint it comes from is a "
            "MODEL by itself"
        )
    titles = "; ".join(layout.title for layout in LAYOUTS.get(architecture_name, {}).values())
    raise ForeignWeightsError(
        f"its keys are those of no known layout of {architecture_name!r}: {some(tensors)}. Known: {titles}"
    )


def _is(layout: Layout | Inexpressible, tensors: Mapping[str, Tensor]) -> bool:
    return all(mark in tensors for mark in layout.marks)


def _check_plain(tensors: Mapping[str, Tensor]) -> None:
    """ForeignWeightsError for tensors that are no real numbers, or more of them than are in memory."""
    odd = [
        f"{key} ({str(tensor.dtype).removeprefix('torch.')}, {str(tensor.layout).removeprefix('torch.')})"
        for key, tensor in tensors.items()
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta
    ]
    if odd:
        raise ForeignWeightsError(f"tensors that are not plain real numbers: {some(odd)}")
    # A view of one number with a stride of 0 can have 10^13 elements, and to look at each takes as many bytes.
    repeated = [
        f"{key} {tuple(tensor.shape)}"
        for key, tensor in tensors.items()
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ]
    if repeated:
        raise ForeignWeightsError(f"tensors with more elements than numbers, which no network saves: {some(repeated)}")


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ForeignWeightsError(f"tensors with NaN or infinite values: {some(broken)}")


def _widened(found: Found) -> Found:
    """The same as float32 and integers, without gradients."""

    def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: it.detach().float() if it.is_floating_point() else it.detach() for key, it in tensors.items()}

    return replace(found, state=widened(found.state), extras=widened(found.extras))


def _dtypes(tensors: Mapping[str, Tensor]) -> list[str]:
    others = {
        str(tensor.dtype).removeprefix("torch.")
        for tensor in tensors.values()
        if tensor.is_floating_point() and tensor.dtype is not torch.float32
    }
    return [f"{', '.join(sorted(others))} converted to float32"] if others else []
