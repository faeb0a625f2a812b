"""Checkpoints go to storage while training goes on: as they were when asked for, one at a time, none lost silently."""

import errno
import threading
import time
from pathlib import Path

import pytest
import torch

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
