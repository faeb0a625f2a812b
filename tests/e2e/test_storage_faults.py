"""Runs on a cluster whose storage or tracking server fails while they train: same weights, no restart, one version."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch
from mlflow import MlflowClient

from sr_data.storage import open_store
from sr_train.mailbox import Message
from sr_train.ray_cluster import connect
from tests.support.faulty_proxy import Fault, FaultyProxy, Weather, faulty_proxy
from tests.support.mlflow_server import MlflowServer
from tests.support.pipeline import command
from tests.support.process import PATIENCE_S
from tests.support.runs import final_tensors, planned, run
from tests.support.s3 import S3Server

pytestmark = pytest.mark.e2e

SEEDS = range(int(os.environ.get("SR_FAULT_ROUNDS", "1")))
RECORD = os.environ.get("SR_FAULT_RECORD")
STORM_S = 12.0
"""Longer than a store tries a request by itself, 6 s where it is answered at once."""


@dataclass(frozen=True)
class Site:
    """Photos in a bucket behind the weather, and a cluster whose processes all go through it."""

    bucket: str
    weather: Weather

    def train(self, name: str, messages: list[Message]) -> dict[str, torch.Tensor]:
        """Two workers, whose images stream; the weights they end with."""
        plan = planned(f"{self.bucket}/photos", f"{self.bucket}/runs", name)  # type: ignore[arg-type]
        assert run(plan, messages).num_restarts == 0
        return dict(final_tensors(plan))


@pytest.fixture(scope="module")
def site(moto_server: S3Server, _photos: Path) -> Iterator[Site]:
    bucket, weather = moto_server.new_bucket(), Weather()
    with faulty_proxy(moto_server.endpoint_url, weather) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in (moto_server.env | {"AWS_ENDPOINT_URL": proxy.url}).items():
            patch.setenv(name, value)
        for photo in _photos.iterdir():
            open_store(f"{bucket}/photos").write(photo.name, photo.read_bytes())
        connect()
        yield Site(bucket, weather)
        ray.shutdown()


@pytest.fixture(scope="module")
def fair(site: Site) -> dict[str, torch.Tensor]:
    return site.train("fair", [])


@pytest.mark.parametrize("seed", SEEDS)
def test_storage_that_is_away_while_images_stream_changes_nothing(
    site: Site, fair: dict[str, torch.Tensor], seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    fault: Fault = rng.choice(["503", "403", "drop"])
    messages = Storm(site.weather, fault, after_s=rng.uniform(0, 2))
    got = site.train(f"storm-{seed}", messages)
    assert [name for name, value in fair.items() if not torch.equal(value, got[name])] == []
    said = [values["message"] for kind, values in messages if kind == "trouble"]
    logged = re.findall(r"images can't be read since|storage is back", capfd.readouterr().err)
    assert site.weather.num_struck > 0 and (said or logged)
    if RECORD:
        with Path(RECORD).open("a") as file:
            line = {"fault": f"S3 {fault} for {STORM_S:g} s", "moment": f"{messages.after_s:.1f} s after the start"}
            file.write(json.dumps(line | {"seed": seed, "steps_redone": 0, "outcome": "same weights"}) + "\n")


class Storm(list[Message]):
    """The run's messages; so long after the workers' start the weather turns bad, for a while."""

    def __init__(self, weather: Weather, fault: Fault, *, after_s: float) -> None:
        super().__init__()
        self._weather, self._fault, self.after_s = weather, fault, after_s

    def append(self, message: Message) -> None:
        super().append(message)
        if message[0] == "start":
            threading.Timer(self.after_s, self._weather.turn_bad, [self._fault]).start()
            threading.Timer(self.after_s + STORM_S, self._weather.clear_up).start()


def test_a_run_without_its_tracking_server_is_registered_once_when_it_is_back(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    with faulty_proxy(mlflow_server.uri, Weather()) as proxy:
        proxy.refuse_connections()
        first = train(tmp_path, proxy, "--tracking.allow-offline")
        assert first.returncode == 0, first.stdout + first.stderr
        assert re.search(r"^registered +no: --resume --run.name offline", first.stdout, flags=re.MULTILINE)
        proxy.listen()
        again = train(tmp_path, proxy, "--resume")
        assert again.returncode == 0, again.stdout + again.stderr
        assert "models:/offline/1" in again.stdout
    client = MlflowClient(mlflow_server.uri, mlflow_server.uri)
    [version] = client.search_model_versions("name = 'offline'")
    [found] = client.search_runs([client.get_experiment_by_name("offline").experiment_id])
    assert (version.run_id, found.info.status) == (found.info.run_id, "FINISHED")
    steps = {point.step for point in client.get_metric_history(found.info.run_id, "validation/psnr_db")}
    assert steps == {8, 16}  # of when nobody could be told


def train(folder: Path, proxy: FaultyProxy, *flags: str) -> subprocess.CompletedProcess[str]:
    """The run "offline", on a cluster of its own."""
    arguments = ["--run.name", "offline", "--tracking.uri", proxy.url, "--tracking.experiment", "offline"]
    arguments += ["--tracking.register-as", "offline", "--model.num-blocks", "1", "--model.num-channels", "4"]
    arguments += ["--optim.total-patches", "256", "--optim.global-batch-size", "16", "--schedule.warmup-patches", "16"]
    arguments += ["--validation.interval-patches", "128", *flags]
    return subprocess.run(
        command("train_edsr.py", *arguments),
        cwd=folder,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
