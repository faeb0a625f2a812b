"""What a staging run has finished so far, kept beside the target's files so that the next run goes on from there."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass

from sr_data.errors import DataError
from sr_data.file_facts import FileFacts
from sr_data.storage import Store

FOLDER = ".staging/"
FLUSH_INTERVAL_S = 3.0  # at most this much work is done again after a crash


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """One HR image of the source with everything that was made of it."""

    signature: str
    """Of the source files' versions and the options: other ones mean that it must be done again."""
    outputs: Mapping[str, FileFacts]
    """Target key → facts of the file there."""


class Journal:
    """HR key → Finished, in small files below `.staging/`: object storage can't append. Used from one thread."""

    def __init__(self, target: Store) -> None:
        """Reads what earlier runs have left."""
        self._target = target
        self._parts = [entry.key for entry in target.list(FOLDER)]
        self._fresh: dict[str, Finished] = {}
        self._flushed_at = time.monotonic()
        self.finished: dict[str, Finished] = {}
        for part in self._parts:  # by name, hence by time: later parts win
            self.finished |= _from_json(target.read_text(part), name=target.uri_of(part))

    def forget_missing(self, there: Container[str], *, keep: Container[str]) -> None:
        """Drops images whose outputs somebody has deleted from the target, unless this run makes them again."""
        self.finished = {
            hr_key: one
            for hr_key, one in self.finished.items()
            if hr_key in keep or any(key in there for key in one.outputs)
        }

    def add(self, hr_key: str, finished: Finished) -> None:
        """Notes it, and writes what is noted every few seconds."""
        self.finished[hr_key] = self._fresh[hr_key] = finished
        if time.monotonic() - self._flushed_at > FLUSH_INTERVAL_S:
            self.flush()

    def flush(self) -> None:
        """Writes what is noted and not yet written."""
        if self._fresh:
            part = f"{FOLDER}{time.time_ns():020}-{uuid.uuid4().hex[:8]}.json"
            self._target.write(part, _to_json(self._fresh))
            self._parts.append(part)
            self._fresh = {}
        self._flushed_at = time.monotonic()

    def compact(self) -> None:
        """Replaces all parts by one."""
        if len(self._parts) + bool(self._fresh) > 1 or self._fresh:
            old, self._parts, self._fresh = self._parts, [], dict(self.finished)
            self.flush()
            for part in old:
                self._target.delete(part)


def _to_json(finished: Mapping[str, Finished]) -> bytes:
    return json.dumps({key: asdict(value) for key, value in finished.items()}).encode()


def _from_json(text: str, *, name: str) -> dict[str, Finished]:
    try:
        return {
            hr_key: Finished(
                signature=row["signature"],
                outputs={
                    key: FileFacts(**{**facts, "notes": tuple(facts["notes"])}) for key, facts in row["outputs"].items()
                },
            )
            for hr_key, row in json.loads(text).items()
        }
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name}: is not a journal of prepare_dataset ({error!r}); delete it and run again") from error
