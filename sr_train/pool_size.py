"""How many images the workers hold at once, and the memory that this takes."""

import dataclasses
from bisect import bisect_right
from itertools import islice
from typing import Any

from sr_data.manifest import ImageRecord, Manifest
from sr_data.patch_pool import images_ahead
from sr_data.sampling import SamplePlan, slot_range, worker_samples
from sr_data.window import image_stream
from sr_train.config import TrainConfig
from sr_train.options import ConfigError

GIB = 1024**3


def choose_window(config: TrainConfig[Any], train: Manifest) -> tuple[TrainConfig[Any], SamplePlan]:
    """`config` with `data.window_images` set: the whole dataset, or as many images as `data.pool_gib` can hold.

    ConfigError if it can't hold any.
    """
    num_images = len(train.images)
    window = config.data.window_images
    if window is None:
        budget = config.data.pool_gib * GIB

        def num_bytes(window_images: int) -> int:
            return largest_shard_bytes(
                train, _samples(config, num_images, window_images), config.run.fewest_workers, unit=unit
            )

        unit = config.optim.accumulation_steps

        window = num_images
        if num_bytes(num_images) > budget:
            window = bisect_right(range(1, num_images), budget, key=num_bytes)
        if window == 0:
            raise ConfigError(
                f"--data.pool-gib={config.data.pool_gib:g} is too little for the images of {train.uri}: the smallest "
                f"rolling window takes {num_bytes(1) / GIB:.2g} GiB per worker. Give more, or cut the images into "
                f"tiles (prepare_dataset.py --tile-px)"
            )
    window = min(window, num_images)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, window_images=window))
    return config, _samples(config, num_images, window)


def largest_shard_bytes(train: Manifest, samples: SamplePlan, num_workers: int, *, unit: int = 1) -> int:
    """Bytes of decoded images in the fullest worker's `PatchPool`; `unit` as for `worker_samples`."""
    parts = [
        worker_samples(samples.global_batch_size, rank=rank, num_workers=num_workers, unit=unit)
        for rank in range(num_workers)
    ]
    shards = [slot_range(samples, part.start, len(part)) for part in parts]
    sizes = [_pair_bytes(record, samples.scale) for record in train.images]
    if samples.is_windowed:  # any image can come to any place
        return max((len(slots) + images_ahead(samples, len(slots))) * max(sizes) for slots in shards)
    in_slot = [sizes[image] for _, image in islice(image_stream(samples, 0), samples.window_images)]
    return max(sum(in_slot[slots.start : slots.stop]) for slots in shards)


def largest_validation_bytes(validation: Manifest, num_workers: int) -> int:
    """Bytes of decoded validation images in the fullest worker, which keeps its part of them in host memory."""
    by_name = sorted(validation.images, key=lambda record: record.name)
    sizes = [_pair_bytes(record, validation.scale) for record in by_name]
    return max(sum(sizes[rank::num_workers]) for rank in range(num_workers))


def _pair_bytes(record: ImageRecord, scale: int) -> int:
    hr = record.width * record.height * 3
    return hr + hr // (scale * scale)


def _samples(config: TrainConfig[Any], num_images: int, window_images: int) -> SamplePlan:
    return SamplePlan(
        seed=config.optim.seed,
        global_batch_size=config.optim.global_batch_size,
        scale=config.model.scale,
        patch_px_lr=config.data.patch_px_hr // config.model.scale,
        augment=config.data.augment,
        num_images=num_images,
        window_images=window_images,
        window_reuse_patches=config.data.window_reuse_patches,
    )
