"""The registered model, saved by MLflow and loaded where the project is not."""

import base64
import io
import json
import subprocess
import sys

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.inference import upscale_image
from sr_models.upscaling import upscale_file
from sr_models.weights import load_model, save_model
from sr_train.model_registry import pack_model

CONFIG = EDSRConfig(scale=2, num_blocks=1, num_channels=4)

ELSEWHERE = """
import json, sys
from pathlib import Path
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # as if never installed
import mlflow.pyfunc, numpy as np
model = mlflow.pyfunc.load_model(sys.argv[1])
images = np.load(sys.argv[2])
np.save(sys.argv[3], model.predict(images))
np.save(sys.argv[4], model.predict(images, params={"self_ensemble": True, "tile_px_lr": 5}))
Path(sys.argv[6]).write_bytes(model.predict(Path(sys.argv[5]).read_bytes()))
import sr_models
foreign = [name for name in ("sr_data", "sr_train", "ray", "tyro", "onnx") if name in sys.modules]
print(json.dumps({"code": sr_models.__file__, "foreign": foreign}))
"""


def photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image, file_format="PNG"):
    target = io.BytesIO()
    Image.fromarray(image).save(target, file_format)
    return target.getvalue()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The folder that is registered."""
    folder = tmp_path_factory.mktemp("pyfunc")
    save_model(folder / "saved", CONFIG, build_model(CONFIG, seed=0).state_dict())
    pack_model(folder / "saved", folder / "packed")
    return folder / "packed"


@pytest.fixture(scope="module")
def model(packed):
    return mlflow.pyfunc.load_model(str(packed))


@pytest.fixture(scope="module")
def network(packed):
    return load_model(packed.parent / "saved")


def test_it_needs_nothing_of_the_project_but_what_it_carries(packed, network, tmp_path):
    images_NHWC = np.stack([photo(9, 7, seed) for seed in range(2)])
    np.save(tmp_path / "in.npy", images_NHWC)
    (tmp_path / "in.jpg").write_bytes(encoded(photo(8, 8), "JPEG"))
    files = [tmp_path / name for name in ("in.npy", "out.npy", "ensemble.npy", "in.jpg", "out.jpg")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, packed, *files], cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["code"].startswith(str(packed))
    assert report["foreign"] == []
    for path, options in zip(files[1:3], ({}, {"self_ensemble": True, "tile_px_lr": 5}), strict=True):
        expected = np.stack([upscale_image(network, image, **options) for image in images_NHWC])
        assert expected.shape == (2, 18, 14, 3)
        assert np.array_equal(np.load(path), expected)
    with Image.open(tmp_path / "out.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (16, 16))


def test_no_pickle_is_in_it(packed):
    suffixes = {path.suffix for path in packed.rglob("*") if path.is_file()}
    assert not suffixes & {".pkl", ".pickle", ".pt", ".pth", ".bin"}
    assert ".safetensors" in suffixes


def test_arrays_of_one_image_of_many_and_of_16_bits(model, network):
    one_HWC = photo(6, 5)
    expected = upscale_image(network, one_HWC)
    assert np.array_equal(model.predict(one_HWC), expected)
    assert np.array_equal(model.predict(np.stack([one_HWC, one_HWC])), np.stack([expected, expected]))
    first, second = model.predict([one_HWC, photo(3, 4)])
    assert np.array_equal(first, expected)
    assert second.shape == (6, 8, 3)
    deep = model.predict(one_HWC.astype(np.uint16) * 257)
    assert deep.dtype == np.uint16
    assert np.abs(np.rint(deep / 257).astype(int) - expected).max() <= 1
    as_in_json = model.predict(one_HWC.astype(np.int64)[None])
    assert (as_in_json.dtype, np.array_equal(as_in_json[0], expected)) == (np.uint8, True)


def test_files_come_back_as_what_they_came_as(model, network):
    file = encoded(photo(6, 5))
    text = base64.b64encode(file).decode()
    larger = upscale_file(network, file, name="it")
    assert model.predict(file) == larger
    assert model.predict([file, file]) == [larger, larger]
    assert base64.b64decode(model.predict(text)) == larger
    assert base64.b64decode(model.predict(f"data:image/png;base64,{text}")) == larger
    [from_table] = model.predict(pd.DataFrame({"image": [text]}))["image"]
    assert base64.b64decode(from_table) == larger


def test_parameters_are_used(model, network):
    file = encoded(photo(12, 10))
    ensemble = upscale_file(network, file, name="it", self_ensemble=True)
    assert ensemble != upscale_file(network, file, name="it")
    assert model.predict(file, params={"self_ensemble": True}) == ensemble
    assert model.predict(file, params={"format": "webp"})[8:12] == b"WEBP"
    rounded = model.predict(photo(12, 10), params={"precision": "bfloat16"})
    exact = model.predict(photo(12, 10))
    assert not np.array_equal(rounded, exact)
    assert np.abs(rounded.astype(int) - exact).max() <= 4


def test_who_runs_it_may_allow_larger_files(model, monkeypatch):
    monkeypatch.setenv("SR_MAX_MPX", "100")
    assert model.predict(photo(2, 2), params={"max_mpx": 99.0}).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("image", "params", "message"),
    [
        (np.zeros((1, 4, 4, 3), np.float32), {}, "the input is float32 .*uint8 or uint16 arrays"),
        (np.zeros((1, 4, 4, 4), np.uint8), {}, r"the input is uint8 \(1, 4, 4, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), {}, r"the input has no pixels: \(0, 4, 4, 3\)"),
        ([np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8)], {}, r"image 1 is uint8 \(2, 2\)"),
        ([[[[1, 2, 3]], [[1, 2]]]], {}, "image 0: .*inhomogeneous"),
        (np.full((4, 4, 3), 256), {}, "levels must be 0 to 255"),
        (b"no image", {}, "image 0: is not an image"),
        ("no base64!", {}, "image 0: is text, but not base64"),
        ("é", {}, "image 0: is text, but not base64"),
        (pd.DataFrame({"picture": ["x"]}), {}, "one column, 'image', not .*picture"),
        (np.zeros((2, 2, 3), np.uint8), {"precision": "float8"}, "'float8' is not one of float32, bfloat16"),
        (np.zeros((2, 2, 3), np.uint8), {"format": "gif"}, "'gif' is not one of same, png, jpeg, webp"),
        (np.zeros((2, 2, 3), np.uint8), {"tile_px_lr": 0}, "tile_px_lr=0 must be at least 1"),
        (encoded(np.zeros((30, 40, 3), np.uint8)), {"max_mpx": 0.001}, "40 x 30 px are more than 0.001 Mpx"),
        (np.zeros((2, 2, 3), np.uint8), {"max_mpx": 65.0}, "max_mpx=65 must be above 0 and at most 64, .*SR_MAX_MPX"),
        (np.zeros((2, 2, 3), np.uint8), {"max_mpx": float("nan")}, "max_mpx=nan must be above 0"),
    ],
)
def test_what_is_wrong_is_said(model, image, params, message):
    with pytest.raises(mlflow.MlflowException, match=message):
        model.predict(image, params=params)
