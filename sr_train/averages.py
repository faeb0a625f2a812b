"""Sums of a step's values that stay on the device until someone asks."""

from collections.abc import Mapping, Sequence

import torch

from sr_train.collective import Collective


class Averages:
    """Averages over steps and workers. Adding costs the host no wait; reading waits for the device once."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self._names = tuple(names)
        self._sums = torch.zeros(
            len(self._names) + 1, dtype=torch.float64 if device.type == "cpu" else None, device=device
        )

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """One step's values: a scalar tensor for every name."""
        parts = [values[name].detach().to(self._sums.dtype).reshape(()) for name in self._names]
        self._sums += torch.stack([*parts, torch.ones_like(self._sums[0])])

    def read(self, collective: Collective) -> dict[str, float]:
        """Averages since the last read, over all workers' steps; all workers must call it together. NaN for none."""
        *sums, num_steps = collective.mean(self._sums).tolist()
        self._sums.zero_()
        return {
            name: total / num_steps if num_steps else float("nan")
            for name, total in zip(self._names, sums, strict=True)
        }
