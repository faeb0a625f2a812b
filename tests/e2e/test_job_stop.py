"""A job is stopped and submitted again until it is complete, from a cluttered checkout, on nodes that hold the
credentials.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from ray.job_submission import JobStatus

from sr_data.storage import open_store
from sr_train.checkpoint import Checkpoint, key_of_step, read_checkpoint, step_of_key
from tests.support.mlflow_server import MlflowServer
from tests.support.pipeline import REPO, without_controller
from tests.support.ray_head import Job, JobOutcome, RayHead, start_ray_head
from tests.support.s3 import S3Server

pytestmark = pytest.mark.e2e

BATCH, STEPS = 4, 2000
PASSWORD = "open-sesame-of-the-tracking-server"
OF_A_JOB = "brought-by-a-job-4711"
# A checkpoint at the end and none before: whatever lies between was made by stopping.
WHAT = [
    *("--preset", "edsr-small-x2", "--model.num-blocks", 1, "--model.num-channels", 4, "--data.patch-px-hr", 16),
    *("--optim.global-batch-size", BATCH, "--optim.total-patches", BATCH * STEPS, "--schedule.warmup-patches", BATCH),
    *("--validation.interval-patches", BATCH * STEPS, "--checkpoint.interval-patches", BATCH * STEPS),
    *("--run.cpus-per-worker", 1, "--run.threads-per-worker", 1, "--tracking.experiment", "job-stop"),
]
MINE = '''
"""A script of the user's own, outside pipelines/: says where the packages are from, then trains."""
import sys
import ray
import sr_models
from pipelines.train_edsr import main
from sr_train.ray_cluster import connect

def place():
    import sr_data
    return sr_data.__file__

class Actor:
    def place(self):
        import sr_train.worker
        return sr_train.worker.__file__

