"""A training worker is killed by a signal: Ray Train replaces it, and the weights are those of a run that lost none."""

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
import torch
import torch.distributed as dist

from sr_data.manifest import ImageRecord
from sr_data.pairs import DecodedPair, load_pair
from sr_data.storage import open_store
from sr_train.mailbox import Message
from sr_train.ray_cluster import connect, pair_stream
from sr_train.ray_workers import TrainingFailedError
from sr_train.worker import StreamPairs
from tests.support.runs import CHECKPOINT_STEPS, TOTAL_STEPS, final_tensors, planned, run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    connect()
    yield
    ray.shutdown()


@dataclass(frozen=True)
class KillsItsWorker:
    """A feed whose worker of rank 1 is killed, once, as its 12th image arrives: between two checkpoints."""

    feed: StreamPairs
    marker: Path

    def __call__(self, uri: str, records: Iterable[ImageRecord], scale: int) -> Iterator[DecodedPair]:
        for number, pair in enumerate(self.feed(uri, records, scale), start=1):
            if number == 12 and dist.get_rank() == 1 and not self.marker.exists():
                self.marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield pair


@dataclass(frozen=True)
class PoisonsAnImage:
    """A feed whose first image can't be had any more when training starts."""

    missing: str

    def __call__(self, uri: str, records: Iterable[ImageRecord], scale: int) -> Iterator[DecodedPair]:
        store = open_store(uri)
        for record in records:
            yield load_pair(store, replace(record, hr_key=self.missing), scale)


def start_steps(messages: list[Message]) -> list[int]:
    return [values["step"] for kind, values in messages if kind == "start"]


def test_a_killed_worker_changes_nothing(tiny_photos: Path, tmp_path: Path) -> None:
    unharmed = planned(tiny_photos, tmp_path, "unharmed")
    assert run(unharmed, []).num_restarts == 0

    harmed, messages = planned(tiny_photos, tmp_path, "harmed"), list[Message]()
    marker = tmp_path / "killed"
    result = run(harmed, messages, KillsItsWorker(pair_stream(harmed.config), marker))
    assert marker.exists() and result.num_restarts == 1
    first, second = start_steps(messages)
    assert first == 0 and second % CHECKPOINT_STEPS == 0 and 0 < second < TOTAL_STEPS

    expected, got = final_tensors(unharmed), final_tensors(harmed)
    assert expected.keys() == got.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, got[name])] == []


def test_an_error_that_would_come_back_is_not_tried_again(tiny_photos: Path, tmp_path: Path) -> None:
    plan, messages = planned(tiny_photos, tmp_path, "hopeless", num_workers=1, max_failures=3), list[Message]()
    with pytest.raises(TrainingFailedError, match=r"gone\.png"):
        run(plan, messages, PoisonsAnImage("gone.png"))
    assert start_steps(messages) == [0]
