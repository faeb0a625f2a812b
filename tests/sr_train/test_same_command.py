"""The same command again: with --resume in it from the beginning it begins a run, goes on with it, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from sr_models.edsr import EDSRConfig
from sr_models.srresnet import SRResNetConfig
from sr_train.adversarial_config import AdversarialConfig
from sr_train.cli import TrainCommand, parse_train
from sr_train.config import TrainConfig, config_to_dict
from sr_train.options import ConfigError
from sr_train.placement import ClusterFacts
from sr_train.plan import Plan, PlanError, make_plan
from sr_train.presets import EDSR_PRESETS
from sr_train.run_folder import CONFIG_KEY
from sr_train.srgan_presets import SRGAN_PRESETS

CLUSTER = ClusterFacts(cpus_per_node=(4.0,), gpus_per_node=(0.0,))


def edsr(arguments: list[str]) -> TrainCommand[TrainConfig[EDSRConfig]]:
    kinds = {"config_type": TrainConfig[EDSRConfig], "presets": EDSR_PRESETS, "default_preset": "edsr-small-x2"}
    return parse_train(arguments, **kinds, prog="train_edsr.py", description="")


def srgan(arguments: list[str]) -> TrainCommand[AdversarialConfig[SRResNetConfig]]:
    kinds = {"config_type": AdversarialConfig[SRResNetConfig], "presets": SRGAN_PRESETS}
    return parse_train(arguments, **kinds, default_preset="srgan-small-x4", prog="train_srgan.py", description="")


def begun(command: TrainCommand[TrainConfig[EDSRConfig]]) -> Plan:
    """The run's folder as its first start leaves it."""
    plan = make_plan(command.config, CLUSTER, resume=command.resume)
    folder = Path(plan.run_uri)
    folder.mkdir(parents=True)
    (folder / CONFIG_KEY).write_text(json.dumps(config_to_dict(plan.config)))
    return plan


COMMANDS = {
    "every flag": ["--preset", "edsr-small-x2", "--optim.seed", "7", "--model.num-blocks", "1"],
    "no preset": ["--optim.seed", "7", "--run.num-workers", "2"],
    "nothing but where": [],
}


@pytest.mark.parametrize("flags", COMMANDS.values(), ids=COMMANDS)
def test_it_begins_a_run_and_then_is_the_same_run(flags: list[str], tmp_path: Path) -> None:
    command = [*flags, "--run.name", "mine", "--run.storage", str(tmp_path), "--resume"]
    first = begun(edsr(command))
    again = make_plan(edsr(command).config, CLUSTER, resume=True)
    assert again.config == first.config
    assert "begins at step 0" in " ".join(first.warnings) and again.warnings == first.warnings[1:]


def test_it_is_the_same_run_of_a_gan_too(tmp_path: Path) -> None:
    flags = ["--preset", "srgan-small-x4", "--optim.seed", "7"]
    command = [*flags, "--run.name", "mine", "--run.storage", str(tmp_path), "--resume"]
    first = srgan(command)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / CONFIG_KEY).write_text(json.dumps(config_to_dict(first.config)))
    assert srgan(command) == first
    with pytest.raises(ConfigError, match=r"--optim.seed 8 \(was 7\)"):
        srgan([*command, "--optim.seed", "8"])


def test_another_config_under_its_name_is_refused_with_each_difference(tmp_path: Path) -> None:
    where = ["--run.name", "mine", "--run.storage", str(tmp_path), "--resume"]
    begun(edsr(["--preset", "edsr-small-x2", "--optim.seed", "7", *where]))
    with pytest.raises(ConfigError) as caught:
        edsr(["--preset", "edsr-small-x2", "--model.num-blocks", "9", *where])
    assert "--model.num-blocks 9 (was 4)" in str(caught.value)
    assert "--optim.seed 0 (was 7)" in str(caught.value)  # left out, while a preset says that the command is whole
    assert "--run.name" in str(caught.value)


def test_without_resume_a_name_is_taken_once(tmp_path: Path) -> None:
    where = ["--run.name", "mine", "--run.storage", str(tmp_path)]
    begun(edsr(where))
    with pytest.raises(PlanError, match=r"run 'mine' exists at .*--resume.*another --run.name"):
        make_plan(edsr(where).config, CLUSTER, resume=False)
    assert make_plan(dataclasses.replace(edsr([*where, "--resume"]).config), CLUSTER, resume=True).goes_on_from is None
