"""A run whose storage fails at the worst moments ends with the weights of a run whose storage never did.

The worker runs in this process, on a real S3 server behind a proxy that spoils its requests: at random
(`SR_FAULT_ROUNDS` times, each with another seed) and where it hurts most. The bad weather lasts until the run has said
that it noticed.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from sr_data import storage_patience, storage_s3
from sr_data.storage import open_store
from sr_models.edsr import EDSRConfig
from sr_train import checkpoint as ckpt
from sr_train import worker
from sr_train.config import TrainConfig
from sr_train.driver import make_job
from sr_train.loop import CheckpointWriteError, Position
from sr_train.options import CheckpointConfig, DataConfig, OptimConfig, RunConfig, ValidationConfig
from sr_train.placement import ClusterFacts
from sr_train.plan import Plan, make_plan
from sr_train.run_folder import checkpoint_store, claim
from sr_train.tracking import RunHandle, RunStart, Tracker, pending_run
from sr_train.worker import run_worker
from tests.support.disk import small_disk
from tests.support.faulty_proxy import Fault, FaultyProxy, Weather
from tests.support.s3 import S3Server

BATCH, TOTAL_STEPS, CHECKPOINT_STEPS = 4, 20, 5
FAULTS: tuple[Fault, ...] = ("503", "403", "quota", "drop", "truncate", "slow")
ROUNDS = int(os.environ.get("SR_FAULT_ROUNDS", "1"))
RECORD = os.environ.get("SR_FAULT_RECORD")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_s3, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(storage_s3, "MAX_ATTEMPTS", 2)
    monkeypatch.setattr(storage_patience, "FIRST_PAUSE_S", 0.02)


@dataclass(frozen=True)
class Site:
    """A bucket with photos, behind the weather."""

    bucket: str
    weather: Weather

    def plan(self, name: str, *, patience_s: float = 60.0) -> Plan:
        """A run of one worker on the six photos."""
        photos = f"{self.bucket}/photos"
        return make_plan(
            TrainConfig(
                model=EDSRConfig(scale=2, num_blocks=1, num_channels=4),
                data=DataConfig(uri=photos, patch_px_hr=16, layout="folder"),
                validation=ValidationConfig(uri=photos, layout="folder", num_images=2, interval_patches=10 * BATCH),
                optim=OptimConfig(total_patches=TOTAL_STEPS * BATCH, global_batch_size=BATCH, ema_decay=0.9),
                checkpoint=CheckpointConfig(interval_patches=CHECKPOINT_STEPS * BATCH, patience_s=patience_s),
                run=RunConfig(name=name, storage=f"{self.bucket}/runs", threads_per_worker=1, device="cpu"),
            ),
            ClusterFacts(cpus_per_node=(2.0,), gpus_per_node=(0.0,)),
            resume=True,
        )


@pytest.fixture
def site(s3: S3Server, tiny_photos: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    bucket, weather = s3.new_bucket(), Weather()
    for photo in tiny_photos.iterdir():
        open_store(f"{bucket}/photos").write(photo.name, photo.read_bytes())
    proxy = FaultyProxy(s3.endpoint_url, weather)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield Site(bucket, weather)
    proxy.refuse_connections()


@dataclass
class Run:
    """A worker's life in this process, and what it told; the weather clears up as soon as trouble was told of."""

    site: Site
    plan: Plan
    storms: Mapping[tuple[str, int], tuple[Fault, str, str]] = field(default_factory=dict)
    """(kind of message, step) at which the weather turns: the fault, and the methods and paths that it strikes."""
    told: list[str] = field(default_factory=list)
    clears_up: bool = True
    tracking: RunHandle | None = None
    measures: Mapping[str, float] = field(default_factory=dict)

    def go(self) -> Position:
        job = make_job(
            self.plan,
            tracking=self.tracking,
            owner=claim(open_store(self.plan.run_uri)),
            git_sha="x",
            script_started_s=0.0,
        )
        logger, handler = logging.getLogger("sr_data.storage_patience"), _Tells(self.tell)
        logger.addHandler(handler)
        try:
            if ("begin", 0) in self.storms:  # the owner is known, nothing else was read yet
                self.turn_bad(*self.storms["begin", 0])
            position, self.measures = run_worker(job, device=torch.device("cpu"), send=self.hear)
        finally:
            logger.removeHandler(handler)
            self.site.weather.clear_up()
        return position

    def turn_bad(self, fault: Fault, methods: str, path: str) -> None:
        self.site.weather.turn_bad(fault, methods=methods.split(), path=path)

    def hear(self, kind: str, values: Mapping[str, Any]) -> None:
        if kind == "trouble":
            self.tell(values["message"])
        elif (kind, values["step"]) in self.storms:
            self.turn_bad(*self.storms[kind, values["step"]])

    def tell(self, message: str) -> None:
        self.told.append(message)
        if self.clears_up:
            self.site.weather.clear_up()


class _Tells(logging.Handler):
    def __init__(self, tell: Any) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(record.getMessage())


def all_tensors(plan: Plan) -> dict[str, torch.Tensor]:
    """Of the last checkpoint; every checkpoint that there is can be read."""
    store = checkpoint_store(plan.run_uri)
    saved = {key: ckpt.read_checkpoint(store, key) for key in ckpt.list_keys(store)}
    last = saved[ckpt.key_of_step(TOTAL_STEPS)]
    assert last.meta["patches_seen"] == TOTAL_STEPS * BATCH
    return {f"{group}/{name}": value for group, values in last.tensors.items() for name, value in values.items()}


def assert_same(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == got.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, got[name])] == []


