"""(f) The same training step fed as BasicSR feeds it, and from the patch pool, in one run.

    python benchmarks/basicsr_feed.py [--num-workers 6 16] [--device cuda] [--json FILE]

BasicSR's feed is written here as a baseline after its sources (XPixelGroup/BasicSR, in basicsr/data:
paired_image_dataset.py, transforms.py, __init__.py, data_sampler.py; options/train/EDSR/train_EDSR_Mx4.yml): PNG
sub-images of 480 px (extract_subimages.py, compression level 3); for each patch both files are read, decoded and
converted to float whole, then cropped, flipped and turned; a DataLoader with 6 processes makes batches of 16 in memory
that is not pinned, and feed_data copies them to the device. Its deviations:
- Pillow decodes instead of OpenCV, to RGB, so no channels are swapped. OpenCV took 4.1 ms for such a tile of DIV2K,
  Pillow takes 4.0 ms for one of the tiles made here (see synthetic_data.py): the cost is the same.
- Epochs never end. BasicSR starts its processes anew after each (of 100 times the dataset, `dataset_enlarge_ratio`).

Both feeds draw from the same files, which the operating system holds in memory; the pool has decoded them before the
clock starts, once in a run. Columns: patches/s of the feed alone, and per second of CPU time; with the step, the share
of that time spent waiting for the feed, and the rate as a share of the same step's on one fixed batch; how many times
as fast the pool is.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import measuring
import numpy as np
import torch
from machine import cpu_s, num_cpus
from measuring import Benchmark, Column
from numpy.typing import NDArray
from PIL import Image
from synthetic_data import write_photos
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from training_setup import FixedBatch, Stepper, filled_pool

from sr_data.batch_feed import Batch, BatchFeed
from sr_data.manifest import Manifest, load_manifest
from sr_data.patch_pool import PatchPool
from sr_models.edsr import EDSRConfig
from sr_train.config import TrainConfig
from sr_train.presets import EDSR_PRESETS

PRESETS = {
    "tiny": ("edsr-small-x2",),
    "small": ("edsr-small-x2", "edsr-baseline-x4"),
    "full": ("edsr-baseline-x4",),
}
TILES = {"tiny": (8, 96), "small": (64, 480), "full": (256, 480)}
"""How many sub-images of which side."""
NUM_WORKERS = 6  # num_worker_per_gpu of BasicSR's options
_COMPRESS_LEVEL = 3  # of its extract_subimages.py


class PairedImages(Dataset[dict[str, Tensor]]):
    """BasicSR's PairedImageDataset."""

    def __init__(self, folder: Path, *, scale: int, patch_px_hr: int) -> None:
        self._scale, self._patch_px_hr = scale, patch_px_hr
        lr_folder = folder / "LR_bicubic" / f"X{scale}"
        self._paths = [(path, lr_folder / f"{path.stem}x{scale}.png") for path in sorted((folder / "HR").iterdir())]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        hr_path, lr_path = self._paths[index]
        hr_HWC, lr_HWC = _image_from(hr_path.read_bytes()), _image_from(lr_path.read_bytes())
        hr_HWC, lr_HWC = self._crop(hr_HWC, lr_HWC)
        hr_HWC, lr_HWC = _augment(hr_HWC, lr_HWC)
        return {"lq": _to_tensor(lr_HWC), "gt": _to_tensor(hr_HWC)}

    def _crop(
        self, hr_HWC: NDArray[np.float32], lr_HWC: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """paired_random_crop"""
        scale, patch_px_hr, patch_px_lr = self._scale, self._patch_px_hr, self._patch_px_hr // self._scale
        top = random.randint(0, lr_HWC.shape[0] - patch_px_lr)
        left = random.randint(0, lr_HWC.shape[1] - patch_px_lr)
        lr_HWC = lr_HWC[top : top + patch_px_lr, left : left + patch_px_lr]
        return hr_HWC[scale * top :, scale * left :][:patch_px_hr, :patch_px_hr], lr_HWC


def _image_from(data: bytes) -> NDArray[np.float32]:
    """imfrombytes"""
    return np.asarray(Image.open(BytesIO(data)).convert("RGB")).astype(np.float32) / 255.0


def _augment(*images_HWC: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """augment"""
    flip, turn_over, transpose = (random.random() < 0.5 for _ in range(3))
    augmented = []
    for image_HWC in images_HWC:
        image_HWC = image_HWC[:, ::-1] if flip else image_HWC
        image_HWC = image_HWC[::-1] if turn_over else image_HWC
        augmented.append(image_HWC.transpose(1, 0, 2) if transpose else image_HWC)
    return augmented


def _to_tensor(image_HWC: NDArray[np.float32]) -> Tensor:
    """img2tensor; the copy is what its change from BGR to RGB makes"""
    return torch.from_numpy(np.ascontiguousarray(image_HWC).transpose(2, 0, 1)).float()


class EndlessShuffle(Sampler[int]):
    """BasicSR's EnlargedSampler, without an end."""

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield from torch.randperm(self._num_images, generator=generator).tolist()


class BasicSRFeed:
    """The DataLoader and feed_data, as a source of batches."""

    def __init__(self, images: PairedImages, *, batch_size: int, num_workers: int, device: torch.device) -> None:
        self._device = device
        loader = DataLoader(
            images,
            batch_size=batch_size,
            sampler=EndlessShuffle(len(images)),
            num_workers=num_workers,
            drop_last=True,
            pin_memory=False,
        )
        self._num_ahead = num_workers * (loader.prefetch_factor or 0)
        self._batches = iter(loader)

    def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> Batch:
        """The next one, whatever the step."""
        del step, micro, num_micro
        batch = next(self._batches)
        return batch["lq"].to(self._device), batch["gt"].to(self._device)

    def forget_what_was_loaded_meanwhile(self) -> None:
        """Before a timing: its processes fill their queues while something else is timed."""
        for _ in range(self._num_ahead + 1):
            next(self._batches)


def measure(benchmark: Benchmark, folder: Path, preset: str, workers: Sequence[int]) -> None:
    """The rows of one preset."""
    config = EDSR_PRESETS[preset]
    batch_size, patch_px_hr = config.optim.global_batch_size, config.data.patch_px_hr
    stepper = Stepper(config, benchmark)
    manifest = load_manifest(str(folder), split="train", scale=config.model.scale)
    pool, decoded_s = _decoded(manifest, config, benchmark.device)
    print(f"\n{preset}: {batch_size} patches of {patch_px_hr} px from {len(manifest.images)} images, {stepper.mode}")
    print(f"the pool's images were decoded in {decoded_s:.1f} s")
    images = PairedImages(folder, scale=config.model.scale, patch_px_hr=patch_px_hr)
    sources = {
        f"BasicSR, {number} workers": BasicSRFeed(
            images, batch_size=batch_size, num_workers=number, device=benchmark.device
        )
        for number in workers
    }
    fixed = stepper.feed(FixedBatch(pool.batch(0)))
    feeds = {name: BatchFeed(source, num_micro=1, device=benchmark.device, ahead=False)
             for name, source in sources.items()} | {"patch pool": stepper.feed(pool)}  # fmt: skip
    num_steps = stepper.steps_per_round(fixed)
    timings = {}
    for name, source in sources.items():
        timings[name] = benchmark.time(
            source.batch, cpu_clock=cpu_s, before_round=source.forget_what_was_loaded_meanwhile
        )
    timings["patch pool"] = benchmark.time(pool.batch)
    rounds = []
    for _ in range(benchmark.rounds):
        steps = {"fixed": stepper.run(fixed, num_steps)}
        for name, feed in feeds.items():
            if name in sources:
                sources[name].forget_what_was_loaded_meanwhile()
            steps[name] = stepper.run(feed, num_steps)
        rounds.append(steps)
    pool.close()

    benchmark.columns(
        Column(key="feed", heading="feed", width=20),
        Column(key="alone_patches_per_s", heading="alone", spec=",.0f"),
        Column(key="alone_patches_per_core_s", heading="per core", spec=",.0f"),
        Column(key="patches_per_s", heading="with step", spec=",.1f"),
        Column(key="wait_share", heading="waits", spec=".1%", width=7),
        Column(key="of_fixed_batch", heading="of fixed", spec=".1%", width=9),
        Column(key="pool_is_times_alone", heading="pool/this: alone", spec=".2f", width=17),
        Column(key="pool_is_times", heading="with step", spec=".3f"),
    )
    for name in rounds[0]:
        alone = timings.get(name)
        benchmark.add(
            preset=preset,
            feed="one fixed batch" if name == "fixed" else name,
            mode=str(stepper.mode),
            patches_per_s=batch_size / statistics.median(steps[name].step_s for steps in rounds),
            wait_share=statistics.median(steps[name].wait_share for steps in rounds),
            of_fixed_batch=statistics.median(steps["fixed"].step_s / steps[name].step_s for steps in rounds),
            pool_is_times=statistics.median(steps[name].step_s / steps["patch pool"].step_s for steps in rounds),
            alone_patches_per_s=alone and batch_size / alone.median_s,
            alone_patches_per_core_s=alone and alone.cpu_s and batch_size / alone.cpu_s,
            pool_is_times_alone=alone and alone.median_s / timings["patch pool"].median_s,
            decoded_s=decoded_s if name == "patch pool" else None,
        )


def _decoded(manifest: Manifest, config: TrainConfig[EDSRConfig], device: torch.device) -> tuple[PatchPool, float]:
    """A pool with all of the images in, and how long that took in one thread."""
    started_s = time.perf_counter()
    pool = filled_pool(manifest, config, device)
    for step in range(20):  # draws that have seen about every image
        pool.batch(step)
    return pool, time.perf_counter() - started_s


def main() -> None:
    """Makes the images and measures each preset."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--presets", nargs="+", choices=tuple(EDSR_PRESETS), help="whose network, batch and patch size")
    how_many = "processes of the DataLoader; when not given, BasicSR's 6 (if there are CPUs), and one for each CPU"
    parser.add_argument("--num-workers", nargs="+", type=int, help=how_many)
    arguments = parser.parse_args()
    benchmark = Benchmark("basicsr_feed", arguments)
    workers = arguments.num_workers or sorted({min(NUM_WORKERS, num_cpus()), num_cpus()})
    presets = arguments.presets or PRESETS[benchmark.size]
    num_images, side_px = TILES[benchmark.size]
    with tempfile.TemporaryDirectory(prefix="sr-benchmark-") as temporary:
        write_photos(
            Path(temporary) / "tiles",
            num_images=num_images,
            height=side_px,
            width=side_px,
            scales=tuple(sorted({EDSR_PRESETS[preset].model.scale for preset in presets})),
            compress_level=_COMPRESS_LEVEL,
        )
        for preset in presets:
            measure(benchmark, Path(temporary) / "tiles", preset, workers)
    benchmark.finish()


if __name__ == "__main__":
    main()
