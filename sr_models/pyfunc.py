"""The registered model's entry point: MLflow loads this file ("models from code") with a folder of weights beside it.

It needs this package and its libraries (numpy, torch, safetensors, Pillow, OpenCV, MLflow), nothing else of the
project. It is logged with `log_model(python_model=<this file>, artifacts={"model": <save_model's folder>},
code_paths=[<sr_models>])`.
"""

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel

from sr_models.errors import ImageFileError, ModelError
from sr_models.image_file import FORMATS, MAX_MPX
from sr_models.inference import placed, upscale_batch
from sr_models.upscaling import PREDICT_DEFAULTS, precision, upscale_file
from sr_models.weights import load_model

LIMIT_VARIABLE = "SR_MAX_MPX"
"""Environment variable: the most that a caller may set `max_mpx` to, in megapixels."""
COLUMN = "image"
"""Of a table: encoded files, as bytes or base64 text."""
ALLOWED = (
    "images are uint8 or uint16 arrays of shape (number, height, width, 3) or (height, width, 3), encoded files "
    f"(bytes), base64 text of encoded files, lists of these, or a table with such a column {COLUMN!r}"
)


class UpscaleImages(PythonModel):
    """Images in, larger images of the same kind out; on the GPU if there is one."""

    def load_context(self, context: Any) -> None:
        """Reads the weights once, when MLflow loads the model."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = placed(load_model(Path(context.artifacts["model"])), device)

    # `Any` would make MLflow warn at each load that it can't check it; `np.ndarray` is a hint that it leaves alone.
    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> Any:  # noqa: ARG002
        """Upscales what `ALLOWED` lists; what comes out is of the kind that went in: array, bytes, text, list, table.

        An array of images gives an array (N, sH, sW, 3) or (sH, sW, 3) of its dtype. A file's grey, alpha, 16 bits,
        EXIF and colour profile are kept. `params` as in `PREDICT_DEFAULTS`.

        MlflowException, which a server answers with status 400, says what is wrong with which image or parameter.
        """
        try:
            return self._upscaled(model_input, _options(params or {}))
        except (ModelError, ImageFileError) as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _upscaled(self, images: Any, options: dict[str, Any]) -> Any:
        if hasattr(images, "columns"):  # a pandas DataFrame, which MLflow makes of JSON records and of CSV
            if list(images.columns) != [COLUMN]:
                raise ModelError(f"a table must have one column, {COLUMN!r}, not {list(images.columns)}")
            return images.assign(**{COLUMN: self._files(list(images[COLUMN]), options)})
        if isinstance(images, bytes | str):
            return self._files([images], options)[0]
        if isinstance(images, np.ndarray) and images.dtype.kind in "OSU":  # JSON's lists of text become arrays
            return self._files(images.ravel().tolist(), options)
        if isinstance(images, list | tuple) and images and isinstance(images[0], bytes | str):
            return self._files(images, options)
        if isinstance(images, list | tuple):
            return [self._array(image, f"image {index}", options) for index, image in enumerate(images)]
        return self._array(images, "the input", options)

    def _files(self, files: Sequence[bytes | str], options: dict[str, Any]) -> list[bytes | str]:
        return [self._file(file, f"image {index}", options) for index, file in enumerate(files)]

    def _file(self, file: bytes | str, name: str, options: dict[str, Any]) -> bytes | str:
        upscaled = upscale_file(self._model, _decoded(file, name), name=name, **options)
        return upscaled if isinstance(file, bytes) else base64.b64encode(upscaled).decode("ascii")

    def _array(self, images: Any, name: str, options: dict[str, Any]) -> np.ndarray:
        try:
            levels = _as_levels(np.asarray(images), name)
        except ValueError as error:  # lists of different lengths
            raise ModelError(f"{name}: {error}; {ALLOWED}") from error
        if levels.dtype not in (np.uint8, np.uint16) or levels.ndim not in (3, 4) or levels.shape[-1] != 3:
            raise ModelError(f"{name} is {levels.dtype} {levels.shape}; {ALLOWED}")
        if not levels.size:
            raise ModelError(f"{name} has no pixels: {levels.shape}")
        batch = levels if levels.ndim == 4 else levels[None]
        options = {key: value for key, value in options.items() if key not in ("format", "max_mpx")}
        larger = np.concatenate([upscale_batch(self._model, image[None], **options).cpu().numpy() for image in batch])
        return larger if levels.ndim == 4 else larger[0]


def _options(params: dict[str, Any]) -> dict[str, Any]:
    """`upscale_file`'s options; ModelError names a parameter that is not as it must be."""
    if unknown := params.keys() - PREDICT_DEFAULTS.keys():
        raise ModelError(f"unknown parameters {sorted(unknown)}; there are {', '.join(PREDICT_DEFAULTS)}")
    values = PREDICT_DEFAULTS | params
    wanted = str(values["format"]).upper().replace("JPG", "JPEG")
    if wanted not in ("SAME", *FORMATS):
        raise ModelError(f"format={values['format']!r} is not one of same, {', '.join(FORMATS).lower()}")
    limit = float(os.environ.get(LIMIT_VARIABLE) or MAX_MPX)
    max_mpx = float(values["max_mpx"])
    if not 0.0 < max_mpx <= limit:
        raise ModelError(f"max_mpx={max_mpx:g} must be above 0 and at most {limit:g}, which {LIMIT_VARIABLE} sets")
    return {
        "tile_px_lr": int(values["tile_px_lr"]),
        "self_ensemble": bool(values["self_ensemble"]),
        "autocast": precision(str(values["precision"])),
        "format": None if wanted == "SAME" else wanted,
        "max_mpx": max_mpx,
    }


def _decoded(file: bytes | str, name: str) -> bytes:
    if isinstance(file, bytes):
        return file
    if not isinstance(file, str):
        raise ModelError(f"{name}: {ALLOWED}; not {type(file).__name__}")
    try:
        # Browsers put `data:image/png;base64,` in front.
        return base64.b64decode(file.rpartition(",")[2], validate=True)
    except ValueError as error:  # binascii.Error is one; text that is not ASCII another
        raise ModelError(f"{name}: is text, but not base64 of an image file ({error})") from error


def _as_levels(images: np.ndarray, name: str) -> np.ndarray:
    """uint8 and uint16 as they are; other whole numbers, which is what JSON's become, if they are levels of 8 bits."""
    if images.dtype in (np.uint8, np.uint16) or images.dtype.kind not in "iu" or not images.size:
        return images
    if images.min() < 0 or images.max() > 255:
        raise ModelError(f"{name}: levels must be 0 to 255, or uint16; these are {images.min()} to {images.max()}")
    return images.astype(np.uint8)


mlflow.models.set_model(UpscaleImages())
