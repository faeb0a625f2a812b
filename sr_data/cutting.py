"""Where a batch's patches lie in a flat buffer of pixels, and the gather that fetches them.

A patch is an origin, a row stride and a column stride. Any of the 8 flips and quarter turns is another origin with
swapped or negative strides, so augmentation costs nothing, and LR and HR, made from the same draws, can't fall out of
step.
"""

import numpy as np
import torch

from sr_data.sampling import Draws, Int64Array, SamplePlan, patch_origins


def patch_geometry(
    plan: SamplePlan, draws: Draws, places_px_lr: Int64Array, heights_px_lr: Int64Array, widths_px_lr: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """For LR and for HR: (3, n) of (first pixel, row stride, column stride), in pixels of the flat buffer."""
    y, x = patch_origins(draws, heights_px_lr=heights_px_lr, widths_px_lr=widths_px_lr, patch_px_lr=plan.patch_px_lr)
    transposed, rows_reversed, columns_reversed = draws.transforms & 1, draws.transforms >> 1 & 1, draws.transforms >> 2
    levels = []
    for scale, patch_px in ((1, plan.patch_px_lr), (plan.scale, plan.patch_px_hr)):
        width = widths_px_lr * scale
        first = places_px_lr * scale**2 + y * scale * width + x * scale
        first += (patch_px - 1) * (rows_reversed * width + columns_reversed)
        down, right = width * (1 - 2 * rows_reversed), 1 - 2 * columns_reversed
        rows, columns = np.where(transposed, right, down), np.where(transposed, down, right)
        levels.append(np.stack([first, rows, columns]))
    return levels[0], levels[1]


def pack_rows(geometry: Int64Array, patch_px: int) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Splits a geometry in two: the rows to gather as they lie, and the same patches within the gathered rows.

    Returns the latter (3, n), and (n,) top left pixels and (n,) distances of the rows to gather.
    """
    first, rows, columns = geometry
    is_transposed = np.abs(rows) == 1
    down, right = np.where(is_transposed, columns, rows), np.where(is_transposed, rows, columns)
    top_left = first + (patch_px - 1) * (np.minimum(down, 0) + np.minimum(right, 0))
    packed_first = np.arange(first.size) * patch_px**2 + (patch_px - 1) * (patch_px * (down < 0) + (right < 0))
    packed_down = np.sign(down) * patch_px
    packed = np.stack(
        [packed_first, np.where(is_transposed, right, packed_down), np.where(is_transposed, packed_down, right)]
    )
    return packed, top_left, np.abs(down)


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device`; to a GPU without waiting for it."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)  # the pinned block is kept until the copy is done


def cut(pixels: torch.Tensor, geometry: torch.Tensor, patch_px: int) -> torch.Tensor:
    """Gathers patches from `pixels`, (num_px, 3) uint8, into (n, 3, patch_px, patch_px) float32 in [0, 1],
    channels_last.

    Whole pixels by `index_select`, in memory order, were twice as fast on a CPU as one index per byte or as flips and
    transposes under `torch.where` (benchmarks/patch_pool.py); channels_last falls out of it.
    """
    first, rows, columns = geometry[:, :, None, None]
    offsets = torch.arange(patch_px, device=geometry.device)
    index = first + rows * offsets[:, None] + columns * offsets
    patches = pixels.index_select(0, index.view(-1)).view(-1, patch_px, patch_px, 3)
    return patches.to(torch.float32).div_(255).permute(0, 3, 1, 2)
