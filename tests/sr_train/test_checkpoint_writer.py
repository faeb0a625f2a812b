"""Checkpoints go to storage while training goes on: as they were when asked for, one at a time, none lost silently."""

import errno
import threading
import time
from pathlib import Path

import pytest
import torch

from sr_data import storage_patience
from sr_data.errors import StorageError
from sr_data.storage import Store, open_store
from sr_train import checkpoint as ckpt
from sr_train.checkpoint_writer import CheckpointWriter

DEADLINE_S = 20


class Gated(Store):
    """A store whose writes wait for permission, or fail."""

    __slots__ = ("__dict__",)

    def __init__(self, uri: str):
        Store.__init__(self, uri)
        self.__dict__.update(asked=threading.Event(), open=threading.Event(), refuses=threading.Event())

    def write(self, key: str, data: bytes) -> None:
        self.asked.set()
        assert self.open.wait(DEADLINE_S)
        if self.refuses.is_set():
            raise StorageError(errno.EIO, "the store is away")
        Store.write(self, key, data)


def meta(step: int) -> dict[str, object]:
    return {"step": step, "best": None}


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path: Path) -> None:
    store = Gated(str(tmp_path))
    writer = CheckpointWriter(store, keep_last=1)
    weight = torch.ones(3)
    writer.write({"model": {"weight": weight}}, meta(1), asked_s=time.perf_counter())
    assert store.asked.wait(DEADLINE_S)
    weight += 1  # the next step
    assert writer.finished() is None
    store.open.set()
    written = writer.finish()
    assert written is not None and written.step == 1 and written.stalled_s <= written.seconds
    saved = ckpt.read_checkpoint(open_store(str(tmp_path)), written.key)
    assert torch.equal(saved.tensors["model"]["weight"], torch.ones(3))
    assert writer.finish() is None
    writer.close()


def test_a_failed_write_is_told_when_it_is_asked_for(tmp_path: Path) -> None:
    store = Gated(str(tmp_path))
    store.refuses.set()
    store.open.set()
    writer = CheckpointWriter(store, keep_last=1)
    writer.write({"model": {"weight": torch.ones(3)}}, meta(1), asked_s=time.perf_counter())
    with pytest.raises(StorageError, match="the store is away"):
        writer.finish()
    store.refuses.clear()
    writer.write({"model": {"weight": torch.ones(3)}}, meta(2), asked_s=time.perf_counter())
    writer.close()
    assert ckpt.list_keys(open_store(str(tmp_path))) == [ckpt.key_of_step(2)]


def test_leaving_waits_for_what_is_on_its_way(tmp_path: Path) -> None:
    store = Gated(str(tmp_path))
    writer = CheckpointWriter(store, keep_last=1)
    writer.write({"model": {"weight": torch.ones(3)}}, meta(7), asked_s=time.perf_counter())
    closing = threading.Thread(target=writer.close)
    closing.start()
    assert store.asked.wait(DEADLINE_S)
    store.open.set()
    closing.join(DEADLINE_S)
    assert ckpt.latest_key(open_store(str(tmp_path))) == ckpt.key_of_step(7)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_patience, "FIRST_PAUSE_S", 0.01)


class Refusing(Store):
    """A store that refuses to write until it is told that it was noticed."""

    __slots__ = ("__dict__",)

    def __init__(self, uri: str):
        Store.__init__(self, uri)
        self.__dict__.update(noticed=list[tuple[str, int]](), refuses=True)

    def notice(self, message: str, step: int) -> None:
        self.noticed.append((message, step))
        self.__dict__["refuses"] = False

    def write(self, key: str, data: bytes) -> None:
        if self.refuses:
            raise StorageError(errno.ENOSPC, "the disk is full")
        Store.write(self, key, data)


@pytest.mark.usefixtures("quick")
def test_a_checkpoint_that_storage_refuses_for_a_while_is_written_as_it_was(tmp_path: Path) -> None:
    store = Refusing(str(tmp_path))
    writer = CheckpointWriter(store, keep_last=1, patience_s=60, on_trouble=store.notice)
    weight = torch.ones(3)
    writer.write({"model": {"weight": weight}}, meta(4), asked_s=time.perf_counter())
    weight += 1  # training goes on
    written = writer.finish()
    assert written is not None and written.step == 4
    saved = ckpt.read_checkpoint(open_store(str(tmp_path)), written.key)
    assert torch.equal(saved.tensors["model"]["weight"], torch.ones(3))
    (began, first_step), (over, last_step) = store.noticed
    assert (first_step, last_step) == (4, 4)
    assert "the checkpoint of step 4 can't be written since" in began and "the disk is full" in began
    assert "storage is back" in over
    writer.close()


@pytest.mark.usefixtures("quick")
def test_leaving_does_not_wait_for_storage_that_refuses(tmp_path: Path) -> None:
    store = Refusing(str(tmp_path))
    refused = threading.Event()
    writer = CheckpointWriter(store, keep_last=1, patience_s=3600, on_trouble=lambda *_: refused.set())
    writer.write({"model": {"weight": torch.ones(3)}}, meta(4), asked_s=time.perf_counter())
    assert refused.wait(DEADLINE_S)
    closing = threading.Thread(target=writer.close, daemon=True)
    closing.start()
    closing.join(DEADLINE_S)
    assert not closing.is_alive()
    with pytest.raises(StorageError, match="the disk is full"):
        writer.finish()
