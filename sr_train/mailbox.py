"""What driver and workers tell each other: the class of a Ray actor, alone here so that its process imports no PyTorch.

One group of workers carries out any number of orders, one after another (a sweep's trials; of a training run, the only
one). The mailbox outlives the workers: those that replace lost ones find the order that is not finished yet, and learn
whether its error is worth another try. No call waits: an actor with one thread keeps what it is sent in order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STOPPED = "the driver was told to stop"
"""The reason for which workers leave for good; for all others their run goes on elsewhere."""

Message = tuple[str, Mapping[str, Any]]
"""(kind, values): "start", "progress", "validation", "checkpoint", "recovery", "trouble", "left", "ask" and "end" from
the workers, "lost" from Ray Train.
"""


@dataclass(frozen=True, slots=True)
class Order:
    """Something for the workers to do."""

    number: int
    """Counted from 1; the next one comes when this one has ended."""
    payload: bytes
    """Pickled by the driver and read by the workers: what is not looked at here need not be imported here."""


class Mailbox:
    """Between a driver and its workers."""

    def __init__(self, num_starts: int = 0) -> None:
        self._messages: list[Message] = []
        self._order: Order | None = None
        self._closed = False
        self._stopping = False
        self._fatal: str | None = None
        self._answers: dict[int, bool] = {}
        self._ended = 0
        self._start = num_starts
        self._why_leave: str | None = None

    # The driver

    def place(self, order: Order) -> None:
        """The workers' next order; the one before has ended."""
        self._order, self._fatal, self._answers, self._messages = order, None, {}, []

    def close(self) -> None:
        """There will be no further order."""
        self._closed = True

    def stop(self) -> None:
        """The workers are to save what they have, and leave."""
        self._stopping = True

    def num_starts(self) -> int:
        """Of workers, so far."""
        return self._start

    def take(self) -> list[Message]:
        """The messages since the last call."""
        taken, self._messages = self._messages, []
        return taken

    def answer(self, step: int, goes_on: bool) -> None:
        """To the worker that asked at this step."""
        self._answers[step] = goes_on

    # The workers

    def order_after(self, number: int) -> tuple[Order | None, bool]:
        """The order that follows that number, if there is one already; and whether there can still come one. Workers
        that replace lost ones ask after 0: what has ended is not done again.
        """
        after = max(number, self._ended)
        return self._order if self._order is not None and self._order.number > after else None, not self._closed

    def begin(self) -> int:
        """Counts a start of the workers. From now on they speak for the order that they carry out, and nobody else:
        those before may still live, cut off with their node.
        """
        self._start, self._why_leave = self._start + 1, None
        return self._start

    def leave(self, start: int, reason: str) -> None:
        """One of the workers was told to leave: they all are to, since none can train alone."""
        if start == self._start:
            self._why_leave = reason

    def why_leave(self, start: int) -> str | None:
        """Why the workers of that start are to save what they have, and leave; None if they are not."""
        return STOPPED if self._stopping else self._why_leave if start == self._start else None

    def put(self, number: int, start: int, message: Message) -> None:
        """About the order of that number; what comes late, or from workers that others have replaced, is dropped."""
        if self._is_of(number, start):
            self._messages.append(message)
            if message[0] == "ask":  # workers that replace others may ask at a step at which those asked
                self._answers.pop(message[1]["step"], None)
            if message[0] == "end":
                self._ended = number

    def put_event(self, message: Message) -> None:
        """What Ray Train's controller has seen."""
        self._messages.append(message)

    def answer_to(self, step: int) -> bool | None:
        """What the driver answered to the question of this step; None if it has not yet."""
        return self._answers.get(step)

    def set_fatal(self, number: int, start: int, error: str) -> None:
        """The error of the order of that number would come back however often it is tried."""
        if self._is_of(number, start):
            self._fatal = self._fatal or error

    def fatal(self) -> str | None:
        return self._fatal

    def _is_of(self, number: int, start: int) -> bool:
        return self._order is not None and self._order.number == number and start == self._start
