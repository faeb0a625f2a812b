"""What a network costs to run: parameters, arithmetic and time for one image of 1280×720."""

from dataclasses import dataclass

OUTPUT_PX = (720, 1280)
"""Height and width of the output that costs are quoted for, as in the papers since CARN (Ahn et al. 2018, section 4)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """Of one architecture with one config."""

    parameters: int
    """Trainable numbers."""
    flops: float
    """Floating-point operations for an output of 1280×720; the papers' Multi-Adds are half of them."""
    latency_s: float | None = None
    """Median seconds for such an output on the device that trains; None where it was not measured."""
