"""Every kind of MODEL gives the image that its weights give; what can't be opened says why."""

import json
from pathlib import Path

import numpy as np
import pytest

from sr_data.errors import StorageError
from sr_data.resize import upscale_bicubic
from sr_data.storage import open_store
from sr_models.architectures import build_model, config_to_dict
from sr_models.edsr import EDSRConfig
from sr_models.errors import ModelError
from sr_models.inference import upscale_image
from sr_models.weights import save_model
from sr_train.checkpoint import Checkpoint, CheckpointError, write_checkpoint
from sr_train.model_registry import register_model
from sr_train.tracking import start_run
from sr_train.tracking_server import TrackingError
from sr_train.upscaler import UpscalerError, open_upscaler

CONFIG = EDSRConfig(scale=2, num_blocks=1, num_channels=4)
LR_HWC = np.random.default_rng(0).integers(0, 256, (11, 14, 3), np.uint8)


def weights(seed=0):
    return build_model(CONFIG, seed=seed).state_dict()


def expected(seed=0, **options):
    return upscale_image(build_model(CONFIG, seed=seed), LR_HWC, **options)


def write_run_checkpoint(store, *, step=3, scale=2, ema_seed=None):
    config = EDSRConfig(scale=scale, num_blocks=1, num_channels=4)
    tensors = {"model": build_model(config, seed=0).state_dict()}
    if ema_seed is not None:
        tensors["ema"] = build_model(config, seed=ema_seed).state_dict()
    meta = {"step": step, "architecture": "edsr", "model_config": config_to_dict(config)}
    return write_checkpoint(store, Checkpoint(tensors=tensors, meta=meta))


def opened(model, **options):
    return open_upscaler(str(model), scale=2, device="cpu", **options).upscale(LR_HWC)


def test_bicubic_is_the_resize():
    assert np.array_equal(opened("bicubic"), upscale_bicubic(LR_HWC, 2))


@pytest.mark.parametrize("file_name", ["", "/weights.safetensors"])
def test_a_saved_folder(tmp_path, file_name):
    save_model(tmp_path / "saved", CONFIG, weights())
    assert np.array_equal(opened(f"{tmp_path}/saved{file_name}"), expected())


def test_tiles_and_self_ensemble_reach_the_network(tmp_path):
    save_model(tmp_path, CONFIG, weights())
    assert np.array_equal(opened(tmp_path, self_ensemble=True), expected(self_ensemble=True))
    assert np.array_equal(opened(tmp_path, tile_px_lr=4), expected(tile_px_lr=4))


def test_a_checkpoint_and_its_moving_average(tmp_path):
    plain = write_run_checkpoint(open_store(str(tmp_path)), step=3)
    averaged = write_run_checkpoint(open_store(str(tmp_path)), step=4, ema_seed=7)
    assert np.array_equal(opened(tmp_path / plain), expected())
    assert np.array_equal(opened(tmp_path / averaged), expected(seed=7))


def test_a_checkpoint_and_a_folder_on_s3(s3, tmp_path):
    bucket = s3.new_bucket()
    store = open_store(f"{bucket}/run/checkpoints")
    assert np.array_equal(opened(store.uri_of(write_run_checkpoint(store))), expected())
    save_model(tmp_path / "saved", CONFIG, weights())
    folder = open_store(f"{bucket}/saved")
    for path in (tmp_path / "saved").iterdir():
        folder.write(path.name, path.read_bytes())
    assert np.array_equal(opened(folder.uri), expected())
    with pytest.raises(StorageError, match="s3://no-such-bucket"):
        opened("s3://no-such-bucket/model")
    folder.write("config.json", json.dumps({"architecture": "vdsr", "config": {}}).encode())
    with pytest.raises(ModelError, match=rf"{folder.uri}/config\.json: unknown architecture 'vdsr'"):
        opened(folder.uri)


@pytest.fixture
def registered(mlflow_server, tmp_path, request):
    """A registered model with the alias champion, named like the test; its name."""
    name = request.node.name
    save_model(tmp_path / "saved", CONFIG, weights())
    run = start_run(tracking_uri=mlflow_server.uri, experiment=name, run_name="run", params={}, tags={}, texts={})
    register_model(run, tmp_path / "saved", name=name, tags={}, sample_lr_HWC=LR_HWC, alias="champion")
    return name


def test_a_registered_model_by_alias_and_version(registered, mlflow_server, monkeypatch):
    by_alias = opened(f"models:/{registered}@champion", tracking_uri=mlflow_server.uri)
    assert np.array_equal(by_alias, expected())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    assert np.array_equal(opened(f"models:/{registered}/1"), expected())
    for missing in (f"models:/{registered}@nobody", f"models:/{registered}/9", "models:/no-such-model/1"):
        with pytest.raises(UpscalerError, match=f"^{missing}: .*--tracking-uri"):
            opened(missing)
    with pytest.raises(UpscalerError, match="is neither models:/name@alias nor models:/name/version"):
        opened(f"models:/{registered}/Production")
    assert not Path("mlflow.db").exists(), "no other registry was asked"


def test_an_unreachable_registry_is_said_at_once():
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9"):
        opened("models:/edsr@champion", tracking_uri="http://127.0.0.1:9")


def test_another_scale_names_model_and_flag(tmp_path):
    save_model(tmp_path / "saved", CONFIG, weights())
    with pytest.raises(UpscalerError, match=rf"^{tmp_path}/saved: is an x2 model, not x4 \(--scale\)"):
        open_upscaler(f"{tmp_path}/saved", scale=4)


def test_what_is_not_there_says_what_model_may_be(tmp_path):
    for missing in (tmp_path / "none", tmp_path / "step-000000001.safetensors"):
        with pytest.raises(UpscalerError, match=rf"^{missing}: .*MODEL is bicubic, a checkpoint"):
            opened(missing)


def test_a_folder_of_checkpoints_points_to_the_newest(tmp_path):
    store = open_store(str(tmp_path / "run/checkpoints"))
    for step in (9, 10):
        write_run_checkpoint(store, step=step)
    with pytest.raises(UpscalerError, match=r"run: .*it holds the checkpoint .*step-000000010\.safetensors"):
        opened(tmp_path / "run")


def test_a_damaged_checkpoint_and_foreign_weights_are_named(tmp_path):
    key = write_run_checkpoint(open_store(str(tmp_path)))
    (tmp_path / key).write_bytes((tmp_path / key).read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=key):
        opened(tmp_path / key)
    save_model(tmp_path / "saved", CONFIG, weights())
    (tmp_path / "saved/weights.safetensors").rename(tmp_path / "step-000000001.safetensors")
    with pytest.raises(CheckpointError, match="step-000000001"):
        opened(tmp_path / "step-000000001.safetensors")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_names_the_flag(tmp_path, device):
    save_model(tmp_path, CONFIG, weights())
    with pytest.raises(UpscalerError, match=rf"^{device}: .*--device"):
        open_upscaler(str(tmp_path), scale=2, device=device)