def record(**facts: object) -> None:
    if RECORD:
        with Path(RECORD).open("a") as file:
            file.write(json.dumps(facts) + "\n")


@pytest.fixture
def expected(site: Site) -> dict[str, torch.Tensor]:
    """The weights of a run in fair weather."""
    plan = site.plan("fair")
    assert Run(site, plan).go().step == TOTAL_STEPS
    return all_tensors(plan)


def test_storage_that_fails_at_the_worst_moments_changes_nothing(site: Site, expected: dict[str, torch.Tensor]) -> None:
    moments: dict[str, tuple[tuple[str, int], tuple[Fault, ...]]] = {
        # The first thing a worker reads is the list of checkpoints, then the images.
        "start": (("begin", 0), ("503", "403", "drop")),
        "images": (("start", 0), ("503", "403", "drop", "truncate")),
        "upload": (("checkpoint", CHECKPOINT_STEPS), ("503", "403", "quota", "drop")),
    }
    for moment, (when, faults) in moments.items():
        for fault in faults:
            methods = "PUT POST" if moment == "upload" else "GET"
            run = Run(site, site.plan(f"{moment}-{fault}"), {when: (fault, methods, "")})
            assert run.go().step == TOTAL_STEPS
            assert_same(expected, all_tensors(run.plan))
            began, over = run.told[::2], run.told[1::2]
            assert all("since" in line and "trying again for" in line for line in began), run.told
            assert all(line.startswith("storage is back") for line in over), run.told
            # Images come by two streams, to train and to validate, which are one trouble if they are in it together.
            assert 1 <= len(began) == len(over) <= (2 if moment == "images" else 1), run.told
            record(fault=f"S3 {fault}", moment=moment, seed=None, steps_redone=0, outcome="same weights")


def test_a_worker_that_comes_back_while_storage_is_away_waits_and_goes_on(
    site: Site, expected: dict[str, torch.Tensor]
) -> None:
    """It stopped at step 10 of 20, and finds the newest checkpoint hidden."""
    short = site.plan("stopped")
    optim = replace(short.config.optim, total_patches=10 * BATCH)
    Run(site, replace(short, config=replace(short.config, optim=optim))).go()
    # As if it had been killed. The budget's end decides the learning rates, so this is the fair run's first half.
    fair, stopped = checkpoint_store(site.plan("fair").run_uri), checkpoint_store(short.run_uri)
    for key in ckpt.list_keys(stopped):
        stopped.delete(key)
    stopped.write(ckpt.key_of_step(10), fair.read(ckpt.key_of_step(10)))
    run = Run(site, site.plan("stopped"), {("begin", 0): ("503", "GET", ckpt.key_of_step(10))})
    assert run.go().step == TOTAL_STEPS
    assert_same(expected, all_tensors(run.plan))
    assert "since" in run.told[0] and ckpt.key_of_step(10) in run.told[0] and run.told[1].startswith("storage is back")


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_storage_that_fails_at_random_changes_nothing(site: Site, expected: dict[str, torch.Tensor], seed: int) -> None:
    rng = random.Random(seed)

    class Random(Weather):
        """Each third request is spoilt, in one way or another, for the whole run."""

        def __call__(self, method: str, path: str, attempt: int) -> Fault | None:
            with self._lock:
                return rng.choice(FAULTS) if self._fault is not None and rng.random() < 1 / 3 else None

    weather = Random()
    proxy = FaultyProxy(os.environ["AWS_ENDPOINT_URL"], weather)
    plan = site.plan(f"random-{seed}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        run = Run(Site(site.bucket, weather), plan, {("start", 0): ("503", "", "")}, clears_up=False)
        assert run.go().step == TOTAL_STEPS
    proxy.refuse_connections()
    assert_same(expected, all_tensors(plan))
    record(fault="S3 at random", moment="all", seed=seed, steps_redone=0, outcome="same weights")


def test_when_patience_ends_the_earlier_checkpoints_are_there_to_go_on_from(
    site: Site, expected: dict[str, torch.Tensor]
) -> None:
    run = Run(
        site,
        site.plan("given-up", patience_s=0.3),
        {("checkpoint", 2 * CHECKPOINT_STEPS): ("403", "PUT POST", "")},
        clears_up=False,
    )
    with pytest.raises(CheckpointWriteError, match=r"earlier ones are untouched: s3://.*403"):
        run.go()
    store = checkpoint_store(run.plan.run_uri)
    assert ckpt.latest_key(store) == ckpt.key_of_step(2 * CHECKPOINT_STEPS)
    again = Run(site, site.plan("given-up"))
    assert again.go().step == TOTAL_STEPS
    assert_same(expected, all_tensors(again.plan))


def test_a_worker_whose_disk_is_full_trains_on(
    site: Site, expected: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What MLflow should have been told is lost, counted and said: there is no server, and no room to keep it."""
    plan = site.plan("full")
    start = RunStart(experiment="full", run_name="full", params={}, tags={}, texts={})
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "filler").write_bytes(bytes(64 * 1024))
        monkeypatch.setattr(worker, "SPOOL", disk / "spool")
        monkeypatch.setattr(Tracker, "close", partialmethod(Tracker.close, 1.0))  # a worker's last try takes 30 s
        run = Run(site, plan, tracking=pending_run("http://127.0.0.1:9", start))
        assert run.go().step == TOTAL_STEPS
    assert run.measures["undelivered_tracking_items"] > 0
    assert_same(expected, all_tensors(plan))
    record(
        fault="disk full", moment="spool", seed=None, steps_redone=0, outcome="same weights; curves lost and counted"
    )
