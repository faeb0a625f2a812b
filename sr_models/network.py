"""What every network and config of this package has in common."""

from typing import Protocol

from torch import Tensor, nn


class ModelConfig(Protocol):
    """A frozen dataclass of plain values (int, float, bool, str) that a network class takes as its only argument."""

    @property
    def scale(self) -> int:
        """Upscaling factor."""


class SRNetwork(nn.Module):
    """A network that enlarges images: RGB N×3×H×W in [0, 1] → RGB N×3×sH×sW, not clamped."""

    config: ModelConfig
    """What the network was built from."""

    upsampler_prefixes: tuple[str, ...] = ()
    """Weights whose names or shapes depend on the scale; all others can be taken over from another scale's network."""

    @property
    def receptive_radius_px_lr(self) -> int:
        """No LR pixel farther away than this, along either axis, changes a pixel's SR pixels."""
        raise NotImplementedError

    def forward(self, lr_NCHW: Tensor) -> Tensor:
        """RGB N×3×H×W in [0, 1] → RGB N×3×sH×sW, not clamped."""
        raise NotImplementedError
