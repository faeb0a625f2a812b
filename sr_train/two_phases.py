"""Adversarial training from nothing: the generator on pixels first, then the GAN from it, as two runs of one name."""

import dataclasses
import json
import time
from datetime import datetime
from typing import Any

from sr_data.storage import Store, open_store
from sr_train.adversarial_config import AdversarialConfig, pretraining
from sr_train.cli import TrainCommand
from sr_train.config import TrainConfig, config_to_dict
from sr_train.driver import plan_training, run_training
from sr_train.options import ConfigError
from sr_train.plan import Plan, default_name
from sr_train.run_folder import CONFIG_KEY, RESULT_KEY

Command = TrainCommand[AdversarialConfig[Any]]


def run_phases(command: Command, *, script_started_s: float) -> None:
    """Runs the phases that the command asks for, and goes on with either where it was stopped.

    Both runs are planned before the first begins, so that nothing stands against the second when its turn comes. The
    first is called NAME-pretrain; `--resume --run.name NAME` goes on with whichever is unfinished. Raises what
    `sr_train.driver.run_training` raises.
    """
    name = command.config.run.name or default_name(command.config, datetime.now())
    if command.resume:
        _require_adversarial(command.config, name)
    if command.config.checkpoint.init_from is not None or command.config.phase == "gan":
        generator = command.config.checkpoint.init_from or _pretrained(command.config)
        _gan_from(generator, _named(command, name), script_started_s)
        return
    command = _named(command, name)
    first = _first_phase(command, name)
    if command.config.phase == "pretrain":
        _note_asked(command, plan_training(first))
        best = run_training(first, script_started_s=script_started_s)
        if best is not None:
            print(f"go on      with the GAN: --resume --run.name {name} --phase gan, or elsewhere --init {best}")
        return
    plan = plan_training(command)  # before the first phase's: it finds all that stands against that one, and more
    plan_training(first)
    _note_asked(command, plan)
    print(f"phase 1 of 2: the generator alone, on {first.config.optim.loss.upper()}", flush=True)
    best = run_training(first, script_started_s=script_started_s)
    print(f"phase 2 of 2: the GAN, from {best or 'the best checkpoint of phase 1'}", flush=True)
    if best is None:
        run_training(command, script_started_s=script_started_s)
    else:
        # Its time to the first step is its own.
        _gan_from(best, dataclasses.replace(command, resume=True), time.time())


def _named(command: Command, name: str) -> Command:
    config = command.config
    return dataclasses.replace(
        command, config=dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
    )


def _first_phase(command: Command, name: str) -> TrainCommand[TrainConfig[Any]]:
    config = pretraining(command.config, name)
    before = _saved(config, f"{name}-pretrain") if command.resume else None
    if before is not None:
        # How many images are held at once was chosen for this phase's batch; the samples depend on it.
        data = dataclasses.replace(config.data, window_images=before["data"]["window_images"])
        config = dataclasses.replace(config, data=data)
    return TrainCommand(config=config, plan_only=command.plan_only, resume=command.resume, resume_name=name)


def _note_asked(command: Command, plan: Plan) -> None:
    """Saves what was asked for, so that --resume finds it by the command's name while the first phase is trained. Of
    the plan's decisions it keeps those that hold for both phases.
    """
    if command.plan_only:
        return
    config = command.config
    run = dataclasses.replace(plan.config.run, name=config.run.name)
    tracking = dataclasses.replace(config.tracking, uri=plan.config.tracking.uri)  # without a password
    asked = dataclasses.replace(config, run=run, tracking=tracking)
    _run_store(run.storage, run.name or "").write(CONFIG_KEY, json.dumps(config_to_dict(asked), indent=2).encode())


def _gan_from(generator: str, command: Command, script_started_s: float) -> None:
    checkpoint = dataclasses.replace(command.config.checkpoint, init_from=generator)
    config = dataclasses.replace(command.config, checkpoint=checkpoint)
    run_training(dataclasses.replace(command, config=config), script_started_s=script_started_s)


def _pretrained(config: AdversarialConfig[Any]) -> str:
    """The best checkpoint of this name's first phase."""
    hint = "--run.name NAME finds the first phase of that name"
    if config.run.name is not None:
        store = _run_store(config.run.storage, f"{config.run.name}-pretrain")
        if store.exists(RESULT_KEY):
            return str(json.loads(store.read_text(RESULT_KEY))["best_checkpoint"])
        hint = f"{store.uri} holds no finished first phase"
    raise ConfigError(
        f"--phase gan starts from a trained generator: give one with --init (a checkpoint, a saved model's folder "
        f"or models:/NAME), or let --phase both train it first; {hint}"
    )


def _require_adversarial(config: AdversarialConfig[Any], name: str) -> None:
    """ConfigError for the name of a first phase, which is a run of its own in storage and in MLflow."""
    saved = _saved(config, name)
    if saved is not None and "gan" not in saved:
        whole = name.removesuffix("-pretrain")
        hint = f"go on with --resume --run.name {whole}" if whole != name else "this script did not begin it"
        raise ConfigError(f"--run.name {name} is a run without a GAN, as a first phase is: {hint}")


def _saved(config: TrainConfig[Any], name: str) -> dict[str, Any] | None:
    """The config of the run of this name, if there is one."""
    store = _run_store(config.run.storage, name)
    return dict(json.loads(store.read_text(CONFIG_KEY))) if store.exists(CONFIG_KEY) else None


def _run_store(storage: str, name: str) -> Store:
    return open_store(f"{storage.rstrip('/')}/{name}")
