"""What the pipeline costs around the network: the training loop fed by the patch pool, against the same loop on one
fixed batch.

    python benchmarks/pipeline_overhead.py [--json FILE]

Both are timed in turn in one process, so that a machine whose speed drifts slows both; the ratio's median is the
result. The images are the built-in photos, decoded before the clock starts, as they are in a run once its shard is in.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import tyro

from sr_data.manifest import load_manifest
from sr_data.pairs import load_pair
from sr_data.patch_pool import PatchPool
from sr_data.sampling import SamplePlan
from sr_data.storage import open_store
from sr_models.architectures import build_model
from sr_train.collective import Collective
from sr_train.learner import PixelLearner
from sr_train.loop import BatchSource
from sr_train.presets import EDSR_PRESETS


class _FixedBatch:
    """The same tensors at every step: a feed that costs nothing."""

    def __init__(self, batch: tuple[torch.Tensor, torch.Tensor]):
        self._batch = batch

    def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        del step, micro, num_micro
        return self._batch


def main(
    preset: str = "edsr-small-x2",
    steps: int = 40,
    rounds: int = 9,
    threads: int = 2,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Time both feeds.

    Args:
        preset: whose network, batch and patch size.
        steps: optimiser steps of one timing.
        rounds: timings of each feed.
        threads: PyTorch threads.
        json_file: where to write the figures as JSON.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = EDSR_PRESETS[preset]
    learner = PixelLearner(
        build_model(config.model, seed=0),
        config.optim,
        device=device,
        precision="bf16" if device.type == "cuda" else "float32",
        collective=Collective(),
    )
    pool = _pool(config.model.scale, config.data.patch_px_hr, config.optim.global_batch_size, device)
    fixed = _FixedBatch(pool.batch(0))
    _patches_per_s(learner, pool, steps, config.optim.global_batch_size, device)  # warm-up
    rates = [
        tuple(_patches_per_s(learner, feed, steps, config.optim.global_batch_size, device) for feed in (pool, fixed))
        for _ in range(rounds)
    ]
    ratios = [piped / alone for piped, alone in rates]
    result = {
        "preset": preset,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads} threads",
        "pipeline_patches_per_s": statistics.median(piped for piped, _ in rates),
        "fixed_batch_patches_per_s": statistics.median(alone for _, alone in rates),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    for name, value in result.items():
        print(f"{name:<28}{value if isinstance(value, str) else format(value, ',.4g')}")
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    pool.close()


def _pool(scale: int, patch_px_hr: int, batch: int, device: torch.device) -> PatchPool:
    manifest = load_manifest("builtin://photos", split="train", scale=scale, min_side_px_hr=patch_px_hr)
    num_images, store = len(manifest.images), open_store(manifest.uri)
    plan = SamplePlan(
        seed=0,
        global_batch_size=batch,
        scale=scale,
        patch_px_lr=patch_px_hr // scale,
        augment=True,
        num_images=num_images,
        window_images=num_images,
        window_reuse_patches=1,
    )
    sizes = [(record.height, record.width) for record in manifest.images]
    pool = PatchPool(plan, sizes, first_sample=0, num_samples=batch, start_step=0, device=device)
    pool.feed([load_pair(store, manifest.images[image], scale) for _, image in pool.needs])
    return pool


def _patches_per_s(learner: PixelLearner, source: BatchSource, steps: int, batch: int, device: torch.device) -> float:
    started_s = time.perf_counter()
    for step in range(steps):
        learner.step([source.batch(step)], learning_rate=1e-4)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return steps * batch / (time.perf_counter() - started_s)


if __name__ == "__main__":
    tyro.cli(main)
