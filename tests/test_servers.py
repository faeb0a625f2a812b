"""The servers that the tests run against are real: they authenticate, keep state, and stop."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.fs
import pytest
import s3fs
from botocore.exceptions import ClientError
from PIL import Image

from tests.support.mlflow_server import MlflowServer
from tests.support.process import Child, ServerError
from tests.support.ray_head import RayHead
from tests.support.s3 import S3Server

REPO = Path(__file__).resolve().parent.parent


def wait_for_end(pid: int) -> None:
    """Returns once the process is gone or a zombie that nobody reaped yet; fails after 10 s."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} still runs")


def test_s3_round_trip_with_every_client(any_s3: S3Server) -> None:
    bucket = any_s3.new_bucket().removeprefix("s3://")
    data = os.urandom(6 << 20)  # above 5 MB, so that pyarrow and s3fs use a multipart upload
    with s3fs.S3FileSystem(default_block_size=5 << 20).open(f"{bucket}/a/s3fs", "wb") as file:
        file.write(data)
    # pyarrow takes the endpoint from AWS_ENDPOINT_URL in `FileSystem.from_uri` only.
    arrow = pyarrow.fs.S3FileSystem(endpoint_override=any_s3.endpoint_url)
    with arrow.open_output_stream(f"{bucket}/a/arrow") as stream:
        stream.write(data)
    any_s3.client().put_object(Bucket=bucket, Key="a/boto", Body=data)
    for name in ("s3fs", "arrow", "boto"):
        assert s3fs.S3FileSystem().cat(f"{bucket}/a/{name}") == data
        assert arrow.open_input_file(f"{bucket}/a/{name}").read() == data


@pytest.mark.parametrize("change", [{"aws_secret_access_key": "wrong"}, {"aws_access_key_id": "AKIAUNKNOWN0"}])
def test_s3_refuses_wrong_credentials(any_s3: S3Server, change: dict[str, str]) -> None:
    bucket = any_s3.new_bucket().removeprefix("s3://")
    stranger = any_s3.client(**change)
    for call in (lambda: stranger.list_objects_v2(Bucket=bucket), lambda: stranger.put_object(Bucket=bucket, Key="a")):
        with pytest.raises(ClientError) as refused:
            call()
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_s3_buckets_are_the_tests_own(s3: S3Server) -> None:
    one, two = s3.new_bucket(), s3.new_bucket()
    assert one != two
    assert s3fs.S3FileSystem().ls(two) == []


def test_mlflow_server_keeps_runs_and_artifacts(mlflow_server: MlflowServer) -> None:
    client = mlflow.MlflowClient(mlflow_server.uri)
    run = client.create_run(client.create_experiment("servers"))
    client.log_metric(run.info.run_id, "loss", 0.5)
    client.log_text(run.info.run_id, "hello", "a.txt")
    assert client.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["a.txt"]


def test_ray_head_runs_a_submitted_folder(ray_head: RayHead, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "uploaded_package").mkdir()
    (tmp_path / "uploaded_package" / "__init__.py").write_text("ANSWER = 42\n")
    (tmp_path / "scripts" / "job.py").write_text(
        "import os, ray\n"
        "from uploaded_package import ANSWER\n"
        "@ray.remote\n"
        "def task():\n"
        "    import uploaded_package\n"
        "    return uploaded_package.ANSWER\n"
        "ray.init()\n"
        "assert ray.get(task.remote()) == ANSWER\n"
        "print('answer', ANSWER, os.environ['COLOUR'])\n"
        "raise SystemExit(3)\n"
    )
    job = ray_head.submit_job(f"{sys.executable} scripts/job.py", working_dir=tmp_path, env={"COLOUR": "blue"})
    assert "answer 42 blue" in job.logs
    assert job.exit_code == 3


def test_child_says_why_it_did_not_start(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such luck'); raise SystemExit(7)"]
    child = Child.start("broken", command, log_path=tmp_path / "log", env=os.environ)
    with pytest.raises(ServerError, match=r"(?s)broken ended with 7.*no such luck"):
        child.wait_until(lambda: False)


def test_child_takes_its_own_children_along(tmp_path: Path) -> None:
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '100']).pid, flush=True); time.sleep(100)"
    child = Child.start("parent", [sys.executable, "-c", code], log_path=tmp_path / "log", env=os.environ)
    child.wait_until(lambda: child.log_path.read_text().endswith("\n"))
    grandchild = int(child.log_path.read_text())
    child.stop()
    wait_for_end(grandchild)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not installed")
def test_child_does_not_outlive_a_killed_test_run() -> None:
    code = (
        "import os, pathlib, signal, sys\n"
        "from tests.support.process import Child\n"
        "child = Child.start('sleep', ['sleep', '100'], log_path=pathlib.Path('log'), env=os.environ)\n"
        "child.wait_until(lambda: 'sleep' in pathlib.Path(f'/proc/{child.process.pid}/comm').read_text())\n"
        "print(child.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = os.environ | {"PYTHONPATH": str(REPO)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == -9, run.stderr
    wait_for_end(int(run.stdout))


def test_no_settings_of_the_developer(tmp_path: Path) -> None:
    assert not {"AWS_ACCESS_KEY_ID", "AWS_PROFILE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"} & set(os.environ)
    assert Path.cwd() == tmp_path


def test_tiny_photos_are_rgb_and_own_copies(tiny_photos: Path) -> None:
    images = [np.asarray(Image.open(path)) for path in sorted(tiny_photos.iterdir())]
    assert len(images) == 6
    assert all(image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 for image in images)


def test_shared_data_has_what_the_tests_name(shared_data: Path) -> None:
    assert len(list((shared_data / "BSDS500" / "train").glob("*.jpg"))) == 200
    assert len(list((shared_data / "Set5" / "LR_bicubic" / "X4").iterdir())) == 5


@pytest.mark.parametrize(("expected", "closing"), [("0", "2 skipped"), ("1", "2 errors")])
def test_absence_is_skipped_and_said_unless_ci_expected_it(tmp_path: Path, expected: str, closing: str) -> None:
    (tmp_path / "test_absent.py").write_text("def test_data(shared_data): ...\ndef test_ceph(s3_rgw): ...\n")
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "tests.conftest", "test_absent.py"]
    env = os.environ | {"SR_SHARED_DATA": "/nonexistent", "PATH": "/nonexistent", "PYTHONPATH": str(REPO)}
    env |= {"SR_EXPECT_SHARED_DATA": expected, "SR_EXPECT_RGW": expected}
    run = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert closing in run.stdout.splitlines()[-1], run.stdout
    assert run.returncode == int(expected)
    for reason in (
        "BSDS500, DIV2K, Set5, T91 not found in /nonexistent (SR_SHARED_DATA)",
        "radosgw-admin not installed",
    ):
        assert reason in run.stdout
