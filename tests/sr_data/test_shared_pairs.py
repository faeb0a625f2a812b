"""Pairs that are decoded once and shared, on a real Ray of two CPUs."""

import errno
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image

from sr_data import ray_source, shared_pairs
from sr_data.errors import DataError, ImageError, StorageError
from sr_data.manifest import ImageRecord
from sr_data.pairs import DecodedPair, load_pair
from sr_data.shared_pairs import SharedPairs, decode_once, shared_stream
from sr_data.storage import open_store

SCALE = 2
NUM_IMAGES = 11


@pytest.fixture(scope="module", autouse=True)
def ray_of_two_cpus() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, logging_level="WARNING")
    yield
    ray.shutdown()


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A set whose files are gone."""

    uri: str
    records: list[ImageRecord]
    expected: dict[str, DecodedPair]
    shared: SharedPairs


def make_images(folder: Path, seed: int = 0) -> list[ImageRecord]:
    """Images of different sizes and colours; each is more than the 100 KiB that Ray sends by value."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(NUM_IMAGES):
        width, height = 240 - 2 * number, 180 + 2 * number
        path = folder / f"{number:04}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path, compress_level=1)
        data = path.read_bytes()
        facts = {"width": width, "height": height, "mode": "RGB", "num_bytes": len(data)}
        digest = hashlib.sha256(data).hexdigest()
        records.append(
            ImageRecord(name=path.stem, hr_key=path.name, lr_key=None, hr_sha256=digest, lr_sha256=None, **facts)
        )
    return records


def decode(folder: Path, records: Iterable[ImageRecord], *, block_images: int = 3) -> SharedPairs:
    return decode_once(str(folder), records, SCALE, num_threads=2, block_images=block_images)


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> Decoded:
    """The files are deleted after they were decoded: whatever is streamed was not read again."""
    folder = tmp_path_factory.mktemp("images")
    records = make_images(folder)
    store = open_store(str(folder))
    expected = {record.name: load_pair(store, record, SCALE) for record in records}
    shared = decode(folder, records)
    shutil.rmtree(folder)
    return Decoded(uri=str(folder), records=records, expected=expected, shared=shared)


def is_shared_memory(pixels: np.ndarray) -> bool:
    """Whether the pixels lie in memory that this process maps together with others."""
    address = pixels.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, *_ = line.split()
        first, end = (int(bound, 16) for bound in span.split("-"))
        if first <= address < end:
            return rights[3] == "s"
    return False


def test_pairs_are_those_of_the_files_in_the_order_asked_with_repeats_and_without_end(decoded: Decoded) -> None:
    order = [7, 0, 10, 10, 3, 0, *range(NUM_IMAGES)]
    records = [decoded.records[index] for index in order]
    pairs = list(itertools.islice(decoded.shared.stream(decoded.uri, itertools.cycle(records), SCALE), 2 * len(order)))
    assert [pair.name for pair in pairs] == 2 * [record.name for record in records]
    for pair in pairs:
        np.testing.assert_array_equal(pair.hr_HWC, decoded.expected[pair.name].hr_HWC)
        np.testing.assert_array_equal(pair.lr_HWC, decoded.expected[pair.name].lr_HWC)


def test_records_are_read_as_they_are_needed(decoded: Decoded) -> None:
    records = iter(decoded.records)
    pairs = decoded.shared.stream(decoded.uri, records, SCALE)
    assert [next(pairs).name, next(pairs).name] == ["0000", "0001"]
    assert next(records).name == "0002"


def test_bytes_are_those_of_the_pixels(decoded: Decoded) -> None:
    pairs = decoded.expected.values()
    assert decoded.shared.num_bytes == sum(pair.hr_HWC.nbytes + pair.lr_HWC.nbytes for pair in pairs)


