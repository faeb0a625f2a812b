"""Options of adversarial training and of the watchdog that goes with it."""

import math
from dataclasses import dataclass

from sr_train.options import require, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class GanConfig:
    """The generator's loss, and how the discriminator learns. The defaults are SRGAN's."""

    pixel_weight: float = 0.0
    """Weight of the pixel loss, which --optim.loss chooses (ESRGAN: 0.01 of L1)."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss; with 0 no VGG19 is run."""
    adversarial_weight: float = 1e-3
    """Weight of the adversarial loss (SRGAN: 0.001, ESRGAN: 0.005)."""
    relativistic: bool = False
    """Judge whether real patches look more real than generated ones on average (ESRGAN), instead of each by itself."""
    discriminator_learning_rate_factor: float = 1.0
    """The discriminator's learning rate, as a multiple of the schedule's."""

    def __post_init__(self) -> None:
        _require_finite(
            gan__pixel_weight=self.pixel_weight,
            gan__perceptual_weight=self.perceptual_weight,
            gan__adversarial_weight=self.adversarial_weight,
            gan__discriminator_learning_rate_factor=self.discriminator_learning_rate_factor,
        )
        require_positive(
            gan__adversarial_weight=self.adversarial_weight,
            gan__discriminator_learning_rate_factor=self.discriminator_learning_rate_factor,
        )
        for name, weight in (("pixel", self.pixel_weight), ("perceptual", self.perceptual_weight)):
            require(weight >= 0, f"--gan.{name}-weight={weight} must be 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogConfig:
    """What counts as a collapse of adversarial training, and what is done then.

    A collapse takes the run back to the checkpoint of its last good validation: with a paused discriminator if that
    had left the generator nothing to learn from, else with a lower learning rate.
    """

    enabled: bool = True
    """Watch. Without it nothing but a loss or gradient that is not finite ends a run."""
    max_psnr_drop_db: float = 6.0
    """How far validation may fall below what it was when adversarial training began, dB (SRGAN: 2.7 on Set5)."""
    max_colour_shift: float = 0.05
    """How far the mean of red, green or blue of SR patches may lie from that of HR patches, in [0, 1]."""
    saturation_accuracy: float = 0.995
    """The discriminator has saturated if it is right about this share of the real and of the generated patches …"""
    min_adversarial_gradient_share: float = 1e-3
    """… and the norm of its gradient is less than this share of the norms of all loss terms' gradients, weighted, at
    the SR patches."""
    patience_patches: int = 3_200
    """For how long colours must be off, or the discriminator saturated, without a break."""
    pause_patches: int = 3_200
    """For how long a saturated discriminator stops learning."""
    learning_rate_factor: float = 0.5
    """What the learning rates of both networks are multiplied by after another collapse, for the rest of the run."""
    max_recoveries: int = 3
    """How often a run may go back; at the next collapse it ends."""

    def __post_init__(self) -> None:
        _require_finite(
            watchdog__max_psnr_drop_db=self.max_psnr_drop_db, watchdog__max_colour_shift=self.max_colour_shift
        )
        require_positive(
            watchdog__max_psnr_drop_db=self.max_psnr_drop_db,
            watchdog__max_colour_shift=self.max_colour_shift,
            watchdog__pause_patches=self.pause_patches,
        )
        require(
            0.5 < self.saturation_accuracy <= 1,
            f"--watchdog.saturation-accuracy={self.saturation_accuracy} must be greater than 0.5 (guessing) and at "
            "most 1",
        )
        require(
            0 <= self.min_adversarial_gradient_share <= 1,
            f"--watchdog.min-adversarial-gradient-share={self.min_adversarial_gradient_share} must lie between 0 "
            "(never saturated) and 1",
        )
        require(self.patience_patches >= 0, f"--watchdog.patience-patches={self.patience_patches} must be 0 or more")
        require(
            0 < self.learning_rate_factor < 1,
            f"--watchdog.learning-rate-factor={self.learning_rate_factor} must lie between 0 and 1",
        )
        require(self.max_recoveries >= 0, f"--watchdog.max-recoveries={self.max_recoveries} must be 0 or more")


def _require_finite(**flags: float) -> None:
    for flag, value in flags.items():
        name = flag.replace("__", ".").replace("_", "-")
        require(math.isfinite(value), f"--{name}={value} must be a finite number")
