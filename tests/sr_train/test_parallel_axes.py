"""Where an option's values lie on its axis, and which of them have a tick."""

import math

import pytest

from sr_train.parallel_axes import ABSENT_AT, Column


def test_numbers_that_span_more_than_10_times_have_a_log_axis():
    assert Column.of([1, 10, 100]).heights[10] == pytest.approx(0.5)
    assert Column.of([1, 4, 10]).heights[4] == pytest.approx(3 / 9)
    assert Column.of([0.0, 4.0, 100.0]).heights[4.0] == pytest.approx(0.04), "0 has no logarithm"


def test_names_are_spaced_evenly():
    assert Column.of(["step", "cosine", "step", "one-cycle"]).ticks == pytest.approx(
        {"cosine": 1 / 6, "one-cycle": 3 / 6, "step": 5 / 6}
    )


def test_few_numbers_have_a_tick_each_and_many_have_round_ones():
    assert list(Column.of([8, 32, 16, 8]).ticks) == ["8", "16", "32"]
    drawn = [1e-4 * 1.31**index for index in range(20)]
    ticks = Column.of(drawn).ticks
    assert list(ticks) == ["0.0001", "0.0002", "0.0005", "0.001", "0.002", "0.005", "0.01"]
    assert ticks["0.001"] == pytest.approx(math.log(10) / (19 * math.log(1.31)))


def test_trials_that_lack_the_option_have_a_tick_of_their_own():
    assert Column.of([1, None, 3]).ticks == {"1": 0.0, "3": 1.0, "–": ABSENT_AT}
    assert Column.of([1, 3]).ticks == {"1": 0.0, "3": 1.0}
