"""One decode for many trainings: a dataset's pairs in Ray's object store, seen by every worker without a copy.

Each block of images is one object. On a node it lies in shared memory once, however many processes look at it; another
node fetches it when it first needs it. What the store has no room for, Ray writes to disk and reads again when asked.
The process that decoded owns the blocks: Ray rebuilds those of a lost node by decoding again, and when that process
ends, they are gone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, repeat

import pyarrow as pa
import ray

from sr_data.errors import DataError
from sr_data.manifest import ImageRecord
from sr_data.pairs import DecodedPair
from sr_data.ray_source import PATIENCE_S, decoding, pair_bytes, pair_of_row

_MAX_BLOCK_BYTES = 32 * 2**20
"""Decoded bytes of a block of more than one image: from disk, a block is read whole for the one image asked for."""
_KEPT_BLOCKS = 4
"""Blocks that a stream keeps in shared memory: a dataset that doesn't fit must stay free to go to disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPairs:
    """The decoded pairs of one dataset at one scale. Picklable; the blocks stay as long as any process holds it."""

    store_uri: str
    scale: int
    blocks: tuple["ray.ObjectRef[pa.Table]", ...] = field(repr=False)
    places: Mapping[ImageRecord, tuple[int, int]] = field(repr=False)
    """Record → number of its block, row in it."""

    @property
    def num_bytes(self) -> int:
        """Of all decoded images, HR and LR: what they take of the object store, once on each node that needs them all,
        and beyond its limit of disk.
        """
        return sum(pair_bytes(record, self.scale) for record in self.places)

    def stream(self, store_uri: str, records: Iterable[ImageRecord], scale: int) -> Iterator[DecodedPair]:
        """`shared_stream` of this set alone."""
        return _stream([self], store_uri, records, scale)


def shared_stream(
    sets: Sequence[SharedPairs],
) -> Callable[[str, Iterable[ImageRecord], int], Iterator[DecodedPair]]:
    """One source for what a job needs, such as its training and its validation images. Picklable.

    Called with a dataset's URI, records and the scale, it yields the pair of each record, in order; `records` may be
    endless and may repeat. Arrays are read-only views of shared memory, which stays in use as long as they do. Raises
    `DataError` at the first record that is in none of the sets, and the `DataError` or `StorageError` of an image that
    was lost with its node and can't be loaded again.
    """
    return partial(_stream, sets)


def decode_once(
    store_uri: str,
    records: Iterable[ImageRecord],
    scale: int,
    *,
    num_threads: int,
    block_images: int,
    reserved_cpus: float = 0.0,
    patience_s: float = PATIENCE_S,
) -> SharedPairs:
    """Reads and decodes all of `records` (one or more) on the cluster's CPUs, into the object store. Ray must be
    initialised.

    `num_threads` images are fetched at a time in each task, at most `block_images` are one task's work and one object.
    `reserved_cpus` of the cluster are not decoded on. Storage that is away, or fails, is waited for, `patience_s` at
    most for each image, also when a lost block is decoded again. Raises the `DataError` or `StorageError` of the first
    image that can't be loaded.
    """
    wanted = list(dict.fromkeys(records))
    dataset = decoding(
        _cut(wanted, scale, block_images),
        store_uri,
        scale,
        num_threads=num_threads,
        reserved_cpus=reserved_cpus,
        patience_s=patience_s,
    )
    blocks = dataset.materialize().to_arrow_refs()
    # Where the blocks are, so that none travels. One at a time, and without a CPU to count, as none may be left.
    check = ray.remote(_check).options(num_cpus=0)
    lengths = []
    for block in blocks:
        length, first_error = ray.get(check.remote(block, scale))
        if first_error is not None:
            raise first_error
        lengths.append(length)
    places = chain.from_iterable(zip(repeat(block), range(length)) for block, length in enumerate(lengths))
    return SharedPairs(
        store_uri=store_uri, scale=scale, blocks=tuple(blocks), places=dict(zip(wanted, places, strict=True))
    )


def _cut(records: Sequence[ImageRecord], scale: int, block_images: int) -> list[list[ImageRecord]]:
    blocks: list[list[ImageRecord]] = []
    num_bytes = 0
    for record in records:
        num_bytes += pair_bytes(record, scale)
        if not blocks or len(blocks[-1]) == block_images or num_bytes > _MAX_BLOCK_BYTES:
            blocks.append([])
            num_bytes = pair_bytes(record, scale)
        blocks[-1].append(record)
    return blocks


def _check(table: pa.Table, scale: int) -> tuple[int, Exception | None]:
    """Runs in a task. Number of rows, and the error of the first image that could not be loaded."""
    try:
        for row in range(len(table)):
            pair_of_row(table, row, scale)
    except Exception as error:  # noqa: BLE001 — raised where the task was started, as itself and not as Ray's
        return len(table), error
    return len(table), None


def _stream(
    sets: Sequence[SharedPairs], store_uri: str, records: Iterable[ImageRecord], scale: int
) -> Iterator[DecodedPair]:
    candidates = [it for it in sets if (it.store_uri, it.scale) == (store_uri, scale)]
    block_of = lru_cache(_KEPT_BLOCKS)(ray.get)
    for record in records:
        holder = next((it for it in candidates if record in it.places), None)
        if holder is None:
            decoded = ", ".join(f"{len(it.places)} of {it.store_uri} at scale {it.scale}" for it in sets)
            raise DataError(
                f"{store_uri}: {record.name} at scale {scale} is not among the images that were decoded for all "
                f"trainings ({decoded}); all of them need the same --data.uri, --data.split and --validation.uri"
            )
        block, row = holder.places[record]
        yield pair_of_row(block_of(holder.blocks[block]), row, scale)
