"""As a user does it: stage a dataset to S3, submit a job to a cluster, find, load and evaluate the registered model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from PIL import Image

from sr_train.checkpoint import Checkpoint, key_of_step, read_checkpoint
from tests.support.mlflow_server import MlflowServer
from tests.support.pipeline import REPO, run_script, without_controller
from tests.support.ray_head import JobOutcome, RayHead
from tests.support.s3 import S3Server, missing_ceph_programs

pytestmark = pytest.mark.e2e

GIT_SHA = "0123456789abcdef0123456789abcdef01234567"
MODEL = "edsr-x2"
BATCH, STEPS = 8, 24
PROTOCOL = "psnr@y,crop=scale"
SMALL = [
    *("--preset", "edsr-small-x2", "--model.num-blocks", 1, "--model.num-channels", 8, "--data.patch-px-hr", 32),
    *("--optim.global-batch-size", BATCH, "--optim.total-patches", BATCH * STEPS),
    *("--schedule.warmup-patches", BATCH * 4, "--validation.interval-patches", BATCH * STEPS // 2),
    *("--checkpoint.interval-patches", BATCH * STEPS // 2),
]


@dataclass(frozen=True, kw_only=True)
class Images:
    """What a run trains on and is validated on, on this machine."""

    train: Path
    train_split: str
    valid: Path
    """HR images, or HR and LR in the benchmark layout."""
    bicubic_psnr_db: float | None
    """As published for `valid`, x2, under the papers' protocol."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """One finished job and all that it left."""

    images: Images
    s3: S3Server
    bucket: str
    name: str
    staged: tuple[subprocess.CompletedProcess[str], ...]
    job: JobOutcome
    mlflow: MlflowServer
    version: ModelVersion

    @property
    def env(self) -> dict[str, str]:
        return {**self.s3.env, "MLFLOW_TRACKING_URI": self.mlflow.uri}

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.mlflow.uri, self.mlflow.uri)

    @property
    def run(self) -> Run:
        return self.client.get_run(self.version.run_id)

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Everything in the bucket below `prefix`."""
        s3, bucket = self.s3.client(), self.bucket.removeprefix("s3://")
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {key.removeprefix(prefix): s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


@pytest.fixture(scope="module", params=["generated photos on moto", "BSDS500 and Set5 on RGW"])
def trained(
    request: pytest.FixtureRequest,
    ray_head: RayHead,
    mlflow_server: MlflowServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> TrainedRun:
    """Stages, submits, waits: once for all tests of a set of images."""
    folder = tmp_path_factory.mktemp("job")
    if request.param.startswith("generated"):
        images = generated_images(request.getfixturevalue("_photos"), folder)
        server: S3Server = request.getfixturevalue("moto_server")
    else:
        data: Path = request.getfixturevalue("shared_data")
        images = Images(train=data / "BSDS500", train_split="train", valid=data / "Set5", bicubic_psnr_db=33.66)
        ceph = not missing_ceph_programs() or os.environ.get("SR_EXPECT_RGW") == "1"
        server = request.getfixturevalue("rgw_server" if ceph else "moto_server")
    bucket = server.new_bucket()
    stage = ["--target", f"{bucket}/train", "--source", images.train, "--split", images.train_split]
    staged = [run_script("prepare_dataset.py", *stage, cwd=folder, env=server.env)]
    stage = ["--target", f"{bucket}/valid", "--source", images.valid]
    staged += [run_script("prepare_dataset.py", *stage, cwd=folder, env=server.env)]
    name = f"{server.kind}-{bucket[-8:]}"
    job = ray_head.submit_job(
        train_command(
            *("--data.uri", f"{bucket}/train", "--data.split", "train", "--validation.uri", f"{bucket}/valid"),
            *("--run.storage", f"{bucket}/runs", "--run.name", name, "--run.num-workers", 2),
            *("--tracking.uri", mlflow_server.uri, "--tracking.experiment", "job-submit"),
        ),
        working_dir=REPO,
        env={**server.env, "SR_GIT_SHA": GIT_SHA},
    )
    assert job.exit_code == 0, job.logs
    return TrainedRun(
        images=images,
        s3=server,
        bucket=bucket,
        name=name,
        staged=tuple(staged),
        job=job,
        mlflow=mlflow_server,
        version=MlflowClient(mlflow_server.uri, mlflow_server.uri).get_model_version_by_alias(MODEL, "challenger"),
    )


def generated_images(photos: Path, folder: Path) -> Images:
    """Four photos to train on, two to validate on."""
    for number, path in enumerate(sorted(photos.iterdir())):
        target = folder / ("train" if number < 4 else "valid")
        target.mkdir(exist_ok=True)
        shutil.copy(path, target)
    return Images(train=folder / "train", train_split="all", valid=folder / "valid", bicubic_psnr_db=None)


def train_command(*arguments: object) -> str:
    """What stands behind `ray job submit --working-dir . --`."""
    return " ".join([sys.executable, "pipelines/train_edsr.py", *map(str, [*SMALL, *arguments])])


def test_staging_says_that_it_is_complete(trained: TrainedRun) -> None:
    for done, name in zip(trained.staged, ("train", "valid"), strict=True):
        assert done.returncode == 0, done.stderr
        assert f"{trained.bucket}/{name}: complete" in done.stdout


def test_the_job_says_what_it_does_and_where_everything_is(trained: TrainedRun) -> None:
    logs = trained.job.logs
    assert f"{trained.bucket}/train [train]" in logs  # the plan
    assert f"step {STEPS}: PSNR" in logs  # the last validation
    assert f"models:/{MODEL}/{trained.version.version} ({MODEL}@challenger)" in logs
    assert "Traceback" not in without_controller(logs), logs


def test_checkpoints_and_result_lie_in_object_storage(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    left = trained.objects(f"runs/{trained.name}/")
    assert {"config.json", "result.json", "comparison.png"} <= left.keys()
    saved = [key for key in left if key.startswith("checkpoints/")]
    assert saved == [f"checkpoints/{key_of_step(step)}" for step in (STEPS // 2, STEPS)]
    last = whole_checkpoint(trained, key_of_step(STEPS), monkeypatch)
    assert (last.step, last.meta["patches_seen"]) == (STEPS, BATCH * STEPS)
    result = json.loads(left["result.json"])
    assert result["registered"]["version"] == str(trained.version.version)
    assert result["best_checkpoint"] == trained.version.tags["checkpoint"]


def test_the_version_is_registered_with_its_facts(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = trained.version.tags
    run_tags = trained.run.data.tags
    best = whole_checkpoint(trained, tags["checkpoint"].rpartition("/")[2], monkeypatch)
    assert tags["dataset_fingerprint"] == best.meta["dataset_fingerprint"] == run_tags["dataset_fingerprint"]
    assert tags["git_sha"] == run_tags["git_sha"] == GIT_SHA
    assert (tags["protocol"], tags["scale"], tags["step"]) == (PROTOCOL, "2", str(best.step))
    assert float(tags["psnr_db"]) == pytest.approx(best.meta["best"]["psnr_db"], abs=1e-4)
    if trained.images.bicubic_psnr_db is not None:
        assert float(tags["bicubic_psnr_db"]) == pytest.approx(trained.images.bicubic_psnr_db, abs=0.02)


def test_the_registered_model_upscales_where_the_project_is_not(trained: TrainedRun, tmp_path: Path) -> None:
    code = (
        "import mlflow.pyfunc, numpy as np, sys\n"
        f"model = mlflow.pyfunc.load_model('models:/{MODEL}@challenger')\n"
        "images = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3), np.uint8)\n"
        "upscaled = np.asarray(model.predict(images))\n"
        "assert not {'sr_train', 'sr_data', 'ray'} & set(sys.modules)\n"
        "print(upscaled.shape, upscaled.dtype)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | trained.env, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ["(1, 40, 60, 3) uint8"], done.stderr


def test_mlflow_has_params_and_curves(trained: TrainedRun) -> None:
    run = trained.run
    assert (run.info.status, run.info.run_name) == ("FINISHED", trained.name)
    assert run.data.params["data.uri"] == f"{trained.bucket}/train"
    assert run.data.params["optim.global_batch_size"] == str(BATCH)
    history = {
        name: {point.step: point.value for point in trained.client.get_metric_history(run.info.run_id, name)}
        for name in ("loss", "learning_rate", "patches_per_s", "data_wait_share", "validation/psnr_db")
    }
    for name, points in history.items():
        assert max(points) == STEPS and len(points) >= 2, name
        assert all(map(np.isfinite, points.values())), name
    assert history["loss"][STEPS] < history["loss"][min(history["loss"])]
    assert all(0 <= share <= 1 for share in history["data_wait_share"].values())
    assert sorted(history["validation/psnr_db"]) == [STEPS // 2, STEPS]
    assert max(history["validation/psnr_db"].values()) == pytest.approx(
        float(trained.version.tags["psnr_db"]), abs=1e-4
    )


def test_mlflow_has_pictures(trained: TrainedRun, tmp_path: Path) -> None:
    client, run_id = trained.client, trained.version.run_id
    assert {"config.json", "plan.txt"} <= {item.path for item in client.list_artifacts(run_id)}
    names = [path.name for path in sorted(trained.images.valid.rglob("*.png")) if "LR_bicubic" not in path.parts]
    first = sorted(name.removesuffix(".png") for name in names)[:1]  # rank 0 shows its own part of the images
    expected = ["samples/training_patches.png"]
    expected += [f"samples/step-{step:09d}/{name}.png" for step in (STEPS // 2, STEPS) for name in first]
    for path in expected:
        picture = np.asarray(Image.open(client.download_artifacts(run_id, path, str(tmp_path))))
        assert picture.ndim == 3 and picture.std() > 10, path


def test_evaluation_agrees_with_the_run(trained: TrainedRun, tmp_path: Path) -> None:
    done = run_script(
        *("evaluate_model.py", f"models:/{MODEL}@challenger", "--sets", trained.images.valid, "--scale", 2),
        *("--json", tmp_path / "out.json"),
        cwd=tmp_path,
        env=trained.env,
    )
    assert done.returncode == 0, done.stderr
    [scores] = json.loads((tmp_path / "out.json").read_text())
    assert scores.keys() >= {"set", "scale", "protocol", "psnr_db", "ssim", "images"}
    assert (scores["set"], scores["scale"], scores["protocol"]) == (trained.images.valid.name, 2, PROTOCOL)
    assert {frozenset(image) for image in scores["images"]} == {frozenset({"name", "psnr_db", "ssim"})}
    # Two workers in the cluster on images from S3, and one process here on the files: the same numbers.
    for name in ("psnr_db", "ssim"):
        assert scores[name] == pytest.approx(float(trained.version.tags[name]), abs=1e-3)
    [of_bicubic] = (line.split() for line in done.stdout.splitlines() if line.startswith("bicubic "))
    assert float(of_bicubic[1]) == pytest.approx(float(trained.version.tags["bicubic_psnr_db"]), abs=1e-3)


def test_credentials_are_written_nowhere(trained: TrainedRun) -> None:
    secret = trained.s3.secret_key.encode()
    said = {
        "job": trained.job.logs,
        **{f"staging {n}": done.stdout + done.stderr for n, done in enumerate(trained.staged)},
    }
    written = {name: text.encode() for name, text in said.items()}
    written |= trained.objects()  # config.json, checkpoints with their headers, result, manifests
    folder = trained.mlflow.child.log_path.parent  # database, its journal, artefacts, log
    written |= {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert any(name.endswith(".safetensors") for name in written) and "mlflow.db" in written
    assert [name for name, content in written.items() if secret in content] == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--optim.learning-rat", "1"], "--optim.learning-rat"),
        (["--data.uri", "s3://no-such-bucket/bsds"], "s3://no-such-bucket/bsds"),
    ],
    ids=["unknown flag", "missing bucket"],
)
def test_a_job_that_cannot_run_says_why_and_fails(
    ray_head: RayHead, s3: S3Server, mlflow_server: MlflowServer, wrong: list[str], says: str
) -> None:
    storage = f"{s3.new_bucket()}/runs"
    job = ray_head.submit_job(
        train_command("--run.storage", storage, "--tracking.uri", mlflow_server.uri, *wrong),
        working_dir=REPO,
        env=s3.env,
    )
    assert job.exit_code == 2, job.logs
    assert says in job.logs
    assert "Traceback" not in without_controller(job.logs), job.logs
    assert s3.secret_key not in job.logs


def test_processes_of_a_job_know_their_cluster(ray_head: RayHead, tmp_path: Path) -> None:
    """Else Ray's helpers look for a cluster on the machine, and may find another one."""
    (tmp_path / "job.py").write_text(
        "import os, ray\n"
        "from sr_train.ray_cluster import connect\n"
        "connect()\n"
        "address = ray.get(ray.remote(lambda: os.environ['RAY_ADDRESS']).remote())\n"
        "assert address == ray.get_runtime_context().gcs_address, address\n"
    )
    job = ray_head.submit_job(f"{sys.executable} job.py", working_dir=tmp_path)
    assert job.exit_code == 0, job.logs


def whole_checkpoint(trained: TrainedRun, key: str, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """Reads a checkpoint of the run from its bucket."""
    from sr_data.storage import open_store

    for name, value in trained.s3.env.items():
        monkeypatch.setenv(name, value)
    return read_checkpoint(open_store(f"{trained.bucket}/runs/{trained.name}/checkpoints"), key)
