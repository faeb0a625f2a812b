"""A network as an ONNX file for any height and width, and the check that it computes what PyTorch does.

`onnx` and `onnxruntime` are imported by these functions only: a registered model carries this module and neither of
them.
"""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sr_models.architectures import architecture_name, config_to_dict
from sr_models.errors import ModelError
from sr_models.network import SRNetwork

ONNX_FILE = "model.onnx"
INPUT_NAME, OUTPUT_NAME = "lr", "sr"
OPSET = 17
"""Of 2022: TensorRT 8.5, OpenVINO 2022.3 and onnxruntime 1.12 read it, and these networks need nothing newer."""
MAX_DIFFERENCE = 1e-4
"""Of an output in [0, 1]; 1/39 of a level of 8 bits. Measured: 2·10⁻⁷, which is rounding."""
_TRACED_PX = (8, 11)


def export_onnx(network: SRNetwork, path: Path) -> None:
    """Writes the network as ONNX in float32, for batches and images of any size.

    Input `lr` is float32 N×3×H×W RGB in [0, 1], output `sr` float32 N×3×sH×sW, not clamped. The file's metadata say so
    and hold architecture, config (JSON), scale, and how far the network sees (`receptive_radius_px_lr`, for whoever
    cuts large images into tiles). The network stays as it is: device, dtype, training mode.

    ModelError if it has an operation that ONNX, or the exporter, does not know.
    """
    import onnx

    exported = copy.deepcopy(network).to("cpu", torch.float32).eval()
    with _older_exporter(), _as_model_error(f"{type(network).__name__} can't be written as ONNX"):
        torch.onnx.export(
            exported,
            (torch.zeros(1, 3, *_TRACED_PX),),
            path,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_axes={
                INPUT_NAME: {0: "batch", 2: "height", 3: "width"},
                OUTPUT_NAME: {0: "batch", 2: "sr_height", 3: "sr_width"},
            },
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_model(path)
    onnx.helper.set_model_props(model, _metadata(network))
    onnx.checker.check_model(model)
    onnx.save_model(model, path)


def check_onnx(network: SRNetwork, path: Path) -> float:
    """The largest difference between onnxruntime on the CPU and the network on random images of several sizes: odd
    ones, a batch, and some that are smaller than what the network can see.

    In outputs of which [0, 1] is the visible range. ModelError names the file and the difference if that is above
    `MAX_DIFFERENCE` (of the largest output, where one exceeds 1) or if the file can't be run.
    """
    import onnxruntime  # type: ignore[import-untyped]
    from onnxruntime.capi import onnxruntime_pybind11_state as ort  # type: ignore[import-untyped]

    refusals = (ort.Fail, ort.InvalidArgument, ort.InvalidGraph, ort.InvalidProtobuf, ort.NoSuchFile,
                ort.NotImplemented, ort.RuntimeException, ValueError)  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # on machines without a GPU it warns that it found none
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # training may need the cores
    expected_of = copy.deepcopy(network).to("cpu", torch.float32).eval()
    worst, worst_shape = 0.0, ""
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for lr_NCHW in _images(network.receptive_radius_px_lr):
            with torch.inference_mode():
                expected_NCHW = expected_of(torch.from_numpy(lr_NCHW)).numpy()
            sr_NCHW = session.run([OUTPUT_NAME], {INPUT_NAME: lr_NCHW})[0]
            difference = _difference(sr_NCHW, expected_NCHW)
            if not difference <= worst:  # also one that is not a number
                worst, worst_shape = difference, " × ".join(map(str, lr_NCHW.shape))
    except refusals as error:
        raise ModelError(f"{path}: onnxruntime can't run it: {error}") from error
    if not worst <= MAX_DIFFERENCE:
        raise ModelError(
            f"{path}: differs from the network by up to {worst:.3g} (input {worst_shape}); "
            f"{MAX_DIFFERENCE:g} of the largest output, or of 1, is allowed"
        )
    return worst


def _metadata(network: SRNetwork) -> dict[str, str]:
    return {
        "architecture": architecture_name(network.config),
        "config": json.dumps(config_to_dict(network.config)),
        "scale": str(network.config.scale),
        "receptive_radius_px_lr": str(network.receptive_radius_px_lr),
        "input": f"{INPUT_NAME}: float32, batch × 3 × height × width, RGB in [0, 1], any size",
        "output": f"{OUTPUT_NAME}: float32, batch × 3 × {network.config.scale}·height × {network.config.scale}·width, "
        "RGB in [0, 1] but not clamped: clamp, multiply by 255 and round for 8 bits",
    }


@contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:  # of which the exporter's own are
        raise ModelError(f"{what}: {error}") from error


@contextmanager
def _older_exporter() -> Iterator[None]:
    """Silence what PyTorch says of its older exporter, which is used on purpose: see docs/decisions/0012."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.onnx|sr_models\.onnx_export")
        warnings.filterwarnings("ignore", message=".*legacy TorchScript-based ONNX export.*")
        yield


def _images(radius_px_lr: int) -> Iterator[NDArray[np.float32]]:
    """float32 N×3×H×W in [0, 1]; no size is the traced one."""
    rng = np.random.default_rng(0)
    for num_images, height, width in ((1, 1, 1), (2, 5, 3), (1, 2 * radius_px_lr + 3, 4)):
        yield rng.random((num_images, 3, height, width), dtype=np.float32)


def _difference(sr_NCHW: NDArray[np.float32], expected_NCHW: NDArray[np.float32]) -> float:
    """Infinite if the shapes differ; relative to the largest output where one exceeds 1."""
    if sr_NCHW.shape != expected_NCHW.shape:
        return float("inf")
    return float(np.abs(sr_NCHW - expected_NCHW).max() / max(1.0, float(np.abs(expected_NCHW).max())))
