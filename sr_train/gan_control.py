"""What a watchdog may turn while a GAN trains, and what it has to remember: a part of the learner's state."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Self

import torch
from torch import Tensor

from sr_train.checkpoint import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Control:
    """In each checkpoint, so that a run that was resumed after a recovery goes on as gently as before."""

    learning_rate_factor: float = 1.0
    """On the schedule's learning rate, for both networks."""
    discriminator_pause_steps_left: int = 0
    """For so many steps the discriminator does not learn."""
    num_recoveries: int = 0
    psnr_at_start_db: float = float("nan")
    """Validation's PSNR when adversarial training began; NaN while that is not known."""
    num_steps: int = 0
    """Taken with the networks' present state; 0 means that the optimisers hold nothing yet."""

    def to_tensors(self) -> dict[str, Tensor]:
        """Scalars: int64 for counts, float64 for the rest."""
        return {
            name: torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `to_tensors`; CheckpointError for a value that is not there."""
        missing = [field.name for field in fields(cls) if field.name not in tensors]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks control/{', control/'.join(missing)}: another version wrote it"
            )
        return cls(
            learning_rate_factor=float(tensors["learning_rate_factor"]),
            discriminator_pause_steps_left=int(tensors["discriminator_pause_steps_left"]),
            num_recoveries=int(tensors["num_recoveries"]),
            psnr_at_start_db=float(tensors["psnr_at_start_db"]),
            num_steps=int(tensors["num_steps"]),
        )
