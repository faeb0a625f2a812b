"""Ray Data: manifest records → a stream of decoded pairs, in order, fetched and decoded on the cluster's CPUs.

Only keys travel to the tasks: each fetches its images with threads and decodes them, and whole uint8 images come back
through the object store. That was two to five times as fast as Ray's own image readers on files in object storage.

An execution of Ray Data is finite and takes a tenth of a second to start, so an endless stream of records runs as a
chain of executions, each started while the one before still delivers. Where one breaks off, because storage is away or
its processes are killed for their memory, the next one begins with the first record that was not delivered.
"""

import logging
import pickle
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionOptions, ExecutionResources, TaskPoolStrategy
from ray.exceptions import RayError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from sr_data.errors import DataError, ImageError, StorageError
from sr_data.manifest import ImageRecord
from sr_data.pairs import DecodedPair, load_pair
from sr_data.storage import Store, open_store
from sr_data.storage_patience import Patience, may_pass, warn

_MAX_RUN_IMAGES = 256
_MAX_RUN_BYTES = 512 * 2**20
"""Decoded bytes of one execution; two can be under way, so the object store holds at most twice as much per worker."""

PATIENCE_S = 600.0
"""How long storage may be away while a run waits for its images. It is below the 1800 s after which the other workers,
which wait for this one, are ended by PyTorch.
"""
_MAX_TASK_TRIES = 3
"""By Ray itself; its default, without end, would try an image that no process survives for ever."""
_LEAST_CPUS = 0.2
"""Tasks that asked for less would crowd the nodes that have more."""
_MAX_BREAKS = 4
"""So many executions in a row may break off without a single image: from 16 images a task to 1."""

_SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "hr": pa.large_binary(),  # a column of plain binary has 32-bit offsets and ends at 2 GiB
        "lr": pa.large_binary(),
        "height_lr": pa.int32(),
        "width_lr": pa.int32(),
        "error": pa.large_binary(),
    }
)


def stream_pairs(
    store_uri: str,
    records: Iterable[ImageRecord],
    scale: int,
    *,
    num_threads: int,
    block_images: int,
    reserved_cpus: float,
    spare_cpus_here: float = 0.0,
    head_images: int = 8,
    patience_s: float = PATIENCE_S,
) -> Iterator[DecodedPair]:
    """Yield the decoded pair of each record, in order; `records` may be endless. Ray must be initialised.

    `num_threads` images are fetched at a time in each task, `block_images` are one task's work. `reserved_cpus` are
    held by the training workers of this run for as long as it lasts: decoding asks for what is left of the cluster's
    CPUs, one per task or less, and for none if nothing is left, so that it is always scheduled. `spare_cpus_here` are
    what is left of this node, which stays as long as its worker does, while others may go: a task asks for no more.

    The first `head_images` are loaded in this process, while Ray Data starts: its first execution takes 3 s on two
    idle cores and 12 s on busy ones, as each of its processes imports Ray Data. A dataset of so few images needs no
    execution at all.

    Arrays can be read-only views of Ray's shared memory: keep copies, not them. Closing the generator stops the
    execution. Raises the `DataError` or `StorageError` of the first image that can't be loaded, after the pairs
    before it.

    Storage that is away, or fails, is waited for, `patience_s` at most. Where tasks lack memory (MemoryError, or
    their process is killed) the stream goes on with smaller ones; where even one image a task is too much, it raises
    what ended the last one. Each is a warning in the log of this process, which says where the stream goes on.
    """
    source, store = iter(records), open_store(store_uri)
    tasks = _Tasks(store_uri, scale, num_threads, block_images, reserved_cpus, spare_cpus_here)
    pending: deque[ImageRecord] = deque()
    """Asked for, and not delivered yet."""
    num_breaks = 0
    while True:
        source = chain(list(pending), source)
        pending.clear()
        try:
            with closing(_unbroken(tasks, _noting(source, pending), store, head_images)) as pairs:
                for pair in pairs:
                    pending.popleft()
                    num_breaks = 0
                    yield pair
            return
        except StorageError as error:
            if not may_pass(error):
                raise
            # One image, in this process, until storage is back: that costs the cluster nothing.
            patience = Patience(seconds=patience_s)
            load = partial(_load_pair, store, pending[0], scale)
            pair = patience.spend(load, on="images can't be read", meanwhile="training waits for them", after=error)
            pending.popleft()
            yield pair
        except (MemoryError, RayError) as error:
            num_breaks += 1
            if (isinstance(error, RayTaskError) and not isinstance(error, MemoryError)) or num_breaks > _MAX_BREAKS:
                raise  # of our own code's mistakes, too, which would come back
            head_images, tasks = 0, tasks.smaller()  # what ends a task must not end a training worker
            warn(
                f"decoding broke off ({type(error).__name__}: {_first_line(error)}); going on at {pending[0].name} "
                f"with {tasks.block_images} images a task, {tasks.num_threads} at a time"
            )


