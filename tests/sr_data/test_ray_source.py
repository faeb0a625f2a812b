"""Ray Data's stream of pairs on a real Ray of two CPUs."""

import hashlib
import itertools
import os
import pickle
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image
from ray.exceptions import RayError

from sr_data import ray_source
from sr_data.errors import DataError, ImageError, StorageError
from sr_data.manifest import ImageRecord
from sr_data.pairs import DecodedPair, load_pair
from sr_data.ray_source import stream_pairs
from sr_data.storage import open_store

SCALE = 2
NUM_IMAGES = 11


@pytest.fixture(scope="module", autouse=True)
def ray_of_two_cpus() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, logging_level="WARNING")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of different sizes and colours."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        pixels = rng.integers(0, 256, (20 + 2 * number, 40 - 2 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04}.png")
    return folder


def records_of(folder: Path) -> list[ImageRecord]:
    records = []
    for path in sorted(folder.glob("*.png")):
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        with Image.open(path) as image:
            width, height = image.size
        facts = {"width": width, "height": height, "mode": "RGB", "hr_sha256": digest, "num_bytes": len(data)}
        records.append(ImageRecord(name=path.stem, hr_key=path.name, lr_key=None, lr_sha256=None, **facts))
    return records


def stream(folder: Path, records: Iterator[ImageRecord] | list[ImageRecord], **changes: float) -> Iterator[DecodedPair]:
    arguments = {"num_threads": 2, "block_images": 3, "reserved_cpus": 0.0, "head_images": 0} | changes
    return stream_pairs(str(folder), records, SCALE, **arguments)  # type: ignore[arg-type]


def assert_same(pairs: list[DecodedPair], folder: Path, records: list[ImageRecord]) -> None:
    store = open_store(str(folder))
    assert [pair.name for pair in pairs] == [record.name for record in records]
    for pair, record in zip(pairs, records, strict=True):
        expected = load_pair(store, record, SCALE)
        np.testing.assert_array_equal(pair.hr_HWC, expected.hr_HWC)
        np.testing.assert_array_equal(pair.lr_HWC, expected.lr_HWC)


@pytest.mark.parametrize("run_images", [256, 4])
def test_pairs_are_those_of_the_records_in_order(
    images: Path, run_images: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_source, "_MAX_RUN_IMAGES", run_images)
    records = records_of(images)
    records = records[5:] + records[:5]
    assert_same(list(stream(images, records)), images, records)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("head_images", [2, NUM_IMAGES, 100])
def test_head_is_followed_by_the_rest(images: Path, head_images: int) -> None:
    records = records_of(images)
    assert_same(list(stream(images, records, head_images=head_images)), images, records)


