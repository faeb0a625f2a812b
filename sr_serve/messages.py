"""What the HTTP side and the model's replicas tell each other: plain values, no PyTorch, no Ray."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Which model answers."""

    model: str
    """MODEL as it was given: `models:/edsr-x4@champion`, a checkpoint, a folder."""
    name: str
    """Of the registered model; of the file or folder where it is none."""
    version: str | None
    """Of the registered model; None where it is none."""
    scale: int
    """Upscaling factor."""
    architecture: str
    num_parameters: int
    weights: str
    """16 hex digits over config and weights: the registered version's tag `weights_sha256`."""

    def label(self) -> str:
        """For a line of a log."""
        return self.model if self.version is None else f"{self.name} version {self.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What is asked for an uploaded image, which has been looked at."""

    format: str
    """In which format the result is written: PNG, JPEG or WEBP."""
    tile_px_lr: int
    """Largest tile, in LR pixels."""
    self_ensemble: bool
    """Average over the eight flips and quarter turns."""
    timeout_s: float
    """For how long the result is waited for; nothing is computed for it after that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Upscaled:
    """An answer."""

    data: bytes
    """The image file."""
    format: str
    """PNG, JPEG or WEBP."""
    lr_size_px: tuple[int, int]
    """Width and height of what came in, upright."""
    sr_size_px: tuple[int, int]
    """Width and height of what goes out."""
    facts: ModelFacts
    """The version that did it."""
    num_together: int
    """How many images went through the network together with it, itself included."""
    elapsed_s: float
    """From the replica's taking it to the finished file, waiting included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why there is no image."""

    status: int
    """Of HTTP."""
    code: str
    """One word for programs: `too_large`, `damaged`, …"""
    message: str
    """One sentence for people: what was got, what is allowed."""


def not_ready(timeout_s: float) -> Refusal:
    """What is said when `timeout_s` are over."""
    message = f"the image was not ready within {timeout_s:g} s; a smaller one will be"
    return Refusal(status=504, code="timeout", message=message)


class RefusedError(Exception):
    """Raised where an upload is turned down; carries a `Refusal`."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(status=status, code=code, message=message)
