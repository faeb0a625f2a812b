"""A sweep's options: refused with the flag's name, and saved and read back."""

import json
from typing import Any

import pytest

from sr_models.edsr import EDSRConfig
from sr_train.config import TrainConfig
from sr_train.options import ConfigError
from sr_train.pareto import Limits
from sr_train.presets import EDSR_PRESETS
from sr_train.sweep_config import SearchConfig, SweepConfig, sweep_from_json, sweep_to_dict, sweep_to_json
from sr_train.training_space import EDSRSpace, TrainingSpace

SWEEP = SweepConfig(
    base=EDSR_PRESETS["edsr-baseline-x4"],
    space=TrainingSpace(model=EDSRSpace()),
    search=SearchConfig(num_trials=5, search="tpe", trial_patches=1600, cost="latency_ms"),
    limits=Limits(max_parameters=100_000, max_latency_ms=12.5),
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_trials": 0}, "--num-trials=0 must be greater than 0"),
        ({"reduction_factor": 1}, "--reduction-factor=1 must be at least 2"),
        ({"trial_patches": 0}, "--trial-patches=0"),
        ({"grace_patches": -1}, "--grace-patches=-1"),
        ({"max_concurrent": 0}, "--max-concurrent=0"),
        ({"trial_patches": 10, "grace_patches": 11}, "--grace-patches=11 is more than --trial-patches=10"),
        ({"scheduler": "pbt", "search": "tpe"}, "--scheduler pbt .*--search tpe"),
        ({"scheduler": "pbt", "search": "grid"}, "--search grid"),
    ],
)
def test_what_can_not_be_searched_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**options)


def test_what_just_can_is_taken() -> None:
    SearchConfig(num_trials=1, reduction_factor=2, trial_patches=10, grace_patches=10, max_concurrent=1)
    SearchConfig(scheduler="pbt", search="random")


def read(text: str) -> SweepConfig[Any, Any]:
    return sweep_from_json(text, TrainConfig[EDSRConfig], TrainingSpace[EDSRSpace])


def test_a_saved_sweep_is_read_back_whole() -> None:
    assert read(sweep_to_json(SWEEP)) == SWEEP


def test_its_space_is_saved_as_people_write_it() -> None:
    values = json.loads(sweep_to_json(SWEEP))
    assert values["space"]["num_blocks"] == "4,8,16"
    assert values["space"]["schedule.learning_rate"] == "0.0003..0.005:log"


def changed(section: str, **options: Any) -> str:
    values = sweep_to_dict(SWEEP)
    return json.dumps({**values, section: {**values[section], **options}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (sweep_to_json(SWEEP)[:-20], "not a sweep's options"),
        ("[]", "not a sweep's options"),
        ("{}", "not a sweep's options.*base"),
        (changed("search", num_trails=3), "num_trails"),
        (changed("search", num_trials=0), "--num-trials=0"),
        (changed("search", scheduler="asap"), "scheduler.*'asha'"),
        (changed("limits", max_watts=3), "max_watts"),
        (changed("space", num_blocks="many"), "--space.num-blocks='many'"),
        (changed("base", colour="red"), "colour"),
    ],
)
def test_what_is_no_saved_sweep_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(text)
