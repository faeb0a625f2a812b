"""What Ray Train's controller sees of lost and failed workers, as messages to the driver."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback

from sr_train.loop import Left

_PROPERTY = re.compile(r"\s*\w+: \S*$")
"""A line like "\tactor_id: 7a2a78e4" in Ray's errors."""

_LOST_TOUCH = re.compile(r"(reset|closed) by (remote )?peer|remote process exited|Broken pipe|Socket closed")
"""In what gloo and NCCL say of a connection that ended."""
_ADDRESS = re.compile(r"\b(\d{1,3}(?:\.\d{1,3}){3})[]<:]")
_ADVICE = ". This is typically caused by"


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

    One worker's death makes the others' collectives fail: then it is the death that counts. Where Ray has not seen it
    yet, `noticed` says that these workers only noticed, and `peer` the address that they lost touch with, if they say.
    """
    causes = {rank: getattr(error, "health_check_failure", error) for rank, error in exceptions.items()}
    died = {rank: error for rank, error in causes.items() if isinstance(error, RayActorError)}
    if died:
        return {"ranks": sorted(died), "message": _why_dead(str(died[min(died)]))}
    failed = {rank: error for rank, error in causes.items() if not isinstance(error, Left)}
    if not failed:
        return None
    message, _, _ = _last_line(failed[min(failed)]).partition(_ADVICE)
    event: dict[str, Any] = {"ranks": sorted(failed), "message": message}
    if _LOST_TOUCH.search(message):
        peer = _ADDRESS.search(message)
        event |= {"noticed": True, "peer": peer[1] if peer else None}
    return event


def lost_line(event: Mapping[str, Any], places: Sequence[tuple[str, str]]) -> str:
    """An event as its user reads it; `places` are the workers' machines and addresses, by rank."""
    ranks = ", ".join(f"{rank} on {places[rank][0]}" if rank < len(places) else f"{rank}" for rank in event["ranks"])
    if not event.get("noticed"):
        return f"lost: worker {ranks}: {event['message']}"
    others = {host for rank, (host, ip) in enumerate(places) if ip == event["peer"] and rank not in event["ranks"]}
    gone = f"a worker on {others.pop()}" if len(others) == 1 else "another worker"
    return f"lost: {gone}, as worker {ranks} noticed: {event['message']}"


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
