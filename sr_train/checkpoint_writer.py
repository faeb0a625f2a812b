"""Checkpoints written while training goes on: a copy of the tensors now, serialising and uploading in a thread.

Storage that is away, full or refusing for a while costs no checkpoint and not the run: the thread goes on trying, and
training waits when the next checkpoint is due.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from sr_data.errors import StorageError
from sr_data.storage import Store
from sr_data.storage_patience import Patience, warn
from sr_train import checkpoint as ckpt
from sr_train.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Written:
    """A checkpoint that is in storage, whole."""

    key: str
    step: int
    stalled_s: float
    """How long training stood still for it."""
    seconds: float
    """From when it was asked for to its end in storage."""


class CheckpointWriter:
    """At most one checkpoint on its way: memory stays bounded, and a slow store slows training rather than losing
    checkpoints.
    """

    def __init__(
        self,
        store: Store,
        *,
        keep_last: int,
        patience_s: float = 0.0,
        on_trouble: Callable[[str, int], None] | None = None,
    ):
        """`patience_s`: how long storage may refuse a checkpoint. `on_trouble(message, step)` is called, in the
        writer's thread, when that begins and when it is over; without one, it is logged.
        """
        self._store, self._keep_last = store, keep_last
        self._patience_s, self._on_trouble = patience_s, on_trouble
        self._leaving = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._on_the_way: Future[Written] | None = None

    def write(
        self, tensors: Mapping[str, Mapping[str, torch.Tensor]], meta: Mapping[str, Any], *, asked_s: float
    ) -> None:
        """Copies the tensors and begins to write them, then deletes all but the newest `keep_last`, the best and the
        last good one.

        No other write may be on its way (`finish` it first). `asked_s`: time.perf_counter() when training began to
        stand still for it.
        """
        assert self._on_the_way is None, "finish() the last one first"
        copies = {
            group: {name: tensor.detach().clone() for name, tensor in named.items()} for group, named in tensors.items()
        }
        copied = _record_event(copies)
        stalled_s = time.perf_counter() - asked_s
        checkpoint = Checkpoint(tensors=copies, meta=meta)
        self._on_the_way = self._thread.submit(self._write, checkpoint, copied, asked_s, stalled_s)

    def finished(self) -> Written | None:
        """The write that ended since the last call, if it did and went well; never waits."""
        if self._on_the_way is None or not self._on_the_way.done() or self._on_the_way.exception() is not None:
            return None
        return self.finish()

    def finish(self) -> Written | None:
        """Waits for the write on its way; None if there is none. Raises its StorageError; earlier ones are
        untouched.
        """
        future, self._on_the_way = self._on_the_way, None
        return future.result() if future is not None else None

    def close(self) -> None:
        """Waits for what is on its way; but no longer for storage that refuses it, once the attempt under way fails."""
        self._leaving.set()
        self._thread.shutdown(wait=True)

    def _write(
        self, checkpoint: Checkpoint, copied: torch.cuda.Event | None, asked_s: float, stalled_s: float
    ) -> Written:
        if copied is not None:  # on a stream of its own: the default one is full of training steps
            stream = torch.cuda.Stream(copied.device)  # type: ignore[no-untyped-call]
            stream.wait_event(copied)
            with torch.cuda.stream(stream):
                data = ckpt.checkpoint_bytes(checkpoint)
        else:
            data = ckpt.checkpoint_bytes(checkpoint)
        key = ckpt.key_of_step(checkpoint.step)
        self._patience(checkpoint.step).spend(
            lambda: self._store.write(key, data),
            on=f"the checkpoint of step {checkpoint.step} can't be written",
            meanwhile="training goes on until the next one is due",
        )
        best, good_step = checkpoint.meta.get("best"), checkpoint.meta.get("good_step")
        spared = {best["key"]} if best else set()
        if good_step is not None:
            spared.add(ckpt.key_of_step(good_step))
        try:
            ckpt.keep(self._store, last=self._keep_last, spared=spared)
        except StorageError as failure:  # costs space, not the run; the next checkpoint tries again
            logging.getLogger(__name__).warning("old checkpoints could not be deleted: %s", failure)
        return Written(key=key, step=checkpoint.step, stalled_s=stalled_s, seconds=time.perf_counter() - asked_s)

    def _patience(self, step: int) -> Patience:
        def say(message: str) -> None:
            if self._on_trouble is None:
                warn(message)
            else:
                self._on_trouble(message, step)

        return Patience(seconds=self._patience_s, say=say, given_up=self._leaving)


def _record_event(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> torch.cuda.Event | None:
    """An event after the work queued so far, if the tensors are on a GPU."""
    devices = {tensor.device for named in tensors.values() for tensor in named.values() if tensor.is_cuda}
    return torch.cuda.current_stream(devices.pop()).record_event() if devices else None
