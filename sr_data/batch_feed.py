"""Batches for a training loop, the next one cut on the GPU while the current one is trained on."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch

Batch = tuple[torch.Tensor, torch.Tensor]

_MAX_STEPS_AHEAD = 16
"""So many steps the host may queue before it waits for the first of them."""


class BatchSource(Protocol):
    """This worker's part of every batch, as `sr_data.patch_pool.PatchPool` gives it."""

    def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> Batch:
        """(lr_NCHW, hr_NCHW) of a step's micro-batch, a function of its arguments."""


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A step's batches, cut or being cut on the side stream."""

    step: int
    batches: list[Batch]
    ready: torch.cuda.Event
    step_before_ends: torch.cuda.Event


class BatchFeed:
    """Takes from a source, in the order of steps, and measures how long training waits for it.

    With `ahead` (CUDA) `prepare` cuts on a side stream, behind nothing but the step before last, and `take` makes
    training's stream wait for it: the host waits for neither, until it is `_MAX_STEPS_AHEAD` steps ahead.
    """

    def __init__(self, source: BatchSource, *, num_micro: int, device: torch.device, ahead: bool):
        """`num_micro`: micro-batches of a step."""
        self._source, self._num_micro, self._device = source, num_micro, device
        self._side = torch.cuda.Stream(device) if ahead else None  # type: ignore[no-untyped-call]
        self._prepared: _Prepared | None = None
        # Batches lie in the side stream's memory, which it may use again as soon as the host lets go of them; so they
        # are held here until the side stream has been told to wait for the step that reads them.
        self._in_use: list[Batch] = []
        self._may_overwrite: torch.cuda.Event | None = None
        self._step_ends: deque[torch.cuda.Event] = deque(maxlen=_MAX_STEPS_AHEAD)
        self._waited_s = 0.0
        self._device_waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def take(self, step: int) -> list[Batch]:
        """The micro-batches of `step`; usable on the current stream until the next call."""
        if self._side is None:
            started_s = time.perf_counter()
            batches = self._cut(step)
            self._waited_s += time.perf_counter() - started_s
            return batches
        if len(self._step_ends) == _MAX_STEPS_AHEAD and not self._step_ends[0].query():  # type: ignore[no-untyped-call]
            self._step_ends[0].synchronize()  # else memory would be taken for all that the host is ahead
        if self._prepared is None or self._prepared.step != step:
            self.prepare(step)
        assert self._prepared is not None
        prepared, self._prepared = self._prepared, None
        current = torch.cuda.current_stream(self._device)
        self._may_overwrite = current.record_event()  # the batch before, once all that is queued by now has ended
        self._in_use = prepared.batches
        current.wait_event(prepared.ready)
        self._device_waits.append((prepared.step_before_ends, prepared.ready))
        return prepared.batches

    def prepare(self, step: int) -> None:
        """Begins to cut `step`, after the work of the step before it was queued. Without `ahead` it does nothing."""
        if self._side is None:
            return
        # Recorded before the host waits for images: on an idle GPU a later event would hide that training waits.
        step_before_ends = torch.cuda.current_stream(self._device).record_event(_timed_event())
        self._step_ends.append(step_before_ends)
        if self._may_overwrite is not None:
            self._side.wait_event(self._may_overwrite)
        with torch.cuda.stream(self._side):
            batches = self._cut(step)
            ready = self._side.record_event(_timed_event())
        self._prepared = _Prepared(step=step, batches=batches, ready=ready, step_before_ends=step_before_ends)

    def waited_s(self) -> float:
        """Seconds since the last call for which training had to wait for its data.

        On CUDA with `ahead`: from the end of a step to the arrival of the next one's batch, on the GPU's clock; waits
        for the GPU. Else the time that the host spent in the source.
        """
        waited_s, self._waited_s = self._waited_s, 0.0
        for idle_from, ready in self._device_waits:
            ready.synchronize()
            waited_s += max(0.0, idle_from.elapsed_time(ready)) / 1000
        self._device_waits = []
        return waited_s

    def _cut(self, step: int) -> list[Batch]:
        return [self._source.batch(step, micro, self._num_micro) for micro in range(self._num_micro)]


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
