"""Patience with storage that is away or refuses for a while: the same work again, until it is done or the time is up.

The stores try every request for up to half a minute themselves (`storage_s3`); this is for what takes longer: a gateway
that restarts, a quota that someone raises, a disk that someone clears.
"""

import errno
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from sr_data.errors import StorageError
from sr_data.storage import FileEntry, Store, open_store

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 15.0

_PASSING = {errno.EIO, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET,
            errno.ENOTCONN, errno.ESTALE, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT, errno.EACCES}  # fmt: skip

_lock = threading.Lock()
_in_trouble: dict[str, int] = {}

T = TypeVar("T")
Say = Callable[[str], None]
"""Takes a line for people."""


def warn(message: str) -> None:
    """Says it in this process's log, which Ray shows where the driver's output is."""
    logging.getLogger(__name__).warning("%s", message)


def to_stderr(message: str) -> None:
    """Says it to whoever started this process."""
    print(message, file=sys.stderr, flush=True)


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
    """Set by whoever can't wait any longer: the next attempt, made at once, is the last one."""

    def spend(self, work: Callable[[], T], *, on: str, meanwhile: str = "", after: StorageError | None = None) -> T:
        """What `work` returns, tried again after a pause for as long as its StorageError `may_pass`.

        `on` names the trouble, as in "the checkpoint of step 40 can't be written", `meanwhile` what happens until it
        is over, as in "training goes on". `after` is the error of an attempt that somebody else has made. Raises the
        StorageError of the last attempt, and any other error at once.
        """
        started_s, started_at = time.monotonic(), time.strftime("%H:%M:%S")
        try:
            if after is not None:
                raise after
            return work()
        except StorageError as error:
            if not self._waits_after(error):
                raise
            rest = f"; {meanwhile}" if meanwhile else ""
            began = f"{on} since {started_at}: {error}; trying again for {_span(self.seconds)}{rest}"
        with _trouble(on, self.say, began, started_s):
            return self._again(work)

    def _again(self, work: Callable[[], T]) -> T:
        deadline_s, pause_s = time.monotonic() + self.seconds, FIRST_PAUSE_S
        self.given_up.wait(pause_s)
        while True:
            try:
                return work()
            except StorageError as error:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or not self._waits_after(error):
                    raise
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                self.given_up.wait(min(pause_s, left_s))

    def _waits_after(self, error: StorageError) -> bool:
        return self.seconds > 0 and may_pass(error) and not self.given_up.is_set()


@dataclass(frozen=True, slots=True)
class PatientStore(Store):
    """A store that is waited for while it is away: for the small files that a run can't do without."""

    patience: Patience

    def list(self, prefix: str = "") -> list[FileEntry]:
        return self._spend(partial(Store.list, self, prefix), "listed")

    def read(self, key: str) -> bytes:
        return self._spend(partial(Store.read, self, key), "read")

    def num_bytes(self, key: str) -> int:
        return self._spend(partial(Store.num_bytes, self, key), "read")

    def write(self, key: str, data: bytes) -> None:
        self._spend(partial(Store.write, self, key, data), "written")

    def exists(self, key: str) -> bool:
        return self._spend(partial(Store.exists, self, key), "read")

    def delete(self, key: str) -> None:
        self._spend(partial(Store.delete, self, key), "written")

    def _spend(self, work: Callable[[], T], done: str) -> T:
        return self.patience.spend(work, on=f"{self.uri} can't be {done}")


def patient_store(uri: str, seconds: float, *, say: Say = warn) -> PatientStore:
    """`open_store` with that much patience."""
    return PatientStore(open_store(uri).uri, Patience(seconds=seconds, say=say))


@contextmanager
def _trouble(on: str, say: Say, began: str, started_s: float) -> Iterator[None]:
    """Says that it began, and that it is over if it ends well, but once for all threads of this process that are in
    it: two streams of images that wait are one trouble to people.
    """
    with _lock:
        _in_trouble[on] = _in_trouble.get(on, 0) + 1
        is_first = _in_trouble[on] == 1
    if is_first:
        say(began)
    try:
        yield
    finally:
        with _lock:
            _in_trouble[on] -= 1
            is_last = _in_trouble[on] == 0
    if is_last:
        say(f"storage is back, {_span(time.monotonic() - started_s)} after the trouble began ({on}): nothing is lost")


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
