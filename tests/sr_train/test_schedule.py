"""The learning rate against the papers' definitions, in patches seen."""

import pytest

from sr_train.options import ScheduleConfig
from sr_train.schedule import learning_rate_at

TOTAL = 1_000


def at(schedule: ScheduleConfig, patches_seen: int) -> float:
    return learning_rate_at(schedule, patches_seen=patches_seen, total_patches=TOTAL)


def test_step_decay_halves_every_interval_counted_from_the_start() -> None:
    schedule = ScheduleConfig(kind="step", learning_rate=8.0, decay_every_patches=400, decay_factor=0.5)
    assert [at(schedule, seen) for seen in (0, 399, 400, 799, 800)] == [8.0, 8.0, 4.0, 4.0, 2.0]


def test_cosine_falls_from_the_peak_to_the_final_fraction() -> None:
    schedule = ScheduleConfig(kind="cosine", learning_rate=2.0, final_fraction=0.1)
    assert at(schedule, 0) == 2.0
    assert at(schedule, TOTAL // 2) == pytest.approx(1.1)
    assert at(schedule, TOTAL) == at(schedule, 2 * TOTAL) == pytest.approx(0.2)


def test_warm_up_rises_linearly_from_zero() -> None:
    schedule = ScheduleConfig(kind="constant", learning_rate=4.0, warmup_patches=100)
    assert [at(schedule, seen) for seen in (0, 25, 50, 100, 500)] == [0.0, 1.0, 2.0, 4.0, 4.0]


def test_one_cycle_rises_and_falls_smoothly() -> None:
    schedule = ScheduleConfig(kind="one-cycle", learning_rate=1.0, warmup_patches=200)
    rates = [at(schedule, seen) for seen in range(0, TOTAL + 1, 10)]
    peak = rates.index(max(rates))
    assert peak == 20 and rates[0] == 0.0 and rates[-1] == pytest.approx(0.0)
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert at(schedule, 100) == pytest.approx(0.5)


def test_the_same_patches_give_the_same_rate_whatever_the_batch() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_patches=64)
    small = {step * 16: at(schedule, step * 16) for step in range(60)}
    large = {step * 32: at(schedule, step * 32) for step in range(30)}
    assert all(small[seen] == rate for seen, rate in large.items())
