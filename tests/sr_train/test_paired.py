"""Intervals of paired differences, against what statistics knows of them."""

import math

import numpy as np
import pytest

from sr_train.paired import mean_interval


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(0.1, 0.3, size=300)
    interval = mean_interval(list(values))
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


@pytest.mark.parametrize(("num_values", "student"), [(6, 2.571), (12, 2.201), (30, 2.045)])
def test_few_values_give_about_students_interval(num_values: int, student: float) -> None:
    values = np.random.default_rng(2).normal(0.1, 0.3, size=num_values)
    low, high = mean_interval(list(values)) or (math.nan, math.nan)
    half = student * values.std(ddof=1) / math.sqrt(num_values)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_how_far_the_sets_lie_apart_is_no_uncertainty() -> None:
    """Of two sets with ever the same images the mean is as certain as within each: resampling is stratified."""
    rng = np.random.default_rng(3)
    near, far = rng.normal(0.1, 0.02, size=20), rng.normal(1.1, 0.02, size=40)
    low, high = mean_interval(list(near), list(far)) or (math.nan, math.nan)
    mean = np.concatenate([near, far]).mean()
    half = 1.96 * 0.02 / math.sqrt(60)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.3 * half)
    mixed = mean_interval([*near, *far]) or (math.nan, math.nan)
    assert mixed[1] - mixed[0] > 5 * (high - low)


def test_of_several_small_sets_it_is_wide_enough() -> None:
    """Of 95 % intervals 2.5 % lie above a mean of 0; without Student's quantile it would be 4 %."""
    rng = np.random.default_rng(1)
    intervals = [
        mean_interval(*(list(rng.normal(0, spread, size=num_values)) for num_values, spread in sets))
        for sets in ([(5, 1), (5, 1)], [(5, 5), (5, 1)], [(5, 5), (14, 1)])
        for _ in range(600)
    ]
    assert sum(interval is not None and interval[0] > 0 for interval in intervals) <= 0.035 * len(intervals)


@pytest.mark.parametrize(
    "sets", [[], [[0.1]], [[0.1, 0.2, 0.3, 0.4]], [[0.1] * 9, [0.1, 0.2, 0.3, 0.4]], [[0.1] * 5 + [math.inf]]]
)
def test_without_a_known_spread_there_is_no_interval(sets: list[list[float]]) -> None:
    assert mean_interval(*sets) is None


def test_values_without_spread_are_certain() -> None:
    assert mean_interval([0.25] * 6, [0.25] * 5) == (0.25, 0.25)
