"""Scores that trials of unequal length can be compared by, and what they say about the options."""

import itertools

import pytest

from sr_train.sweep_study import comparable_scores, importances, study_of
from sr_train.trial_record import Point, TrialRecord


def trial(name, scores_db, sample=None, *, status="finished"):
    """`scores_db`: patches seen → PSNR."""
    history = tuple(Point(patches_seen=patches, psnr_db=db, ssim=0.9) for patches, db in scores_db.items())
    return TrialRecord(name=name, sample=sample or {}, status=status, history=history)


def test_the_mark_is_the_last_one_that_half_of_the_trials_reached():
    records = [
        *(trial(f"long {i}", {100: 20.0 + i, 200: 30.0 + i, 300: 40.0 + i}) for i in range(3)),
        trial("middle", {100: 23.0, 200: 33.0}, status="stopped"),
        *(trial(f"short {i}", {100: 10.0 + i}, status="stopped") for i in range(4)),
    ]
    assert comparable_scores(records) == (200, {"long 0": 30.0, "long 1": 31.0, "long 2": 32.0, "middle": 33.0})
    more = [*records, trial("short 4", {100: 14.0}, status="stopped")]
    mark, scores = comparable_scores(more)
    assert mark == 100, "four of nine reached 200"
    assert scores["long 2"] == 22.0, "what it had learnt by then"
    assert len(scores) == 9


def test_at_least_four_trials_must_have_reached_the_mark():
    records = [trial(str(i), {100: 20.0, 200: 30.0}) for i in range(3)]
    assert comparable_scores(records) == (0, {})
    assert comparable_scores([*records, trial("3", {100: 21.0})])[0] == 100
    assert comparable_scores(records, min_trials=1)[0] == 200
    assert comparable_scores([]) == (0, {})


def test_validations_less_than_2_percent_apart_are_at_one_mark():
    """Batches of 16 and 48 validate at 16,000 and 16,032 patches, and never meet."""
    small = [trial(f"batch 16, {i}", {16_000: 28.0, 32_000: 29.0, 48_000: 30.0}) for i in range(4)]
    large = [trial(f"batch 48, {i}", {16_032: 28.5, 32_016: 29.5, 48_032: 30.5}) for i in range(4)]
    mark, scores = comparable_scores([*small, *large])
    assert mark == 48_032
    assert sorted(scores.values()) == [30.0] * 4 + [30.5] * 4


def test_a_validation_well_beyond_the_mark_is_not_used():
    records = [trial(str(i), {100: 20.0}) for i in range(4)]
    late = trial("late", {80: 15.0, 150: 40.0})
    only_later = trial("only later", {150: 40.0})
    ended_before = trial("ended before", {80: 39.0}, status="stopped")
    mark, scores = comparable_scores([*records, late, only_later, ended_before])
    assert mark == 100
    assert scores == {"0": 20.0, "1": 20.0, "2": 20.0, "3": 20.0, "late": 15.0}


def test_failed_trials_do_not_count():
    records = [trial(str(i), {100: 20.0}) for i in range(4)]
    failed = [trial(f"failed {i}", {50: 8.0}, status="failed") for i in range(9)]
    assert comparable_scores([*records, *failed]) == (100, dict.fromkeys("0123", 20.0))


def factorial(score_db, **options):
    """A trial for each combination of the options' values."""
    samples = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    return [trial(str(i), {100: score_db(**sample)}, sample) for i, sample in enumerate(samples)]


def test_shares_of_the_variance_by_hand():
    """Of 2a + b, with a and b evenly from n values 1 apart, whose variance is (n² - 1) / 12."""
    shares = importances(factorial(lambda a, b: 2.0 * a + b, a=(0, 1, 2, 3), b=(0, 1, 2, 3, 4)))
    of_a, of_b = 4 * 15 / 12, 24 / 12
    assert list(shares) == ["a", "b"], "largest first"
    assert shares["a"] == pytest.approx(of_a / (of_a + of_b), abs=0.05)
    assert shares["b"] == pytest.approx(of_b / (of_a + of_b), abs=0.05)


