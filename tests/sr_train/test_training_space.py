"""From a space's texts to the configs of its runs, and what is refused before any of them is trained."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from sr_models.edsr import EDSRConfig
from sr_models.srresnet import SRResNetConfig
from sr_train.config import TrainConfig
from sr_train.options import ConfigError, DataConfig, OptimConfig, RunConfig, ScheduleConfig
from sr_train.presets import EDSR_PRESETS
from sr_train.search_space import Floats, Ints, Names, draw_samples, grid
from sr_train.training_space import (
    EDSRSpace,
    ScheduleSpace,
    TrainingSpace,
    canonical,
    check_space,
    configure,
    domains_of,
    space_from_dict,
    space_to_dict,
    trial_name,
)
from sr_train.trial_record import Value

BASE = EDSR_PRESETS["edsr-small-x2"]
TOTAL = 1600
STEP: dict[str, Value] = {
    "num_blocks": 8,
    "num_channels": 32,
    "schedule.kind": "step",
    "schedule.learning_rate": 0.001,
    "schedule.warmup_fraction": 0.1,
    "schedule.decay_every_fraction": 0.25,
    "global_batch_size": 32,
    "patch_px_hr": 64,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingSpace:
    """Another model's space: domains called like fields of its config."""

    residual_scaling: Floats = field(default=Floats.parse("0.1,1"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpace:
    num_layers: Ints = field(default=Ints.parse("2,4"))


def space(model: Any = None, **options: Any) -> TrainingSpace[Any]:
    """The default space with other texts: `kind`, `patch_px_hr` …"""
    schedule = {name: options.pop(name) for name in list(options) if name in ScheduleSpace.__dataclass_fields__}
    values = space_to_dict(TrainingSpace(model=EDSRSpace()))
    values |= {f"schedule.{name}": text for name, text in schedule.items()} | options
    made = space_from_dict(TrainingSpace[EDSRSpace], values)
    return made if model is None else replace(made, model=model)


def test_a_sample_becomes_a_config() -> None:
    config = configure(BASE, STEP, total_patches=TOTAL)
    assert config == replace(
        BASE,
        model=EDSRConfig(scale=2, num_blocks=8, num_channels=32),
        data=DataConfig(patch_px_hr=64),
        optim=replace(BASE.optim, total_patches=1600, global_batch_size=32),
        schedule=ScheduleConfig(kind="step", learning_rate=0.001, warmup_patches=160, decay_every_patches=400),
    )


def test_fractions_carry_over_to_another_budget() -> None:
    small, full = (configure(BASE, STEP, total_patches=total).schedule for total in (1_600, 160_000))
    assert (full.warmup_patches, full.decay_every_patches) == (16_000, 40_000)
    assert full.warmup_patches == 100 * small.warmup_patches


def test_a_decay_is_at_least_one_patch() -> None:
    config = configure(BASE, {**STEP, "schedule.decay_every_fraction": 1e-6}, total_patches=TOTAL)
    assert config.schedule.decay_every_patches == 1


@pytest.mark.parametrize(("kind", "final"), [("step", 0.0), ("constant", 0.0), ("cosine", 0.1), ("one-cycle", 0.1)])
def test_the_final_fraction_stays_where_it_has_a_meaning(kind: str, final: float) -> None:
    base = replace(BASE, schedule=replace(BASE.schedule, final_fraction=0.1))
    config = configure(base, {**STEP, "schedule.kind": kind}, total_patches=TOTAL)
    assert (config.schedule.kind, config.schedule.final_fraction) == (kind, final)


def test_what_a_sample_does_not_name_stays() -> None:
    assert configure(BASE, {}, total_patches=BASE.optim.total_patches) == BASE
    half = configure(BASE, {"num_blocks": 2}, total_patches=BASE.optim.total_patches // 2)
    assert half.model.num_blocks == 2 and half.model.num_channels == BASE.model.num_channels
    assert half.schedule.warmup_patches == BASE.schedule.warmup_patches // 2


def test_numbers_get_the_type_that_the_option_has() -> None:
    """As flags would give them: a resumed run compares its options as texts, where 8 is not 8.0."""
    floats = {name: float(value) if isinstance(value, int) else value for name, value in STEP.items()}
    sample = {**floats, "residual_scaling": 1}
    assert repr(configure(BASE, sample, total_patches=TOTAL)) == repr(configure(BASE, STEP, total_patches=TOTAL))


def test_any_models_config_can_be_swept() -> None:
    base = TrainConfig(model=SRResNetConfig(scale=2), data=DataConfig(patch_px_hr=48))
    check_space(space(), base, total_patches=TOTAL)
    config = configure(base, STEP, total_patches=TOTAL)
    assert config.model == SRResNetConfig(scale=2, num_blocks=8, num_channels=32)
    check_space(space(ScalingSpace()), BASE, total_patches=TOTAL)
    scaled = configure(BASE, {"residual_scaling": 0.1}, total_patches=TOTAL)
    assert scaled.model == replace(BASE.model, residual_scaling=0.1)


def test_only_steps_depend_on_the_decay() -> None:
    cosine = {**STEP, "schedule.kind": "cosine"}
    other = {**cosine, "schedule.decay_every_fraction": 0.5}
    assert canonical(cosine) == canonical(other) == {k: v for k, v in cosine.items() if "decay" not in k}
    assert canonical(STEP) == STEP
    assert configure(BASE, cosine, total_patches=TOTAL) == configure(BASE, other, total_patches=TOTAL)


def test_canonical_samples_have_one_order() -> None:
    assert list(canonical(dict(reversed(STEP.items())))) == list(STEP)


def test_a_trials_name_is_what_it_trains() -> None:
    name = trial_name(STEP)
    assert name.startswith("trial-") and len(name) == 14 and int(name[6:], 16) >= 0
    assert trial_name(dict(reversed(STEP.items()))) == trial_name({**STEP, "num_blocks": 8.0}) == name
    others = [{**STEP, key: value} for key, value in (("num_blocks", 4), ("schedule.decay_every_fraction", 0.5))]
    cosine = [{**STEP, "schedule.kind": "cosine", "schedule.decay_every_fraction": decay} for decay in (0.25, 0.5)]
    assert len({name, *map(trial_name, others)}) == 3
    assert len({name, *map(trial_name, cosine)}) == 2


def test_the_default_space() -> None:
    """Blocks × channels × (two decays of step, cosine, one-cycle), with the learning rate given."""
    default = TrainingSpace(model=EDSRSpace())
    check_space(default, BASE, total_patches=TOTAL)
    assert list(domains_of(default)) == list(STEP)
    samples = grid(domains_of(space(learning_rate="1e-3")), canonical)
    assert len(samples) == 3 * 2 * (2 + 1 + 1)
    assert len({trial_name(sample) for sample in samples}) == len(samples)
    with pytest.raises(ConfigError, match=r"schedule\.learning_rate="):
        grid(domains_of(default), canonical)


def test_every_drawn_sample_gives_a_run() -> None:
    wide = space(
        num_blocks="1..8", num_channels="1..64:log", warmup_fraction="0.01..0.9", patch_px_hr="16..64:2",
        kind="constant,step,cosine,one-cycle", decay_every_fraction="0.001..1:log",
    )  # fmt: skip
    check_space(wide, BASE, total_patches=TOTAL)
    for sample in draw_samples(domains_of(wide), num_samples=200, seed=0, canonical=canonical):
        config = configure(BASE, sample, total_patches=TOTAL)
        assert (config.model.num_blocks, config.data.patch_px_hr) == (sample["num_blocks"], sample["patch_px_hr"])


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"patch_px_hr": "48,47"}, ["--space.patch-px-hr=47", "multiple of model.scale=2", "46 or 48"]),
        ({"patch_px_hr": "46..48"}, ["--space.patch-px-hr=47"]),
        ({"global_batch_size": "16,9"}, ["--space.global-batch-size=9", "run.num_workers=2", "accumulation_steps=2"]),
        ({"kind": "step,cosin"}, ["--space.schedule.kind=cosin", "constant, step, cosine, one-cycle"]),
        ({"learning_rate": "0..1e-3"}, ["--space.schedule.learning-rate=0.0", "greater than 0"]),
        ({"num_blocks": "0..4"}, ["--space.num-blocks=0", "at least 1"]),
        ({"num_channels": "-8,8"}, ["--space.num-channels=-8", "at least 1"]),
        ({"warmup_fraction": "-0.1..0.1"}, ["--space.schedule.warmup-fraction=-0.1", "[0, 1)"]),
        ({"warmup_fraction": "0.1..1"}, ["--space.schedule.warmup-fraction=1.0", "[0, 1)"]),
        ({"warmup_fraction": "0.9999"}, ["--space.schedule.warmup-fraction=0.9999", "not shorter than the budget"]),
        ({"decay_every_fraction": "0,1"}, ["--space.schedule.decay-every-fraction=0.0", "(0, 1]"]),
        ({"decay_every_fraction": "0.5..1.5"}, ["--space.schedule.decay-every-fraction=1.5", "(0, 1]"]),
        (
            {"warmup_fraction": "0..0.1"},
            ["--space.schedule.kind=one-cycle", "--space.schedule.warmup-fraction=0.0", "greater than 0"],
        ),
        (
            {"warmup_fraction": "1e-4"},
            ["--space.schedule.kind=one-cycle", "1600 patches", "--space.schedule.warmup-fraction=0.0001"],
        ),
        ({"model": LayerSpace()}, ["--space.num-layers=2,4", "EDSRConfig has no num_layers", "num_blocks"]),
    ],
)
def test_what_gives_no_run_is_refused_by_its_flag(options: dict[str, Any], messages: list[str]) -> None:
    base = replace(BASE, optim=replace(BASE.optim, accumulation_steps=2), run=RunConfig(num_workers=2))
    with pytest.raises(ConfigError) as refused:
        check_space(space(**options), base, total_patches=TOTAL)
    assert all(message in str(refused.value) for message in messages), refused.value
    assert "\n" not in str(refused.value), "one problem, one line"


