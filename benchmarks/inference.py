"""(e) Inference: megapixels a second that EDSR's baseline x4 puts out, in tiles and whole.

    python benchmarks/inference.py [--device cuda] [--json FILE]

An image of random pixels goes through `upscale_image`, from an array on the host to an array on the host: 2040×1356
put out at full size, 512×340 at the small one. FLOPs are those of the image without the tiles' borders, so what borders
cost shows in the shares.
"""

import measuring
import numpy as np
import torch
from machine import precisions
from measuring import Benchmark, Column

from sr_models.architectures import build_model, macs_per_lr_pixel
from sr_models.edsr import EDSRConfig
from sr_models.inference import placed, upscale_image

MODELS = {"tiny": EDSRConfig(scale=4, num_blocks=1, num_channels=8), "small": EDSRConfig(), "full": EDSRConfig()}
SIZES_LR = {"tiny": (17, 24), "small": (85, 128), "full": (339, 510)}
"""(height, width)"""
TILES_PX_LR = {"tiny": (8,), "small": (48,), "full": (96, 192)}


def measure(benchmark: Benchmark, precision: str, model: torch.nn.Module, tiles_px_lr: tuple[int, ...]) -> None:
    """The rows of one precision: in tiles, and whole."""
    config = MODELS[benchmark.size]
    height, width = SIZES_LR[benchmark.size]
    lr_HWC = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    flops = 2 * macs_per_lr_pixel(config) * height * width
    sr_mpx = height * width * config.scale**2 / 1e6
    autocast = torch.bfloat16 if precision == "bf16" else None
    for tile_px_lr in (*tiles_px_lr, max(height, width)):

        def upscale(_: int, tile_px_lr: int = tile_px_lr) -> None:
            upscale_image(model, lr_HWC, tile_px_lr=tile_px_lr, autocast=autocast)

        if benchmark.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(benchmark.device)
        timing = benchmark.time(upscale)
        is_whole = tile_px_lr >= max(height, width)
        benchmark.add(
            precision=precision,
            tile="whole" if is_whole else f"{tile_px_lr} px",
            tile_px_lr=None if is_whole else tile_px_lr,
            output=f"{width * config.scale}×{height * config.scale}",
            seconds=timing.median_s,
            mpx_per_s=sr_mpx / timing.median_s,
            slowest=sr_mpx / timing.max_s,
            fastest=sr_mpx / timing.min_s,
            peak_gib=torch.cuda.max_memory_allocated(benchmark.device) / 2**30
            if benchmark.device.type == "cuda"
            else None,
            **benchmark.shares(flops / timing.median_s, precision, training=False),
        )


def main() -> None:
    """float32, and bf16 where the device has it."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--tiles-px-lr", nargs="+", type=int, help="sides of the tiles, without their borders")
    arguments = parser.parse_args()
    benchmark = Benchmark("inference", arguments)
    config = MODELS[benchmark.size]
    model = placed(build_model(config, seed=0), benchmark.device).eval()
    supported = precisions(benchmark.device)
    for precision in supported:
        benchmark.measure_ceilings(precision, images=16, side_px=48, channels=config.num_channels)
    benchmark.columns(
        Column(key="precision", heading="precision"),
        Column(key="tile", heading="tile", width=8),
        Column(key="output", heading="output"),
        Column(key="seconds", heading="s", spec=".4f"),
        Column(key="mpx_per_s", heading="Mpx/s", spec=",.3f"),
        Column(key="slowest", heading="slowest", spec=",.3f"),
        Column(key="fastest", heading="fastest", spec=",.3f"),
        Column(key="peak_gib", heading="GiB", spec=".2f", width=6),
        *measuring.SHARES,
    )
    for precision in supported:
        measure(benchmark, precision, model, tuple(arguments.tiles_px_lr or TILES_PX_LR[benchmark.size]))
    benchmark.finish()


if __name__ == "__main__":
    main()
