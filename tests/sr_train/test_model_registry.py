"""A model is registered on a real server and used from another process that knows nothing of this project."""

import json
import os
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import mlflow.artifacts
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from sr_data.resize import upscale_bicubic
from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.errors import ModelError
from sr_models.inference import upscale_image
from sr_models.onnx_export import check_onnx
from sr_models.weights import load_model, save_model
from sr_train.model_registry import register_model
from sr_train.tracking import RunHandle, TrackingError, start_run
from tests.support.faulty_proxy import Fault, faulty_proxy
from tests.support.mlflow_server import MlflowServer
from tests.support.process import PATIENCE_S

SAMPLE = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)

USE = """
import importlib.util, json, sys
import mlflow, numpy as np
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # as if never installed
sys.modules.update(onnx=None, onnxruntime=None)  # the registered model's requirements list neither
uri, image_path, result_path = sys.argv[1:]
assert importlib.util.find_spec("sr_models") is None and importlib.util.find_spec("sr_train") is None
model = mlflow.pyfunc.load_model(uri)
small = np.load(image_path)
large = np.zeros((2, 20, 17, 3), np.uint8)
outcome = {"large": list(model.predict(large).shape)}
np.save(result_path, model.predict(small[None]))
ensemble = model.predict(small[None], params={"self_ensemble": True, "tile_px_lr": 8})
outcome["ensemble"] = [str(ensemble.dtype), list(ensemble.shape)]
for wrong in (small[None].astype(np.float32), small[None, ..., :1], small[0], 'not base64 of an image'):
    try:
        model.predict(wrong)
        outcome.setdefault("refused", []).append("")
    except mlflow.exceptions.MlflowException as error:
        outcome.setdefault("refused", []).append(str(error))
print(json.dumps(outcome))
"""


def weights(folder: Path, seed: int = 0, residual_scaling: float = 1.0) -> Path:
    torch.manual_seed(seed)
    config = EDSRConfig(scale=2, num_blocks=2, num_channels=8, residual_scaling=residual_scaling)
    save_model(folder, config, build_model(config).state_dict(), notes={"made in": folder.name})
    return folder


def use_elsewhere(tracking_uri: str, model_uri: str, folder: Path) -> tuple[dict[str, object], np.ndarray]:
    """Predict in a process of another working directory, without this project on its import path."""
    folder.mkdir()
    np.save(folder / "image.npy", SAMPLE)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "MLFLOW_TRACKING_URI": tracking_uri
    }
    command = [sys.executable, "-I", "-c", USE, model_uri, str(folder / "image.npy"), str(folder / "result.npy")]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), np.load(folder / "result.npy")


