"""Which patch is sample `i` of step `s`: a pure function of the plan, the same on every machine and for any number of
workers.

Every draw is a 64-bit hash of `(seed, step, sample, field)` and is mapped to its range by integers only, so no
rounding, library version or device can change a sample. It runs on the host, in NumPy, over all samples of a batch at
once: for a batch of 16 that is about 25 µs, less than launching the same arithmetic kernel by kernel on a GPU, and
its result is a few numbers per patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sr_data.errors import DataError

Int64Array = NDArray[np.int64]
UInt64Array = NDArray[np.uint64]

MAX_SAMPLE_SLOTS = 2**31
"""Limit of `global_batch_size · window_images`: the image of a sample is found by a product below 2^63 (see
`draw_slots`).
"""

# splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with Stafford's mix 13.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_30, _SHIFT_27, _SHIFT_31, _SHIFT_32 = (np.uint64(shift) for shift in (30, 27, 31, 32))

_FIELD_IMAGE, _FIELD_Y, _FIELD_X, _FIELD_TRANSFORM, _NUM_FIELDS = range(5)
NUM_TRANSFORMS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePlan:
    """Everything that decides samples, and nothing that depends on the workers."""

    seed: int
    """Any integer in [0, 2^63): other seeds give other orders and other patches."""
    global_batch_size: int
    """Samples per optimiser step, over all workers and micro-batches."""
    scale: int
    """Upscaling factor: HR position and patch are `scale` times those of LR."""
    patch_px_lr: int
    """Side of an LR patch."""
    augment: bool
    """Draw one of the 8 flips and quarter turns for each patch; off: every patch as it lies in the image."""
    num_images: int
    """Images of the dataset."""
    window_images: int
    """Images held at a time by all workers together; `num_images`: the whole dataset."""
    window_reuse_patches: int
    """Patches drawn before the window moves on by one image; without meaning when it holds the whole dataset."""

    def __post_init__(self) -> None:
        for name in (
            "global_batch_size", "scale", "patch_px_lr", "num_images", "window_images", "window_reuse_patches"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise DataError(f"seed={self.seed} must be in [0, 2^63)")
        if self.window_images > self.num_images:
            raise DataError(
                f"window_images={self.window_images} is more than the num_images={self.num_images} there are"
            )
        if self.global_batch_size * self.window_images > MAX_SAMPLE_SLOTS:
            raise DataError(
                f"global_batch_size={self.global_batch_size} times window_images={self.window_images} is above the "
                f"limit of {MAX_SAMPLE_SLOTS}; use at most {MAX_SAMPLE_SLOTS // self.global_batch_size} images "
                "(--data.window-images)"
            )

    @property
    def patch_px_hr(self) -> int:
        """Side of an HR patch."""
        return self.patch_px_lr * self.scale

    @property
    def is_windowed(self) -> bool:
        """Whether the workers hold only a part of the dataset at a time."""
        return self.window_images < self.num_images


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """The draws of `n` consecutive samples of one step."""

    slots: Int64Array
    """(n,) in [0, window_images): which image of the window."""
    y: UInt64Array
    """(n,) in [0, 2^32): vertical position as a fraction of 2^32."""
    x: UInt64Array
    """(n,) in [0, 2^32): horizontal position as a fraction of 2^32."""
    transforms: Int64Array
    """(n,) in [0, 8): bit 0 transposes the patch; before that, bit 1 reverses its rows and bit 2 its columns."""


def draw_samples(plan: SamplePlan, step: int, first_sample: int, num_samples: int) -> Draws:
    """Draw samples `[first_sample, first_sample + num_samples)` of the global batch of `step`."""
    hashes = _hash(plan.seed, [step], first_sample, num_samples, range(_NUM_FIELDS))[0]
    if plan.augment:
        transforms = (hashes[_FIELD_TRANSFORM] >> np.uint64(61)).astype(np.int64)
    else:
        transforms = np.zeros(num_samples, np.int64)
    return Draws(
        slots=_slots(plan, hashes[_FIELD_IMAGE], first_sample),
        y=hashes[_FIELD_Y] >> _SHIFT_32,
        x=hashes[_FIELD_X] >> _SHIFT_32,
        transforms=transforms,
    )


def draw_slots(plan: SamplePlan, steps: Sequence[int], first_sample: int, num_samples: int) -> Int64Array:
    """The slots of samples `[first_sample, first_sample + num_samples)` of several steps: (len(steps), num_samples)."""
    return _slots(plan, _hash(plan.seed, steps, first_sample, num_samples, [_FIELD_IMAGE])[:, 0], first_sample)


def patch_origins(
    draws: Draws, *, heights_px_lr: Int64Array, widths_px_lr: Int64Array, patch_px_lr: int
) -> tuple[Int64Array, Int64Array]:
    """Top left corners `(y, x)` in LR pixels, uniform over all positions at which the patch lies inside its image.

    `heights_px_lr` and `widths_px_lr`: (n,), the sizes of the images that the samples take. The HR corner is `scale`
    times the LR one.
    """
    return (
        _below(draws.y, heights_px_lr - (patch_px_lr - 1)),
        _below(draws.x, widths_px_lr - (patch_px_lr - 1)),
    )


def worker_samples(global_batch_size: int, *, rank: int, num_workers: int, unit: int = 1) -> range:
    """The samples of every batch that a worker draws: all workers' parts together are the batch, in the order of ranks.

    Equal parts where that is possible; else they differ by one `unit` (samples that must stay together: one for each of
    a step's micro-batches). The batch must be a multiple of `unit`, and have one for each worker.
    """
    num_units = global_batch_size // unit
    if global_batch_size % unit or num_units < num_workers:
        raise ValueError(f"{global_batch_size} samples, in units of {unit}, can't be shared by {num_workers} workers")
    return range(unit * (rank * num_units // num_workers), unit * ((rank + 1) * num_units // num_workers))


def slot_range(plan: SamplePlan, first_sample: int, num_samples: int) -> range:
    """The slots that these samples of any step can draw from, no more and no less: what a worker has to hold."""
    end = first_sample + num_samples
    if first_sample < 0 or num_samples < 1 or end > plan.global_batch_size:
        raise DataError(
            f"samples [{first_sample}, {end}) are not within the global_batch_size={plan.global_batch_size}"
        )
    first = (first_sample * plan.window_images) // plan.global_batch_size
    last = (((end << 32) - 1) * plan.window_images) // (plan.global_batch_size << 32)
    return range(first, last + 1)


def shuffled(seed: int, epoch: int, num_images: int) -> Int64Array:
    """A permutation of `range(num_images)` by `(seed, epoch)`: the images sorted by their hash."""
    # 2^64 - 1 - epoch: a counter that no training step reaches, so that orders and patches are unrelated.
    keys = _hash(seed, [2**64 - 1 - epoch], 0, num_images, [_FIELD_IMAGE])[0, 0]
    return np.argsort(keys, kind="stable")


def _slots(plan: SamplePlan, hashes: UInt64Array, first_sample: int) -> Int64Array:
    """floor((i + u) · n / B) for u = hash / 2^64 cut to 32 bits: below B · 2^32 · n ≤ 2^63, exact in 64-bit
    integers.
    """
    samples = np.arange(first_sample, first_sample + hashes.shape[-1], dtype=np.uint64)
    positions = ((samples << _SHIFT_32) + (hashes >> _SHIFT_32)) * np.uint64(plan.window_images)
    return (positions // np.uint64(plan.global_batch_size << 32)).astype(np.int64)


def _below(fractions: UInt64Array, limits: Int64Array) -> Int64Array:
    """Maps [0, 2^32) to [0, limit): uniform up to limit / 2^32, which is 10^-6 for a 4,000 px side."""
    return ((fractions * limits.astype(np.uint64)) >> _SHIFT_32).astype(np.int64)


def _hash(seed: int, steps: Sequence[int], first_sample: int, num_samples: int, fields: Sequence[int]) -> UInt64Array:
    """(len(steps), len(fields), num_samples) hashes: splitmix64 of the counter `(sample, field)` from a state by
    `(seed, step)`.
    """
    state = _mix(np.array([seed], np.uint64) + _GOLDEN)
    state = _mix(state ^ _mix(np.array(steps, np.uint64) * _GOLDEN))
    samples = np.arange(first_sample, first_sample + num_samples, dtype=np.uint64)
    counters: UInt64Array = samples * np.uint64(_NUM_FIELDS) + (np.array(fields, np.uint64) + np.uint64(1))[:, None]
    return _mix(state[:, None, None] + counters * _GOLDEN)


def _mix(values: UInt64Array) -> UInt64Array:
    """The finaliser of splitmix64: a bijection of 64-bit integers whose output bits all depend on all input bits."""
    values = (values ^ (values >> _SHIFT_30)) * _MIX_1
    values = (values ^ (values >> _SHIFT_27)) * _MIX_2
    return values ^ (values >> _SHIFT_31)
