"""(a) The patch pool alone: patches a second by placement, scale and patch size, augmentation included.

    python benchmarks/patch_pool.py [--device cuda] [--json FILE]

Images are random pixels of the sizes of BSDS500 (481 x 321, both ways), so no data is needed. On CUDA "host" keeps them
in host memory and sends rows of patches through pinned memory; batches arrive on the GPU in every row. "window" draws
from half of the images while the other half comes in, one image every 50 patches.
"""

import measuring
import numpy as np
from measuring import Benchmark, Column

from sr_data.pairs import DecodedPair
from sr_data.patch_pool import PatchPool, Placement
from sr_data.sampling import SamplePlan

GLOBAL_BATCH_SIZE = 16
REUSE_PATCHES = 50
CASES = ((4, 96), (2, 96), (3, 144), (4, 192))
"""(scale, HR patch side)"""
VARIANTS: tuple[tuple[Placement, bool], ...] = (("device", False), ("host", False), ("device", True), ("host", True))
"""(placement, whether the window moves)"""


def measure(
    benchmark: Benchmark, scale: int, patch_px_hr: int, placement: Placement, *, windowed: bool, num_images: int
) -> None:
    """One row: the pool's speed in steady state."""
    plan = SamplePlan(
        seed=0,
        global_batch_size=GLOBAL_BATCH_SIZE,
        scale=scale,
        patch_px_lr=patch_px_hr // scale,
        augment=True,
        num_images=num_images,
        window_images=num_images // 2 if windowed else num_images,
        window_reuse_patches=REUSE_PATCHES,
    )
    pairs = random_pairs(scale, num_images)
    pool = PatchPool(
        plan,
        [pair.hr_HWC.shape[:2] for pair in pairs],
        first_sample=0,
        num_samples=GLOBAL_BATCH_SIZE,
        start_step=0,
        device=benchmark.device,
        placement=placement,
    )
    pool.feed(pairs[image] for _, image in pool.needs)
    timing = benchmark.time(pool.batch)
    pool.close()
    benchmark.add(
        placement=placement,
        window="moving" if windowed else "whole",
        scale=scale,
        patch_px_hr=patch_px_hr,
        patches_per_s=GLOBAL_BATCH_SIZE / timing.median_s,
        patches_per_cpu_s=GLOBAL_BATCH_SIZE / max(timing.cpu_s, 1e-9),
        slowest=GLOBAL_BATCH_SIZE / timing.max_s,
        fastest=GLOBAL_BATCH_SIZE / timing.min_s,
        pool_mib=pool.num_bytes / 2**20,
    )


def random_pairs(scale: int, num_images: int) -> list[DecodedPair]:
    """Images whose contents don't matter: what is copied is not looked at."""
    rng = np.random.default_rng(0)
    sides_px_lr = (321 // scale, 481 // scale)
    pairs = []
    for number in range(num_images):
        lr_HWC = rng.integers(0, 256, (*(sides_px_lr if number % 3 else sides_px_lr[::-1]), 3), np.uint8)
        pairs.append(DecodedPair("random", lr_HWC.repeat(scale, 0).repeat(scale, 1), lr_HWC))
    return pairs


def main() -> None:
    """A row for each placement, window, scale and patch size."""
    benchmark = Benchmark("patch_pool", measuring.parser(__doc__).parse_args())
    tiny = benchmark.size == "tiny"
    benchmark.columns(
        Column(key="placement", heading="placement"),
        Column(key="window", heading="window", width=8),
        Column(key="scale", heading="scale", width=6),
        Column(key="patch_px_hr", heading="HR px", width=6),
        Column(key="patches_per_s", heading="patches/s", spec=",.0f"),
        Column(key="slowest", heading="slowest", spec=",.0f"),
        Column(key="fastest", heading="fastest", spec=",.0f"),
        Column(key="patches_per_cpu_s", heading="per CPU s", spec=",.0f"),
    )
    for placement, windowed in VARIANTS:
        for scale, patch_px_hr in CASES[:1] if tiny else CASES:
            measure(benchmark, scale, patch_px_hr, placement, windowed=windowed, num_images=10 if tiny else 100)
    benchmark.finish()


if __name__ == "__main__":
    main()
