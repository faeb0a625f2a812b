"""Ceilings on costs, the front of trials that no other one beats, and the best trial."""

import itertools
import random

import pytest

from sr_models.cost import ModelCost
from sr_train.options import ConfigError
from sr_train.pareto import COSTS, Limits, best_trial, cost_of, over_limit, pareto_front
from sr_train.trial_record import Point, TrialRecord

NO_LIMITS = Limits()


def trial(
    name, psnr_db, parameters=1000, *, flops=None, latency_s=None, status="finished", checkpoint="ckpt", patches=100
):
    return TrialRecord(
        name=name,
        sample={},
        status=status,
        history=() if psnr_db is None else (Point(patches_seen=patches, psnr_db=psnr_db, ssim=0.9),),
        cost=ModelCost(parameters=parameters, flops=2e9 if flops is None else flops, latency_s=latency_s),
        checkpoint=checkpoint,
    )


def names(records):
    return [record.name for record in records]


COST = ModelCost(parameters=1_369_859, flops=632.5e9, latency_s=0.025)


def test_costs_in_their_units():
    assert {name: cost.of(COST) for name, cost in COSTS.items()} == pytest.approx(
        {"parameters": 1_369_859, "gflops": 632.5, "latency_ms": 25.0}
    )


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(max_parameters=1_369_858), ["1,369,859", "--limits.max-parameters=1369858"]),
        (Limits(max_gflops=600.0), ["632.5 GFLOPs", "--limits.max-gflops=600"]),
        (Limits(max_latency_ms=24.5), ["25 ms", "--limits.max-latency-ms=24.5"]),
    ],
)
def test_a_network_over_a_limit_is_told_both_numbers_and_the_flag(limits, said):
    reason = over_limit(COST, limits)
    assert reason is not None
    assert all(part in reason for part in said), reason


@pytest.mark.parametrize("limits", [NO_LIMITS, Limits(max_parameters=1_369_859, max_gflops=632.5, max_latency_ms=25.0)])
def test_a_cost_that_equals_its_ceiling_is_within_it(limits):
    assert over_limit(COST, limits) is None


def test_a_latency_that_was_not_measured_is_within_any_ceiling():
    unmeasured = ModelCost(parameters=1, flops=1.0)
    assert over_limit(unmeasured, Limits(max_latency_ms=0.001)) is None


@pytest.mark.parametrize("field", ["max_parameters", "max_gflops", "max_latency_ms"])
@pytest.mark.parametrize("ceiling", [0, -1])
def test_a_ceiling_that_nothing_meets_names_the_flag(field, ceiling):
    with pytest.raises(ConfigError, match=f"--limits.{field.replace('_', '-')}={ceiling}"):
        Limits(**{field: ceiling})


def test_the_front_by_hand():
    records = [
        trial("large", 32.0, 3000),
        trial("beaten in both", 29.0, 2500),
        trial("small", 28.0, 1000),
        trial("as good as small but larger", 28.0, 1500),
        trial("as large as middle but worse", 30.0, 2000),
        trial("middle", 31.0, 2000),
    ]
    assert names(pareto_front(records, "parameters")) == ["small", "middle", "large"]


def test_no_trial_beats_one_of_the_front_and_each_other_is_beaten_by_one_of_it():
    """By the definition, on random trials with many ties."""
    draw = random.Random(0)
    records = [trial(f"{i:02}", draw.randrange(6), draw.randrange(1, 7)) for i in range(40)]
    front = pareto_front(records, "parameters")

    def beats(one, other):
        no_worse = one.psnr_db >= other.psnr_db and one.cost.parameters <= other.cost.parameters
        return no_worse and (one.psnr_db, one.cost.parameters) != (other.psnr_db, other.cost.parameters)

    def equals(one, other):
        return (one.psnr_db, one.cost.parameters) == (other.psnr_db, other.cost.parameters)

    assert not any(beats(one, other) for one, other in itertools.product(records, front))
    for record in records:
        if record not in front:
            assert any(beats(one, record) or (equals(one, record) and one.name < record.name) for one in front)


def test_costs_make_different_fronts():
    wide = trial("wide", 30.0, 2000, flops=1e9, latency_s=0.002)
    deep = trial("deep", 29.0, 1000, flops=2e9, latency_s=None)
    assert names(pareto_front([wide, deep], "parameters")) == ["deep", "wide"]
    assert names(pareto_front([wide, deep], "gflops")) == ["wide"]
    assert names(pareto_front([wide, deep], "latency_ms")) == ["wide"], "the other's was not measured"


def test_of_equals_the_first_by_name_is_on_the_front():
    assert names(pareto_front([trial("b", 30.0), trial("a", 30.0), trial("c", 30.0)], "gflops")) == ["a"]


def test_stopped_trials_are_on_the_front_but_failed_ones_are_not():
    records = [
        trial("stopped", 29.0, 500, status="stopped"),
        trial("running", 29.5, 600, status="running"),
        trial("finished", 30.0, 1000),
        trial("failed", 35.0, 100, status="failed"),
        trial("over limit", None, 9000, status="over limit"),
        trial("no score", None, 50, status="running"),
    ]
    assert names(pareto_front(records, "parameters")) == ["stopped", "running", "finished"]


def test_a_cost_that_is_not_known_is_none():
    assert cost_of(TrialRecord(name="a", sample={}), "gflops") is None
    assert pareto_front([TrialRecord(name="a", sample={}, history=trial("a", 30.0).history)], "gflops") == []


def test_the_best_is_the_highest_psnr_within_the_limits():
    records = [trial("small", 28.0, 1000), trial("middle", 31.0, 2000), trial("large", 32.0, 3000)]
    assert best_trial(records, NO_LIMITS).name == "large"
    assert best_trial(records, Limits(max_parameters=2000)).name == "middle"
    assert best_trial(records, Limits(max_parameters=999)) is None


def test_a_trial_with_its_whole_budget_goes_before_a_better_one_that_was_stopped():
    stopped, finished = trial("a", 31.0, status="stopped"), trial("b", 30.0)
    assert best_trial([stopped, finished], NO_LIMITS) is finished
    assert best_trial([stopped, trial("c", None, status="failed")], NO_LIMITS) is stopped


def test_the_finished_trial_must_be_eligible_itself():
    stopped, lost = trial("a", 29.0, status="stopped"), trial("b", 30.0, checkpoint=None)
    assert best_trial([stopped, lost], NO_LIMITS) is stopped


def test_a_failed_trial_is_never_the_best():
    assert best_trial([trial("a", 30.0, status="failed")], NO_LIMITS) is None


def test_of_equal_trials_the_one_with_fewer_flops_is_the_best():
    assert best_trial([trial("a", 30.0, flops=2e9), trial("b", 30.0, flops=1e9)], NO_LIMITS).name == "b"
    assert best_trial([trial("b", 30.0), trial("a", 30.0)], NO_LIMITS).name == "a"


def test_a_trial_of_unknown_cost_is_within_no_limit():
    unknown = TrialRecord(
        name="a", sample={}, status="finished", history=trial("a", 30.0).history, checkpoint="ckpt", cost=None
    )
    assert best_trial([unknown], NO_LIMITS) is unknown
    assert best_trial([unknown], Limits(max_gflops=1e6)) is None


def test_a_trial_whose_latency_is_not_known_is_not_best_under_a_ceiling_of_latency():
    measured = trial("a", 30.0, latency_s=0.01)
    assert best_trial([trial("b", 31.0), measured], Limits(max_latency_ms=50)) is measured
