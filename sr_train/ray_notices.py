"""What tells a training worker on Ray to leave: its driver, a node that will be taken away, a SIGTERM of its own."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.train.torch import TorchConfig
from ray.train.v2._internal.execution.context import get_train_context

from sr_train.loop import Leave

_LOOK_INTERVAL_S = 0.25

_TERMINATED = "a worker's process was told to end (SIGTERM)"

_trains = threading.Event()
_terminated = threading.Event()
"""Of this process, as signals are."""


@dataclass
class LeavingTorchConfig(TorchConfig):
    """Ray's process group, on workers that take a first SIGTERM as notice."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


_RayBackend: Any = TorchConfig().backend_cls


class _Backend(_RayBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(_heed_sigterm)  # in their main threads, where alone Python lets signals be handled


def _heed_sigterm() -> None:
    """While this process trains, its first SIGTERM asks it to leave. A second one, or one at any other time, does what
    it did before.
    """
    before = signal.getsignal(signal.SIGTERM)

    def heed(number: int, frame: FrameType | None) -> None:
        if _trains.is_set() and not _terminated.is_set():
            _terminated.set()
        elif callable(before):
            before(number, frame)

    signal.signal(signal.SIGTERM, heed)


@contextmanager
def notices(mailbox: Any, *, start: int) -> Iterator[Leave]:
    """A function that says why the workers of that start should leave, None if they need not; it never waits.

    What one worker is told reaches the others by the mailbox, so that none of them goes on with its part of a
    validation; a drained node is told to all of them by Ray.
    """
    told: list[str] = []
    closing = threading.Event()

    def look() -> None:
        while not told and not closing.wait(_LOOK_INTERVAL_S):
            try:
                if _terminated.is_set():
                    ray.get(mailbox.leave.remote(start, _TERMINATED))
                reason = ray.get(mailbox.why_leave.remote(start))
            except ActorDiedError:  # the driver is gone, and Ray will end this worker
                return
            except RayError:  # out of reach for a moment
                continue
            if reason is not None:
                told.append(reason)

    def leave() -> str | None:
        if told:
            return told[0]
        if _terminated.is_set():
            return _TERMINATED
        # ray.train.get_preemption_info() would make every call a barrier of all workers.
        info = get_train_context().preemption_context.preemption_info
        if info is not None:
            return f"{'a node' if len(info.preempted_node_ids) == 1 else 'nodes'} will be taken away"
        return None

    threading.Thread(target=look, name="notices", daemon=True).start()
    _trains.set()
    try:
        yield leave
    finally:
        _trains.clear()
        closing.set()