def test_few_images_need_no_execution(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start_nothing(*_: object, **__: object) -> None:
        raise AssertionError("an execution was started")

    monkeypatch.setattr(ray_source, "decoding", start_nothing)
    records = records_of(images)[:5]
    assert_same(list(stream(images, records, head_images=8)), images, records)


def test_no_records_no_pairs(images: Path) -> None:
    assert list(stream(images, [])) == []


def test_endless_records_are_read_as_they_are_needed(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_source, "_MAX_RUN_IMAGES", 4)
    records = records_of(images)
    num_read = 0

    def endless() -> Iterator[ImageRecord]:
        nonlocal num_read
        for record in itertools.cycle(records):
            num_read += 1
            yield record

    pairs = stream(images, endless())
    assert_same(list(itertools.islice(pairs, 30)), images, [records[i % NUM_IMAGES] for i in range(30)])
    assert num_read <= 30 + 2 * 4
    pairs.close()  # type: ignore[attr-defined]


def test_runs_end_at_their_limit_of_bytes(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_source, "_MAX_RUN_BYTES", 1)
    records = records_of(images)[:3]
    assert_same(list(stream(images, records)), images, records)


def test_error_of_an_image_comes_as_itself_after_the_pairs_before_it(images: Path, tmp_path: Path) -> None:
    for path in images.glob("000[0-4].png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "0003.png").read_bytes()
    (tmp_path / "0003.png").write_bytes(whole[: len(whole) // 2])
    pairs = stream(tmp_path, records_of(tmp_path), block_images=2)
    assert [pair.name for pair in itertools.islice(pairs, 3)] == ["0000", "0001", "0002"]
    with pytest.raises((ImageError, DataError), match="0003") as raised:
        next(pairs)
    assert "ray" not in str(raised.value).lower()


def test_missing_file_is_a_storage_error(images: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"0000\.png"):
        list(stream(tmp_path, records_of(images)))


@pytest.mark.parametrize("held_cpus", [1.5, 2.0])
def test_training_workers_that_hold_the_cpus_do_not_block_decoding(images: Path, held_cpus: float) -> None:
    """The stream runs inside a worker that holds most or all of the cluster's CPUs, as in Ray Train."""

    @ray.remote(num_cpus=held_cpus)
    def worker(folder: Path, records: list[ImageRecord]) -> list[str]:
        return [pair.name for pair in stream_pairs(
            str(folder), records, SCALE, num_threads=2, block_images=3, reserved_cpus=held_cpus, head_images=0
        )]  # fmt: skip

    records = records_of(images)
    assert ray.get(worker.remote(images, records), timeout=60) == [record.name for record in records]


def test_closing_the_stream_ends_its_executions(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_source, "_MAX_RUN_IMAGES", 4)
    pairs = stream(images, itertools.cycle(records_of(images)))
    assert len(list(itertools.islice(pairs, 7))) == 7  # half way through the second execution: the third is starting
    names = ("ray-data-start", "StreamingExecutor")
    assert any(thread.name.startswith(names) for thread in threading.enumerate())
    pairs.close()  # type: ignore[attr-defined]
    for name in names:
        for thread in threading.enumerate():
            if thread.name.startswith(name):
                thread.join(timeout=20)
                assert not thread.is_alive()


Load = Callable[..., pa.Table]


@dataclass(frozen=True)
class ShortOfMemory:
    """Tasks in a process that may hold so much more memory than it does when they begin, and no more."""

    load: Load
    spare_bytes: int
    __name__: ClassVar[str] = "load"  # which Ray Data asks for

    def __call__(self, block: pa.Table, **arguments: object) -> pa.Table:
        status = Path("/proc/self/status").read_text()
        in_use_bytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData")) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (in_use_bytes + self.spare_bytes, resource.RLIM_INFINITY))
        try:
            return self.load(block, **arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@dataclass(frozen=True)
class Killed:
    """Tasks that are killed, as by the kernel when memory ends, if they have more than so many images."""

    load: Load
    max_images: int
    __name__: ClassVar[str] = "load"

    def __call__(self, block: pa.Table, **arguments: object) -> pa.Table:
        if sum(len(pickle.loads(blob)) for blob in block["records"].to_pylist()) > self.max_images:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.load(block, **arguments)


def test_tasks_that_lack_memory_are_made_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(24):  # 4 MB each, decoded, and ten times as much while LR is made
        Image.new("RGB", (1000, 1000), (number, 0, 0)).save(tmp_path / f"{number:04}.png")
    records = records_of(tmp_path)
    monkeypatch.setattr(ray_source, "_load_block", ShortOfMemory(ray_source._load_block, 128 * 2**20))
    pairs = list(stream(tmp_path, records, block_images=24))
    assert [pair.name for pair in pairs] == [record.name for record in records]
    assert [pair.hr_HWC[-1, -1].tolist() for pair in pairs] == [[number, 0, 0] for number in range(24)]
    assert "decoding broke off (" in caplog.text and "with 6 images a task" in caplog.text


def test_tasks_that_are_killed_are_made_smaller(
    images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_source, "_MAX_TASK_TRIES", 0)
    monkeypatch.setattr(ray_source, "_load_block", Killed(ray_source._load_block, max_images=3))
    records = records_of(images)
    assert_same(list(stream(images, records, block_images=NUM_IMAGES)), images, records)
    assert caplog.text.count("decoding broke off (") == 1
    assert "going on at 0000 with 2 images a task, 1 at a time" in caplog.text


def test_an_image_that_no_task_survives_ends_the_stream(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_source, "_MAX_TASK_TRIES", 0)
    monkeypatch.setattr(ray_source, "_MAX_BREAKS", 1)
    monkeypatch.setattr(ray_source, "_load_block", Killed(ray_source._load_block, max_images=0))
    with pytest.raises(RayError):
        list(stream(images, records_of(images)))
