"""Configs and flags: refused early, with the flag and what is allowed; saved and run again."""

import json
from pathlib import Path

import pytest

from sr_models.edsr import EDSRConfig
from sr_train.cli import TrainCommand, parse_train
from sr_train.config import TrainConfig, config_from_dict, config_to_dict
from sr_train.options import ConfigError
from sr_train.presets import EDSR_PRESETS
from sr_train.run_folder import CONFIG_KEY


def parse(*arguments: str) -> TrainCommand[TrainConfig[EDSRConfig]]:
    return parse_train(
        arguments,
        config_type=TrainConfig[EDSRConfig],
        presets=EDSR_PRESETS,
        default_preset="edsr-small-x2",
        prog="train_edsr.py",
        description="",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.patch-px-hr", "63"], r"63 is not a multiple of model.scale=2; use 62 or 64 \(--data.patch-px-hr\)"),
        (["--run.num-workers", "3"], r"16 can't be divided evenly by run.num_workers=3 .* use 15 or 18"),
        (["--schedule.warmup-patches", "14400"], r"not shorter than the budget .*--schedule.warmup-patches"),
        (["--preset", "edsr-x8"], r"--preset 'edsr-x8' is unknown; there are: .*edsr-baseline-x4"),
        (["--preset", "edsr-x4"], r"--data.uri"),
        (["--resume"], r"--resume needs --run.name"),
    ],
)
def test_contradictions_name_the_flags_and_what_is_allowed(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*arguments)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--data.patch-px", "64"], ["--data.patch-px", "--data.patch-px-hr"]),
        (["--optim.loss", "l3"], ["--optim.loss", "l1", "mse"]),
        (["--model.scale", "5"], ["--model.scale", "2", "3", "4"]),
        (["--run.num-workers", "0"], ["--run.num-workers", "greater than 0"]),
        (["--optim.ema-decay", "1.5"], ["--optim.ema-decay", "between 0 and 1"]),
        (["--run.name", "a/b"], ["--run.name", "letters"]),
        (["--schedule.kind", "one-cycle", "--schedule.warmup-patches", "0"], ["--schedule.warmup-patches"]),
        (["--schedule.kind", "step", "--schedule.final-fraction", "0.1"], ["--schedule.final-fraction", "cosine"]),
        (["--schedule.kind", "constant", "--schedule.final-fraction", "0.1"], ["--schedule.final-fraction", "cosine"]),
        (["--validation.early-stop-min-gain-db", "-0.1"], ["--validation.early-stop-min-gain-db", "0 or more"]),
        (["--run.gpus-per-worker", "0"], ["--run.gpus-per-worker", "greater than 0"]),
        (["--run.gpus-per-worker", "2"], ["--run.gpus-per-worker=2.0", "must be 1, or less"]),
        (["--run.gpus-per-worker", "0.5", "--run.num-workers", "2"], ["--run.gpus-per-worker=0.5", "single worker"]),
        (["--run.cost-per-hour", "-1"], ["--run.cost-per-hour", "0 or more"]),
        *[
            (["--tracking.register-as", name], ["--tracking.register-as", "letters, digits"])
            for name in ("edsr-x4-v1.2", "a/b", "a:b", "a%b", "it's", "a@b", "", " a")
        ],
        (["--tracking.experiment", " "], ["--tracking.experiment", "1 to 500"]),
        (["--tracking.experiment", "e" * 501], ["--tracking.experiment", "1 to 500"]),
    ],
)
def test_unknown_or_wrong_flags_end_with_status_2(
    arguments: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2
    said = " ".join("".join(capsys.readouterr()).split())  # tyro breaks lines
    assert all(message in said for message in messages), said


def test_what_mlflow_takes_is_taken() -> None:
    config = parse("--tracking.register-as", "My edsr_x4-v12", "--tracking.experiment", "team / x4: 1.2").config
    assert (config.tracking.register_as, config.tracking.experiment) == ("My edsr_x4-v12", "team / x4: 1.2")


@pytest.mark.parametrize(("share", "num_workers"), [("0.25", "1"), ("1", "2")])
def test_a_part_of_a_gpu_is_for_a_single_worker(share: str, num_workers: str) -> None:
    run = parse("--run.gpus-per-worker", share, "--run.num-workers", num_workers).config.run
    assert run.gpus_per_worker == float(share)


@pytest.mark.parametrize("preset", EDSR_PRESETS)
def test_a_saved_config_is_read_back_whole(preset: str) -> None:
    config = EDSR_PRESETS[preset]
    assert config_from_dict(TrainConfig[EDSRConfig], json.loads(json.dumps(config_to_dict(config)))) == config


def test_an_unknown_option_in_a_saved_config_is_named() -> None:
    values = config_to_dict(EDSR_PRESETS["edsr-small-x2"])
    values["optim"]["momentum"] = 0.9
    with pytest.raises(ConfigError, match="optim.momentum"):
        config_from_dict(TrainConfig[EDSRConfig], values)


def test_the_papers_numbers() -> None:
    """Lim et al. 2017, section 4.2, and the authors' training commands."""
    for scale in (2, 3, 4):
        baseline, full = EDSR_PRESETS[f"edsr-baseline-x{scale}"], EDSR_PRESETS[f"edsr-x{scale}"]
        assert (baseline.model.num_blocks, baseline.model.num_channels, baseline.model.residual_scaling) == (16, 64, 1)
        assert (full.model.num_blocks, full.model.num_channels, full.model.residual_scaling) == (32, 256, 0.1)
        for config in (baseline, full):
            assert config.data.patch_px_hr == 48 * scale
            assert config.optim.total_steps == 300_000 and config.optim.global_batch_size == 16
            assert config.schedule.decay_every_patches == 200_000 * 16 and config.schedule.learning_rate == 1e-4
            assert config.optim.loss == "l1"


def saved_run(storage: Path, config: TrainConfig[EDSRConfig]) -> None:
    folder = storage / "mine"
    folder.mkdir(parents=True)
    (folder / CONFIG_KEY).write_text(json.dumps(config_to_dict(config)))


def test_resume_goes_on_with_the_saved_config(tmp_path: Path) -> None:
    saved_run(tmp_path, parse("--optim.seed", "7", "--model.num-blocks", "3").config)
    again = parse("--resume", "--run.name", "mine", "--run.storage", str(tmp_path), "--optim.total-patches", "32000")
    assert (again.config.optim.seed, again.config.model.num_blocks, again.config.optim.total_patches) == (7, 3, 32_000)


def test_resume_refuses_what_would_make_it_another_run(tmp_path: Path) -> None:
    saved_run(tmp_path, parse("--optim.seed", "7").config)
    with pytest.raises(ConfigError, match=r"--optim.seed 8 \(was 7\)"):
        parse("--resume", "--run.name", "mine", "--run.storage", str(tmp_path), "--optim.seed", "8")


def test_resume_of_a_run_that_never_began_is_a_first_start(tmp_path: Path) -> None:
    command = parse("--resume", "--run.name", "new", "--run.storage", str(tmp_path))
    assert command.resume and command.config.run.name == "new"
