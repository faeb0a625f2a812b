"""Samples: a pure, uniform, worker-independent function of the plan."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest

from sr_data.errors import DataError
from sr_data.sampling import SamplePlan, draw_samples, draw_slots, patch_origins, shuffled, slot_range

MASK = 2**64 - 1


def plan(**changes: Any) -> SamplePlan:
    defaults = {
        "seed": 7, "global_batch_size": 8, "scale": 2, "patch_px_lr": 4, "augment": True,
        "num_images": 20, "window_images": 20, "window_reuse_patches": 16,
    }  # fmt: skip
    return SamplePlan(**(defaults | changes))


def reference_mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def reference_sample(of: SamplePlan, step: int, sample: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(slot, y, x, transform) in Python's exact integers."""
    golden = 0x9E3779B97F4A7C15
    state = reference_mix(reference_mix((of.seed + golden) & MASK) ^ reference_mix(step * golden & MASK))
    image, y, x, transform = (reference_mix((state + (sample * 4 + field + 1) * golden) & MASK) for field in range(4))
    slot = ((sample << 32) + (image >> 32)) * of.window_images // (of.global_batch_size << 32)
    y_px = (y >> 32) * (height - of.patch_px_lr + 1) >> 32
    x_px = (x >> 32) * (width - of.patch_px_lr + 1) >> 32
    return slot, y_px, x_px, transform >> 61 if of.augment else 0


def test_mix_is_splitmix64() -> None:
    """The first output of splitmix64 from seed 0, as published with Vigna's reference code (prng.di.unimi.it)."""
    assert reference_mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("step", [0, 1, 299_999, 2**40])
@pytest.mark.parametrize("augment", [True, False])
def test_agrees_with_exact_integers(step: int, augment: bool) -> None:
    of = plan(augment=augment, seed=2**63 - 1, global_batch_size=48, num_images=2**31 // 48, window_images=2**31 // 48)
    draws = draw_samples(of, step, 0, 48)
    heights, widths = np.arange(48) + 4, np.arange(48) * 1000 + 4
    y, x = patch_origins(draws, heights_px_lr=heights, widths_px_lr=widths, patch_px_lr=4)
    got = zip(*(values.tolist() for values in (draws.slots, y, x, draws.transforms)), strict=True)
    assert list(got) == [reference_sample(of, step, i, int(heights[i]), int(widths[i])) for i in range(48)]


@pytest.mark.parametrize("num_workers", [2, 4, 8])
def test_number_of_workers_changes_no_sample(num_workers: int) -> None:
    whole, share = draw_samples(plan(), 5, 0, 8), 8 // num_workers
    parts = [draw_samples(plan(), 5, first, share) for first in range(0, 8, share)]
    for field in dataclasses.fields(whole):
        joined = np.concatenate([getattr(part, field.name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, field.name))


def test_as_many_samples_as_images_take_each_image_once() -> None:
    of = plan(global_batch_size=20)
    for step in range(10):
        assert draw_samples(of, step, 0, 20).slots.tolist() == list(range(20))


def test_images_are_drawn_uniformly_where_batch_and_images_do_not_divide() -> None:
    of = plan(global_batch_size=6, num_images=35, window_images=35)
    counts = np.bincount(draw_slots(of, range(10_000), 0, 6).ravel(), minlength=35)
    expected = 60_000 / 35
    # Chi-square with 34 degrees of freedom is below 66 with probability 0.999; stratification can only make it smaller.
    assert ((counts - expected) ** 2 / expected).sum() < 66


@pytest.mark.parametrize(("num_images", "batch", "share"), [(20, 8, 2), (7, 16, 4), (100, 6, 3), (5, 5, 1), (1, 8, 4)])
def test_slot_range_is_what_samples_draw_from_and_no_more(num_images: int, batch: int, share: int) -> None:
    of = plan(global_batch_size=batch, num_images=num_images, window_images=num_images)
    for first in range(0, batch, share):
        drawn = set(draw_slots(of, range(4_000), first, share).ravel().tolist())
        assert drawn == set(slot_range(of, first, share))


def test_slot_range_of_samples_outside_the_batch_is_refused() -> None:
    with pytest.raises(DataError, match=r"samples \[6, 9\)"):
        slot_range(plan(), 6, 3)


def test_positions_and_transforms_are_uniform() -> None:
    of = plan(global_batch_size=1, num_images=1, window_images=1)
    seen: Counter[tuple[int, int, int]] = Counter()
    for step in range(12_000):
        draws = draw_samples(of, step, 0, 1)
        y, x = patch_origins(draws, heights_px_lr=np.array([6]), widths_px_lr=np.array([8]), patch_px_lr=4)
        seen[int(y[0]), int(x[0]), int(draws.transforms[0])] += 1
    assert set(seen) == {(y, x, t) for y in range(3) for x in range(5) for t in range(8)}
    # 120 cells of 100: chi-square with 119 degrees of freedom is below 173 with probability 0.999.
    assert sum((count - 100) ** 2 / 100 for count in seen.values()) < 173


def test_seed_and_step_change_the_samples() -> None:
    def drawn(seed: int, step: int) -> tuple[int, ...]:
        draws = draw_samples(plan(seed=seed), step, 0, 8)
        return (*draws.slots.tolist(), *draws.y.tolist())

    assert len({drawn(seed, step) for seed in range(20) for step in range(20)}) == 400


def test_shuffled_is_a_permutation_of_its_own_for_each_epoch_and_seed() -> None:
    orders = {tuple(shuffled(seed, epoch, 50).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert all(sorted(order) == list(range(50)) for order in orders)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 0}, "global_batch_size=0 must be at least 1"),
        ({"seed": -1}, "seed=-1"),
        ({"window_images": 21}, "window_images=21 is more than the num_images=20"),
        ({"global_batch_size": 2**27}, "use at most 16 images"),
    ],
)
def test_impossible_plans_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan(**changes)