def test_images_are_read_only_views_of_the_one_copy(decoded: Decoded) -> None:
    streams = [decoded.shared.stream(decoded.uri, decoded.records, SCALE) for _ in range(2)]
    for one, other in zip(*streams, strict=True):
        for mine, theirs in ((one.hr_HWC, other.hr_HWC), (one.lr_HWC, other.lr_HWC)):
            assert is_shared_memory(mine)
            assert mine.ctypes.data == theirs.ctypes.data
            assert not mine.flags.writeable


def test_a_stream_lets_go_of_all_but_the_last_blocks(decoded: Decoded, monkeypatch: pytest.MonkeyPatch) -> None:
    """And fetches one that comes back, while views of it stay good."""
    fetched = []
    get = ray.get

    def counting_get(block: ray.ObjectRef) -> object:
        fetched.append(decoded.shared.blocks.index(block))
        return get(block)

    monkeypatch.setattr(ray, "get", counting_get)
    monkeypatch.setattr(shared_pairs, "_KEPT_BLOCKS", 2)
    records = [decoded.records[image] for image in (0, 3, 1, 6, 9, 4, 2, 0)]
    pairs = list(decoded.shared.stream(decoded.uri, records, SCALE))
    assert fetched == [0, 1, 2, 3, 1, 0]  # wanted, by threes: 0 1 0 2 3 1 0 0
    for pair in pairs:
        np.testing.assert_array_equal(pair.hr_HWC, decoded.expected[pair.name].hr_HWC)


@dataclass(frozen=True)
class AwayAtFirst:
    """In a task: storage fails when it is first asked for an image."""

    load: Callable[..., pa.Table]
    __name__: ClassVar[str] = "load"

    def __call__(self, block: pa.Table, **arguments: object) -> pa.Table:
        its, asked = self.load.__globals__, itertools.count()  # it came by value: its module here is another
        real = its["_load_pair"]

        def load_pair(*of: Any) -> DecodedPair:
            if next(asked) == 0:
                raise StorageError(errno.EIO, "storage is away")
            return real(*of)

        with patch.dict(its, _load_pair=load_pair):
            return self.load(block, **arguments)


