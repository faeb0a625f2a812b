"""A durable queue between a training loop that never waits and a receiver that may be slow, away, or hanging.

`put` hands an item to a thread that writes it to the spool (`sr_train.spool`); a second thread sends what lies there.
Two threads, because a send can hang for as long as the network likes, and what is put meanwhile must reach the disk:
so memory stays bounded and a killed worker loses nothing.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from sr_train.spool import Record, Segment, orphans
from sr_train.tracking_server import redact

logger = logging.getLogger(__name__)

Deliver = Callable[[Sequence[Record], Path], None]
"""Sends records (all of kind "metrics", or a single one of another kind) whose files lie below the folder.
Raises RefusedError for what will never be accepted; any other exception means: try again later."""

MAX_RECORDS_PER_BATCH = 100
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 15.0
MAX_BYTES_IN_MEMORY = 256 * 2**20
MAX_ITEMS_IN_MEMORY = 100_000


class RefusedError(Exception):
    """The receiver will never take this record."""


@dataclass(frozen=True, slots=True)
class _Item:
    record: Record
    encode: Callable[[], bytes] | None
    num_bytes: int


class Outbox:
    """Puts records into a spool folder and delivers them in order, in the background."""

    def __init__(self, spool: Path, deliver: Deliver, *, receiver: str, interval_s: float = 1.0) -> None:
        """Start the threads; records that an earlier process left in `spool` are delivered first.

        receiver: what to call the receiver in log messages. interval_s: pause between two rounds of sending, in which
        metrics gather for one request. Raises OSError if `spool` can't be written.
        """
        self._deliver = deliver
        self._receiver = receiver
        self._interval_s = interval_s
        self._segment = Segment.create(spool)
        self._inherited = orphans(spool)
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._bytes_in_memory = 0
        self._num_dropped = 0
        self._closing = threading.Event()
        self._all_written = threading.Event()
        self._abandoned = threading.Event()
        self._closed_with: int | None = None
        self._writer = threading.Thread(target=self._write, name="outbox-writer", daemon=True)
        self._sender = threading.Thread(target=self._send, name="outbox-sender", daemon=True)
        self._writer.start()
        self._sender.start()

    def put(self, record: Record, *, encode: Callable[[], bytes] | None = None, num_bytes: int = 0) -> None:
        """Queue a record; returns at once. `encode` makes the content of its file, in the writer thread."""
        if self._closing.is_set():
            raise RuntimeError("the outbox is closed")
        with self._lock:
            full = self._queue.qsize() >= MAX_ITEMS_IN_MEMORY or self._bytes_in_memory + num_bytes > MAX_BYTES_IN_MEMORY
            if full:  # only when the disk has refused for long: memory is for training
                self._num_dropped += 1
                return
            self._bytes_in_memory += num_bytes
        self._queue.put(_Item(record, encode, num_bytes))

    def close(self, timeout_s: float) -> int:
        """Deliver what is left for at most `timeout_s`; return the number of records that were not delivered.

        What is not delivered stays in the spool. A send that hangs beyond the time is left behind in its daemon thread.
        """
        if self._closed_with is not None:
            return self._closed_with
        deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._queue.put(None)
        self._writer.join(max(0.0, deadline - time.monotonic()))
        self._sender.join(max(0.0, deadline - time.monotonic()))
        self._abandoned.set()
        # A writer that a full disk holds up has one record in its hands and the end mark in the queue: they cancel.
        undelivered = num_lost = self._num_dropped + self._queue.qsize()
        for segment in [*self._inherited, self._segment]:
            undelivered += _give_up(segment)
        if undelivered:
            lost = f"{num_lost} of them are lost, as the disk refused them; the rest waits" if num_lost else "they wait"
            where = f"{lost} in {self._segment.folder.parent}"
            logger.warning("%d records for %s were not delivered; %s", undelivered, self._receiver, where)
        self._closed_with = undelivered
        return undelivered

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            content = item.encode() if item.encode else None
            warned = False
            while True:
                try:
                    self._segment.append(item.record, content)
                    break
                except OSError as error:
                    if not warned:
                        logger.warning("the spool %s can't be written (%s): retrying", self._segment.folder, error)
                    warned = True
                    if self._abandoned.wait(1.0):
                        return
            with self._lock:
                self._bytes_in_memory -= item.num_bytes
        self._all_written.set()

    def _send(self) -> None:
        pending = [*self._inherited, self._segment]
        failures = 0
        while not self._abandoned.is_set():
            last_round = self._all_written.is_set()
            try:
                for segment in pending:
                    send_all(segment, self._deliver, self._abandoned)
            # Whatever a failed request raises (requests, botocore, SQLAlchemy, MLflow, a bug in one of them) means the
            # same here: not delivered, the records stay. An exception that got out would silently end the thread.
            except Exception as error:  # noqa: BLE001
                if failures == 0:
                    logger.warning("%s can't be reached, training goes on: %s", self._receiver, _first_line(error))
                wait_s = min(FIRST_WAIT_S * 2**failures, 1.0 if self._closing.is_set() else LONGEST_WAIT_S)
                failures += 1
                self._pause(wait_s)
                continue
            if failures:
                logger.warning("%s is back", self._receiver)
            failures = 0
            if last_round:
                return
            self._pause(self._interval_s)

    def _pause(self, wait_s: float) -> None:
        """Wait, but not longer than until everything is written after `close`, and always a little after that."""
        if self._all_written.is_set():
            self._abandoned.wait(wait_s)
        else:
            self._all_written.wait(wait_s)


def send_all(segment: Segment, deliver: Deliver, abandoned: threading.Event | None = None) -> None:
    """Deliver every record of `segment` in order. Raises what `deliver` raises; what came before is marked as sent."""
    while found := segment.read(MAX_RECORDS_PER_BATCH):
        group = list(itertools.takewhile(lambda it: it[0]["kind"] == "metrics", found)) or found[:1]
        refused = _deliver_group(group, deliver, segment.folder)
        if abandoned is not None and abandoned.is_set():
            return  # close() has given the segment up; delivering twice is harmless
        for record, reason in refused:
            logger.warning("a %s record was refused for good: %s", record["kind"], reason)
            with suppress(OSError):  # a full disk: it is dropped, which the line above says
                segment.set_aside(record, reason)
        segment.mark_sent((record for record, _ in group), group[-1][1])


def _deliver_group(group: Sequence[tuple[Record, int]], deliver: Deliver, folder: Path) -> list[tuple[Record, str]]:
    """Deliver together or, where that is refused, one by one; returns what is refused, with the reason."""
    records = [record for record, _ in group]
    try:
        deliver(records, folder)
    except RefusedError as error:
        if len(group) == 1:
            return [(records[0], _first_line(error))]
        return [bad for one in group for bad in _deliver_group([one], deliver, folder)]
    return []


def replay(spool: Path, deliver: Deliver) -> int:
    """Deliver what processes that are gone left in `spool`; returns the number of records still not delivered."""
    undelivered = 0
    for segment in orphans(spool):
        try:
            send_all(segment, deliver)
        except Exception as error:  # noqa: BLE001  as in Outbox._send: whatever it is, the records stay and are counted
            logger.warning("%s could not be delivered: %s", segment.folder, _first_line(error))
        undelivered += _give_up(segment)
    return undelivered


def _give_up(segment: Segment) -> int:
    """Close a segment; returns how many of its records were not delivered, 0 if the disk does not tell."""
    try:
        undelivered = segment.num_pending() + segment.num_refused()
        segment.close()
    except (OSError, ValueError) as error:  # ValueError: what a power cut has left is no JSON
        logger.warning("the spool %s can't be read any more: %s", segment.folder, error)
        return 0
    return undelivered


def _first_line(error: Exception) -> str:
    """For a log and for `refused.jsonl`: an exception of a request quotes the whole URI, with the password in it."""
    return redact((str(error).splitlines() or [type(error).__name__])[0])