@pytest.mark.parametrize("kind", ["step", "constant,cosine"])
def test_kinds_without_a_rising_part_need_no_warm_up(kind: str) -> None:
    """Whatever the base's own schedule is."""
    for schedule in (BASE.schedule, ScheduleConfig(kind="cosine", final_fraction=0.1)):
        check_space(space(kind=kind, warmup_fraction="0"), replace(BASE, schedule=schedule), total_patches=TOTAL)


def test_all_problems_are_said_at_once_and_long_lists_are_cut() -> None:
    with pytest.raises(ConfigError) as refused:
        check_space(space(patch_px_hr="41..60", num_blocks="0,-1"), BASE, total_patches=TOTAL)
    lines = str(refused.value).splitlines()
    patches = [line for line in lines if line.startswith("- --space.patch-px-hr")]
    assert len(patches) == 4 and patches[-1].endswith("7 more values are refused")
    assert sum(line.startswith("- --space.num-blocks=") for line in lines) == 2


def test_a_budget_that_no_run_can_have_is_said_as_such() -> None:
    with pytest.raises(ConfigError, match=r"^--optim.total-patches=0 must be greater than 0$"):
        check_space(space(), BASE, total_patches=0)


def test_a_large_range_is_checked_at_its_ends() -> None:
    base = TrainConfig(model=EDSRConfig(scale=2), data=DataConfig(patch_px_hr=48), optim=OptimConfig())
    check_space(space(num_channels="1..1000000"), base, total_patches=TOTAL)
    with pytest.raises(ConfigError, match=r"--space.num-channels=0: "):
        check_space(space(num_channels="0..1000000"), base, total_patches=TOTAL)


def test_texts_give_the_space_back() -> None:
    varied = space(num_blocks="4..32:4", learning_rate="1e-5..1e-2:log", kind="step", patch_px_hr="48,96")
    texts = space_to_dict(varied)
    assert list(texts) == list(STEP)
    assert texts["num_blocks"] == "4..32:4" and texts["schedule.kind"] == "step"
    assert space_from_dict(TrainingSpace[EDSRSpace], texts) == varied
    other = TrainingSpace(model=ScalingSpace(), schedule=ScheduleSpace(kind=Names.parse("cosine")))
    assert space_from_dict(TrainingSpace[ScalingSpace], space_to_dict(other)) == other


def test_texts_that_give_no_space_are_named_by_their_flags() -> None:
    texts = space_to_dict(space()) | {"num_blocks": "many", "num_layers": "3"}
    del texts["schedule.kind"]
    with pytest.raises(ConfigError) as refused:
        space_from_dict(TrainingSpace[EDSRSpace], texts)
    for message in ("--space.num-blocks='many'", "--space.num-layers is unknown", "--space.schedule.kind is missing"):
        assert message in str(refused.value)
