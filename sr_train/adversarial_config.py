"""The options of an adversarial run: a generator against a discriminator, after a first phase on pixels alone."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from sr_models.discriminators import MIN_PATCH_PX_HR, DiscriminatorConfig
from sr_train.config import ModelT, TrainConfig, batch_contradictions
from sr_train.gan_options import GanConfig, WatchdogConfig
from sr_train.options import OptimConfig, ScheduleConfig
from sr_train.perceptual_weights import PerceptualConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """The first phase: the generator alone, on a pixel loss. Data, validation and workers are the run's."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    register_as: str | None = None
    """Name of the first phase's registered model; ARCHITECTURE-xSCALE when not given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdversarialConfig(TrainConfig[ModelT]):
    """A whole adversarial run; `optim` and `schedule` are those of the second phase."""

    phase: Literal["both", "pretrain", "gan"] = "both"
    """What to train: the generator on pixels and then the GAN from it, or one of them. With --init it is gan."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def _contradictions(self) -> Iterator[str]:
        yield from TrainConfig._contradictions(self)  # super() does not work in a dataclass with slots
        smallest = MIN_PATCH_PX_HR
        if self.data.patch_px_hr < smallest:
            yield (
                f"data.patch_px_hr={self.data.patch_px_hr} is too small for a discriminator; use {smallest} or more "
                f"(--data.patch-px-hr)"
            )
        if self.phase == "pretrain" and self.checkpoint.init_from is not None:
            yield "--phase pretrain starts from nothing: --init (--checkpoint.init-from) is for the GAN's generator"
        if self.phase != "gan" and self.checkpoint.init_from is None:
            yield from self._first_phase_contradictions()

    def _first_phase_contradictions(self) -> Iterator[str]:
        """What `TrainConfig` finds in the first phase, by the flags of that phase."""
        optim, schedule = self.pretrain.optim, self.pretrain.schedule
        yield from batch_contradictions(optim, self.run, group="pretrain.optim")
        if schedule.warmup_patches >= optim.total_patches:
            yield (
                f"pretrain.schedule.warmup_patches={schedule.warmup_patches} is not shorter than the first phase's "
                f"budget of {optim.total_patches} patches (--pretrain.schedule.warmup-patches, "
                f"--pretrain.optim.total-patches)"
            )


def pretraining(config: AdversarialConfig[ModelT], name: str) -> TrainConfig[ModelT]:
    """The first phase as a run of its own, called NAME-pretrain."""
    return TrainConfig(
        model=config.model,
        data=config.data,
        validation=replace(config.validation, best_by="auto"),
        optim=config.pretrain.optim,
        schedule=config.pretrain.schedule,
        step=config.step,
        checkpoint=config.checkpoint,
        tracking=replace(config.tracking, register_as=config.pretrain.register_as),
        run=replace(config.run, name=f"{name}-pretrain"),
    )
