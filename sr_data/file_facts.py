"""What reading and decoding a file has shown, for many files at once, and as a table that saves doing it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from sr_data.decode import decode_image
from sr_data.errors import DataError, ImageError
from sr_data.storage import FileEntry, Store

TABLE_FORMAT = "sr-dataset-files-1"

Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFacts:
    """One image file that was read whole and decoded, or that could not be."""

    num_bytes: int
    sha256: str
    width: int = 0
    """Pixels, as decoded; 0 if that failed."""
    height: int = 0
    mode: str = ""
    notes: tuple[str, ...] = ()
    """Conversions to RGB, see `sr_data.decode.CONVERSIONS`."""
    error: str | None = None
    """Why it is not a usable image, without its name."""


def facts_of(data: bytes) -> FileFacts:
    """The facts of one file's bytes; a damaged image gives `error`, not an exception."""
    return decode_with_facts(data)[0]


def decode_with_facts(data: bytes) -> tuple[FileFacts, NDArray[np.uint8] | None]:
    """The facts and, unless they hold an `error`, the pixels: uint8 HWC RGB."""
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        image_HWC, facts = decode_image(data, name="")
    except ImageError as error:
        return FileFacts(num_bytes=len(data), sha256=sha256, error=str(error).removeprefix(": ")), None
    return FileFacts(num_bytes=len(data), sha256=sha256, width=facts.width, height=facts.height, mode=facts.mode,
                     notes=facts.notes), image_HWC  # fmt: skip


def read_facts(
    store: Store, keys: Sequence[str], *, num_threads: int, progress: Progress | None = None
) -> dict[str, FileFacts]:
    """Reads every file. Threads are enough: waiting for the network, Pillow and SHA-256 all release the GIL."""
    facts: dict[str, FileFacts] = {}
    with ThreadPoolExecutor(num_threads, "verify") as threads:
        futures = {threads.submit(lambda key: facts_of(store.read(key)), key): key for key in keys}
        try:
            for future in as_completed(futures):
                facts[futures[future]] = future.result()
                if progress is not None:
                    progress(len(facts), len(keys))
        except BaseException:  # storage that fails for one file would fail for the thousands behind it
            threads.shutdown(cancel_futures=True)
            raise
    return facts


def listing_digest(uri: str, entries: Iterable[FileEntry]) -> str:
    """Changes when a file is added, removed or replaced: what a table read earlier is valid for."""
    listing = [[entry.key, entry.num_bytes, entry.version] for entry in sorted(entries, key=lambda entry: entry.key)]
    return hashlib.sha256(json.dumps([TABLE_FORMAT, uri, listing]).encode()).hexdigest()


def table_to_json(facts: Mapping[str, FileFacts]) -> str:
    """One line a file, so that two tables can be compared with diff."""
    rows = [f"{json.dumps(key)}: {json.dumps(asdict(facts[key]))}" for key in sorted(facts)]
    return f'{{"format": "{TABLE_FORMAT}", "files": {{\n' + ",\n".join(rows) + "\n}}\n"


def is_table(text: str) -> bool:
    """Whether this is a table of ours (of any version), and not something else of the same file name."""
    return text.startswith('{"format": "sr-dataset-files-')


def table_from_json(text: str, *, name: str) -> dict[str, FileFacts]:
    """The inverse of `table_to_json`. DataError, starting with `name`, if it is anything else."""
    try:
        table = json.loads(text)
        if table["format"] != TABLE_FORMAT:
            raise DataError(f"{name}: has format {table['format']!r}, not {TABLE_FORMAT!r}")
        return {key: FileFacts(**{**row, "notes": tuple(row["notes"])}) for key, row in table["files"].items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name}: is not a table of files as prepare_dataset writes it ({error!r})") from error
