"""What a sweep's trials say about its options: scores that can be compared, and the importance of each option."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sr_train.sweep_table import varied_options
from sr_train.trial_record import TrialRecord, Value

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

MIN_TRIALS = 4
"""Fewer say nothing about an option."""
MARK_SLACK = 0.02
"""Validations whose patches seen differ by less than this share count as at one mark: a trial validates after the first
whole step beyond each interval, and steps differ with the batch size."""


def comparable_scores(records: Sequence[TrialRecord], *, min_trials: int = MIN_TRIALS) -> tuple[int, dict[str, float]]:
    """PSNR in dB by trial's name, all after about as much training, and the patches seen at which that is: the mark.

    The mark is the largest patches seen that at least half of the trials reached, and at least `min_trials` of them; so
    trials that were stopped early are compared with what the others had learnt by then. A trial's score is that of its
    last validation at or before the mark, or up to 2 % beyond it; a trial that ended more than 2 % before the mark has
    none. Failed trials and those without a validation don't count. (0, {}) if too few trials are left.
    """
    histories = {
        record.name: record.history
        for record in records
        if record.history and record.status not in ("failed", "over limit")
    }
    num_needed = max(min_trials, -(-len(histories) // 2), 1)
    for mark in sorted({point.patches_seen for history in histories.values() for point in history}, reverse=True):
        scores = {}
        for name, history in histories.items():
            until_mark = [point for point in history if point.patches_seen <= mark * (1 + MARK_SLACK)]
            if until_mark and history[-1].patches_seen >= mark * (1 - MARK_SLACK):
                scores[name] = until_mark[-1].psnr_db
        if len(scores) >= num_needed:
            return mark, scores
    return 0, {}


def study_of(records: Sequence[TrialRecord]) -> "optuna.Study":
    """An Optuna study in memory of the trials that have a comparable score, which is to be maximised.

    It has the options that vary among these trials. A name is a category. A number is replaced by its rank among the
    option's values, from 0, in a range half a rank wider at both ends: for fANOVA, which draws evenly from the range,
    each value that was tried then weighs the same, whether they are 8, 16, 64 or spread over decades. Sets Optuna's log
    level to warnings, for this process.
    """
    _, scores = comparable_scores(records)
    return _study([record for record in records if record.name in scores], scores)


def importances(records: Sequence[TrialRecord]) -> dict[str, float]:
    """How much each option that varies matters, in [0, 1], largest first.

    It is the share of the comparable scores' variance that the option explains by itself, averaged over the others:
    fANOVA on a random forest (Hutter, Hoos, Leyton-Brown, "An Efficient Approach for Assessing Hyperparameter
    Importance", ICML 2014). What is left to 1 is due to options acting together. An option that only some trials have
    is judged among these, by their variance, if they are at least `MIN_TRIALS` and differ; otherwise it is left out.

    Empty if fewer than `MIN_TRIALS` trials have comparable scores, or if all scores are equal. The same records give
    the same shares, every time.
    """
    _, scores = comparable_scores(records)
    compared = [record for record in records if record.name in scores]
    options_of_group: dict[tuple[str, ...], list[str]] = {}
    for option in varied_options(compared):
        group = tuple(record.name for record in compared if option in record.sample)
        options_of_group.setdefault(group, []).append(option)
    shares: dict[str, float] = {}
    for group, options in options_of_group.items():
        if len(group) >= MIN_TRIALS and len({scores[name] for name in group}) > 1:
            share_of = _shares([record for record in compared if record.name in group], scores)
            shares |= {option: share_of[option] for option in options}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _shares(records: Sequence[TrialRecord], scores: Mapping[str, float]) -> dict[str, float]:
    """Of the options that vary and that all of these trials have."""
    from optuna.importance import FanovaImportanceEvaluator

    evaluated = FanovaImportanceEvaluator(seed=0).evaluate(_study(records, scores))
    return {option: float(share) for option, share in evaluated.items()}


def _study(records: Sequence[TrialRecord], scores: Mapping[str, float]) -> "optuna.Study":
    # Seconds to import, with all that it needs.
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    columns = {option: _column(records, option) for option in varied_options(records)}
    study = optuna.create_study(direction="maximize")
    for record in records:
        present = {option: column for option, column in columns.items() if option in record.sample}
        study.add_trial(
            optuna.trial.create_trial(
                params={option: codes[record.sample[option]] for option, (codes, _) in present.items()},
                distributions={option: distribution for option, (_, distribution) in present.items()},
                value=scores[record.name],
            )
        )
    return study


def _column(records: Sequence[TrialRecord], option: str) -> "tuple[dict[Value, Value], BaseDistribution]":
    """What stands for each of an option's values in a study, and the range of that."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    values = {record.sample[option] for record in records if option in record.sample}
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) < len(values):
        return {value: value for value in values}, CategoricalDistribution(sorted(values, key=str))
    ranks: dict[Value, Value] = {value: float(rank) for rank, value in enumerate(sorted(numbers))}
    return ranks, FloatDistribution(-0.5, len(ranks) - 0.5)