@pytest.fixture(params=["server", "sqlite"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunHandle:
    if request.param == "server":
        server: MlflowServer = request.getfixturevalue("mlflow_server")
        uri = server.uri
    else:
        uri = f"sqlite:///{tmp_path}/elsewhere.db"  # not the default of this working directory
    return start_run(
        tracking_uri=uri, experiment=f"registry-{tmp_path.name}", run_name="r", params={}, tags={}, texts={}
    )


def test_a_registered_model_works_without_this_project(
    run: RunHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"edsr-{tmp_path.name}"
    folder = weights(tmp_path / "weights")
    path_before = list(sys.path)
    registered = register_model(run, folder, name=name, tags={"psnr": "30.1"}, sample_lr_HWC=SAMPLE)
    assert sys.path == path_before
    assert (registered.name, registered.version, registered.uri) == (name, "1", f"models:/{name}/1")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", run.tracking_uri)  # download_artifacts knows only this one
    client = MlflowClient()
    version = client.get_model_version(name, "1")
    assert version.run_id == run.run_id
    assert version.tags["psnr"] == "30.1"
    model = mlflow.artifacts.download_artifacts(version.source)
    files = {path.name for path in Path(model).rglob("*")}
    assert {"lr.png", "bicubic.png", "sr.png", "weights.safetensors", "config.json", "edsr.py"} <= files
    assert not {name for name in files if name.endswith((".pkl", ".pyc")) or name == "__pycache__"}

    outcome, sr = use_elsewhere(run.tracking_uri, f"models:/{name}@challenger", tmp_path / "elsewhere")
    assert outcome["large"] == [2, 40, 34, 3]
    assert outcome["ensemble"] == ["uint8", [1, 18, 24, 3]]
    refused = outcome["refused"]
    assert isinstance(refused, list)
    assert all(refused), refused
    assert sr.dtype == np.uint8
    expected = upscale_image(load_model(folder), SAMPLE)
    assert np.array_equal(sr[0], expected)


def test_beside_the_model_lie_onnx_card_and_pictures(
    mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the card says that one can do with them can be done."""
    run = start_run(tracking_uri=mlflow_server.uri, experiment="extras", run_name="r", params={}, tags={}, texts={})
    folder, hr_HWC = weights(tmp_path / "weights"), np.zeros((18, 24, 3), np.uint8)
    tags = {"psnr_db": "30.1"}
    version = register_model(run, folder, name="extras", tags=tags, sample_lr_HWC=SAMPLE, sample_hr_HWC=hr_HWC)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    monkeypatch.chdir(mlflow.artifacts.download_artifacts(version.uri))

    pictures = {path.stem: np.asarray(Image.open(path)) for path in Path("samples").iterdir()}
    assert pictures.keys() == {"lr", "bicubic", "sr", "hr"}
    assert np.array_equal(pictures["lr"], SAMPLE) and np.array_equal(pictures["hr"], hr_HWC)
    assert np.array_equal(pictures["bicubic"], upscale_bicubic(SAMPLE, 2))
    expected_HWC = upscale_image(load_model(folder), SAMPLE)
    assert np.array_equal(pictures["sr"], expected_HWC)
    check_onnx(load_model(folder), Path("onnx/model.onnx"))

    card = Path("MODEL_CARD.md").read_text()
    linked = re.findall(r"!\[[^]]*\]\(([^)]*)\)", card)
    assert linked and all(Path(link).is_file() for link in linked)
    description = MlflowClient().get_model_version("extras", version.version).description
    assert description.startswith("# extras\n") and "| psnr_db | 30.1 |" in description

    Image.fromarray(SAMPLE).save("photo.jpg", format="PNG")  # a JPEG would change the levels
    snippets = re.findall(r"^```python\n(.*?)^```", description, flags=re.MULTILINE | re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, {})
    for name in ("larger.jpg", "larger-onnx.png"):
        assert np.abs(np.asarray(Image.open(name)).astype(int) - expected_HWC).max() <= 1, name


def test_a_card_is_set_on_the_version_that_is_there_and_kept_where_none_is_given(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    run = start_run(tracking_uri=mlflow_server.uri, experiment="cards", run_name="r", params={}, tags={}, texts={})
    folder, client = weights(tmp_path / "weights"), MlflowClient(mlflow_server.uri)

    def described(card: str | None) -> str:
        version = register_model(run, folder, name="cards", tags={}, sample_lr_HWC=SAMPLE, card=card)
        assert version.version == "1"
        return str(client.get_model_version("cards", "1").description)

    assert described("# First") == "# First"
    assert described("# models:/cards/VERSION") == "# models:/cards/1"
    assert described(None) == "# models:/cards/1"


def test_registering_again_gives_the_same_version_and_other_weights_the_next(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    uri = mlflow_server.uri
    run = start_run(tracking_uri=uri, experiment="registry", run_name="r", params={}, tags={}, texts={})
    first = register_model(run, weights(tmp_path / "a"), name="again", tags={}, sample_lr_HWC=SAMPLE)
    same = register_model(run, weights(tmp_path / "copy"), name="again", tags={"late": "yes"}, sample_lr_HWC=SAMPLE)
    assert same == first
    client = MlflowClient(uri)
    assert client.get_model_version("again", first.version).tags["late"] == "yes"
    other = register_model(run, weights(tmp_path / "b", seed=1), name="again", tags={}, sample_lr_HWC=SAMPLE)
    assert other.version == "2"
    assert client.get_model_version_by_alias("again", "challenger").version == "2"
    late = register_model(run, weights(tmp_path / "late"), name="again", tags={}, sample_lr_HWC=SAMPLE)
    assert late == first
    assert client.get_model_version_by_alias("again", "challenger").version == "2", "never back to an older version"
    scaled = weights(tmp_path / "scaled", seed=1, residual_scaling=0.1)  # the same tensors, another network
    assert register_model(run, scaled, name="again", tags={}, sample_lr_HWC=SAMPLE).version == "3"
    assert client.get_model_version_by_alias("again", "challenger").version == "3"


@pytest.mark.parametrize("then", ["answers", "is away"])
def test_a_version_whose_answer_was_lost_is_not_registered_twice(
    mlflow_server: MlflowServer, tmp_path: Path, then: str
) -> None:
    """The server makes the version, and goes before it has said so: for a moment, or until it is started again."""
    lost = threading.Event()

    def faults(method: str, path: str, _attempt: int) -> Fault | None:
        if path.endswith("model-versions/create") and not lost.is_set():
            lost.set()
            return "lost"
        return "drop" if lost.is_set() and away.is_set() else None

    away = threading.Event()
    with faulty_proxy(mlflow_server.uri, faults) as proxy:
        name, folder = f"edsr-{tmp_path.name}", weights(tmp_path / "weights")
        run = start_run(tracking_uri=proxy.url, experiment=name, run_name="r", params={}, tags={}, texts={})
        register = partial(register_model, run, folder, name=name, tags={}, sample_lr_HWC=SAMPLE)
        if then == "is away":
            away.set()
            with pytest.raises(TrackingError):
                register()
            away.clear()
        assert lost.is_set() or then == "answers"
        assert register().version == "1"
    assert lost.is_set()
    assert [it.version for it in MlflowClient(mlflow_server.uri).search_model_versions(f"name = '{name}'")] == ["1"]


def test_what_does_not_work_is_not_registered(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    uri = mlflow_server.uri
    run = start_run(tracking_uri=uri, experiment="registry", run_name="r", params={}, tags={}, texts={})
    folder = weights(tmp_path / "weights")
    (folder / "weights.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="safetensors"):
        register_model(run, folder, name="broken", tags={}, sample_lr_HWC=SAMPLE)
    config = EDSRConfig(scale=2, num_blocks=2, num_channels=8)
    state = build_model(config, seed=0).state_dict()
    save_model(folder, config, state | {"tail.bias": torch.full((3,), torch.nan)})
    with pytest.raises(ModelError, match=r"onnx.*nan"):
        register_model(run, folder, name="broken", tags={}, sample_lr_HWC=SAMPLE)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        register_model(run, folder, name="broken", tags={}, sample_lr_HWC=SAMPLE)
    assert MlflowClient(uri).search_model_versions("name = 'broken'") == []


def test_a_server_that_is_away_is_named(tmp_path: Path) -> None:
    run = RunHandle(tracking_uri="http://127.0.0.1:9", run_id="0" * 32, experiment_id="0", run_name="r", url="")
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:9"):
        register_model(run, weights(tmp_path / "w"), name="away", tags={}, sample_lr_HWC=SAMPLE)
