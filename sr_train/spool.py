"""Records that wait on disk until they have been delivered, in the order in which they were made.

A spool folder holds one *segment* (a subfolder) per writer, so that a restarted worker and its dead predecessor never
write the same file:

    <segment>/records.jsonl   one JSON object per line, only ever appended to
    <segment>/files/          what a record of kind "file" points to, until it is delivered
    <segment>/sent            how many bytes of records.jsonl have been delivered
    <segment>/refused.jsonl   records the receiver will never take, each with the reason
    <segment>/lock            held (flock) by the process that writes or sends this segment

A segment survives the death of its process; a record is lost only with the disk (nothing is fsynced: a power cut may
take the last seconds). Delivery is at least once: a process that dies between delivering and noting it delivers again.
"""

import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
"""Plain JSON. A record with the key "file" has its content in the segment, at that relative path."""


def spool_root() -> Path:
    """Where this machine's spools are. Unlike `tempfile.gettempdir` it writes nothing to find out, which fails where
    the disk is full.
    """
    return Path(os.environ.get("TMPDIR") or "/tmp") / f"sr-tracking-{os.getuid()}"


class Segment:
    """One writer's records. Appending and sending may happen in two threads; nothing else may."""

    def __init__(self, folder: Path, lock: IO[str]) -> None:
        """Use `create` or `adopt`, which also take the lock."""
        self.folder = folder
        self._lock = lock
        self._records = folder / "records.jsonl"
        self._sent = folder / "sent"
        sent = self._sent.read_text() if self._sent.exists() else ""
        self.offset = int(sent) if sent.isdecimal() else 0  # a power cut can leave it empty: then all is sent again
        self._num_files = 0

    @classmethod
    def create(cls, spool: Path) -> "Segment":
        """Make a new segment in `spool`. Raises OSError if the disk refuses."""
        folder = spool / f"{time.time_ns()}-{socket.gethostname()}-{os.getpid()}"
        (folder / "files").mkdir(parents=True)
        segment = cls.adopt(folder)
        if segment is None:
            raise OSError(f"{folder}: was just made and is already locked by another process")
        return segment

    @classmethod
    def adopt(cls, folder: Path) -> "Segment | None":
        """Take over a segment whose process is gone; None if it is alive, just removed, or another user's."""
        try:
            lock = (folder / "lock").open("a")
        except (FileNotFoundError, PermissionError):
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        return cls(folder, lock)

    def append(self, record: Record, content: bytes | None = None) -> None:
        """Write one record, and the `content` of its file. Raises OSError, then nothing of it counts as written."""
        record = dict(record)
        if content is not None:
            record["file"] = f"files/{self._num_files:06d}/{Path(record['path']).name}"
            target = self.folder / record["file"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            self._num_files += 1
        line = (json.dumps(record, separators=(",", ":")) + "\n").encode()
        size = self._records.stat().st_size if self._records.exists() else 0
        with self._records.open("ab", buffering=0) as out:
            try:
                written = out.write(line)
                if written != len(line):
                    raise OSError(f"{self._records}: only {written} of {len(line)} bytes written, disk full?")
            except OSError:
                out.truncate(size)  # half a line would be glued to the next one
                raise

    def read(self, max_records: int) -> list[tuple[Record, int]]:
        """Undelivered records in order, each with the offset to pass to `mark_sent` once it is delivered. A line that
        a power cut has damaged is left out, and said in the log.
        """
        if not self._records.exists():
            return []
        found: list[tuple[Record, int]] = []
        with self._records.open("rb") as lines:
            lines.seek(self.offset)
            position = self.offset
            while len(found) < max_records:
                line = lines.readline()
                if not line.endswith(b"\n"):  # the end, or a line that is being written right now
                    break
                position += len(line)
                try:
                    found.append((json.loads(line), position))
                except ValueError:
                    logger.warning("%s: a damaged line before byte %d is left out", self._records, position)
        if not found and position > self.offset:
            self.mark_sent([], position)
        return found

    def mark_sent(self, records: Iterable[Record], offset: int) -> None:
        """Note that everything up to `offset` is delivered (or set aside) and drop the files of these `records`."""
        self.offset = offset
        temporary = self._sent.with_suffix(".new")
        # A full disk: this process knows what is sent, and another one would send it again, which changes nothing.
        with suppress(OSError):
            temporary.write_text(str(offset))
            temporary.replace(self._sent)
        for record in records:
            if "file" in record:
                shutil.rmtree((self.folder / record["file"]).parent, ignore_errors=True)

    def set_aside(self, record: Record, reason: str) -> None:
        """Keep a record that the receiver refuses for good, so that it does not block those behind it."""
        if "file" in record:
            kept = self.folder / "refused" / record["file"]
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / record["file"], kept)
        with (self.folder / "refused.jsonl").open("a") as out:
            out.write(json.dumps({**record, "reason": reason}) + "\n")

    def num_pending(self) -> int:
        """Number of records that are not delivered."""
        return len(self.read(max_records=2**62))

    def num_refused(self) -> int:
        """Number of records that were set aside."""
        path = self.folder / "refused.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def close(self) -> None:
        """Give the segment up: remove it if nothing in it is left to deliver or to look at, else leave it on disk."""
        if self.num_pending() == 0 and self.num_refused() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def orphans(spool: Path) -> list[Segment]:
    """Segments in `spool` whose process is gone, oldest first, taken over by the caller, who must close them.

    A spool that can't be read is a warning and holds none: what lies there is not worth a run.
    """
    try:
        folders = sorted((folder for folder in spool.iterdir() if (folder / "lock").exists()), key=lambda it: it.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("the spool %s can't be read, what an earlier process left there is not sent: %s", spool, error)
        return []
    return [segment for folder in folders if (segment := Segment.adopt(folder)) is not None]
