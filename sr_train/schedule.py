"""The learning rate as a pure function of patches seen: nothing to save, nothing that a resume could apply twice."""

import math

from sr_train.options import ScheduleConfig


def learning_rate_at(schedule: ScheduleConfig, *, patches_seen: int, total_patches: int) -> float:
    """Learning rate of the step that starts after `patches_seen` of `total_patches`.

    step: EDSR's (Lim et al. 2017, section 4.2) halving at fixed intervals, counted from the start of the run. cosine:
    Loshchilov & Hutter 2017 (one period, no restart). one-cycle: Smith & Topin 2018, cosine-shaped rise and fall. Past
    the budget the final value holds.
    """
    peak, warmup = schedule.learning_rate, schedule.warmup_patches
    if patches_seen < warmup:
        rising = patches_seen / warmup
        return peak * ((1 - math.cos(math.pi * rising)) / 2 if schedule.kind == "one-cycle" else rising)
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "step":
        return peak * float(schedule.decay_factor ** (patches_seen // schedule.decay_every_patches))
    done = min(1.0, (patches_seen - warmup) / max(1, total_patches - warmup))
    falling = (1 + math.cos(math.pi * done)) / 2
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * falling)
