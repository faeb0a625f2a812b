"""Command line → config: a preset, or the saved config of a run to resume, plus overrides as typed flags."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Generic, NoReturn

import tyro

from sr_data.errors import StorageError
from sr_data.storage import open_store
from sr_train.config import ConfigT, config_from_dict, config_to_dict, flatten
from sr_train.options import ConfigError
from sr_train.run_folder import CONFIG_KEY

# What a resumed run may change: how long, where and how watched, but nothing that earlier samples or updates depended
# on.
_MAY_CHANGE_ON_RESUME = (
    "run.",
    "tracking.",
    "checkpoint.",
    "validation.interval",
    "validation.tile",
    "validation.early",
    # Which images these mean is checked by the plan: a dataset may have moved.
    "validation.uri",
    "validation.split",
    "validation.layout",
    "validation.num_images",
    "data.uri",
    "data.pool_gib",
    "data.placement",
    "data.decode_threads",
    "data.on_bad_image",
    "optim.total_patches",
    # What another machine may not have; the arithmetic (precision, layout, optimiser) stays.
    "step.compile",
    "step.cuda_graph",
    "step.batch_ahead",
    # Of adversarial runs: which phases are trained now, and what is only measured.
    "phase",
    "perceptual.lpips_weights",
    "watchdog.",
)


@dataclass(frozen=True, kw_only=True)
class TrainCommand(Generic[ConfigT]):
    """What was asked for."""

    config: ConfigT
    plan_only: bool
    resume: bool
    resume_name: str | None = None
    """The --run.name by which the user goes on with it; the run's own when not given."""
    parent_run_id: str | None = None
    """The MLflow run that it belongs to, where there is one."""


@dataclass(frozen=True, kw_only=True)
class _Options(Generic[ConfigT]):
    """What the flags of a training script are."""

    config: Annotated[ConfigT, tyro.conf.arg(name="")]
    preset: str
    """Named config to start from."""
    plan: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check everything, print the resolved plan, train nothing."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with the run --run.name from its newest checkpoint, if it has one."""


def parse_train(
    arguments: Sequence[str],
    *,
    config_type: type[ConfigT],
    presets: Mapping[str, ConfigT],
    default_preset: str,
    prog: str,
    description: str,
    aliases: Mapping[str, str] | None = None,
) -> TrainCommand[ConfigT]:
    """Exits with status 2 and the flag's name on an unknown flag or a wrong value (ConfigError for contradictory ones).

    With --resume and no --preset, the saved config of --run.name is what the other flags override. `aliases` are
    shorter names of flags.
    """
    arguments = [unaliased(argument, aliases or {}) for argument in arguments]
    preset = given(arguments, "--preset")
    if preset is not None and preset not in presets:
        raise ConfigError(f"--preset {preset!r} is unknown; there are: {', '.join(presets)}")
    base = presets[preset or default_preset]

    def parse(default: ConfigT) -> _Options[ConfigT]:
        return tyro.cli(
            _Options[config_type],  # type: ignore[valid-type]
            default=_Options(config=default, preset=preset or default_preset),
            args=list(arguments),
            prog=prog,
            description=f"{description}\n\nPresets: {', '.join(presets)}.",
        )

    # Before the other flags are parsed: they override what the run was begun with, not a preset.
    saved = _saved_config(arguments, base, config_type) if "--resume" in arguments else None
    options = parse(saved if saved is not None and preset is None else base)
    config = options.config
    if saved is not None:
        config = resumed(saved, config)
        _require_same_run(saved, config)
    if not config.data.uri:
        raise ConfigError(
            f"preset {preset or default_preset} trains on a dataset of yours: give its place with --data.uri, for "
            f"example s3://bucket/div2k"
        )
    return TrainCommand(config=config, plan_only=options.plan, resume=options.resume)


def unaliased(argument: str, aliases: Mapping[str, str]) -> str:
    """The argument with the flag that an alias stands for."""
    flag, equals, value = argument.partition("=")
    return f"{aliases.get(flag, flag)}{equals}{value}"


def given(arguments: Sequence[str], flag: str) -> str | None:
    """The text that follows a flag, before flags are parsed; None if it is not there."""
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
    return None


def _saved_config(arguments: Sequence[str], base: ConfigT, config_type: type[ConfigT]) -> ConfigT | None:
    """The config that a run of that name left in its folder; None if there is no such run yet."""
    name = given(arguments, "--run.name") or base.run.name
    try:
        storage = open_store(given(arguments, "--run.storage") or base.run.storage)
        if name is None:
            raise ConfigError(f"--resume needs --run.name: which run below --run.storage {storage.uri} to go on with")
        key = f"{name}/{CONFIG_KEY}"
        text = storage.read_text(key) if storage.exists(key) else None
    except StorageError as error:
        raise StorageError(f"the run's folder (--run.storage): {error}") from error
    if text is None:
        return None
    try:
        return config_from_dict(config_type, json.loads(text))
    except ValueError as error:  # no JSON, or not of this version
        raise ConfigError(
            f"{storage.uri_of(key)}: --resume needs this run's config and can't read it: {error}"
        ) from error


def resumed(saved: ConfigT, asked: ConfigT) -> ConfigT:
    """What the plan had resolved is kept where samples or sums depend on it, and left open where it no longer fits."""
    run, data = asked.run, asked.data
    if run.num_workers != saved.run.num_workers:
        if run.cpus_per_worker == saved.run.cpus_per_worker:
            run = replace(run, cpus_per_worker=None)
        if run.threads_per_worker == saved.run.threads_per_worker:
            run = replace(run, threads_per_worker=None)
    elif run.threads_per_worker is None:
        run = replace(run, threads_per_worker=saved.run.threads_per_worker)
    if data.window_images is None:
        data = replace(data, window_images=saved.data.window_images)
    tracking = asked.tracking
    if tracking.uri is not None and "***@" in tracking.uri:  # saved without its password: the environment has it
        tracking = replace(tracking, uri=None)
    return replace(asked, run=run, data=data, tracking=tracking)


def _require_same_run(saved: ConfigT, asked: ConfigT) -> None:
    before, after = flatten(config_to_dict(saved)), flatten(config_to_dict(asked))
    changed = [
        f"--{name.replace('_', '-')} {after[name]} (was {before[name]})"
        for name in after
        if before.get(name) != after[name] and not name.startswith(_MAY_CHANGE_ON_RESUME)
    ]
    if changed:
        raise ConfigError(
            f"--resume can't change what run {asked.run.name!r} was trained with: {'; '.join(changed)}. "
            f"Leave these out to go on, or start another run with another --run.name."
        )


def exit_with(error: Exception) -> NoReturn:
    """Ends a pipeline on an error that the user can mend: its message on stderr, status 2, no traceback."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
