"""Options of a sweep: which trials, how far each is trained, and what they may cost."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from sr_train.config import ConfigT, config_from_dict, config_to_dict
from sr_train.options import ConfigError, require, require_positive
from sr_train.pareto import CostName, Limits
from sr_train.training_space import ModelSpaceT, TrainingSpace, space_from_dict, space_to_dict

OptionsT = TypeVar("OptionsT")

TRIAL_SHARE = 4
"""A trial sees a quarter of the full budget unless told otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """Which trials there are, and how they are stopped."""

    num_trials: int = 12
    """Trials of the sweep; a grid has as many as it has points."""
    search: Literal["random", "grid", "tpe"] = "random"
    """How points of the space are chosen: at random, all of them, or by Optuna's TPE from the results so far."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """asha stops trials that fall behind; pbt lets the worst go on from the best, with another learning rate; none
    trains all to the end."""
    trial_patches: int | None = None
    """Budget of a trial, in patches seen; a quarter of optim.total-patches when not given."""
    grace_patches: int | None = None
    """Patches between validations of a trial, and before the first decision about it; a ninth of its budget when not
    given."""
    reduction_factor: int = 3
    """asha: one in so many trials goes on to the next rung, which is so many times as long."""
    max_concurrent: int | None = None
    """Trials at once; as many as the cluster holds when not given."""
    search_seed: int = 0
    """Decides which points are drawn."""
    cost: CostName = "gflops"
    """What the Pareto table and plot set PSNR against: parameters, arithmetic or measured latency for an output of
    1280×720."""

    def __post_init__(self) -> None:
        require_positive(num_trials=self.num_trials)
        require(self.reduction_factor >= 2, f"--reduction-factor={self.reduction_factor} must be at least 2")
        for flag, value in (
            ("trial_patches", self.trial_patches),
            ("grace_patches", self.grace_patches),
            ("max_concurrent", self.max_concurrent),
        ):
            if value is not None:
                require_positive(**{flag: value})
        if self.trial_patches is not None and self.grace_patches is not None:
            require(
                self.grace_patches <= self.trial_patches,
                f"--grace-patches={self.grace_patches} is more than --trial-patches={self.trial_patches}",
            )
        require(
            self.scheduler != "pbt" or self.search == "random",
            f"--scheduler pbt begins with random points: --search {self.search} does not go with it",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig(Generic[ConfigT, ModelSpaceT]):
    """A whole sweep: the run that its trials vary, and how."""

    base: ConfigT
    """What trials have in common; its name, storage and tracking are the sweep's, its budget that of `--retrain`."""
    space: TrainingSpace[ModelSpaceT]
    search: SearchConfig
    limits: Limits


def sweep_to_dict(sweep: SweepConfig[Any, Any]) -> dict[str, Any]:
    """Plain JSON values; the space as the texts that its domains are parsed from."""
    return {
        "space": space_to_dict(sweep.space),
        "search": asdict(sweep.search),
        "limits": asdict(sweep.limits),
        "base": config_to_dict(sweep.base),
    }


def sweep_to_json(sweep: SweepConfig[Any, Any]) -> str:
    """As it is saved, recorded and gone on with."""
    return json.dumps(sweep_to_dict(sweep), indent=2)


def sweep_from_json(
    text: str, config_type: type[ConfigT], space_type: type[TrainingSpace[ModelSpaceT]]
) -> SweepConfig[ConfigT, ModelSpaceT]:
    """What `sweep_to_json` wrote. ConfigError if it is not."""
    try:
        values = json.loads(text)
        return SweepConfig(
            base=config_from_dict(config_type, values["base"]),
            space=space_from_dict(space_type, values["space"]),
            search=_options(SearchConfig, values["search"]),
            limits=_options(Limits, values["limits"]),
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(f"not a sweep's options: {error!r}") from error


def _options(options_type: type[OptionsT], values: dict[str, Any]) -> OptionsT:
    try:
        # Typed values for the right options; the constructor alone would take any, the adapter alone others too.
        options_type(**values)
        return TypeAdapter(options_type).validate_python(values)
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError("; ".join(lines)) from error
