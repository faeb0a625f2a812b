"""What a run shows of itself: progress to the driver, curves and pictures to the tracking server."""

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from sr_train.pictures import patch_grid
from sr_train.tracking import Tracker

Send = Callable[[str, Mapping[str, Any]], None]

_NUM_CURVE_POINTS = 500


class RunObserver:
    """Rank 0's ears; on the other ranks `send` does nothing and there is no tracker."""

    def __init__(
        self,
        *,
        send: Send,
        tracker: Tracker | None,
        total_steps: int,
        global_batch_size: int,
        protocol: str,
        script_started_s: float,
    ):
        """`script_started_s`: time.time() when the user started the run."""
        self._send, self._tracker = send, tracker
        self._curve_interval_steps = max(1, total_steps // _NUM_CURVE_POINTS)
        self._global_batch_size, self._protocol, self._script_started_s = global_batch_size, protocol, script_started_s
        self._sums: dict[str, float] = {}
        self._num_steps = 0
        self._next_point_step = 0
        self._totals = {"steps": 0.0, "seconds": 0.0, "waited_s": 0.0}
        self._first_step_s: float | None = None
        self._psnr_db: float | None = None
        self._num_recoveries = 0

    def on_first_batch(self, lr_NCHW: torch.Tensor, hr_NCHW: torch.Tensor) -> None:
        """The very patches of step 0 that this worker trains on."""
        if self._tracker is not None:
            self._tracker.image("samples/training_patches.png", patch_grid(lr_NCHW, hr_NCHW))

    def on_steps(self, values: Mapping[str, float], *, step: int, num_steps: int, seconds: float) -> None:
        if self._first_step_s is None:
            self._first_step_s = time.time() - self._script_started_s
            self._next_point_step = step
        else:  # the first step warms up caches and compilers; speed is counted from the second on
            self._totals["steps"] += num_steps
            self._totals["seconds"] += seconds
            self._totals["waited_s"] += values["data_wait_share"] * seconds
        self._send("progress", {**values, "step": step, "psnr_db": self._psnr_db})
        self._num_steps += num_steps
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * num_steps
        if step >= self._next_point_step:
            self._next_point_step = step + self._curve_interval_steps
            self._track(
                {name: total / self._num_steps for name, total in self._sums.items()}
                | {"patches_seen": float(step * self._global_batch_size)},
                step,
            )
            self._sums, self._num_steps = {}, 0

    def on_validation(self, values: Mapping[str, float], *, step: int, is_best: bool) -> None:
        self._psnr_db = values["psnr_db"]
        self._send("validation", {**values, "step": step, "is_best": is_best, "protocol": self._protocol})
        self._track({f"validation/{name}": value for name, value in values.items()}, step)

    def on_picture(self, name: str, image_HWC: np.ndarray, *, step: int) -> None:
        if self._tracker is not None:
            self._tracker.image(f"samples/step-{step:09d}/{name}.png", image_HWC)

    def on_checkpoint(self, key: str, *, step: int, seconds: float, stalled_s: float) -> None:
        self._send("checkpoint", {"key": key, "step": step, "seconds": seconds})
        self._track({"checkpoint_s": seconds, "checkpoint_stall_s": stalled_s}, step)

    def on_recovery(self, message: str, *, step: int) -> None:
        self._num_recoveries += 1
        self._send("recovery", {"message": message, "step": step})
        self._track({"recoveries": float(self._num_recoveries)}, step)

    def on_trouble(self, message: str, step: int) -> None:
        """Something holds the run up, or no longer does; called by any thread."""
        self._send("trouble", {"message": message, "step": step})

    def measures(self) -> dict[str, float]:
        """What the run cost, by name with unit."""
        seconds = max(self._totals["seconds"], 1e-9)
        measures = {
            "seconds_to_first_step": self._first_step_s or 0.0,
            "patches_per_s": self._totals["steps"] * self._global_batch_size / seconds,
            "data_wait_share": self._totals["waited_s"] / seconds,
            "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2,  # Linux: KiB
        }
        if torch.cuda.is_available():
            measures["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 1024**3
        return measures

    def _track(self, values: Mapping[str, float], step: int) -> None:
        if self._tracker is not None:
            self._tracker.metrics(values, step=step)