def test_how_far_an_option_s_values_lie_apart_does_not_matter():
    near = importances(factorial(lambda a, b: 2.0 * a + b, a=(1, 2, 3), b=(1, 2, 3)))
    rank = {1e-4: 1, 1e-3: 2, 1e-1: 3}
    far = importances(factorial(lambda a, b: 2.0 * rank[a] + b, a=(1e-4, 1e-3, 1e-1), b=(1, 2, 3)))
    assert far == pytest.approx(near)


def test_what_options_do_only_together_is_nobody_s_share():
    """Whether a and b are the same: each alone says nothing."""
    shares = importances(factorial(lambda a, b, run: float(a == b), a=(0, 1), b=(0, 1), run=(0, 1, 2, 3)))
    assert sum(shares.values()) < 0.3


def test_names_are_categories():
    score_db = {"constant": 1.0, "cosine": 5.0, "step": 2.0}
    shares = importances(factorial(lambda kind, b: score_db[kind] + 0.1 * b, kind=tuple(score_db), b=(0, 1, 2)))
    assert shares["kind"] > 0.9 > 0.1 > shares["b"]


def test_an_option_with_one_value_has_no_share():
    assert list(importances(factorial(lambda a, b: a + b, a=(1.0, 2.0, 3.0, 4.0), b=(7,)))) == ["a"]


def test_options_are_judged_by_what_all_trials_had_learnt_by_the_mark():
    """Which trial was stopped, and so how far it came, says nothing about b."""
    records = [
        trial(f"{a} {b}", {100: float(a)} | ({200: float(a), 300: 9.0} if b == 1 else {}), {"a": a, "b": b})
        for a, b in itertools.product(range(4), (1, 2, 3))
    ]
    shares = importances(records)
    assert shares["a"] > 0.95
    assert shares["b"] < 0.05


def test_an_option_that_only_some_trials_have_is_judged_among_these():
    others = factorial(lambda a: float(a), a=(0, 1, 2, 3, 4, 5))
    having = [
        trial(f"step {a} {every}", {100: 0.1 * a + every}, {"a": a, "every": every})
        for a, every in itertools.product((0, 1), (1, 2, 3))
    ]
    shares = importances([*others, *having])
    assert shares["every"] > 0.9, "0.1 a + every, where every is there"
    assert importances([*others, *having])["a"] == pytest.approx(
        importances([trial(r.name, {100: r.psnr_db}, {"a": r.sample["a"]}) for r in [*others, *having]])["a"]
    ), "an option of all trials is judged among all"
    assert "every" not in importances([*others, *having[:3]]), "three trials say nothing"


@pytest.mark.parametrize(
    "records",
    [
        [],
        factorial(lambda a: float(a), a=(1, 2, 3)),
        factorial(lambda a, b: 30.0, a=(1, 2, 3), b=(1, 2, 3)),
        [trial(str(i), {}, {"a": i}) for i in range(9)],
    ],
    ids=["no trials", "three trials", "all equal", "no scores"],
)
def test_too_little_to_judge_by(records):
    assert importances(records) == {}


def test_the_same_records_give_the_same_shares():
    records = factorial(lambda a, b: a * b + 0.5 * b, a=(1, 2, 3), b=(1.0, 5.0, 7.0))
    assert importances(records) == importances(records)


def test_a_study_holds_the_comparable_trials_and_their_scores():
    records = factorial(lambda a: 10.0 * a, a=(1, 2, 4, 8))
    study = study_of([*records, trial("stopped", {50: 99.0}, {"a": 16}, status="stopped")])
    assert study.best_value == 80.0
    assert [(one.params["a"], one.value) for one in study.trials] == [(0, 10.0), (1, 20.0), (2, 40.0), (3, 80.0)]
