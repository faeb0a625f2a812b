"""A sweep by `ray job submit` on BSDS500 from S3: driver and a worker are killed, it goes on, its winner is used."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from ray.thirdparty_files import psutil

from sr_data.storage import Store, open_store
from sr_train.sweep_plan import known_trials
from tests.support.mlflow_server import MlflowServer
from tests.support.pipeline import REPO
from tests.support.ray_head import Job, JobOutcome, RayHead
from tests.support.s3 import S3Server

pytestmark = pytest.mark.e2e

NUM_TRIALS, BATCH, TRIAL_PATCHES, GRACE_PATCHES = 12, 16, 1440, 160
EXPERIMENT, MODEL = "tuning", "edsr-tuned"
WHAT = [
    *("--preset", "edsr-small-x2", "--optim.global-batch-size", BATCH, "--optim.total-patches", 4 * TRIAL_PATCHES),
    *("--trial-patches", TRIAL_PATCHES, "--grace-patches", GRACE_PATCHES, "--validation.num-images", 4),
    *("--space.num-blocks", "1,2", "--space.num-channels", "8,16", "--schedule.warmup-patches", BATCH),
    *("--space.schedule.learning-rate", "1e-3..6e-3:log"),
    *("--max-concurrent", 2),  # three groups of workers that start at once take two cores minutes
]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the sweeps of this module read, write, train and are recorded."""

    s3: S3Server
    bucket: str
    ray: RayHead
    mlflow: MlflowServer

    def start(self, name: str, *flags: object) -> Job:
        """Submits the sweep with this name."""
        where = ["--data.uri", f"{self.bucket}/bsds", "--run.storage", f"{self.bucket}/sweeps", "--run.name", name]
        where += ["--tracking.uri", self.mlflow.uri, "--tracking.experiment", EXPERIMENT]
        where += ["--tracking.register-as", MODEL]
        entrypoint = " ".join([sys.executable, "pipelines/tune_edsr.py", *where, *map(str, flags)])
        return self.ray.start_job(entrypoint, working_dir=REPO, env=self.s3.env)


@pytest.fixture(scope="module")
def cluster(moto_server: S3Server, ray_head: RayHead, mlflow_server: MlflowServer, shared_data: Path) -> Cluster:
    """BSDS500's train and val in a bucket, in its official layout."""
    bucket, client = moto_server.new_bucket(), moto_server.client()
    for split, count in (("train", 200), ("val", 4)):
        for path in sorted((shared_data / "BSDS500" / split).glob("*.jpg"))[:count]:
            client.upload_file(str(path), bucket.removeprefix("s3://"), f"bsds/images/{split}/{path.name}")
    return Cluster(s3=moto_server, bucket=bucket, ray=ray_head, mlflow=mlflow_server)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One that was interrupted and went on."""

    outcome: JobOutcome
    store: Store
    before: Mapping[str, str]
    """Trial → its record as it was when the driver was dead."""


@pytest.fixture(scope="module")
def sweep(cluster: Cluster) -> Sweep:
    """Twelve trials; the driver is killed after the fourth, and a worker of the resumed sweep after the seventh."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.s3.env.items():
            patch.setenv(name, value)
        job = cluster.start("sweep", *WHAT, "--num-trials", NUM_TRIALS)
        job.wait_until_said(f"trial 4/{NUM_TRIALS}")
        os.kill(job.driver_pid(), signal.SIGKILL)
        job.wait()
        store = open_store(f"{cluster.bucket}/sweeps/sweep")
        before = {entry.key: store.read_text(entry.key) for entry in store.list("trials/") if "trial.json" in entry.key}

        job = cluster.start("sweep", "--resume")
        job.wait_until_said(f"trial 7/{NUM_TRIALS}")
        training_workers(cluster)[0].kill()
        return Sweep(outcome=job.wait(), store=store, before=before)


def training_workers(cluster: Cluster) -> list[psutil.Process]:
    """Ray Train's workers below the head node."""
    children = psutil.Process(cluster.ray.child.process.pid).children(recursive=True)
    return [child for child in children if child.name().startswith("ray::RayTrainWo")]


def test_it_ends_with_every_trial_over(cluster: Cluster, sweep: Sweep) -> None:
    assert sweep.outcome.exit_code == 0, sweep.outcome.logs
    with in_environment(cluster):
        records = known_trials(sweep.store)
    assert len(records) == NUM_TRIALS
    assert {record.status for record in records} == {"finished", "stopped"}
    # ASHA: most trials end at a rung, and those that see the whole budget passed all of them.
    stopped = [record for record in records if record.status == "stopped"]
    assert len(stopped) >= NUM_TRIALS // 3 and all(record.patches_seen < TRIAL_PATCHES for record in stopped)
    for record in records:
        seen = [point.patches_seen for point in record.history]
        assert seen == sorted(set(seen)) and all(patches % GRACE_PATCHES == 0 for patches in seen)


def test_trials_that_were_over_are_not_run_again(sweep: Sweep, cluster: Cluster) -> None:
    over = {key: text for key, text in sweep.before.items() if json.loads(text)["status"] != "running"}
    # Of the four that the driver had told of, those that were just ending may not have written it down.
    assert len(over) >= 2
    with in_environment(cluster):
        assert {key: sweep.store.read_text(key) for key in over} == over
    assert re.search(rf"going on: {len(over)} trials", sweep.outcome.logs), sweep.outcome.logs


