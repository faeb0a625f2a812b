"""A training worker is killed, or told to end: Ray Train replaces it, and the weights are as if nothing had been."""

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
from sr_train import ray_notices
from sr_train.mailbox import Message
from sr_train.plan import Plan
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
class SignalsItsWorker:
    """A feed whose worker of rank 1 gets a signal, once, as its 12th image arrives: between two checkpoints."""

    feed: StreamPairs
    marker: Path
    signal: signal.Signals

    def __call__(self, uri: str, records: Iterable[ImageRecord], scale: int) -> Iterator[DecodedPair]:
        for number, pair in enumerate(self.feed(uri, records, scale), start=1):
            if number == 12 and dist.get_rank() == 1 and not self.marker.exists():
                self.marker.touch()
                os.kill(os.getpid(), self.signal)
                assert ray_notices._terminated.wait(timeout=60)  # not before: these runs end within a second
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


@pytest.fixture(scope="module")
def photos(request: pytest.FixtureRequest) -> Path:
    """Images for all runs of this module: a copy of a test's own would be another dataset."""
    return Path(request.getfixturevalue("_photos"))


@pytest.fixture(scope="module")
def unharmed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A run that nobody disturbed."""
    plan = planned(photos, tmp_path_factory.mktemp("runs"), "unharmed")
    assert run(plan, []).num_restarts == 0
    return plan


def differences(expected: Plan, got: Plan) -> list[str]:
    """Which tensors of the last checkpoints differ in any bit."""
    wanted, there = final_tensors(expected), final_tensors(got)
    assert wanted.keys() == there.keys()
    return [name for name, value in wanted.items() if not torch.equal(value, there[name])]


def test_a_killed_worker_changes_nothing(unharmed: Plan, photos: Path, tmp_path: Path) -> None:
    harmed, messages = planned(photos, tmp_path, "harmed"), list[Message]()
    marker = tmp_path / "killed"
    result = run(harmed, messages, SignalsItsWorker(pair_stream(harmed.config), marker, signal.SIGKILL))
    assert marker.exists() and result.num_restarts == 1
    first, second = start_steps(messages)
    assert first == 0 and second % CHECKPOINT_STEPS == 0 and 0 < second < TOTAL_STEPS
    [lost] = [values for kind, values in messages if kind == "lost"]
    assert 1 in lost["ranks"] and lost["message"].startswith("its worker process has died"), lost
    assert differences(unharmed, harmed) == []


def test_a_worker_that_is_told_to_end_saves_first(unharmed: Plan, photos: Path, tmp_path: Path) -> None:
    told, messages = planned(photos, tmp_path, "told", max_failures=0), list[Message]()
    marker = tmp_path / "signalled"
    run(told, messages, SignalsItsWorker(pair_stream(told.config), marker, signal.SIGTERM))
    assert marker.exists()
    [left] = [values for kind, values in messages if kind == "left"]
    assert "SIGTERM" in left["message"]
    # It went on from the very step at which it left, and it counts as no failure.
    assert start_steps(messages) == [0, left["step"]]
    assert "lost" not in [kind for kind, _ in messages]
    assert differences(unharmed, told) == []


def test_an_error_that_would_come_back_is_not_tried_again(tiny_photos: Path, tmp_path: Path) -> None:
    plan, messages = planned(tiny_photos, tmp_path, "hopeless", num_workers=1, max_failures=3), list[Message]()
    with pytest.raises(TrainingFailedError, match=r"gone\.png"):
        run(plan, messages, PoisonsAnImage("gone.png"))
    assert start_steps(messages) == [0]
