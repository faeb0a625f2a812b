"""`mlflow models serve` and `mlflow models predict` of a registered model, in an environment made for it alone."""

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.network import SRNetwork
from sr_models.upscaling import upscale_file
from sr_models.weights import save_model
from sr_train.model_registry import register_model
from sr_train.tracking import start_run
from tests.support.mlflow_server import MlflowServer
from tests.support.process import Child, answers_http, free_ports

pytestmark = pytest.mark.e2e

CONFIG = EDSRConfig(scale=2, num_blocks=2, num_channels=8)
MLFLOW = [sys.executable, "-m", "mlflow", "models"]


@dataclass(frozen=True)
class Served:
    url: str
    model_uri: str
    network: SRNetwork
    child: Child
    env: dict[str, str]

    def predict(self, inputs: Any, **params: Any) -> requests.Response:
        return requests.post(f"{self.url}/invocations", json={"inputs": inputs, "params": params}, timeout=60)


@pytest.fixture(scope="module")
def served(mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    network = build_model(CONFIG, seed=0)
    save_model(folder / "model", CONFIG, network.state_dict())
    run = start_run(tracking_uri=mlflow_server.uri, experiment="served", run_name="r", params={}, tags={}, texts={})
    sample = np.zeros((8, 8, 3), np.uint8)
    version = register_model(run, folder / "model", name="served-x2", tags={}, sample_lr_HWC=sample)
    (port,) = free_ports(1)
    # The environment that MLflow makes is of the model's requirements alone; it must not see this one's packages.
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"MLFLOW_TRACKING_URI": mlflow_server.uri, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    command = [*MLFLOW, "serve", "-m", version.uri, "--env-manager", "uv", "--host", "127.0.0.1", "--port", str(port)]
    child = Child.start("mlflow models serve", command, log_path=folder / "serve.log", env=env)
    try:
        child.wait_until(lambda: answers_http(f"http://127.0.0.1:{port}/ping"))
        yield Served(f"http://127.0.0.1:{port}", version.uri, network, child, env)
    finally:
        child.stop()


@pytest.fixture(scope="module")
def photo(repo: Path) -> bytes:
    """A JPEG, as a phone would send it: lying on its side, and EXIF says so."""
    exif = Image.Exif()
    exif[274], exif[271] = 6, "ACME"
    target = io.BytesIO()
    with Image.open(repo / "sr_data" / "photos" / "valid" / "chelsea.png") as image:
        image.resize((60, 40)).save(target, "JPEG", exif=exif, quality=95)
    return target.getvalue()


def test_a_jpeg_comes_back_upright_and_twice_as_large(served: Served, photo: bytes) -> None:
    answer = served.predict([base64.b64encode(photo).decode()])
    assert answer.status_code == 200, answer.text
    [text] = answer.json()["predictions"]
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        assert (image.format, image.size, image.getexif()[271]) == ("JPEG", (80, 120), "ACME")
        ours = Image.open(io.BytesIO(upscale_file(served.network, photo, name="it")))
        assert np.abs(np.asarray(image).astype(int) - np.asarray(ours)).max() <= 2


def test_levels_and_parameters_over_http(served: Served, photo: bytes) -> None:
    lr_HWC = np.random.default_rng(0).integers(0, 256, (6, 7, 3))
    answer = served.predict(lr_HWC[None].tolist(), self_ensemble=True)
    assert answer.status_code == 200, answer.text
    assert np.shape(answer.json()["predictions"]) == (1, 12, 14, 3)
    records = {"dataframe_records": [{"image": base64.b64encode(photo).decode()}], "params": {"format": "png"}}
    answer = requests.post(f"{served.url}/invocations", json=records, timeout=60)
    [row] = answer.json()["predictions"]
    assert base64.b64decode(row["image"]).startswith(b"\x89PNG")


def test_a_bad_image_is_said_and_the_server_lives_on(served: Served, photo: bytes) -> None:
    cut = base64.b64encode(photo[: len(photo) // 2]).decode()
    for bad, message in ((cut, "truncated or damaged"), ("nothing", "base64"), ([[0.5]], "uint8 or uint16")):
        answer = served.predict([bad] if isinstance(bad, str) else bad)
        assert (answer.status_code, message in answer.json()["message"]) == (400, True), answer.text
    assert served.predict([base64.b64encode(photo).decode()]).status_code == 200


def test_on_the_command_line(served: Served, photo: bytes, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps({"inputs": [base64.b64encode(photo).decode()]}))
    command = [*MLFLOW, "predict", "-m", served.model_uri, "--env-manager", "local", "-t", "json"]
    command += ["-i", "in.json", "-o", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, env=served.env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [text] = json.loads((tmp_path / "out.json").read_text())["predictions"]
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        assert image.size == (80, 120)
