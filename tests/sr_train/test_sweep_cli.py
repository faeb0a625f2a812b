"""Command lines of sweeps: texts of domains, refusals with the flag's name, and what --resume lets change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sr_data.storage import open_store
from sr_models.edsr import EDSRConfig
from sr_train.config import TrainConfig
from sr_train.options import ConfigError
from sr_train.presets import EDSR_PRESETS
from sr_train.search_space import Floats, Ints, Names
from sr_train.sweep import SweepCommand
from sr_train.sweep_cli import parse_sweep
from sr_train.sweep_config import SearchConfig, SweepConfig, sweep_to_json
from sr_train.sweep_plan import SWEEP_KEY, with_budgets
from sr_train.training_space import EDSRSpace, TrainingSpace


def space_of(base: TrainConfig[EDSRConfig]) -> TrainingSpace[EDSRSpace]:
    return TrainingSpace(model=EDSRSpace(num_blocks=Ints(values=(base.model.num_blocks, 99))))


def parse(*arguments: str) -> SweepCommand:
    return parse_sweep(
        arguments,
        config_type=TrainConfig[EDSRConfig],
        space_type=TrainingSpace[EDSRSpace],
        space_of=space_of,
        presets=EDSR_PRESETS,
        default_preset="edsr-small-x2",
        prog="tune_edsr.py",
        description="",
    )


def test_without_flags_it_is_the_preset_and_the_space_around_it() -> None:
    command, base = parse(), EDSR_PRESETS["edsr-small-x2"]
    assert command.config.base == base
    assert command.config.space == space_of(base)
    assert command.config.search == SearchConfig()
    assert (command.plan_only, command.resume, command.retrain) == (False, False, False)


def test_domains_are_read_from_one_text_each() -> None:
    command = parse(
        *("--space.num-blocks", "8,16,32", "--space.num-channels=16..64:16"),
        *("--space.schedule.kind", "step,constant", "--space.schedule.learning-rate", "1e-4..1e-2:log"),
    )
    space = command.config.space
    assert space.model.num_blocks == Ints(values=(8, 16, 32))
    assert space.model.num_channels == Ints(values=(16, 32, 48, 64))
    assert space.schedule.kind == Names(values=("step", "constant"))
    assert space.schedule.learning_rate == Floats(values=(1e-4, 1e-2), spread="log")
    assert space.schedule.warmup_fraction == space_of(command.config.base).schedule.warmup_fraction


def test_the_models_options_have_their_long_names_too() -> None:
    assert parse("--space.model.num-blocks", "3").config == parse("--space.num-blocks", "3").config


def test_search_limits_and_the_run_itself_have_flags() -> None:
    command = parse(
        *("--num-trials", "7", "--search", "tpe", "--scheduler", "none", "--limits.max-gflops", "10"),
        *("--run.gpus-per-worker", "0.25", "--preset", "edsr-baseline-x4", "--data.uri", "s3://bucket/div2k"),
        *("--plan", "--retrain"),
    )
    config = command.config
    assert config.search == SearchConfig(num_trials=7, search="tpe", scheduler="none")
    assert (config.limits.max_gflops, config.limits.max_parameters) == (10.0, None)
    assert (config.base.run.gpus_per_worker, config.base.model.scale) == (0.25, 4)
    assert config.space == space_of(EDSR_PRESETS["edsr-baseline-x4"])
    assert (command.plan_only, command.retrain, command.resume) == (True, True, False)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--space.num-blocks", "many"], ["--space.model.num-blocks", "'many' is not a whole number"]),
        (["--space.num-blocks", "8..4"], ["--space.model.num-blocks", "8 is greater than 4"]),
        (["--space.num-blocks", "8,8"], ["--space.model.num-blocks", "more than once"]),
        (["--space.schedule.learning-rate", "0..1:log"], ["--space.schedule.learning-rate", "above 0"]),
        (["--space.schedule.kind", "a..b"], ["--space.schedule.kind", "only numbers have ranges"]),
        (["--search", "all"], ["--search", "random", "grid", "tpe"]),
        (["--limits.max-gflops", "-1"], ["--limits.max-gflops", "greater than 0"]),
        (["--space.blocks", "8"], ["--space.blocks"]),
    ],
)
def test_bad_texts_end_with_status_2_and_the_flag(
    arguments: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    said = " ".join("".join(capsys.readouterr()).replace("│", " ").split())  # tyro breaks lines, in a box
    assert all(message in said for message in messages), said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "edsr-x8"], "--preset 'edsr-x8' is unknown; there are: .*edsr-baseline-x4"),
        (["--preset", "edsr-x4"], "preset edsr-x4 trains on a dataset of yours.*--data.uri"),
        (["--resume"], "--resume needs --run.name"),
        (["--num-trials", "0"], "--num-trials=0 must be greater than 0"),
        (["--scheduler", "pbt", "--search", "tpe"], "--scheduler pbt .*--search tpe"),
    ],
)
def test_contradictions_name_the_flags(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*arguments)


@pytest.fixture
def begun(tmp_path: Path) -> list[str]:
    """The flags that go on with a sweep that was begun with other options than the default."""
    config = parse("--space.num-blocks", "2,4", "--num-trials", "4", "--search-seed", "7", "--optim.seed", "5").config
    save(tmp_path, config)
    return ["--resume", "--run.name", "mine", "--run.storage", str(tmp_path)]


def save(storage: Path, config: SweepConfig[TrainConfig[EDSRConfig], EDSRSpace]) -> None:
    """As a sweep saves it: what its user asked for."""
    run = replace(
        config.base.run, name="mine", storage=str(storage), device="cuda", cpus_per_worker=3.0, threads_per_worker=3
    )
    tracking = replace(config.base.tracking, uri="https://me:***@mlflow.example.org", register_as="edsr-x2")
    search = replace(config.search, max_concurrent=9)
    base = replace(config.base, run=run, tracking=tracking)
    open_store(str(storage)).write(
        f"mine/{SWEEP_KEY}", sweep_to_json(replace(config, base=base, search=search)).encode()
    )


def test_resume_goes_on_with_the_saved_options(begun: list[str]) -> None:
    command = parse(*begun)
    config = command.config
    assert command.resume and config.space.model.num_blocks == Ints(values=(2, 4))
    assert (config.search.num_trials, config.search.search_seed, config.base.optim.seed) == (4, 7, 5)


def test_resume_keeps_what_was_asked_for_but_the_password(begun: list[str]) -> None:
    config = parse(*begun).config
    run = config.base.run
    assert (run.device, run.cpus_per_worker, run.threads_per_worker) == ("cuda", 3.0, 3)
    assert (config.search.max_concurrent, config.base.tracking.uri) == (9, None)
    assert config.base.tracking.register_as == "edsr-x2"


def test_resume_takes_more_trials_and_other_limits(begun: list[str]) -> None:
    more = ["--num-trials", "9", "--max-concurrent", "1", "--limits.max-gflops", "5", "--optim.total-patches", "99999"]
    config = parse(*begun, *more, "--run.device", "cpu", "--cost", "parameters").config
    assert (config.search.num_trials, config.search.max_concurrent, config.search.cost) == (9, 1, "parameters")
    assert (config.limits.max_gflops, config.base.optim.total_patches) == (5.0, 99_999)
    assert config.space.model.num_blocks == Ints(values=(2, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space.num-blocks", "2,4,8"], r"sweep 'mine' .* --space.num-blocks 2,4,8 \(was 2,4\)"),
        (["--space.schedule.kind", "step"], r"--space.schedule.kind step \(was step,cosine,one-cycle\)"),
        (["--search", "grid"], r"--search grid \(was random\)"),
        (["--search-seed", "1"], r"--search-seed 1 \(was 7\)"),
        (["--trial-patches", "800"], r"--trial-patches 800 \(was 2400\)"),
        (["--optim.seed", "6"], r"--optim.seed 6 \(was 5\).*another --run.name"),
        (["--preset", "edsr-small-x2"], r"--optim.seed 0 \(was 5\)"),
    ],
)
def test_resume_refuses_what_trials_have_in_common(begun: list[str], arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*begun, *arguments)


def test_a_job_that_is_submitted_again_with_its_preset_goes_on(begun: list[str], tmp_path: Path) -> None:
    same = ["--preset", "edsr-small-x2", "--space.num-blocks", "2,4", "--num-trials", "4", "--search-seed", "7"]
    config = parse(*begun, *same, "--optim.seed", "5").config
    assert (config.search.num_trials, config.space.model.num_blocks) == (4, Ints(values=(2, 4)))


def test_a_trials_budget_stays_where_the_full_one_changes(begun: list[str]) -> None:
    before = with_budgets(parse(*begun).config)
    after = with_budgets(parse(*begun, "--optim.total-patches", "99999").config)
    assert (after.trial_patches, after.grace_patches) == (before.trial_patches, before.grace_patches)


def test_resume_of_a_sweep_that_never_began_is_a_first_start(tmp_path: Path) -> None:
    command = parse("--resume", "--run.name", "new", "--run.storage", str(tmp_path))
    assert command.resume and command.config.base.run.name == "new"
    assert command.config.search == SearchConfig()


def test_saved_options_that_cannot_be_read_are_named(begun: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine" / SWEEP_KEY).write_text("{")
    with pytest.raises(ConfigError, match=rf"mine/{SWEEP_KEY}: --resume needs this sweep's options"):
        parse(*begun)
