"""The patch pool alone: patches a second by placement, scale and patch size, augmentation included.

python benchmarks/patch_pool.py [--json FILE] [--device cuda]

Images are random pixels of the sizes of BSDS500 (481 x 321, both ways), so no data is needed. "window" draws from
half of the images while the other half comes in, one image every 50 patches.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from sr_data.pairs import DecodedPair
from sr_data.patch_pool import PatchPool, Placement
from sr_data.sampling import SamplePlan

NUM_IMAGES = 100
GLOBAL_BATCH_SIZE = 16
CASES = ((4, 96), (2, 96), (3, 144), (4, 192))
"""(scale, HR patch side)"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table."""

    device: str
    num_threads: int
    placement: str
    scale: int
    patch_px_hr: int
    patches_per_s: float
    patches_per_cpu_s: float
    """By the process's CPU time: says the same on a machine that others use too (with --num-threads 1)."""


def per_second(work: Callable[[int], object], *, seconds: float, device: torch.device) -> tuple[float, float]:
    """Calls of `work(step)` a second and a CPU second, after a warm-up."""
    for step in range(20):
        work(step)
    synchronize(device)
    started_s, cpu_started_s, step = time.perf_counter(), time.process_time(), 20
    while time.perf_counter() - started_s < seconds:
        for _ in range(10):
            work(step)
            step += 1
    synchronize(device)
    num_calls = step - 20
    return num_calls / (time.perf_counter() - started_s), num_calls / (time.process_time() - cpu_started_s)


def synchronize(device: torch.device) -> None:
    """Waits for what is queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    scale: int, patch_px_hr: int, placement: Placement, *, windowed: bool, device: torch.device, seconds: float
) -> Result:
    """The pool's speed in steady state; a moving window gives way to a new image every 50 patches."""
    plan = SamplePlan(
        seed=0,
        global_batch_size=GLOBAL_BATCH_SIZE,
        scale=scale,
        patch_px_lr=patch_px_hr // scale,
        augment=True,
        num_images=NUM_IMAGES,
        window_images=NUM_IMAGES // 2 if windowed else NUM_IMAGES,
        window_reuse_patches=50,
    )
    rng = np.random.default_rng(0)
    sides_px_lr = (321 // scale, 481 // scale)
    shapes = [sides_px_lr if number % 3 else sides_px_lr[::-1] for number in range(NUM_IMAGES)]
    pairs = []
    for height, width in shapes:
        lr = rng.integers(0, 256, (height, width, 3), np.uint8)
        pairs.append(DecodedPair("random", np.ascontiguousarray(lr.repeat(scale, 0).repeat(scale, 1)), lr))
    pool = PatchPool(
        plan,
        [pair.hr_HWC.shape[:2] for pair in pairs],
        first_sample=0,
        num_samples=GLOBAL_BATCH_SIZE,
        start_step=0,
        device=device,
        placement=placement,
    )
    pool.feed(pairs[image] for _, image in pool.needs)
    rate, cpu_rate = per_second(pool.batch, seconds=seconds, device=device)
    pool.close()
    return Result(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        num_threads=torch.get_num_threads(),
        placement=placement + (", window" if windowed else ""),
        scale=scale,
        patch_px_hr=patch_px_hr,
        patches_per_s=round(rate * GLOBAL_BATCH_SIZE),
        patches_per_cpu_s=round(cpu_rate * GLOBAL_BATCH_SIZE),
    )


def main() -> None:
    """Prints the table; writes it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-threads", type=int, default=os.cpu_count(), help="PyTorch's threads on the host")
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time of each row")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    device = torch.device(arguments.device)

    print(f"{device.type}, {torch.get_num_threads()} threads, batch {GLOBAL_BATCH_SIZE}")
    print(f"{'placement':16} {'scale':>5} {'HR patch':>8} {'patches/s':>12} {'per CPU s':>12}")
    results = []
    variants: tuple[tuple[Placement, bool], ...] = (
        ("device", False),
        ("host", False),
        ("device", True),
        ("host", True),
    )
    for placement, windowed in variants:
        for scale, patch_px_hr in CASES:
            result = measure(scale, patch_px_hr, placement, windowed=windowed, device=device, seconds=arguments.seconds)
            results.append(result)
            print(
                f"{result.placement:16} {scale:5} {patch_px_hr:8} {result.patches_per_s:12,.0f} "
                f"{result.patches_per_cpu_s:12,.0f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
