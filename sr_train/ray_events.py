"""What Ray Train's controller sees of lost and failed workers, as messages to the driver."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

from sr_train.loop import Left
from sr_train.mailbox import Message
from sr_train.ray_cluster import cluster_room

_PROPERTY = re.compile(r"\s*\w+: \S*$")
"""A line like "\tactor_id: 7a2a78e4" in Ray's errors."""
_IP = re.compile(r"^\s*ip: (\S+)$", re.MULTILINE)

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
        ips = {rank: ip[1] for rank, error in died.items() if (ip := _IP.search(str(error)))}
        return {"ranks": sorted(died), "ips": ips, "message": _why_dead(str(died[min(died)]))}
    failed = {rank: error for rank, error in causes.items() if not isinstance(error, Left)}
    if not failed:
        return None
    first = failed[min(failed)]
    said = str(first).strip().splitlines()[0] if isinstance(first, WorkerHealthCheckTimeoutError) else _last_line(first)
    message, _, _ = said.partition(_ADVICE)
    event: dict[str, Any] = {"ranks": sorted(failed), "message": message}
    if _LOST_TOUCH.search(message):
        peer = _ADDRESS.search(message)
        event |= {"noticed": True, "peer": peer[1] if peer else None}
    return event


def lost_line(event: Mapping[str, Any], places: Sequence[tuple[str, str]]) -> str:
    """An event as its user reads it; `places` are the machines and addresses, by rank, of the workers that began last:
    where Ray says at which address a worker died, that counts.
    """
    hosts = {ip: host for host, ip in places}
    homes = {rank: host for rank, (host, _) in enumerate(places)}
    homes |= {rank: hosts.get(ip, ip) for rank, ip in event.get("ips", {}).items()}
    ranks = ", ".join(f"{rank} on {homes[rank]}" if rank in homes else f"{rank}" for rank in event["ranks"])
    if not event.get("noticed"):
        return f"lost: worker {ranks}: {event['message']}"
    others = {host for rank, (host, ip) in enumerate(places) if ip == event["peer"] and rank not in event["ranks"]}
    gone = f"a worker on {others.pop()}" if len(others) == 1 else "another worker"
    return f"lost: {gone}, as worker {ranks} noticed: {event['message']}"


def trouble_line(message: Message, places: Sequence[tuple[str, str]], fewest_workers: int) -> str | None:
    """A message about what keeps a run from training, as its user reads it; None for any other. `places` as above,
    `fewest_workers` that it can begin with.
    """
    kind, values = message
    if kind == "lost":
        return lost_line(values, places)
    if kind == "left":
        return f"step {values['step']}: {values['message']}; saved, and going on where there is room"
    if kind == "waiting":
        return f"still waiting for {num_workers_text(fewest_workers)} to start: {cluster_room()}"
    if kind in ("recovery", "trouble"):
        return f"step {values['step']}: {values['message']}" if values["step"] else str(values["message"])
    return None


def num_workers_text(number: int) -> str:
    """The number with its noun."""
    return "1 worker" if number == 1 else f"{number} workers"


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