def test_the_winner_is_registered_and_upscales(
    cluster: Cluster, sweep: Sweep, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_environment(cluster):
        best = max((one for one in known_trials(sweep.store) if one.status == "finished"), key=lambda one: one.psnr_db)
    client = MlflowClient(cluster.mlflow.uri, cluster.mlflow.uri)
    version = client.get_model_version_by_alias(MODEL, "challenger")
    assert version.tags["checkpoint"] == best.checkpoint and float(version.tags["psnr_db"]) == pytest.approx(
        best.psnr_db, abs=1e-4
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", cluster.mlflow.uri)
    model = mlflow.pyfunc.load_model(f"models:/{MODEL}@challenger")
    with Image.open(shared_data / "Set5" / "LR_bicubic" / "X2" / "butterflyx2.png") as image:
        lr_NHWC = np.asarray(image.convert("RGB"))[None]
    sr_NHWC = model.predict(lr_NHWC)
    assert sr_NHWC.shape == (1, 2 * lr_NHWC.shape[1], 2 * lr_NHWC.shape[2], 3) and sr_NHWC.dtype == np.uint8


def test_mlflow_shows_the_sweep_and_a_run_for_each_trial(cluster: Cluster, sweep: Sweep) -> None:
    client = MlflowClient(cluster.mlflow.uri, cluster.mlflow.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    [parent] = client.search_runs([experiment.experiment_id], "run_name = 'sweep'")
    assert parent.info.status == "FINISHED" and parent.data.params["space.num_blocks"] == "1,2"
    trials = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", max_results=100
    )
    assert len({run.info.run_name for run in trials}) == len(trials) == NUM_TRIALS
    assert {run.info.status for run in trials} == {"FINISHED"}
    files = {entry.path for entry in client.list_artifacts(parent.info.run_id)}
    assert {"pareto.png", "parallel_coordinates.png", "importance.png", "trials.csv", "sweep.json"} <= files
    with in_environment(cluster):
        Image.open(io.BytesIO(sweep.store.read("pareto.png"))).verify()


def test_workers_are_started_once_for_many_trials(cluster: Cluster, sweep: Sweep) -> None:
    """Starting a group of workers takes ten seconds and more on two cores; a trial that finds one waiting does not."""
    assert "start-up to a trial's first step" in sweep.outcome.logs
    with in_environment(cluster):
        start_ups_s = sorted(record.seconds["start_up"] for record in known_trials(sweep.store))
    assert start_ups_s[0] < 0.25 * start_ups_s[-1]


def test_trials_of_two_workers_and_one_that_goes_non_finite(cluster: Cluster) -> None:
    flags = ["--search", "grid", "--scheduler", "none", "--run.num-workers", 2, "--space.schedule.kind", "step"]
    flags += ["--space.schedule.decay-every-fraction", "0.5", "--space.num-blocks", 1, "--space.num-channels", 8]
    flags += ["--space.schedule.learning-rate", "1e-3,1e30", "--trial-patches", 160, "--grace-patches", 80]
    outcome = cluster.start("pairs", *WHAT, *flags).wait()
    assert outcome.exit_code == 0, outcome.logs
    assert "1 trials at once, 2 on cpu each" in outcome.logs
    with in_environment(cluster):
        records = {one.status: one for one in known_trials(open_store(f"{cluster.bucket}/sweeps/pairs"))}
    assert records.keys() == {"finished", "failed"}
    assert records["finished"].patches_seen == 160
    assert "loss nan" in str(records["failed"].reason) and records["failed"].sample["schedule.learning_rate"] == 1e30


def test_a_trial_that_can_never_run_is_refused_at_once(cluster: Cluster) -> None:
    outcome = cluster.start("giants", *WHAT, "--run.num-workers", 16, "--optim.global-batch-size", 16).wait()
    assert outcome.exit_code == 2
    assert "a trial of 16 workers with 1 CPUs each can't run on the nodes that are there (3 CPUs)" in outcome.logs


@contextmanager
def in_environment(cluster: Cluster) -> Iterator[None]:
    """The credentials of the cluster's object storage."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.s3.env.items():
            patch.setenv(name, value)
        yield


def test_a_population_trains_together_and_goes_on(cluster: Cluster) -> None:
    """Three members, taken over from one another or not, each to the end of its budget; then there is nothing left."""
    flags = ["--scheduler", "pbt", "--num-trials", 3, "--trial-patches", 480, "--grace-patches", 80]
    flags += ["--space.num-blocks", 1, "--space.num-channels", 8]
    outcome = cluster.start("population", *WHAT, *flags).wait()
    assert outcome.exit_code == 0, outcome.logs
    with in_environment(cluster):
        store = open_store(f"{cluster.bucket}/sweeps/population")
        members = known_trials(store)
        assert [one.name for one in members] == ["member-000", "member-001", "member-002"]
        assert [(one.status, one.patches_seen) for one in members] == [("finished", 480)] * 3
        before = [store.read_text(f"trials/{one.name}/trial.json") for one in members]
    again = cluster.start("population", "--resume").wait()
    assert again.exit_code == 0 and "trial 1/3" not in again.logs, again.logs
    with in_environment(cluster):
        assert [store.read_text(f"trials/{one.name}/trial.json") for one in members] == before
