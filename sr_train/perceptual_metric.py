"""LPIPS, the perceptual metric beside PSNR and SSIM, or the reason why it can't be had here.

Zhang, Isola, Efros, Shechtman, Wang: "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR
2018 (https://arxiv.org/abs/1801.03924), as torchmetrics computes it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sr_train.metrics import MetricError
from sr_train.perceptual_weights import IMAGENET, NONE, PerceptualWeights, PerceptualWeightsError, load_alexnet_weights

# The least that AlexNet's strides and poolings leave a pixel of: (31 + 4 - 11) // 4 + 1 = 7, then 3, then 1.
SMALLEST_SIDE_PX = 31

Image = Tensor | NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unavailable:
    """There is no LPIPS in this run."""

    reason: str
    """One line, with what to do about it."""


class LpipsMetric:
    """LPIPS on AlexNet's features with the authors' linear layers, version 0.1. Lower is better; 0 is identical.

    The whole image is compared, in RGB, no border cut off. Picklable.
    """

    def __init__(self, weights: PerceptualWeights, *, device: torch.device | str = "cpu"):
        """`weights` are those of `load_alexnet_weights`."""
        # The public class always downloads AlexNet; this is what it wraps. Imported here: it takes seconds.
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        with torch.random.fork_rng(devices=[]):  # AlexNet is made with random weights first
            self._network = _NoTrainLpips(net="alex", pnet_rand=True)
        backbone = self._network.net
        # There `features.N` is `sliceK.N`.
        backbone.load_state_dict(
            {key: weights.state[f"features.{key.partition('.')[2]}"] for key in backbone.state_dict()}
        )
        self.protocol = "lpips@alex,v0.1"
        """What the numbers may be compared under; other weights than torchvision's are part of it."""
        if not weights.is_official:
            self.protocol += f",weights={(weights.sha256 or weights.description)[:8]}"
        self.to(device)

    def to(self, device: torch.device | str) -> "LpipsMetric":
        """Moves the network; images are brought to where it is."""
        self._network.to(device)
        return self

    def distance(self, sr_HWC: Image, hr_HWC: Image) -> Tensor:
        """LPIPS of two uint8 RGB H×W×3 images of one size, sides from 31 px; a float32 scalar on the metric's device.

        MetricError if they are not that.
        """
        for label, image_HWC in (("SR", sr_HWC), ("HR", hr_HWC)):
            if image_HWC.dtype not in (torch.uint8, np.uint8) or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
                found = f"{image_HWC.dtype} {tuple(image_HWC.shape)}"
                raise MetricError(f"LPIPS: the {label} image is {found}, not uint8 RGB (H, W, 3)")
        if sr_HWC.shape != hr_HWC.shape:
            raise MetricError(f"LPIPS: SR is {tuple(sr_HWC.shape)}, HR {tuple(hr_HWC.shape)}; they must be equal")
        if min(hr_HWC.shape[:2]) < SMALLEST_SIDE_PX:
            raise MetricError(f"LPIPS: {tuple(hr_HWC.shape)} is too small: sides from {SMALLEST_SIDE_PX} px")
        device = next(self._network.parameters()).device
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            first_NCHW, second_NCHW = (_to_unit_NCHW(image_HWC, device) for image_HWC in (sr_HWC, hr_HWC))
            distance: Tensor = self._network(first_NCHW, second_NCHW, normalize=True)
            return distance.reshape(())

    def score(self, sr_HWC: Image, hr_HWC: Image) -> float:
        """`distance` as a number; waits for the device."""
        return float(self.distance(sr_HWC, hr_HWC))


def open_lpips(source: str = IMAGENET, *, device: torch.device | str = "cpu") -> LpipsMetric | Unavailable:
    """LPIPS with AlexNet's weights from torchvision (`imagenet`), or from a file (path or s3://bucket/key); `none` asks
    for none.

    Where they can't be had, the reason, within seconds; never an error.
    """
    if source == NONE:
        return Unavailable(reason="not asked for (--perceptual.lpips-weights none)")
    try:
        return LpipsMetric(load_alexnet_weights(source), device=device)
    except PerceptualWeightsError as error:
        return Unavailable(reason=" ".join(str(error).split()))


def _to_unit_NCHW(image_HWC: Image, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(image_HWC)) if isinstance(image_HWC, np.ndarray) else image_HWC
    return tensor.to(device).permute(2, 0, 1).unsqueeze(0).to(torch.float32) / 255
