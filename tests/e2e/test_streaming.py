"""A dataset that the workers may not hold as a whole streams from S3; a killed driver changes no bit of the weights."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from sr_data.storage import open_store
from sr_train.checkpoint import key_of_step, latest_key, read_checkpoint, step_of_key
from tests.support.mlflow_server import MlflowServer
from tests.support.pipeline import REPO
from tests.support.ray_head import Job, RayHead
from tests.support.s3 import S3Server

pytestmark = pytest.mark.e2e

NUM_IMAGES, WINDOW, REUSE = 24, 6, 8
BATCH, STEPS, INTERVAL_STEPS, KILL_AT_STEP = 16, 60, 10, 20
WHAT = [
    *("--preset", "edsr-small-x2", "--data.patch-px-hr", 48, "--data.layout", "folder"),
    *("--data.window-images", WINDOW, "--data.window-reuse-patches", REUSE),
    *("--optim.global-batch-size", BATCH, "--optim.total-patches", BATCH * STEPS, "--schedule.warmup-patches", BATCH),
    *("--validation.interval-patches", BATCH * INTERVAL_STEPS, "--checkpoint.interval-patches", BATCH * INTERVAL_STEPS),
]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the runs of this module read, write, train and are recorded."""

    s3: S3Server
    bucket: str
    ray: RayHead
    mlflow: MlflowServer

    def start(self, name: str, *flags: str) -> Job:
        """Submits the run with this name."""
        where = ["--data.uri", f"{self.bucket}/photos", "--validation.uri", f"{self.bucket}/valid"]
        where += ["--run.storage", f"{self.bucket}/runs", "--run.name", name, "--run.num-workers", "2"]
        where += ["--tracking.uri", self.mlflow.uri, "--tracking.experiment", "streaming"]
        entrypoint = " ".join([sys.executable, "pipelines/train_edsr.py", *map(str, WHAT), *where, *flags])
        return self.ray.start_job(entrypoint, working_dir=REPO, env=self.s3.env)


@pytest.fixture(scope="module")
def cluster(
    moto_server: S3Server, ray_head: RayHead, mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory
) -> Cluster:
    """Noise photos in a bucket: 24 to train on, 2 to validate on."""
    folder, bucket = tmp_path_factory.mktemp("photos"), moto_server.new_bucket()
    rng, client = np.random.default_rng(0), moto_server.client()
    for index in range(NUM_IMAGES + 2):
        name = f"{index:02}.png"
        Image.fromarray(rng.integers(0, 256, (96, 120, 3), np.uint8)).save(folder / name)
        key = f"{'photos' if index < NUM_IMAGES else 'valid'}/{name}"
        client.upload_file(str(folder / name), bucket.removeprefix("s3://"), key)
    return Cluster(s3=moto_server, bucket=bucket, ray=ray_head, mlflow=mlflow_server)


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster) -> str:
    """What a run that nobody disturbed prints."""
    outcome = cluster.start("uninterrupted").wait()
    assert outcome.exit_code == 0, outcome.logs
    return outcome.logs


def test_a_dataset_larger_than_the_window_streams(cluster: Cluster, uninterrupted: str) -> None:
    assert f"{WINDOW} of {NUM_IMAGES} images at once, one replaced every {REUSE} patches" in uninterrupted
    # Over the run's 120 generations every image passed through the window five times.
    assert BATCH * STEPS // REUSE >= 5 * NUM_IMAGES
    assert f"step {STEPS}: PSNR" in uninterrupted


def test_a_killed_driver_changes_nothing(cluster: Cluster, uninterrupted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.s3.env.items():
        monkeypatch.setenv(name, value)
    kill_at_step(cluster, KILL_AT_STEP)
    store = open_store(f"{cluster.bucket}/runs/killed/checkpoints")
    newest = step_of_key(latest_key(store) or "")  # of an interval, or of the step at which Ray ended the workers
    assert newest is not None and INTERVAL_STEPS <= newest < STEPS

    resumed = cluster.start("killed", "--resume").wait()
    assert resumed.exit_code == 0, resumed.logs
    going_on = re.search(r"going on from step (\d+)", resumed.logs)
    assert going_on and KILL_AT_STEP - INTERVAL_STEPS <= int(going_on[1]) < STEPS, resumed.logs

    expected, got = final_tensors(cluster, "uninterrupted"), final_tensors(cluster, "killed")
    assert expected.keys() == got.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, got[name])] == []

    client = MlflowClient(cluster.mlflow.uri, cluster.mlflow.uri)
    experiment = client.get_experiment_by_name("streaming")
    [run] = client.search_runs([experiment.experiment_id], "run_name = 'killed'")  # one run, not one per start
    assert run.info.status == "FINISHED"
    assert {point.step for point in client.get_metric_history(run.info.run_id, "validation/psnr_db")} == set(
        range(INTERVAL_STEPS, STEPS + 1, INTERVAL_STEPS)
    )


def kill_at_step(cluster: Cluster, step: int) -> None:
    """Starts the run "killed" and kills its driver as soon as that has told of the validation at `step`."""
    job = cluster.start("killed")
    job.wait_until_said(f"step {step}: PSNR")
    os.kill(job.driver_pid(), signal.SIGKILL)
    outcome = job.wait()
    assert outcome.exit_code == 128 + signal.SIGKILL and "best  " not in outcome.logs, outcome.logs


def final_tensors(cluster: Cluster, name: str) -> Mapping[str, torch.Tensor]:
    """Weights, moving average and optimiser state after the last step."""
    saved = read_checkpoint(open_store(f"{cluster.bucket}/runs/{name}/checkpoints"), key_of_step(STEPS))
    return {f"{group}/{key}": value for group, tensors in saved.tensors.items() for key, value in tensors.items()}
