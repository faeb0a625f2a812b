"""Command line → sweep: a preset, or the saved options of a sweep to go on with, plus overrides as typed flags."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Generic, get_args

import tyro

from sr_data.errors import StorageError
from sr_data.storage import open_store
from sr_train.cli import given, unaliased
from sr_train.config import ConfigT, flatten
from sr_train.options import ConfigError
from sr_train.pareto import Limits
from sr_train.search_space import Domain
from sr_train.sweep import SweepCommand
from sr_train.sweep_config import SearchConfig, SweepConfig, sweep_from_json, sweep_to_dict
from sr_train.sweep_plan import SWEEP_KEY, with_budgets
from sr_train.training_space import ModelSpaceT, TrainingSpace

# What a sweep that goes on may change: how many trials, how many at once, where, and what the result is judged by.
_MAY_CHANGE_ON_RESUME = (
    "search.num_trials",
    "search.max_concurrent",
    "search.cost",
    "limits.",
    "base.run.",
    "base.tracking.",
    "base.data.uri",
    "base.validation.uri",
    "base.data.pool_gib",
    "base.data.decode_threads",
    "base.optim.total_patches",
)


@dataclass(frozen=True, kw_only=True)
class _Options(Generic[ConfigT, ModelSpaceT]):
    """What the flags of a tuning script are."""

    base: Annotated[ConfigT, tyro.conf.arg(name="")]
    search: Annotated[SearchConfig, tyro.conf.arg(name="")]
    space: TrainingSpace[ModelSpaceT]
    limits: Limits
    preset: str
    """Named config of the run that trials vary."""
    plan: tyro.conf.FlagCreatePairsOff[bool] = False
    """Check everything, print the resolved sweep, train nothing."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on with the sweep --run.name: trials that are over are not run again, others go on from their checkpoints."""
    retrain: tyro.conf.FlagCreatePairsOff[bool] = False
    """Train the winner anew with the full budget (--optim.total-patches), and register that too."""


def parse_sweep(
    arguments: Sequence[str],
    *,
    config_type: type[ConfigT],
    space_type: type[TrainingSpace[ModelSpaceT]],
    space_of: Callable[[ConfigT], TrainingSpace[ModelSpaceT]],
    presets: Mapping[str, ConfigT],
    default_preset: str,
    prog: str,
    description: str,
) -> SweepCommand:
    """Exits with status 2 and the flag's name on an unknown flag or a wrong value (ConfigError for contradictory ones).

    `space_of` gives the default space around a preset. With --resume, the saved options of --run.name are what the
    other flags override.
    """
    (model_type,) = get_args(space_type)
    aliases = {f"--space.{_flag(item.name)}": f"--space.model.{_flag(item.name)}" for item in fields(model_type)}
    arguments = [unaliased(argument, aliases) for argument in arguments]
    preset = given(arguments, "--preset")
    if preset is not None and preset not in presets:
        raise ConfigError(f"--preset {preset!r} is unknown; there are: {', '.join(presets)}")
    base = presets[preset or default_preset]
    default = SweepConfig(base=base, space=space_of(base), search=SearchConfig(), limits=Limits())
    saved = _saved(arguments, default, config_type, space_type) if "--resume" in arguments else None
    start = default
    if saved is not None and preset is None:
        # A trial's budget stays, also where the full one, of which it was a part, is changed.
        start = replace(saved, search=with_budgets(saved))
    with _registry():
        options = tyro.cli(
            _Options[config_type, model_type],  # type: ignore[valid-type]
            default=_Options(
                base=start.base,
                search=start.search,
                space=start.space,
                limits=start.limits,
                preset=preset or default_preset,
            ),
            args=list(arguments),
            prog=prog,
            description=f"{description}\n\nPresets: {', '.join(presets)}.\n\n{', '.join(aliases)} are enough for "
            f"{', '.join(aliases.values())}.",
        )
    config = SweepConfig(base=options.base, space=options.space, search=options.search, limits=options.limits)
    if saved is not None:
        _require_same(saved, config)
    if not config.base.data.uri:
        raise ConfigError(
            f"preset {preset or default_preset} trains on a dataset of yours: give its place with --data.uri, for "
            f"example s3://bucket/div2k"
        )
    return SweepCommand(config=config, plan_only=options.plan, resume=options.resume, retrain=options.retrain)


def _registry() -> tyro.constructors.ConstructorRegistry:
    """With the rule that a domain is one argument, read by its own `parse`."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def domain_rule(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        if not (isinstance(info.type, type) and issubclass(info.type, Domain)):
            return None
        domain_type = info.type
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=domain_type.forms,
            instance_from_str=lambda texts: domain_type.parse(texts[0]),
            is_instance=lambda value: isinstance(value, domain_type),
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _saved(
    arguments: Sequence[str],
    default: SweepConfig[ConfigT, ModelSpaceT],
    config_type: type[ConfigT],
    space_type: type[TrainingSpace[ModelSpaceT]],
) -> SweepConfig[ConfigT, ModelSpaceT] | None:
    """The options that a sweep of that name left in its folder; None if there is no such sweep yet."""
    name = given(arguments, "--run.name") or default.base.run.name
    try:
        storage = open_store(given(arguments, "--run.storage") or default.base.run.storage)
        if name is None:
            raise ConfigError(f"--resume needs --run.name: which sweep below --run.storage {storage.uri} to go on with")
        key = f"{name}/{SWEEP_KEY}"
        text = storage.read_text(key) if storage.exists(key) else None
    except StorageError as error:
        raise StorageError(f"the sweep's folder (--run.storage): {error}") from error
    if text is None:
        return None
    try:
        saved = sweep_from_json(text, config_type, space_type)
    except ValueError as error:
        raise ConfigError(f"{storage.uri_of(key)}: --resume needs this sweep's options: {error}") from error
    tracking = saved.base.tracking
    if tracking.uri is not None and "***@" in tracking.uri:  # saved without its password: the environment has it
        saved = replace(saved, base=replace(saved.base, tracking=replace(tracking, uri=None)))
    return saved


def _require_same(saved: SweepConfig[Any, Any], asked: SweepConfig[Any, Any]) -> None:
    before, after = (flatten(sweep_to_dict(replace(one, search=with_budgets(one)))) for one in (saved, asked))
    changed = [
        f"--{_flag(name.removeprefix('base.').removeprefix('search.'))} {after[name]} (was {before.get(name)})"
        for name in after
        if before.get(name) != after[name] and not name.startswith(_MAY_CHANGE_ON_RESUME)
    ]
    if changed:
        raise ConfigError(
            f"--resume can't change what the trials of sweep {asked.base.run.name!r} have in common: "
            f"{'; '.join(changed)}. Leave these out to go on, or start another sweep with another --run.name."
        )


def _flag(name: str) -> str:
    return name.replace("_", "-")
