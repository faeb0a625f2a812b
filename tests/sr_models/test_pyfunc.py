"""The registered model, logged to MLflow and loaded where the project is not."""

import json
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.models import ModelSignature
from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

import sr_models
from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.inference import upscale_image
from sr_models.weights import load_model, save_model

CONFIG = EDSRConfig(scale=2, num_blocks=1, num_channels=4)
PACKAGE = Path(sr_models.__file__).parent

ELSEWHERE = """
import json, sys
import mlflow.pyfunc, numpy as np
model = mlflow.pyfunc.load_model(sys.argv[1])
images = np.load(sys.argv[2])
np.save(sys.argv[3], model.predict(images))
np.save(sys.argv[4], model.predict(images, params={"self_ensemble": True, "tile_px_lr": 5}))
import sr_models
foreign = [name for name in ("sr_data", "sr_train", "ray", "tyro") if name in sys.modules]
print(json.dumps({"code": sr_models.__file__, "foreign": foreign}))
"""


@pytest.fixture
def logged_model(tmp_path):
    """The logged model's local folder."""
    save_model(tmp_path / "saved", CONFIG, build_model(CONFIG, seed=0).state_dict())
    uint8_images = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))])
    params = ParamSchema(
        [ParamSpec("tile_px_lr", DataType.long, 192), ParamSpec("self_ensemble", DataType.boolean, default=False)]
    )
    mlflow.pyfunc.save_model(
        tmp_path / "logged",
        python_model=str(PACKAGE / "pyfunc.py"),
        artifacts={"model": str(tmp_path / "saved")},
        code_paths=[str(PACKAGE)],
        signature=ModelSignature(uint8_images, uint8_images, params),
        pip_requirements=[],
    )
    return tmp_path / "logged"


def test_it_needs_nothing_of_the_project_but_what_it_carries(logged_model, tmp_path):
    images_NHWC = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), np.uint8)
    np.save(tmp_path / "in.npy", images_NHWC)
    outputs = tmp_path / "out.npy", tmp_path / "ensemble.npy"
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, logged_model, tmp_path / "in.npy", *outputs],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert Path(report["code"]).is_relative_to(logged_model)
    assert report["foreign"] == []
    model = load_model(tmp_path / "saved")
    for path, options in zip(outputs, ({}, {"self_ensemble": True, "tile_px_lr": 5}), strict=True):
        expected = np.stack([upscale_image(model, image, **options) for image in images_NHWC])
        assert expected.shape == (2, 18, 14, 3)
        assert np.array_equal(np.load(path), expected)


def test_no_pickle_is_in_it(logged_model):
    suffixes = {path.suffix for path in logged_model.rglob("*") if path.is_file()}
    assert not suffixes & {".pkl", ".pt", ".pth", ".bin"}
    assert ".safetensors" in suffixes


@pytest.mark.parametrize(
    "image", [np.zeros((1, 4, 4, 3), np.float32), np.zeros((1, 4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8)]
)
def test_other_input_is_refused(logged_model, image):
    model = mlflow.pyfunc.load_model(str(logged_model))
    with pytest.raises((mlflow.MlflowException, ValueError), match=r"[Ss]chema|shape|uint8"):
        model.predict(image)
