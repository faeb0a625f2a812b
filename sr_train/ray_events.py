"""What Ray Train's controller sees of lost and failed workers, as messages to the driver."""

import re
from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback

from sr_train.loop import Left

_PROPERTY = re.compile(r"\s*\w+: \S*$")
"""A line like "\tactor_id: 7a2a78e4" in Ray's errors."""


class WorkerEvents(UserCallback):
    """Puts a line in the mailbox when workers are lost or fail."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Called in the controller's process."""
        event = lost_or_failed(worker_exceptions)
        if event is not None:
            self._mailbox.put_event.remote(("lost", event))


def lost_or_failed(exceptions: dict[int, Exception]) -> dict[str, Any] | None:
    """Ranks and a line that says why; None if the workers left because they were told to.

    One worker's death makes the others' collectives fail: then it is the death that counts.
    """
    causes = {rank: getattr(error, "health_check_failure", error) for rank, error in exceptions.items()}
    died = {rank: error for rank, error in causes.items() if isinstance(error, RayActorError)}
    if died:
        return {"ranks": sorted(died), "message": _why_dead(str(died[min(died)]))}
    failed = {rank: error for rank, error in causes.items() if not isinstance(error, Left)}
    if not failed:
        return None
    return {"ranks": sorted(failed), "message": _last_line(failed[min(failed)])}


def _why_dead(text: str) -> str:
    """From Ray's page about a dead actor what happened: its sentences, without the actor's properties and the guesses
    at causes.
    """
    _, _, reason = text.partition("The actor is dead because ")
    lines = [
        line.strip() for line in reason.partition("Some common causes")[0].splitlines() if not _PROPERTY.match(line)
    ]
    return _one_line(" ".join(lines)) or _one_line(text)


def _last_line(error: Exception) -> str:
    """What a traceback ends with."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())
