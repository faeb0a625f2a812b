"""A training worker is killed by a signal: Ray Train replaces it, and the weights are those of a run that lost none."""

import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray
import torch
import torch.distributed as dist

from sr_data.manifest import ImageRecord
from sr_data.pairs import DecodedPair, load_pair
from sr_data.storage import open_store
from sr_models.edsr import EDSRConfig
from sr_train import checkpoint as ckpt
from sr_train.config import CheckpointConfig, DataConfig, OptimConfig, RunConfig, TrainConfig, ValidationConfig
from sr_train.mailbox import Message
from sr_train.plan import Plan, make_plan
from sr_train.ray_run import FitResult, TrainingFailedError, cluster_facts, connect, fit, pair_stream
from sr_train.run_folder import checkpoint_store, claim
from sr_train.worker import Job, StreamPairs

pytestmark = pytest.mark.e2e

BATCH, TOTAL_STEPS, CHECKPOINT_STEPS = 4, 24, 5


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


def planned(photos: Path, storage: Path, name: str, **run: object) -> Plan:
    """Two workers on a rolling window of four of the photos: one image is replaced at every step."""
    settings = {"name": name, "storage": str(storage), "num_workers": 2, "threads_per_worker": 1, "device": "cpu"}
    return make_plan(
        TrainConfig(
            model=EDSRConfig(scale=2, num_blocks=1, num_channels=4),
            data=DataConfig(uri=str(photos), patch_px_hr=16, window_images=4, window_reuse_patches=BATCH),
            validation=ValidationConfig(uri=str(photos), num_images=2, interval_patches=10 * BATCH),
            optim=OptimConfig(total_patches=TOTAL_STEPS * BATCH, global_batch_size=BATCH, ema_decay=0.9),
            checkpoint=CheckpointConfig(interval_patches=CHECKPOINT_STEPS * BATCH),
            run=RunConfig(**(settings | run)),  # type: ignore[arg-type]
        ),
        cluster_facts(),
        resume=False,
    )


def run(plan: Plan, messages: list[Message], feed: StreamPairs | None = None) -> FitResult:
    job = Job(
        config=plan.config,
        train=plan.train,
        validation=plan.validation,
        samples=plan.samples,
        run_uri=plan.run_uri,
        owner=claim(open_store(plan.run_uri)),
        git_sha="unknown",
        tracking=None,
        init_state=None,
        stream_pairs=feed or pair_stream(plan.config),
        script_started_s=0.0,
    )
    return fit(plan, job, on_message=messages.append)


def start_steps(messages: list[Message]) -> list[int]:
    return [values["step"] for kind, values in messages if kind == "start"]


def final_tensors(plan: Plan) -> Mapping[str, torch.Tensor]:
    store = checkpoint_store(plan.run_uri)
    saved = ckpt.read_checkpoint(store, ckpt.key_of_step(TOTAL_STEPS))
    return {f"{group}/{name}": value for group, values in saved.tensors.items() for name, value in values.items()}


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
