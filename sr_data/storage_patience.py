"""Patience with storage that is away or refuses for a while: the same work again, until it is done or the time is up.

The stores try every request for up to half a minute themselves (`storage_s3`); this is for what takes longer: a gateway
that restarts, a quota that someone raises, a disk that someone clears.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from sr_data.errors import StorageError

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 15.0

_PASSING = {errno.EIO, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET,
            errno.ENOTCONN, errno.ESTALE, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT, errno.EACCES}  # fmt: skip

T = TypeVar("T")
Say = Callable[[str], None]
"""Takes a line for people."""


def warn(message: str) -> None:
    """Says it in this process's log, which Ray shows where the driver's output is."""
    logging.getLogger(__name__).warning("%s", message)


def may_pass(error: StorageError) -> bool:
    """Whether storage may do later what it did not do now.

    It may if it was away, broke off, was full, or refused credentials that it knows: what could be read and written
    when the run was planned was taken away since. It won't if something is not there or is no valid request, if
    credentials are missing or wrong, or if the run is another driver's.
    """
    return error.errno in _PASSING


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long to go on trying, and what to do meanwhile."""

    seconds: float
    """From the first failure to the last attempt; 0 for a single attempt."""
    say: Say = warn
    """Told once when trouble begins, and once when it is over."""
    given_up: threading.Event = field(default_factory=threading.Event)
    """Set by whoever can't wait any longer: the attempt under way is the last one."""

    def spend(self, work: Callable[[], T], *, on: str, meanwhile: str = "", after: StorageError | None = None) -> T:
        """What `work` returns, tried again after a pause for as long as its StorageError `may_pass`.

        `on` names the trouble, as in "the checkpoint of step 40 can't be written", `meanwhile` what happens until it
        is over, as in "training goes on". `after` is the error of an attempt that somebody else has made. Raises the
        StorageError of the last attempt, and any other error at once.
        """
        started_s, started_at = time.monotonic(), time.strftime("%H:%M:%S")
        deadline_s: float | None = None
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                if after is not None:
                    raise after
                result = work()
            except StorageError as error:
                after, failed_s = None, time.monotonic()
                if not may_pass(error) or self.seconds <= 0 or self.given_up.is_set():
                    raise
                if deadline_s is None:
                    deadline_s = failed_s + self.seconds
                    rest = f"; {meanwhile}" if meanwhile else ""
                    self.say(f"{on} since {started_at}: {error}; trying again for {_span(self.seconds)}{rest}")
                if failed_s >= deadline_s or self.given_up.wait(min(pause_s, deadline_s - failed_s)):
                    raise
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                if deadline_s is not None:
                    took = _span(time.monotonic() - started_s)
                    self.say(f"storage is back, {took} after the trouble began ({on}): nothing is lost")
                return result


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