connect()
print("driver has", sr_models.__file__)
print("task has", ray.get(ray.remote(place).remote()))
actor = ray.remote(Actor).remote()
print("actor has", ray.get(actor.place.remote()), flush=True)
ray.kill(actor)
main(sys.argv[1:])
'''
CLUTTER = (
    "data/div2k/0801.png",
    "runs/mine/checkpoints/step-000000100.safetensors",
    "mlflow.db",
    "mlartifacts/1/model.onnx",
    ".git/objects/pack/pack-1.pack",
    ".venv/lib/libtorch.so",
    "sr_data/__pycache__/decode.cpython-311.pyc",
)
ANYWHERE = ("images/holiday.png", "EDSR_x4.pt", "DIV2K_train_HR.zip", "sr_models/model.onnx", ".env")
"""Clutter that has no folder of its own."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the jobs run, and from where they are submitted."""

    checkout: Path
    head: RayHead
    s3: S3Server
    bucket: str
    mlflow: MlflowServer

    @property
    def temp(self) -> Path:
        """Ray's own folder on the node: sessions, logs, what jobs brought."""
        return self.head.child.log_path.parent

    def named(self, name: str) -> str:
        """The run of that name in this module: MLflow's server is shared with others."""
        return f"{name}-{self.bucket[-8:]}"

    def start(self, name: str, *flags: object, script: str = "pipelines/train_edsr.py") -> Job:
        """Submits the run with that name, and --resume from the beginning; no credentials in the job."""
        name = self.named(name)
        where = ["--run.storage", f"{self.bucket}/runs", "--run.name", name, "--tracking.register-as", name, "--resume"]
        command = [sys.executable, script, *map(str, [*WHAT, *where, *flags])]
        return self.head.start_job(shlex.join(command), working_dir=self.checkout)

    def objects(self) -> dict[str, bytes]:
        """Everything in the bucket."""
        s3, bucket = self.s3.client(), self.bucket.removeprefix("s3://")
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {key: s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    def checkpoint_steps(self, name: str) -> list[int]:
        """Of the run, in order."""
        folder = f"runs/{self.named(name)}/checkpoints/"
        found = [step_of_key(key.removeprefix(folder)) for key in self.objects() if key.startswith(folder)]
        return sorted(step for step in found if step is not None)

    def checkpoint(self, name: str, step: int) -> Checkpoint:
        """Read from the bucket: needs `s3` in the environment."""
        return read_checkpoint(open_store(f"{self.bucket}/runs/{self.named(name)}/checkpoints"), key_of_step(step))

    def runs(self, name: str) -> list[Run]:
        """What MLflow knows by that name."""
        client = MlflowClient(self.mlflow.uri, self.mlflow.uri)
        experiment = client.get_experiment_by_name("job-stop")
        assert experiment is not None
        return list(client.search_runs([experiment.experiment_id], f"attributes.run_name = '{self.named(name)}'"))

    def versions(self, name: str) -> list[str]:
        """Registered ones of the model of that name."""
        client = MlflowClient(self.mlflow.uri, self.mlflow.uri)
        return [found.version for found in client.search_model_versions(f"name = '{self.named(name)}'")]


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """One run that was stopped and submitted again, beside one that was not."""

    place: Place
    undisturbed: JobOutcome
    seen_step: int
    """The last that its driver had said before it was told to stop."""
    stopped: JobOutcome
    stopped_status: JobStatus
    left_steps: list[int]
    """Checkpoints that stopping left."""
    left_run: Run
    """In MLflow, after stopping."""
    resumed: JobOutcome
    jobs: tuple[Job, ...]


@pytest.fixture(scope="module")
def place(
    moto_server: S3Server, mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """A cluttered copy of the checkout, and a head whose environment holds what jobs need to know."""
    checkout = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (REPO / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, checkout / name)
    for name in (*CLUTTER, *ANYWHERE):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(os.urandom(1_000_000))
    (checkout / "experiments").mkdir()
    (checkout / "experiments" / "mine.py").write_text(MINE)
    env = {
        **moto_server.env,
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        head = start_ray_head(Path(folder), num_cpus=6, env=env)
        yield Place(
            checkout=checkout,
            head=head,
            s3=moto_server,
            bucket=moto_server.new_bucket(),
            mlflow=mlflow_server,
        )
        head.child.stop()


@pytest.fixture(scope="module")
def stopped(place: Place) -> Stopped:
    """Runs one to its end; stops another in its middle; submits that once more, by the same command."""
    undisturbed = place.start("undisturbed", script="experiments/mine.py")
    first = place.start("stopped")
    first.wait_until_said("patches/s |")
    [*_, seen_step] = re.findall(rf"step +(\d+)/{STEPS}", first.logs())
    first.client.stop_job(first.job_id)
    after_stop = first.wait()
    left_steps, [left_run] = place.checkpoint_steps("stopped"), place.runs("stopped")
    again = place.start("stopped")
    return Stopped(
        place=place,
        undisturbed=undisturbed.wait(),
        seen_step=int(seen_step),
        stopped=after_stop,
        stopped_status=first.client.get_job_status(first.job_id),
        left_steps=left_steps,
        left_run=left_run,
        resumed=again.wait(),
        jobs=(undisturbed, first, again),
    )


def tensors(checkpoint: Checkpoint) -> Mapping[str, torch.Tensor]:
    return {f"{group}/{name}": value for group, some in checkpoint.tensors.items() for name, value in some.items()}


def test_stopping_leaves_a_checkpoint_of_that_step(stopped: Stopped) -> None:
    [step] = stopped.left_steps
    assert stopped.seen_step <= step < STEPS
    assert stopped.stopped_status is JobStatus.STOPPED
    assert stopped.left_run.info.status == "KILLED"
    where = f"--run.name {stopped.place.named('stopped')} --run.storage {stopped.place.bucket}/runs"
    hint = f"go on, from {key_of_step(step)}, with --resume {where}"
    assert f"stopped by SIGTERM; {hint}" in stopped.stopped.logs
    assert "Traceback" not in without_controller(stopped.stopped.logs), stopped.stopped.logs


def test_the_same_command_goes_on_from_there_to_the_weights_of_an_undisturbed_run(
    stopped: Stopped, s3: S3Server
) -> None:
    assert stopped.undisturbed.exit_code == 0, stopped.undisturbed.logs
    assert stopped.resumed.exit_code == 0, stopped.resumed.logs
    assert f"going on from step {stopped.left_steps[0]} " in stopped.resumed.logs
    one, other = (tensors(stopped.place.checkpoint(name, STEPS)) for name in ("undisturbed", "stopped"))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_it_stays_one_run_and_one_version(stopped: Stopped) -> None:
    [run] = stopped.place.runs("stopped")
    assert run.info.run_id == stopped.left_run.info.run_id
    assert run.info.status == "FINISHED"
    assert len(stopped.place.versions("stopped")) == 1


def test_a_complete_run_says_so_and_changes_nothing(stopped: Stopped) -> None:
    place, before = stopped.place, stopped.place.objects()
    job = place.start("stopped").wait()
    assert job.exit_code == 0, job.logs
    assert "is complete" in job.logs
    checkpoints = {key for key in before if f"{place.named('stopped')}/checkpoints/" in key}
    after = place.objects()
    assert {key for key in after if f"{place.named('stopped')}/checkpoints/" in key} == checkpoints
    assert all(after[key] == before[key] for key in checkpoints)
    assert len(place.runs("stopped")) == len(place.versions("stopped")) == 1


def test_another_config_under_that_name_is_refused_with_each_difference(stopped: Stopped) -> None:
    job = stopped.place.start("stopped", "--optim.seed", 1, "--model.num-channels", 8).wait()
    assert job.exit_code == 2, job.logs
    assert "--optim.seed 1 (was 0)" in job.logs and "--model.num-channels 8 (was 4)" in job.logs
    assert "Traceback" not in without_controller(job.logs), job.logs


def test_packages_are_the_jobs_own_in_driver_tasks_and_actors(stopped: Stopped) -> None:
    for process in ("driver", "task", "actor"):
        [found] = re.findall(rf"^{process} has (.+)$", stopped.undisturbed.logs, re.MULTILINE)
        assert "/working_dir_files/" in found, stopped.undisturbed.logs


def shipped(place: Place) -> dict[str, int]:
    """Files of the working directory as they arrived on the node, with their sizes in bytes."""
    folders = place.temp.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*")
    folder = max((path for path in folders if path.is_dir()), key=lambda path: path.stat().st_mtime)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_a_checkouts_clutter_does_not_travel(stopped: Stopped) -> None:
    files = shipped(stopped.place)
    assert {"pipelines/train_edsr.py", "experiments/mine.py", "sr_data/photos/train/coffee.png"} <= files.keys()
    assert files.keys().isdisjoint(CLUTTER)
    tops = {name.partition("/")[0] for name in files}
    assert tops.isdisjoint({"tests", "docs", "docker", "benchmarks", "requirements", "tools", ".ci"}), tops
    assert sum(size for name, size in files.items() if name not in ANYWHERE) < 5_000_000


def test_images_weights_archives_and_secrets_of_a_checkout_do_not_travel(stopped: Stopped) -> None:
    assert shipped(stopped.place).keys().isdisjoint(ANYWHERE)


def said_by_ray(place: Place, jobs: tuple[Job, ...]) -> dict[str, bytes]:
    """What the dashboard's API answers, and every file that Ray has written on the node."""
    paths = ["/api/jobs/", *(f"/api/jobs/{job.job_id}" for job in jobs)]
    paths += [f"/api/v0/{kind}?detail=1&limit=10000" for kind in ("jobs", "actors", "tasks", "workers", "runtime_envs")]
    said = {}
    for path in [*paths, "/logical/actors", "/events"]:
        with urllib.request.urlopen(place.head.jobs_url + path, timeout=30) as answer:
            said[path] = answer.read()
    for path in place.temp.rglob("*"):
        if path.is_file() and not path.is_symlink():
            said[str(path.relative_to(place.temp))] = path.read_bytes()
    return said


def test_what_the_nodes_environment_holds_is_shown_and_written_nowhere(stopped: Stopped) -> None:
    place = stopped.place
    written = said_by_ray(place, stopped.jobs)
    assert any(name.endswith("runtime_env_agent.log") for name in written)
    written |= {job.job_id: job.logs().encode() for job in stopped.jobs}
    written |= place.objects()
    folder = place.mlflow.child.log_path.parent  # database, its journal, artefacts, log
    written |= {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for secret in (place.s3.secret_key, PASSWORD):
        assert [name for name, content in written.items() if secret.encode() in content] == []


def test_what_a_job_brings_is_shown_by_ray(stopped: Stopped) -> None:
    """That is why docs/security.md puts credentials on the nodes. It shows too that the search above would find."""
    job = stopped.place.head.start_job("true", working_dir=stopped.place.checkout, env={"TOKEN": OF_A_JOB})
    assert job.wait().exit_code == 0
    said = said_by_ray(stopped.place, (job,))
    found = {name.rpartition("/logs/")[2] for name, content in said.items() if OF_A_JOB.encode() in content}
    assert {"/api/jobs/", f"/api/jobs/{job.job_id}", "runtime_env_agent.log"} <= found
