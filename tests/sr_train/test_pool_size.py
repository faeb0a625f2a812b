"""How many images workers hold, against the buffers that they then really make."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sr_data.manifest import ImageRecord, Manifest
from sr_data.patch_pool import PatchPool
from sr_models.edsr import EDSRConfig
from sr_train.config import TrainConfig
from sr_train.options import ConfigError, DataConfig, OptimConfig, RunConfig
from sr_train.pool_size import GIB, choose_window, largest_shard_bytes, largest_validation_bytes

SCALE, PATCH_PX = 2, 16


def manifest(*sizes: tuple[int, int]) -> Manifest:
    images = tuple(
        ImageRecord(
            name=f"{index:04d}",
            hr_key=f"{index:04d}.png",
            lr_key=None,
            width=width,
            height=height,
            mode="RGB",
            hr_sha256=str(index),
            lr_sha256=None,
            num_bytes=1,
        )
        for index, (width, height) in enumerate(sizes)
    )
    return Manifest(uri="/photos", layout="folder", split="train", scale=SCALE, images=images)


RNG = np.random.default_rng(0)
PHOTOS = manifest(*(tuple(2 * RNG.integers(10, 60, 2)) for _ in range(40)))


def config(*, num_workers: int = 1, batch: int = 16, **data: object) -> TrainConfig[EDSRConfig]:
    return TrainConfig(
        model=EDSRConfig(scale=SCALE),
        data=DataConfig(patch_px_hr=PATCH_PX, **data),  # type: ignore[arg-type]
        optim=OptimConfig(global_batch_size=batch),
        run=RunConfig(num_workers=num_workers),
    )


def pool_bytes(chosen: TrainConfig[EDSRConfig], train: Manifest) -> list[int]:
    """What each worker's pool takes."""
    config, samples = choose_window(chosen, train)
    batch = samples.global_batch_size // config.run.num_workers
    return [
        PatchPool(
            samples,
            [(record.height, record.width) for record in train.images],
            first_sample=rank * batch,
            num_samples=batch,
            start_step=0,
            device=torch.device("cpu"),
        ).num_bytes
        for rank in range(config.run.num_workers)
    ]


@pytest.mark.parametrize("num_workers", [1, 2, 8])
@pytest.mark.parametrize("data", [{}, {"window_images": 9}, {"window_images": 9, "window_reuse_patches": 4}])
def test_the_bytes_are_those_of_the_pools(num_workers: int, data: dict[str, int]) -> None:
    chosen = config(num_workers=num_workers, **data)
    samples = choose_window(chosen, PHOTOS)[1]
    assert largest_shard_bytes(PHOTOS, samples, num_workers) == max(pool_bytes(chosen, PHOTOS))


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_the_window_is_the_largest_that_fits(num_workers: int) -> None:
    whole = max(pool_bytes(config(num_workers=num_workers), PHOTOS))
    fits, samples = choose_window(config(num_workers=num_workers, pool_gib=whole / GIB), PHOTOS)
    assert fits.data.window_images == samples.window_images == 40 and not samples.is_windowed
    budget = whole * 0.9
    windowed = choose_window(config(num_workers=num_workers, pool_gib=budget / GIB), PHOTOS)[0]
    window = windowed.data.window_images
    assert window is not None and 0 < window < 40
    one_more = config(num_workers=num_workers, window_images=window + 1)
    assert max(pool_bytes(windowed, PHOTOS)) <= budget < max(pool_bytes(one_more, PHOTOS))


def test_a_window_that_is_given_is_kept_up_to_the_whole_dataset() -> None:
    assert choose_window(config(window_images=7, pool_gib=1e-9), PHOTOS)[1].window_images == 7
    assert choose_window(config(window_images=70), PHOTOS)[1].window_images == 40


def test_a_budget_below_one_image_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--data.pool-gib=1e-06 .* /photos.* GiB per worker.*--tile-px"):
        choose_window(config(pool_gib=1e-6), PHOTOS)


def test_workers_may_be_more_than_images() -> None:
    two = manifest((32, 32), (32, 32))
    assert pool_bytes(config(num_workers=8), two) == [32 * 32 * 3 * 5 // 4] * 8


def test_validation_images_are_shared_out() -> None:
    sizes = manifest((20, 20), (40, 40), (20, 20), (60, 60))
    pixels = [400, 1600, 400, 3600]
    assert largest_validation_bytes(sizes, 1) == sum(pixels) * 15 // 4
    assert largest_validation_bytes(sizes, 2) == (1600 + 3600) * 15 // 4
    assert largest_validation_bytes(sizes, 8) == 3600 * 15 // 4
