"""An exported network gives in onnxruntime what it gives in PyTorch, and a file that does not is refused."""

import json
import random
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.errors import ModelError
from sr_models.network import ModelConfig
from sr_models.onnx_export import check_onnx, export_onnx
from sr_models.srresnet import SRResNetConfig

CONFIGS: list[ModelConfig] = [
    config_type(scale=scale, num_blocks=2, num_channels=4)
    for config_type in (EDSRConfig, SRResNetConfig)
    for scale in (2, 3, 4)
]
EDSR = EDSRConfig(scale=2, num_blocks=1, num_channels=4)


def onnx_upscale(path: Path, lr_NCHW: np.ndarray) -> np.ndarray:
    sr_NCHW: np.ndarray = onnxruntime.InferenceSession(path).run(["sr"], {"lr": lr_NCHW})[0]
    return sr_NCHW


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{type(config).__name__}-x{config.scale}")
def test_any_size_gives_what_pytorch_gives(config: ModelConfig, tmp_path: Path) -> None:
    network = build_model(config, seed=3)
    for norm in (module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.running_mean)  # as fresh, BatchNorm would do nothing
        torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
    export_onnx(network, tmp_path / "model.onnx")
    network.eval()
    for shape in ((1, 3, 1, 1), (3, 3, 2, 31), (1, 3, 40, 23)):
        lr_NCHW = np.random.default_rng(0).random(shape, dtype=np.float32)
        sr_NCHW = onnx_upscale(tmp_path / "model.onnx", lr_NCHW)
        with torch.no_grad():
            expected_NCHW = network(torch.from_numpy(lr_NCHW)).numpy()
        assert sr_NCHW.shape == (shape[0], 3, config.scale * shape[2], config.scale * shape[3])
        assert np.abs(sr_NCHW - expected_NCHW).max() < 1e-5
    assert check_onnx(network, tmp_path / "model.onnx") < 1e-5


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    export_onnx(build_model(EDSR, seed=0), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    props = {prop.key: prop.value for prop in model.metadata_props}
    assert (props["architecture"], props["scale"]) == ("edsr", "2")
    assert EDSRConfig(**json.loads(props["config"])) == EDSR
    assert "[0, 1]" in props["input"] and "[0, 1]" in props["output"]


def test_exporting_leaves_no_trace(tmp_path: Path) -> None:
    network = build_model(SRResNetConfig(scale=2, num_blocks=1, num_channels=4), seed=0).to(torch.bfloat16)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(network, tmp_path / "model.onnx")
        check_onnx(network, tmp_path / "model.onnx")
    assert network.training and all(module.training for module in network.modules())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state())
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]  # noqa: NPY002


def test_another_networks_file_is_refused(tmp_path: Path) -> None:
    export_onnx(build_model(EDSR, seed=0), tmp_path / "model.onnx")
    network = build_model(EDSR, seed=0)
    assert check_onnx(network, tmp_path / "model.onnx") < 1e-5
    with torch.no_grad():
        network.tail.bias[0] += 1.0  # of 255
    with pytest.raises(ModelError, match=r"model\.onnx: differs .* by up to 0\.0039"):
        check_onnx(network, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="differs"):
        check_onnx(build_model(EDSRConfig(scale=3, num_blocks=1, num_channels=4)), tmp_path / "model.onnx")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = build_model(EDSR, seed=0)
    with torch.no_grad():
        network.tail.bias[0] = torch.nan
    export_onnx(network, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="nan"):
        check_onnx(network, tmp_path / "model.onnx")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    network = build_model(EDSR, seed=0)
    path = tmp_path / "model.onnx"
    with pytest.raises(ModelError, match="model.onnx: onnxruntime can't run it"):
        check_onnx(network, path)
    export_onnx(network, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="model.onnx: onnxruntime can't run it"):
        check_onnx(network, path)