def _noting(records: Iterable[ImageRecord], pending: "deque[ImageRecord]") -> Iterator[ImageRecord]:
    for record in records:
        pending.append(record)
        yield record


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "").strip()


@dataclass(frozen=True, slots=True)
class _Tasks:
    """How images are decoded: the arguments of `stream_pairs`."""

    store_uri: str
    scale: int
    num_threads: int
    block_images: int
    reserved_cpus: float
    spare_cpus_here: float

    def smaller(self) -> "_Tasks":
        """Tasks that need a quarter of the memory, or less."""
        return replace(self, block_images=max(1, self.block_images // 4), num_threads=1)

    def start(self, records: Sequence[ImageRecord]) -> "_Tables":
        """One execution."""
        size = self.block_images
        blocks = [records[start : start + size] for start in range(0, len(records), size)]
        dataset = decoding(
            blocks,
            self.store_uri,
            self.scale,
            num_threads=self.num_threads,
            reserved_cpus=self.reserved_cpus,
            spare_cpus_here=self.spare_cpus_here,
        )
        return _Tables(dataset)


def _unbroken(
    tasks: _Tasks, source: Iterator[ImageRecord], store: Store, head_images: int
) -> Generator[DecodedPair, None, None]:
    """The pairs of `source` until its end, or until something breaks off."""
    head = list(islice(source, head_images))
    upcoming = _next_run(tasks, source)
    try:
        with ThreadPoolExecutor(tasks.num_threads) as threads:
            yield from threads.map(lambda record: _load_pair(store, record, tasks.scale), head)
        while upcoming is not None:
            with closing(upcoming.started.result()) as tables:
                half, upcoming = upcoming.num_images // 2, None
                pairs = (pair_of_row(table, row, tasks.scale) for table in tables for row in range(len(table)))
                for number, pair in enumerate(pairs):
                    if number == half:
                        upcoming = _next_run(tasks, source)
                    yield pair
    finally:
        if upcoming is not None:
            upcoming.started.add_done_callback(_close)


@dataclass(frozen=True)
class _Run:
    """One execution of Ray Data."""

    num_images: int
    started: "Future[_Tables]"
    """Its tables, as soon as the first of them is in."""


class _Tables:
    """The tables of one execution, in order; `close` ends it."""

    def __init__(self, dataset: ray.data.Dataset) -> None:
        self._tables = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
        self._first = next(self._tables)

    def __iter__(self) -> Iterator[pa.Table]:
        return chain([self._first], self._tables)

    def close(self) -> None:
        self._tables.close()  # type: ignore[attr-defined]  # a generator, whose end shuts the execution down


def _close(started: "Future[_Tables]") -> None:
    if started.exception() is None:
        started.result().close()


def _next_run(tasks: _Tasks, source: Iterator[ImageRecord]) -> _Run | None:
    """Starts the next execution, of at least one image and about `_MAX_RUN_BYTES`; None at the end of `source`."""
    records: list[ImageRecord] = []
    num_bytes = 0
    for record in islice(source, _MAX_RUN_IMAGES):
        records.append(record)
        num_bytes += pair_bytes(record, tasks.scale)
        if num_bytes >= _MAX_RUN_BYTES:
            break
    if not records:
        return None
    started: Future[_Tables] = Future()

    def run() -> None:
        try:
            started.set_result(tasks.start(records))
        except BaseException as error:  # noqa: BLE001 — raised where the result is asked for
            started.set_exception(error)

    # A daemon, unlike a thread of an executor: a cluster without a free CPU must not keep the process from ending.
    threading.Thread(target=run, name="ray-data-start", daemon=True).start()
    return _Run(len(records), started)


def decoding(
    blocks: Sequence[Sequence[ImageRecord]],
    store_uri: str,
    scale: int,
    *,
    num_threads: int,
    reserved_cpus: float,
    spare_cpus_here: float = 0.0,
    patience_s: float = 0.0,
) -> ray.data.Dataset:
    """One execution of Ray Data that is yet to start: a task and a table per block, in order, see `pair_of_row`.

    The arguments are those of `stream_pairs`; `patience_s`, of its tasks: 0 where their caller waits for storage.
    """
    _be_quiet()
    items = [{"records": pickle.dumps(block)} for block in blocks]
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free_cpus = resources.get("CPU", 0.0) - reserved_cpus
    # A task runs on one node, and what is left may lie in pieces on several: one of them has the average or more.
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    num_nodes = sum(bool(node["Alive"] and node["Resources"].get("CPU")) for node in nodes)
    num_cpus = min(1.0, max(0.0, int(100 * free_cpus / max(1, num_nodes) + 1e-6) / 100))
    if spare_cpus_here >= _LEAST_CPUS:  # another node may go in mid-stream, and tasks keep what they ask for
        num_cpus = min(num_cpus, spare_cpus_here)
    load = partial(_load_block, store_uri=store_uri, scale=scale, num_threads=num_threads, patience_s=patience_s)
    source = ray.data.from_items(items, override_num_blocks=len(items))
    with warnings.catch_warnings():  # Ray 2.60 has no other way to say how often a task is tried
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = source.map_batches(
            load,
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            num_cpus=num_cpus,
            max_retries=_MAX_TASK_TRIES,
            # Without a CPU of its own to count, nothing else limits the number of tasks.
            compute=None if num_cpus else TaskPoolStrategy(size=1),
        )
    limits = ExecutionResources(cpu=free_cpus) if num_cpus else None
    dataset.context.execution_options = ExecutionOptions(resource_limits=limits, preserve_order=True)
    dataset.context.enable_progress_bars = False
    return dataset


def _load_block(block: pa.Table, *, store_uri: str, scale: int, num_threads: int, patience_s: float) -> pa.Table:
    """Runs in a task. An image's error is a row of its own: raised, it would be retried and reach the caller as
    Ray's.
    """
    store, patience = open_store(store_uri), Patience(seconds=patience_s)

    def load(record: ImageRecord) -> dict[str, object]:
        try:
            pair = patience.spend(partial(_load_pair, store, record, scale), on="images can't be read")
        except (DataError, StorageError, MemoryError) as error:
            return {"name": record.name, "error": pickle.dumps(error)}
        height, width, _ = pair.lr_HWC.shape
        return {
            "name": pair.name,
            "hr": np.ascontiguousarray(pair.hr_HWC).data,
            "lr": np.ascontiguousarray(pair.lr_HWC).data,
            "height_lr": height,
            "width_lr": width,
        }

    records = [record for blob in block["records"].to_pylist() for record in pickle.loads(blob)]
    try:
        with ThreadPoolExecutor(num_threads) as threads:
            return pa.Table.from_pylist(list(threads.map(load, records)), schema=_SCHEMA)
    except MemoryError as error:  # of the table, twice as large as the images
        failed = {"name": records[0].name, "error": pickle.dumps(error)}
        return pa.Table.from_pylist([failed], schema=_SCHEMA)


def _load_pair(store: Store, record: ImageRecord, scale: int) -> DecodedPair:
    """`load_pair`, but a MemoryError is one, not a sign of damage: the file was decoded when the manifest was made."""
    try:
        return load_pair(store, record, scale)
    except ImageError as error:
        if isinstance(error.__cause__, MemoryError):
            raise MemoryError(f"no memory to decode {store.uri_of(record.hr_key)}") from error
        raise


def pair_bytes(record: ImageRecord, scale: int) -> int:
    """Bytes of the record's two images, decoded."""
    return 3 * (record.width * record.height + (record.width // scale) * (record.height // scale))


def pair_of_row(table: pa.Table, row: int, scale: int) -> DecodedPair:
    """The pair in a row of a table of `decoding`: read-only views of the table's memory.

    Raises the `DataError`, `StorageError` or `MemoryError` of an image that could not be loaded.
    """
    name, error, height, width = (table[column][row] for column in ("name", "error", "height_lr", "width_lr"))
    if error.is_valid:
        raise pickle.loads(error.as_py())
    return DecodedPair(
        name=name.as_py(),
        hr_HWC=_image(table["hr"], row, height.as_py() * scale, width.as_py() * scale),
        lr_HWC=_image(table["lr"], row, height.as_py(), width.as_py()),
    )


def _image(images: pa.ChunkedArray, row: int, height: int, width: int) -> np.ndarray:
    # A scalar of Arrow's would be a copy of the bytes.
    (chunk,) = images.slice(row, 1).chunks
    _, offsets, pixels = chunk.buffers()
    start = np.frombuffer(offsets, np.int64)[chunk.offset]
    return np.frombuffer(pixels, np.uint8, height * width * 3, start).reshape(height, width, 3)


def _be_quiet() -> None:
    """Ray Data reports every execution; ours are many and short, and the run has its own progress."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
