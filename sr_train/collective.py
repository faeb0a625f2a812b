"""What the workers of a run say to each other; alone, a worker talks to itself."""

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Collective:
    """A worker's place among the workers of the default process group."""

    rank: int = 0
    world_size: int = 1
    weight: float = 1.0
    """What this worker's mean over its samples counts in a mean over the workers, so that every sample counts alike;
    the workers' mean of it is 1, and it is 1 where all have equally many."""

    @classmethod
    def of_process_group(cls) -> "Collective":
        """The default process group if there is one, else a group of one."""
        if dist.is_available() and dist.is_initialized():
            return cls(rank=dist.get_rank(), world_size=dist.get_world_size())
        return cls()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the workers, elementwise; one worker's NaN reaches all of them."""
        if self.world_size > 1:
            values = values.detach().clone()
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def gather(self, value: T) -> list[T]:
        """Every worker's value, in rank order, on every worker."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def first(self, value: T) -> T:
        """Rank 0's value on every worker."""
        if self.world_size == 1:
            return value
        values: list[T] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]
