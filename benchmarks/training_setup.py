"""A preset's training step, and the feeds that benchmarks put before it."""

import time
from dataclasses import dataclass

import torch
from measuring import Benchmark

from sr_data.batch_feed import Batch, BatchFeed, BatchSource
from sr_data.manifest import Manifest
from sr_data.pairs import load_pair
from sr_data.patch_pool import PatchPool
from sr_data.sampling import SamplePlan
from sr_data.storage import open_store
from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_train.collective import Collective
from sr_train.config import TrainConfig
from sr_train.learner import PixelLearner
from sr_train.step_mode import StepMode, step_mode

LEARNING_RATE = 1e-4


class FixedBatch:
    """The same tensors at every step: a feed that costs nothing."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> Batch:
        """The tensors."""
        del step, micro, num_micro
        return self._batch


class Stepper:
    """A preset's learner, as a worker makes it for this device."""

    def __init__(self, config: TrainConfig[EDSRConfig], benchmark: Benchmark) -> None:
        device = benchmark.device
        self.config, self._benchmark = config, benchmark
        self.mode: StepMode = step_mode(config.step, device_type=device.type, num_workers=1)
        self._learner = PixelLearner(
            build_model(config.model, seed=0),
            config.optim,
            device=device,
            mode=self.mode,
            collective=Collective(),
        )

    def feed(self, source: BatchSource) -> BatchFeed:
        """The source, as the training loop asks it for batches."""
        return BatchFeed(source, num_micro=1, device=self._benchmark.device, ahead=self.mode.batch_ahead)

    def run(self, feed: BatchFeed, num_steps: int) -> "Steps":
        """So many steps, as the training loop takes them, and a report."""
        self._benchmark.synchronize()
        feed.waited_s()
        started_s = time.perf_counter()
        for step in range(num_steps):
            self._learner.step(feed.take(step), learning_rate=LEARNING_RATE)
            if step + 1 < num_steps:
                feed.prepare(step + 1)
        self._learner.report()
        self._benchmark.synchronize()
        return Steps(num_steps=num_steps, elapsed_s=time.perf_counter() - started_s, waited_s=feed.waited_s())

    def steps_per_round(self, feed: BatchFeed) -> int:
        """As many as fill a round; finding out is the warm-up: compilation, graph capture, the choice of kernels."""
        self.run(feed, 5)
        num_steps = 1
        while (steps := self.run(feed, num_steps)).elapsed_s < self._benchmark.seconds:
            fitting = int(1.1 * num_steps * self._benchmark.seconds / steps.elapsed_s)
            num_steps = max(num_steps + 1, min(8 * num_steps, fitting))
        return num_steps


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What some steps took."""

    num_steps: int
    elapsed_s: float
    waited_s: float
    """Of them, waiting for data, see `BatchFeed.waited_s`."""

    @property
    def step_s(self) -> float:
        """Seconds of one step."""
        return self.elapsed_s / self.num_steps

    @property
    def wait_share(self) -> float:
        """Share of the time spent waiting for data."""
        return self.waited_s / self.elapsed_s


def filled_pool(manifest: Manifest, config: TrainConfig[EDSRConfig], device: torch.device) -> PatchPool:
    """A pool that holds the whole dataset, or will soon: its first batch waits for its own images only."""
    scale, batch_size = config.model.scale, config.optim.global_batch_size
    plan = SamplePlan(
        seed=0,
        global_batch_size=batch_size,
        scale=scale,
        patch_px_lr=config.data.patch_px_hr // scale,
        augment=True,
        num_images=len(manifest.images),
        window_images=len(manifest.images),
        window_reuse_patches=1,
    )
    sizes = [(record.height, record.width) for record in manifest.images]
    pool = PatchPool(plan, sizes, first_sample=0, num_samples=batch_size, start_step=0, device=device)
    store, images = open_store(manifest.uri), manifest.images
    pool.feed([load_pair(store, images[image], scale) for _, image in pool.needs])
    return pool


def random_batch(config: TrainConfig[EDSRConfig], device: torch.device) -> Batch:
    """Random pixels on the device, laid out as the patch pool lays them out."""
    generator, scale = torch.Generator(device).manual_seed(0), config.model.scale
    side_px_lr, num_patches = config.data.patch_px_hr // scale, config.optim.global_batch_size

    def pixels(side_px: int) -> torch.Tensor:
        made = torch.rand(num_patches, 3, side_px, side_px, generator=generator, device=device)
        return made.contiguous(memory_format=torch.channels_last)

    return pixels(side_px_lr), pixels(side_px_lr * scale)
