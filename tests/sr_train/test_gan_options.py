"""Options of adversarial training: impossible ones are refused by their flag."""

import math
from typing import Any

import pytest

from sr_train.gan_options import GanConfig, WatchdogConfig
from sr_train.options import ConfigError


@pytest.mark.parametrize(
    ("config", "values", "flag"),
    [
        (GanConfig, {"pixel_weight": -0.1}, "--gan.pixel-weight=-0.1"),
        (GanConfig, {"perceptual_weight": math.nan}, "--gan.perceptual-weight=nan"),
        (GanConfig, {"adversarial_weight": 0.0}, "--gan.adversarial-weight=0.0"),
        (GanConfig, {"discriminator_learning_rate_factor": 0.0}, "--gan.discriminator-learning-rate-factor"),
        (GanConfig, {"discriminator_learning_rate_factor": math.inf}, "--gan.discriminator-learning-rate-factor"),
        (WatchdogConfig, {"max_psnr_drop_db": 0.0}, "--watchdog.max-psnr-drop-db"),
        (WatchdogConfig, {"max_colour_shift": math.nan}, "--watchdog.max-colour-shift"),
        (WatchdogConfig, {"saturation_accuracy": 0.5}, "--watchdog.saturation-accuracy"),
        (WatchdogConfig, {"saturation_accuracy": 1.1}, "--watchdog.saturation-accuracy"),
        (WatchdogConfig, {"min_adversarial_gradient_share": -0.1}, "--watchdog.min-adversarial-gradient-share"),
        (WatchdogConfig, {"patience_patches": -1}, "--watchdog.patience-patches"),
        (WatchdogConfig, {"pause_patches": 0}, "--watchdog.pause-patches"),
        (WatchdogConfig, {"learning_rate_factor": 1.0}, "--watchdog.learning-rate-factor"),
        (WatchdogConfig, {"max_recoveries": -1}, "--watchdog.max-recoveries"),
    ],
)
def test_what_cannot_be_is_refused_by_its_flag(config: type, values: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        config(**values)


def test_the_defaults_are_srgans() -> None:
    """Ledig et al. 2017, equation 3: content loss + 0.001 adversarial loss."""
    gan = GanConfig()
    assert (gan.pixel_weight, gan.perceptual_weight, gan.adversarial_weight) == (0.0, 1.0, 1e-3)
    assert not gan.relativistic
