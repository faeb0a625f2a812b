"""What Ray Train's controller sees of lost and failed workers, as messages to the driver."""

from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback

from sr_train.loop import Left


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
    died = {rank: error for rank, error in exceptions.items() if isinstance(error, RayActorError)}
    if died:
        return {"ranks": sorted(died), "message": _why_dead(str(died[min(died)]))}
    failed = {rank: error for rank, error in exceptions.items() if not _has_left(error)}
    if not failed:
        return None
    return {"ranks": sorted(failed), "message": _last_line(failed[min(failed)])}


def _has_left(error: Exception) -> bool:
    return Left.__name__ in str(error).splitlines()[-1] if str(error) else isinstance(error, Left)


def _why_dead(text: str) -> str:
    """Ray's sentences, without its table of the actor's properties."""
    lines = [line.strip() for line in text.splitlines()]
    sentences = [line for line in lines if line and ": " not in line.split(" ")[0] + " " and not _is_property(line)]
    return " ".join(sentences) or text.strip().splitlines()[0]


def _is_property(line: str) -> bool:
    name, colon, _ = line.partition(":")
    return bool(colon) and name.replace("_", "").isalpha() and name.islower()


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
