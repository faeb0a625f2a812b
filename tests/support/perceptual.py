"""Files of perceptual networks with random weights: the real loading, without a download."""

from __future__ import annotations

from pathlib import Path


def save_random_features(name: str, folder: Path) -> Path:
    """A torchvision network's convolutions, named as torchvision names them, in FOLDER/NAME.safetensors."""
    # Here: settings of the environment that PyTorch reads once are not made yet when this module is imported.
    from safetensors.torch import save_file
    from torchvision import models

    path = folder / f"{name}.safetensors"
    features = models.get_model(name, weights=None).features
    save_file({f"features.{key}": tensor.contiguous() for key, tensor in features.state_dict().items()}, path)
    return path
