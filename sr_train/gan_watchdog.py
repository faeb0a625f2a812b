"""Sees when adversarial training collapses, and lets it go on more gently from the last good checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from sr_train.adversarial_learner import AdversarialLearner
from sr_train.gan_options import WatchdogConfig

_ADVICE = (
    "go on with --resume and other --watchdog.* values, or start a new run (--run.name NEW --init CHECKPOINT) and "
    "lower --schedule.learning-rate or --gan.adversarial-weight, or bound gradients with --optim.clip-grad-norm; "
    "--watchdog.max-psnr-drop-db and --watchdog.max-colour-shift say what is allowed"
)
_ADVICE_SATURATED = (
    "go on with --resume and other --watchdog.* values, or start a new run (--run.name NEW --init CHECKPOINT) and "
    "lower --gan.discriminator-learning-rate-factor, raise --gan.adversarial-weight or --watchdog.pause-patches, or "
    "turn --discriminator.spectral-norm on"
)


class CollapseError(RuntimeError):
    """Adversarial training collapsed once more than it may; checkpoints before that are good."""


class GanWatchdog:
    """A `sr_train.loop.Watchdog`.

    It is told the same values on every worker and keeps nothing in memory but how long something has been wrong. What
    recoveries and later judgements depend on is in the learner's control state, and so in the next checkpoint: a run
    that is resumed after a recovery goes on as gently.

    Validations come at fixed steps, reports about once per second: so where training collapses, the step at which that
    is seen depends on the machine's speed. Where it does not, nothing does.
    """

    def __init__(self, learner: AdversarialLearner, config: WatchdogConfig, *, global_batch_size: int):
        self._learner, self._config, self._global_batch_size = learner, config, global_batch_size
        self._bad_since: dict[str, int] = {}
        self._saturation: str | None = None
        """What the last finding of a saturated discriminator said."""

    def judge(self, values: Mapping[str, float], *, step: int) -> str | None:
        """Values of a validation (psnr_db) or of `AdversarialLearner.report`.

        A run's first validation, which the loop makes before the first step, is what later ones are compared with.
        """
        if "psnr_db" in values:
            return self._judge_psnr(values["psnr_db"])
        return self._judge_colours(values, step) or self._judge_discriminator(values, step)

    def _judge_psnr(self, psnr_db: float) -> str | None:
        control = self._learner.control
        if math.isnan(control.psnr_at_start_db):
            control = self._learner.control = replace(control, psnr_at_start_db=psnr_db)
        drop_db = control.psnr_at_start_db - psnr_db
        if drop_db <= self._config.max_psnr_drop_db:
            return None
        return (
            f"PSNR fell to {psnr_db:.2f} dB, {drop_db:.2f} dB below the start of adversarial training (allowed: "
            f"{self._config.max_psnr_drop_db:g})"
        )

    def _judge_colours(self, values: Mapping[str, float], step: int) -> str | None:
        shift, allowed = values["colour_shift"], self._config.max_colour_shift
        if not self._lasts("colours", shift > allowed, step):
            return None
        return f"colours are off by {shift:.3f} on average (allowed: {allowed:g})"

    def _judge_discriminator(self, values: Mapping[str, float], step: int) -> str | None:
        real, fake = values["discriminator_accuracy_real"], values["discriminator_accuracy_fake"]
        norms = {name: value for name, value in values.items() if name.endswith("_gradient_norm")}
        total = sum(norms.values())
        share = norms["adversarial_gradient_norm"] / total if total > 0 else 0.0
        saturated = (
            not values["discriminator_paused"]
            and min(real, fake) >= self._config.saturation_accuracy
            and share < self._config.min_adversarial_gradient_share
        )
        if not self._lasts("discriminator", saturated, step):
            return None
        self._saturation = (
            f"the discriminator has saturated: right about {real:.1%} of real and {fake:.1%} of generated patches, and "
            f"its gradient is {share:.2%} of the generator's"
        )
        return self._saturation

    def _lasts(self, name: str, is_bad: bool, step: int) -> bool:
        """Whether something was bad in every report for long enough."""
        if not is_bad:
            self._bad_since.pop(name, None)
            return False
        num_steps = step - self._bad_since.setdefault(name, step)
        return num_steps * self._global_batch_size >= self._config.patience_patches

    def recover(self, saved: Mapping[str, Mapping[str, Tensor]], *, step: int, reason: str) -> str:
        """As `Watchdog.recover`. Raises CollapseError, and leaves the learner as it is, if it was too often."""
        config, before = self._config, self._learner.control
        is_saturated = reason == self._saturation
        if before.num_recoveries >= config.max_recoveries:
            raise CollapseError(
                f"adversarial training collapsed at step {step}: {reason}. It went back {before.num_recoveries} "
                f"times before (--watchdog.max-recoveries {config.max_recoveries}) and had come to "
                f"{before.learning_rate_factor:g} of the schedule's learning rate. To do: "
                f"{_ADVICE_SATURATED if is_saturated else _ADVICE}"
            )
        self._learner.load_state(saved)
        # From what is in force now, not from the checkpoint: the second collapse since it was written needs more.
        control = replace(before, num_steps=self._learner.control.num_steps, num_recoveries=before.num_recoveries + 1)
        if is_saturated:
            num_steps = -(-config.pause_patches // self._global_batch_size)
            control = replace(control, discriminator_pause_steps_left=num_steps)
            did = f"discriminator paused for {num_steps} steps"
        else:
            factor = before.learning_rate_factor * config.learning_rate_factor
            control = replace(control, learning_rate_factor=factor)
            did = f"learning rates from now on {factor:g} of the schedule's"
        self._learner.control = control
        self._bad_since.clear()
        return f"{did} (recovery {control.num_recoveries} of at most {config.max_recoveries})"
