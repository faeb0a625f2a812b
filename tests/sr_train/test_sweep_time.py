"""The time a sweep still takes: exact where it can be known, and never nonsense."""

from dataclasses import replace

import pytest

from sr_train.sweep_time import SweepTimeLeft
from sr_train.trial_record import Point, Status, TrialRecord

PATCHES, TRIAL_S, START_S = 9600, 100.0, 50.0


def trial(number: int, patches_seen: int = 0, status: Status = "running") -> TrialRecord:
    history = (Point(patches_seen=patches_seen, psnr_db=30.0, ssim=0.9),) if patches_seen else ()
    return TrialRecord(name=f"trial-{number}", sample={}, status=status, history=history)


@pytest.mark.parametrize(("num_trials", "at_once"), [(6, 1), (6, 2), (7, 3), (2, 4)])
def test_it_is_exact_for_equal_trials(num_trials: int, at_once: int) -> None:
    time_left = SweepTimeLeft(num_trials=num_trials, trial_patches=PATCHES)
    num_waves = -(-num_trials // at_once)
    for wave in range(num_waves):
        numbers = range(wave * at_once, min(num_trials, (wave + 1) * at_once))
        for number in numbers:
            time_left.note(trial(number), START_S + wave * TRIAL_S)
        for tenth in range(1, 10):
            now_s = START_S + (wave + tenth / 10) * TRIAL_S
            for number in numbers:
                time_left.note(trial(number, PATCHES * tenth // 10), now_s)
            if wave > 0 or tenth > 5:
                for later_s in (0.0, 7.0):  # also between two validations
                    expected = num_waves * TRIAL_S - (now_s - START_S) - later_s
                    assert time_left.at(now_s + later_s) == pytest.approx(expected)
        for number in numbers:
            time_left.note(trial(number, PATCHES, "finished"), START_S + (wave + 1) * TRIAL_S)
            if wave + 1 < num_waves:  # also while its place is empty
                assert time_left.at(START_S + (wave + 1) * TRIAL_S) == pytest.approx((num_waves - wave - 1) * TRIAL_S)
    assert time_left.at(START_S + num_waves * TRIAL_S) == 0.0


def test_it_is_not_known_before_a_twentieth_or_a_trial_is_done() -> None:
    time_left = SweepTimeLeft(num_trials=10, trial_patches=1000)
    time_left.note(trial(0), 0.0)
    time_left.note(trial(0, 490), 49.0)
    assert time_left.at(49.0) is None
    time_left.note(trial(0, 500), 50.0)
    assert time_left.at(50.0) == pytest.approx(950.0)
    time_left = SweepTimeLeft(num_trials=1000, trial_patches=1000)
    time_left.note(trial(0), 0.0)
    time_left.note(trial(0, 1000), 100.0)
    assert time_left.at(100.0) is None
    time_left.note(trial(0, 1000, "finished"), 100.0)
    assert time_left.at(100.0) == pytest.approx(99_900.0)


def test_without_a_number_of_trials_it_is_never_known() -> None:
    time_left = SweepTimeLeft(num_trials=None, trial_patches=1000)
    time_left.note(trial(0), 0.0)
    time_left.note(trial(0, 1000, "finished"), 100.0)
    assert time_left.at(100.0) is None


def test_early_stops_make_the_rest_cheaper() -> None:
    time_left = SweepTimeLeft(num_trials=12, trial_patches=1000)
    for number in range(2):  # one stopped after 10 s, one whole in 90 s
        time_left.note(trial(number), 100.0 * number)
    time_left.note(trial(0, 100, "stopped"), 10.0)
    time_left.note(trial(1, 1000, "finished"), 190.0)
    assert time_left.at(190.0) == pytest.approx(10 * (10.0 + 90.0) / 2 / 2)  # two at once


def test_trials_of_earlier_sessions_say_nothing_about_the_pace() -> None:
    time_left = SweepTimeLeft(num_trials=6, trial_patches=1000)
    time_left.known([trial(0, 1000, "finished"), trial(1, 100, "failed"), trial(2, 500), trial(3, 250)])
    assert time_left.at(0.0) is None
    time_left.note(trial(2, 500), 0.0)
    assert time_left.num_running == 1
    time_left.note(trial(2, 750), 25.0)  # a whole one takes 100 s; 25 s of this, 75 s of trial 3, and two more to come
    assert time_left.at(25.0) == pytest.approx(25.0 + 75.0 + 200.0)
    time_left.note(trial(2, 1000, "finished"), 50.0)
    assert time_left.at(50.0) == pytest.approx(75.0 + 200.0)
    time_left.note(trial(1), 50.0)  # what failed is tried again
    assert time_left.at(50.0) == pytest.approx(100.0 + 75.0 + 200.0)


def test_trials_that_end_untrained_say_nothing_about_the_pace() -> None:
    time_left = SweepTimeLeft(num_trials=4, trial_patches=1000)
    time_left.note(trial(0, status="over limit"), 0.0)
    time_left.note(trial(1), 0.0)
    time_left.note(trial(1, status="failed"), 5.0)
    assert time_left.at(5.0) is None
    time_left.note(trial(2), 5.0)
    time_left.note(trial(2, 1000, "finished"), 105.0)
    assert time_left.at(105.0) == pytest.approx(100.0)


def test_a_trial_that_is_tried_again_starts_again() -> None:
    time_left = SweepTimeLeft(num_trials=1, trial_patches=1000)
    time_left.note(trial(0), 0.0)
    time_left.note(trial(0, 300, "failed"), 30.0)
    time_left.note(trial(0, 300), 500.0)
    time_left.note(trial(0, 500), 520.0)
    assert time_left.at(520.0) == pytest.approx(50.0)


def test_it_is_never_negative() -> None:
    time_left = SweepTimeLeft(num_trials=2, trial_patches=1000)
    time_left.note(trial(0), 0.0)
    time_left.note(trial(1), 0.0)
    time_left.note(trial(0, 1000, "finished"), 10.0)
    assert time_left.at(1e6) == 0.0  # the other one is long overdue
    for number in range(2, 5):  # more than were announced
        time_left.note(replace(trial(number, 2000), status="finished"), 20.0)
    time_left.note(trial(1, 3000), 30.0)
    assert time_left.at(31.0) == 0.0
