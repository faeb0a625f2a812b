"""The registered model's entry point: MLflow loads this file ("models from code") with a folder of weights beside it.

It needs this package, numpy, torch, safetensors and MLflow, nothing else of the project. It is logged with
`log_model(python_model=<this file>, artifacts={"model": <save_model's folder>}, code_paths=[<sr_models>])`.
"""

from pathlib import Path
from typing import Any

import mlflow.models
import numpy as np
import torch
from mlflow.pyfunc.model import PythonModel

from sr_models.errors import ModelError
from sr_models.inference import placed, upscale_image
from sr_models.weights import load_model


class UpscaleImages(PythonModel):
    """uint8 RGB N×H×W×3 → uint8 RGB N×sH×sW×3, on the GPU if there is one."""

    def load_context(self, context: Any) -> None:
        """Reads the weights once, when MLflow loads the model."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = placed(load_model(Path(context.artifacts["model"])), device)

    # `np.ndarray` is a hint that MLflow leaves alone; Any, or none, makes it warn at each load.
    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:  # noqa: ARG002
        """Upscales a batch of images of one size; ModelError if they are not as above.

        `params` may hold `tile_px_lr` and `self_ensemble`, see `upscale_image`.
        """
        images_NHWC = np.asarray(model_input)
        if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[3] != 3 or not images_NHWC.size:
            got = f"{images_NHWC.dtype} {images_NHWC.shape}"
            raise ModelError(f"the input must be uint8 of shape (number, height, width, 3), not {got}")
        options = params or {}
        return np.stack([upscale_image(self._model, lr_HWC, **options) for lr_HWC in images_NHWC])


mlflow.models.set_model(UpscaleImages())
