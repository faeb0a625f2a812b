"""The options of upscaling images, checked. Without PyTorch, so that `--help` and a mistyped flag take no seconds."""

from dataclasses import dataclass
from typing import Literal

from sr_models.image_file import MAX_MPX
from sr_serve.upscale_plan import UpscaleError


@dataclass(frozen=True, kw_only=True, slots=True)
class UpscaleOptions:
    """How images are upscaled."""

    format: Literal["same", "png", "jpeg", "webp"] = "same"
    """What is written; same: the source's own, and PNG for what is none of these."""
    tile_px_lr: int = 192
    """Largest tile, in LR pixels: bounds the memory, does not change the result."""
    self_ensemble: bool = False
    """Average over the eight flips and quarter turns: a little better, eight times slower."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What convolutions compute in."""
    max_mpx: float = MAX_MPX
    """Largest image that is read, in 10⁶ pixels."""
    device: str = "auto"
    """auto (GPUs if there are any), cpu or cuda; cuda:N for what runs in this process."""
    num_actors: int | None = None
    """Ray actors that share the images of a folder; as many as the cluster can hold when not given; 0: this process,
    without Ray."""
    gpus_per_actor: float = 1.0
    """Of Ray's GPUs; 0.5 puts two actors on each."""
    cpus_per_actor: float | None = None
    """Of Ray's CPUs, and PyTorch's threads; when not given one, or up to four beside a GPU."""
    overwrite: bool = False
    """Make everything anew, also what is finished or was made with another model."""
    dry_run: bool = False
    """Check everything, say what would be done, write nothing."""
    tracking_uri: str | None = None
    """Where models:/… are; MLFLOW_TRACKING_URI when not given."""

    def __post_init__(self) -> None:
        checks = [
            ("tile-px-lr", self.tile_px_lr >= 1, "at least 1"),
            ("max-mpx", self.max_mpx > 0, "more than 0"),
            ("num-actors", self.num_actors is None or self.num_actors >= 0, "0 or more"),
            ("cpus-per-actor", self.cpus_per_actor is None or self.cpus_per_actor > 0, "more than 0"),
            (
                "gpus-per-actor",
                0 < self.gpus_per_actor <= 1 or (self.gpus_per_actor > 0 and self.gpus_per_actor.is_integer()),
                "a part of one GPU, or a whole number",
            ),
        ]
        for flag, is_right, allowed in checks:
            if not is_right:
                raise UpscaleError(f"--{flag} {getattr(self, flag.replace('-', '_'))}: must be {allowed}")
