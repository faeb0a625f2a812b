"""A whole run's options, and to and from plain values.

`TrainConfig` is generic over the network's config, so each pipeline gets typed flags for its own network; a method that
needs more options than a pixel loss derives its own config from it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sr_models.network import ModelConfig
from sr_train.options import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    StepConfig,
    TrackingConfig,
    ValidationConfig,
    require,
)

ModelT = TypeVar("ModelT", bound=ModelConfig)
ConfigT = TypeVar("ConfigT", bound="TrainConfig[Any]")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Generic[ModelT]):
    """A whole run."""

    model: ModelT
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    step: StepConfig = field(default_factory=StepConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        problems = list(self._contradictions())
        require(not problems, problems[0] if len(problems) == 1 else "\n- ".join(["", *problems]))

    def _contradictions(self) -> Iterator[str]:
        """Options that are right alone and can't be run together."""
        patch, scale = self.data.patch_px_hr, self.model.scale
        if patch % scale:
            yield (
                f"data.patch_px_hr={patch} is not a multiple of model.scale={scale}; "
                f"use {_multiples_around(patch, scale)} (--data.patch-px-hr)"
            )
        yield from batch_contradictions(self.optim, self.run, group="optim")
        if self.schedule.warmup_patches >= self.optim.total_patches:
            yield (
                f"schedule.warmup_patches={self.schedule.warmup_patches} is not shorter than the budget of "
                f"{self.optim.total_patches} patches (--schedule.warmup-patches, --optim.total-patches)"
            )


def batch_contradictions(optim: OptimConfig, run: RunConfig, *, group: str) -> Iterator[str]:
    """Batches that the workers can't share; `group` is what the optimiser's options are called by their flags."""
    batch, accumulation = optim.global_batch_size, optim.accumulation_steps
    flag = f"(--{group}.global-batch-size)"
    if run.min_workers is None and batch % (run.num_workers * accumulation):
        yield (
            f"{group}.global_batch_size={batch} can't be divided evenly by run.num_workers={run.num_workers} × "
            f"{group}.accumulation_steps={accumulation}; use "
            f"{_multiples_around(batch, run.num_workers * accumulation)} {flag}"
        )
    # An elastic run's workers share what they can't share evenly, but not within a micro-batch.
    if run.min_workers is not None and batch % accumulation:
        yield (
            f"{group}.global_batch_size={batch} can't be divided evenly by {group}.accumulation_steps={accumulation}; "
            f"use {_multiples_around(batch, accumulation)} {flag}"
        )
    elif run.min_workers is not None and batch // accumulation < run.num_workers:
        yield (
            f"{group}.global_batch_size={batch} is too small for run.num_workers={run.num_workers} × "
            f"{group}.accumulation_steps={accumulation}; use {run.num_workers * accumulation} or more {flag}"
        )


def _multiples_around(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


def config_to_dict(config: TrainConfig[Any]) -> dict[str, Any]:
    """Plain JSON values, as saved in checkpoints and logged to MLflow."""
    return asdict(config)


def config_from_dict(config_type: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """The config that `config_to_dict` wrote; `config_type` is TrainConfig[EDSRConfig] or the like. ConfigError lists
    unknown options and wrong values.
    """
    adapter = TypeAdapter(config_type, config=ConfigDict(extra="forbid"))
    try:
        result = adapter.validate_python(values)
    except ValidationError as error:
        lines = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(lines) from error
    return result


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested config as `section.option` → text, for MLflow parameters and for comparing two configs."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
