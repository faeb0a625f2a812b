"""TPE under Tune: nothing twice, what is known first and learned from, nothing above the limits, an end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from sr_models.cost import model_cost
from sr_models.edsr import EDSRConfig
from sr_train.pareto import Limits
from sr_train.sweep_plan import SweepPlan
from sr_train.tpe_search import PSNR, TpeSearch, as_config, name_in, sample_in
from sr_train.training_space import trial_name
from sr_train.trial_record import Sample, TrialRecord
from tests.support.sweeps import TINY, planned, told_trial

SIX = {"num_blocks": "1,2,3", "num_channels": "4,8"}
RATES = {"schedule__learning_rate": "1e-4..1e-2:log"}


def sweep(photos: Path, *known: TrialRecord, **options: Any) -> SweepPlan:
    """The plan of a TPE sweep that knows these trials."""
    return replace(planned(photos, photos.parent / "runs", search="tpe", **options), known=known)


def at(**options: Any) -> Sample:
    return {**TINY, **{name.replace("__", "."): value for name, value in options.items()}}


def score(sample: Sample) -> float:
    """Best where the learning rate is 1e-3, and with many blocks."""
    return 30.0 + float(sample["num_blocks"]) - abs(float(sample["schedule.learning_rate"]) / 1e-3 - 1)


def run(search: TpeSearch, num_trials: int) -> list[Sample]:
    """What it proposes for trials that run one after another, until it ends."""
    samples: list[Sample] = []
    for number in range(num_trials):
        config = search.suggest(f"t{number}")
        if config == Searcher.FINISHED:
            break
        samples.append(sample_in(config))
        assert name_in(config) == trial_name(samples[-1])
        search.on_trial_complete(f"t{number}", {PSNR: score(samples[-1])})
    return samples


def names(samples: list[Sample]) -> list[str]:
    return [trial_name(sample) for sample in samples]


def test_a_config_says_name_and_point() -> None:
    assert name_in(as_config(TINY)) == trial_name(TINY)
    assert name_in(as_config(TINY, "member-001")) == "member-001"
    assert sample_in(as_config(TINY)) == TINY


def test_no_point_is_proposed_twice_and_an_exhausted_space_ends(tiny_photos: Path) -> None:
    search = TpeSearch(sweep(tiny_photos, space=SIX, num_trials=50))
    samples = run(search, 50)
    assert {(sample["num_blocks"], sample["num_channels"]) for sample in samples} == {
        (blocks, channels) for blocks in (1, 2, 3) for channels in (4, 8)
    }
    assert len(samples) == 6
    assert search.suggest("one more") == Searcher.FINISHED


def test_points_that_differ_in_nothing_that_counts_are_one(tiny_photos: Path) -> None:
    """The decay means nothing to a constant rate."""
    space = {"schedule__decay_every_fraction": "0.25,0.5,1.0", "schedule__kind": "constant,step"}
    samples = run(TpeSearch(sweep(tiny_photos, space=space, num_trials=50)), 50)
    assert len(samples) == 4
    assert sum("schedule.decay_every_fraction" in sample for sample in samples) == 3


def test_trials_beside_each_other_are_not_the_same(tiny_photos: Path) -> None:
    search = TpeSearch(sweep(tiny_photos, space=SIX))
    running = [sample_in(search.suggest(f"t{number}")) for number in range(6)]
    assert len(set(names(running))) == 6


def test_what_is_known_comes_first(tiny_photos: Path) -> None:
    known = [at(num_blocks=3, num_channels=8), at(num_blocks=2), at(num_blocks=1, num_channels=8)]
    records = [told_trial(trial_name(sample), 30.0, sample=sample) for sample in known]
    samples = run(TpeSearch(sweep(tiny_photos, *records, space=SIX, num_trials=50)), 50)
    assert names(samples[:3]) == names(known)
    assert len(samples) == len(set(names(samples))) == 6


def test_it_learns_from_what_is_known(tiny_photos: Path) -> None:
    """Twenty trials, of which those around one rate were best: what it draws next lies closer to it than chance."""
    rates = [1e-4 * 10 ** (number / 10) for number in range(20)]  # evenly over the decades of RATES
    known = [at(schedule__learning_rate=rate) for rate in rates]
    records = [told_trial(trial_name(sample), score(sample), sample=sample) for sample in known]
    samples = run(TpeSearch(sweep(tiny_photos, *records, space=RATES, num_trials=30)), 30)
    drawn = [float(sample["schedule.learning_rate"]) for sample in samples[20:]]
    # A third of the range's decades, where three or four of ten would lie by chance.
    assert sum(10 ** (-3 - 1 / 3) < rate < 10 ** (-3 + 1 / 3) for rate in drawn) >= 6


def test_points_above_a_limit_are_never_proposed(tiny_photos: Path) -> None:
    most = model_cost(EDSRConfig(scale=2, num_blocks=2, num_channels=4)).parameters
    samples = run(TpeSearch(sweep(tiny_photos, space=SIX, limits=Limits(max_parameters=most), num_trials=50)), 50)
    assert {(sample["num_blocks"], sample["num_channels"]) for sample in samples} == {(1, 4), (2, 4)}


@pytest.mark.parametrize("error", [True, False])
def test_a_trial_without_a_score_is_not_tried_again(tiny_photos: Path, error: bool) -> None:
    search = TpeSearch(sweep(tiny_photos, space={"num_blocks": "1,2"}))
    for number in range(2):
        search.suggest(f"t{number}")
        search.on_trial_complete(f"t{number}", {} if error else None, error=error)
    assert search.suggest("one more") == Searcher.FINISHED


def test_the_seed_decides(tiny_photos: Path) -> None:
    def drawn(seed: int) -> list[str]:
        return names(run(TpeSearch(sweep(tiny_photos, space=SIX | RATES, num_trials=9, search_seed=seed)), 9))

    assert drawn(1) == drawn(1) != drawn(2)


def test_every_kind_of_domain_gives_values_of_its_own(tiny_photos: Path) -> None:
    space = {
        "num_blocks": "1..3",
        "num_channels": "4..32:log",
        "schedule__warmup_fraction": "0.0..0.5",
        "schedule__kind": "constant,cosine",
    }
    samples = run(TpeSearch(sweep(tiny_photos, space=space | RATES, num_trials=15)), 15)
    assert len(samples) == 15
    for sample in samples:
        assert sample["num_blocks"] in (1, 2, 3) and sample["num_channels"] in range(4, 33)
        assert sample["schedule.kind"] in ("constant", "cosine")
        assert 0 <= float(sample["schedule.warmup_fraction"]) <= 0.5
        assert 1e-4 <= float(sample["schedule.learning_rate"]) <= 1e-2