def test_storage_that_is_away_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Now, and when Ray decodes a block again whose node was lost: an error would stay in its place."""
    records = make_images(tmp_path)
    monkeypatch.setattr(ray_source, "_load_block", AwayAtFirst(ray_source._load_block))
    shared = decode(tmp_path, records)
    assert [pair.name for pair in shared.stream(str(tmp_path), records, SCALE)] == [record.name for record in records]
    with pytest.raises(StorageError, match="storage is away"):
        decode_once(str(tmp_path), records, SCALE, num_threads=2, block_images=3, patience_s=0)


@dataclass(frozen=True, kw_only=True)
class JobLike:
    """As a worker is told: the source is deep inside what it gets."""

    stream_pairs: Callable[[str, Iterable[ImageRecord], int], Iterator[DecodedPair]]
    uri: str
    records: list[ImageRecord]


def test_two_other_processes_see_the_same_memory(decoded: Decoded) -> None:
    @ray.remote(num_cpus=1)
    class Worker:
        def stream(self, job: JobLike) -> tuple[list[tuple[str, bytes, bytes]], bool]:
            pairs = list(job.stream_pairs(job.uri, job.records, SCALE))
            shared = all(is_shared_memory(pair.hr_HWC) and is_shared_memory(pair.lr_HWC) for pair in pairs)
            return [(pair.name, pair.hr_HWC.tobytes(), pair.lr_HWC.tobytes()) for pair in pairs], shared

    job = JobLike(stream_pairs=shared_stream([decoded.shared]), uri=decoded.uri, records=decoded.records[::-1])
    workers = [Worker.remote() for _ in range(2)]
    for pairs, shared in ray.get([worker.stream.remote(job) for worker in workers], timeout=60):
        assert shared
        assert [name for name, _, _ in pairs] == [record.name for record in decoded.records[::-1]]
        for name, hr, lr in pairs:
            assert hr == decoded.expected[name].hr_HWC.tobytes()
            assert lr == decoded.expected[name].lr_HWC.tobytes()


def test_a_job_has_one_source_for_several_sets(decoded: Decoded, tmp_path: Path) -> None:
    """Two splits of one dataset (the same URI, and images of the same names), and another dataset."""
    (tmp_path / "valid").mkdir()
    valid = [replace(record, hr_key=f"valid/{record.hr_key}") for record in make_images(tmp_path / "valid", seed=1)]
    train = make_images(tmp_path, seed=2)
    sets = [decoded.shared, decode(tmp_path, train), decode(tmp_path, valid)]
    source = shared_stream(sets)
    store = open_store(str(tmp_path))
    for records in (train, valid):
        for record, pair in zip(records, source(str(tmp_path), records, SCALE), strict=True):
            np.testing.assert_array_equal(pair.hr_HWC, load_pair(store, record, SCALE).hr_HWC)
    (pair,) = source(decoded.uri, decoded.records[:1], SCALE)
    np.testing.assert_array_equal(pair.hr_HWC, decoded.expected["0000"].hr_HWC)


def test_what_was_not_decoded_is_refused(decoded: Decoded) -> None:
    known = decoded.records[0]
    stranger = replace(known, name="stranger")
    replaced = replace(known, hr_sha256="0" * 64)
    for uri, record, scale in [
        (decoded.uri, stranger, SCALE),
        (decoded.uri, replaced, SCALE),
        (decoded.uri, known, 3),
        ("/another", known, SCALE),
    ]:
        pairs = shared_stream([decoded.shared])(uri, [record], scale)
        with pytest.raises(DataError, match=f"^{uri}: {record.name} at scale {scale} .*11 of {decoded.uri} at scale 2"):
            next(pairs)


def test_images_before_the_stranger_come(decoded: Decoded) -> None:
    stranger = replace(decoded.records[0], name="stranger")
    pairs = decoded.shared.stream(decoded.uri, [decoded.records[4], stranger], SCALE)
    assert next(pairs).name == "0004"
    with pytest.raises(DataError, match="stranger"):
        next(pairs)


def test_first_bad_image_is_named(tmp_path: Path) -> None:
    records = make_images(tmp_path)
    for number in (4, 9):
        path = tmp_path / f"{number:04}.png"
        path.write_bytes(path.read_bytes()[:1000])
        records[number] = replace(records[number], hr_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ImageError, match=r"0004\.png") as raised:
        decode(tmp_path, records)
    assert "ray" not in str(raised.value).lower()


def test_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    records = make_images(tmp_path)
    (tmp_path / "0010.png").unlink()
    with pytest.raises(StorageError, match=r"0010\.png"):
        decode(tmp_path, records)


def test_blocks_end_at_their_limit_of_images_and_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = make_images(tmp_path)[:4]
    whole = decode(tmp_path, [*records, records[0]], block_images=3)  # what comes twice is held once
    assert list(whole.places.values()) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    two_images = sum(3 * record.width * record.height * 5 // 4 for record in records[:2])
    monkeypatch.setattr(shared_pairs, "_MAX_BLOCK_BYTES", two_images)  # images 2 and 3 are not smaller than 0 and 1
    halves = decode(tmp_path, records, block_images=3)
    assert list(halves.places.values()) == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert len(halves.blocks) == 3


def test_a_set_can_be_decoded_while_others_hold_all_cpus(tmp_path: Path) -> None:
    @ray.remote(num_cpus=2)
    def trial(folder: Path, records: list[ImageRecord]) -> list[str]:
        start = partial(decode_once, num_threads=2, block_images=3, reserved_cpus=2.0)
        shared = start(str(folder), records, SCALE)
        return [pair.name for pair in shared.stream(str(folder), records, SCALE)]

    records = make_images(tmp_path)
    assert ray.get(trial.remote(tmp_path, records), timeout=60) == [record.name for record in records]
