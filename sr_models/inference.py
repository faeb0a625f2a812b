"""A network applied to whole images: in tiles, so that memory is bounded, and optionally as a self-ensemble."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sr_models.errors import ModelError
from sr_models.network import SRNetwork

ImageHWC: TypeAlias = Tensor | NDArray[np.uint8] | NDArray[np.uint16]
"""uint8 RGB H×W×3, or what a docstring says: a tensor on any device, or an array."""

NetworkT = TypeVar("NetworkT", bound=nn.Module)

_MAX_LEVEL = {torch.uint8: 255.0, torch.uint16: 65535.0}


def upscale_image(
    model: nn.Module,
    lr_HWC: np.ndarray,
    *,
    tile_px_lr: int = 192,
    self_ensemble: bool = False,
    autocast: torch.dtype | None = None,
) -> np.ndarray:
    """`upscale_tensor` of an array, as an array: it waits for the device."""
    sr_HWC = upscale_tensor(model, lr_HWC, tile_px_lr=tile_px_lr, self_ensemble=self_ensemble, autocast=autocast)
    levels_HWC: np.ndarray = sr_HWC.cpu().numpy()
    return levels_HWC


def upscale_tensor(
    model: nn.Module,
    lr_HWC: ImageHWC,
    *,
    tile_px_lr: int = 192,
    self_ensemble: bool = False,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """`upscale_batch` of one image H×W×3."""
    if lr_HWC.ndim != 3:
        raise ModelError(f"an image must be uint8 or uint16 of shape (height, width, 3), not {describe(lr_HWC)}")
    images_NHWC = as_tensor(lr_HWC).unsqueeze(0)
    return upscale_batch(model, images_NHWC, tile_px_lr=tile_px_lr, self_ensemble=self_ensemble, autocast=autocast)[0]


def upscale_batch(
    model: nn.Module,
    lr_NHWC: ImageHWC,
    *,
    tile_px_lr: int = 192,
    self_ensemble: bool = False,
    autocast: torch.dtype | None = None,
    before_pass: Callable[[], None] | None = None,
) -> Tensor:
    """uint8 or uint16 RGB N×H×W×3, wherever it is → RGB N×sH×sW×3 of that dtype where the model is, clamped and
    rounded to nearest.

    Computed in the model's dtype; `autocast=torch.bfloat16` lets convolutions round to that dtype, for speed. Nothing
    here waits for a GPU; LR images in pinned memory must be left alone until they were read.

    Images are cut into tiles of at most `tile_px_lr` square; each is run with a border as wide as the network can see
    (`receptive_radius_px_lr`), which is then cut off, so the result is that of the whole image up to float rounding.
    Borders cost time: EDSR baseline x4 took 510x339 px in 75 s and 0.5 GiB at 192, in 39 s and 1.6 GiB as one tile (2
    CPU cores). `self_ensemble` averages over the eight flips and quarter turns (EDSR, "Geometric self-ensemble"): eight
    times the work. `before_pass` is called before each pass through the network, and what it raises ends the work: a
    large image takes minutes on a CPU. The model's training mode is left as it was.

    ModelError if the images or the tile size are not as they must be.
    """
    if not isinstance(model, SRNetwork):
        raise ModelError(f"{type(model).__name__} is not a network of sr_models; of a wrapper, pass what it wraps")
    lr_NHWC = as_tensor(lr_NHWC)
    if lr_NHWC.dtype not in _MAX_LEVEL or lr_NHWC.ndim != 4 or lr_NHWC.shape[3] != 3 or 0 in lr_NHWC.shape:
        raise ModelError(
            f"images must be uint8 or uint16 of shape (number, height, width, 3), or one without number, "
            f"not {describe(lr_NHWC)}"
        )
    if tile_px_lr < 1:
        raise ModelError(f"tile_px_lr={tile_px_lr} must be at least 1")
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    # What tensor cores take. A CPU is faster with it too (1.1 to 1.8 times), but adds in another order: 6 of 405,000
    # levels of a small EDSR's image came out one apart, 10⁻⁶ dB, and a score is to be met again to the last digit.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    number, height, width, _ = lr_NHWC.shape
    scale, halo, max_level = model.config.scale, model.receptive_radius_px_lr, _MAX_LEVEL[lr_NHWC.dtype]
    lr_NHWC = lr_NHWC.to(device, non_blocking=True)

    def network(lr_NCHW: Tensor) -> Tensor:
        if before_pass is not None:
            before_pass()
        output_NCHW: Tensor = model(lr_NCHW)
        return output_NCHW

    sr_NHWC = torch.empty((number, scale * height, scale * width, 3), dtype=lr_NHWC.dtype, device=device)
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
        _evaluation_mode(model),
        _exact_convolutions(),
    ):
        for y, top, bottom in windows(height, tile_px_lr, halo):
            for x, left, right in windows(width, tile_px_lr, halo):
                lr_NCHW = lr_NHWC[:, y, x].permute(0, 3, 1, 2).to(dtype, memory_format=layout) / max_level
                sr_NCHW = _mean_over_dihedral(network, lr_NCHW) if self_ensemble else network(lr_NCHW)
                tile_NCHW = sr_NCHW[
                    :,
                    :,
                    scale * (top - y.start) : scale * (bottom - y.start),
                    scale * (left - x.start) : scale * (right - x.start),
                ]
                levels_NCHW = (tile_NCHW * max_level).round_().clamp_(0.0, max_level).to(lr_NHWC.dtype)
                sr_NHWC[:, scale * top : scale * bottom, scale * left : scale * right] = levels_NCHW.permute(0, 2, 3, 1)
    return sr_NHWC


def placed(model: NetworkT, device: torch.device) -> NetworkT:
    """The model on a device, its weights laid out there as upscaling reads them fastest."""
    if device.type == "cuda":  # else each convolution of each tile would turn its weights first
        return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
    return model.to(device)


def as_tensor(image_HWC: ImageHWC) -> Tensor:
    """A tensor as it is; an array as a tensor over the same memory, or over a copy if it is read-only or turned."""
    if isinstance(image_HWC, Tensor):
        return image_HWC
    return torch.from_numpy(np.require(image_HWC, requirements=["C", "W"]))


def is_rgb_uint8(image_HWC: ImageHWC) -> bool:
    """Whether it is uint8 of shape (height, width, 3)."""
    return image_HWC.dtype in (np.uint8, torch.uint8) and image_HWC.ndim == 3 and image_HWC.shape[2] == 3


def describe(image_HWC: ImageHWC) -> str:
    """Dtype and shape, the same for a tensor and an array."""
    return f"{str(image_HWC.dtype).removeprefix('torch.')} {tuple(image_HWC.shape)}"


def windows(size: int, limit: int, halo: int) -> Iterator[tuple[slice, int, int]]:
    """Along one axis: windows to run the network on, and what is kept of each (start, stop); the parts cover `size`.

    As few windows as there must be if what is kept of one without the halo on both sides is at most `limit`. All are of
    one length, so that an image asks for one shape of tile only: cuDNN chooses its algorithms for each shape anew. The
    halo ends at the image's border: there the network pads with zeros, as for a whole image.
    """
    num_windows = max(1, -(-(size - 2 * halo) // limit))
    length = -(-(size + 2 * halo * (num_windows - 1)) // num_windows)
    starts = [(size - length) * i // max(1, num_windows - 1) for i in range(num_windows)]
    cuts = [0, *(start + halo for start in starts[1:]), size]
    for start, first, last in zip(starts, cuts, cuts[1:], strict=False):
        yield slice(start, start + length), first, last


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Of cuDNN: float32 that is float32, where PyTorch's default rounds to TF32's 10 bits, fewer than 16-bit images
    have; who wants speed asks for bfloat16. And no search for the fastest algorithm, which pays for the one shape of a
    training batch: it would try all of them for each convolution on each shape of tile.
    """
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=cudnn.deterministic, allow_tf32=False):
        yield


def _mean_over_dihedral(network: Callable[[Tensor], Tensor], lr_NCHW: Tensor) -> Tensor:
    """Mean of the outputs for the 4 quarter turns of the image and of its mirror image, each turned back."""
    outputs_NCHW = []
    for mirrored in (False, True):
        for quarter_turns in range(4):
            view_NCHW = torch.rot90(lr_NCHW.flip(3) if mirrored else lr_NCHW, quarter_turns, (2, 3))
            output_NCHW = torch.rot90(network(view_NCHW), -quarter_turns, (2, 3))
            outputs_NCHW.append(output_NCHW.flip(3) if mirrored else output_NCHW)
    return torch.stack(outputs_NCHW).mean(dim=0)
