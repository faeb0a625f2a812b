"""What a network costs to run: parameters, arithmetic and time for one image of 1280×720."""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from sr_models.architectures import macs_per_lr_pixel, num_parameters
from sr_models.errors import ModelError
from sr_models.inference import placed, upscale_tensor
from sr_models.network import ModelConfig, SRNetwork

OUTPUT_PX = (720, 1280)
"""Height and width of the output that costs are quoted for, as in papers since CARN (Ahn et al. 2018, section 4)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """Of one architecture with one config."""

    parameters: int
    """Trainable numbers."""
    flops: float
    """Floating-point operations for an output of 1280×720; the papers' Multi-Adds are half of them."""
    latency_s: float | None = None
    """Median seconds for such an output on the device that trains; None where it was not measured."""


def input_px_lr(scale: int) -> tuple[int, int]:
    """Height and width of the smallest LR image whose upscaled image holds 1280×720: x3 makes 1281×720 of 427×240."""
    height_px, width_px = OUTPUT_PX
    return -(-height_px // scale), -(-width_px // scale)


def model_cost(config: ModelConfig) -> ModelCost:
    """Parameters and FLOPs of the network that a config describes, without its latency.

    FLOPs are those of one forward pass over an LR image of `input_px_lr`: two for each multiply-add of a convolution;
    biases, activations, normalisation and additions are not counted. PyTorch's FlopCounterMode counts the same, but
    loads the compiler for it, which takes seconds. Nothing is computed and no memory taken, whatever the size.
    ModelError if the config is of no known architecture.
    """
    height_px_lr, width_px_lr = input_px_lr(config.scale)
    multiply_adds = macs_per_lr_pixel(config) * height_px_lr * width_px_lr
    return ModelCost(parameters=num_parameters(config), flops=2.0 * multiply_adds)


def latency_s(network: SRNetwork, device: torch.device, *, rounds: int = 5) -> float:
    """Median seconds to upscale one image to 1280×720 on a device, over `rounds` (1 or more) after one warm-up.

    The image is random uint8 RGB of `input_px_lr` in host memory, and goes through `upscale_tensor` as one tile: its
    way to the device is part of the time, the result's way back is not. The network is moved to the device, in place;
    its dtype stays. ModelError if `rounds` is less than 1.
    """
    if rounds < 1:
        raise ModelError(f"rounds={rounds} must be at least 1")
    height_px_lr, width_px_lr = input_px_lr(network.config.scale)
    lr_HWC = np.random.default_rng(0).integers(0, 256, (height_px_lr, width_px_lr, 3), dtype=np.uint8)
    network = placed(network, device)
    times_s = []
    for _ in range(1 + rounds):
        _wait_for(device)
        start_s = time.perf_counter()
        upscale_tensor(network, lr_HWC, tile_px_lr=max(height_px_lr, width_px_lr))
        _wait_for(device)
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
