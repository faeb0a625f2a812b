"""From gradients to weights without waiting for the device: guard, clip, Adam, moving average."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from sr_train.options import OptimConfig


class FiniteGuard:
    """Whether every gradient so far was finite: a flag on the device, shared by all networks of a method.

    Once it is down, no `Updater` changes a weight any more, so the weights are those before the bad step whenever the
    host gets to know of it.
    """

    def __init__(self, device: torch.device):
        self.tripped = torch.zeros((), device=device)
        """0.0 or 1.0."""
        self._good_steps = torch.zeros((), device=device)

    def check(self, value: torch.Tensor) -> None:
        """Trips on infinity and NaN."""
        self.tripped.copy_(torch.maximum(self.tripped, 1.0 - value.isfinite().to(self.tripped.dtype)))

    def end_step(self) -> None:
        """Counts the step if nothing was wrong with it."""
        self._good_steps += 1.0 - self.tripped

    def read(self) -> int | None:
        """Good steps before the bad one, since the last read; None if all were good. Waits for the device."""
        tripped, good_steps = torch.stack([self.tripped, self._good_steps]).tolist()
        self._good_steps.zero_()
        return int(good_steps) if tripped else None

    def reset(self) -> None:
        """After the weights were replaced by good ones."""
        self.tripped.zero_()
        self._good_steps.zero_()


def backward(loss: torch.Tensor) -> None:
    """Backpropagates; a loss that is not finite makes all its gradients NaN.

    L1's gradient of an infinite error is a finite 1: without this the guard would not see it. And NaN spreads to all
    workers with the gradients' all-reduce, so that all of them stop at the same step.
    """
    torch.autograd.backward([loss], [torch.where(loss.detach().isfinite(), 1.0, float("nan")).to(loss.dtype)])


class Updater:
    """One network's optimiser: Adam (Kingma & Ba 2015), or AdamW (Loshchilov & Hutter 2019) when weight_decay > 0."""

    def __init__(
        self,
        network: nn.Module,
        config: OptimConfig,
        *,
        device: torch.device,
        fused: bool,
        guard: FiniteGuard,
        ema_decay: float | None = None,
    ):
        """`ema_decay` overrides nothing: a network that needs no moving average (a discriminator) gives None."""
        self.network = network
        self._config, self._fused, self._guard, self._ema_decay = config, fused, guard, ema_decay
        self.average = copy.deepcopy(network).eval().requires_grad_(False) if ema_decay is not None else None
        # A tensor: a captured CUDA graph reads it anew at every replay, a number would be frozen into it.
        self._learning_rate = torch.zeros((), device=device)
        kind = torch.optim.AdamW if config.weight_decay > 0 else torch.optim.Adam
        self._optimizer = kind(
            network.parameters(),
            lr=self._learning_rate if fused else 0.0,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=fused,
            capturable=fused and device.type == "cuda",
        )

    def set_learning_rate(self, learning_rate: float) -> None:
        """For the next `step`; outside of what is captured in a CUDA graph."""
        if self._fused:
            self._learning_rate.fill_(learning_rate)
        else:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def step(self) -> torch.Tensor:
        """Applies the gradients unless the guard is down; returns their total L2 norm before clipping (a scalar)."""
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self._guard.check(norm)
        if self._fused:
            # What torch.amp.GradScaler sets: the kernel divides gradients by the one and does nothing if the other is
            # 1.
            limit = self._config.clip_grad_norm
            scale = None if limit is None else ((norm + 1e-6) / limit).clamp(min=1.0)
            self._optimizer.grad_scale = scale  # type: ignore[attr-defined]
            self._optimizer.found_inf = self._guard.tripped  # type: ignore[attr-defined]
            self._optimizer.step()
        elif not self._guard.tripped:
            if self._config.clip_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(self.network.parameters(), self._config.clip_grad_norm, norm)
            self._optimizer.step()
        self._update_average()
        return norm

    @torch.no_grad()
    def _update_average(self) -> None:
        """average += (1 - decay)(network - average), for weights and for BatchNorm's statistics, which belong to them.

        The decay begins at 2/11 and rises to `ema_decay` (after n steps (1 + n)/(10 + n), as TensorFlow's
        ExponentialMovingAverage with num_updates): otherwise the initial weights would be in it for thousands of steps.
        """
        if self.average is None or self._ema_decay is None or not self._optimizer.state:
            return
        num_steps = next(iter(self._optimizer.state.values()))["step"].to(self._guard.tripped.device)
        decay = ((1.0 + num_steps) / (10.0 + num_steps)).clamp(max=self._ema_decay)
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        pairs += zip(self.average.parameters(), self.network.parameters(), strict=True)
        for target, source in zip(self.average.buffers(), self.network.buffers(), strict=True):
            if source.is_floating_point():
                pairs.append((target, source))
            else:
                target.copy_(source)
        averaged = [target for target, _ in pairs]
        differences = list(torch._foreach_sub([source for _, source in pairs], averaged))
        torch._foreach_mul_(differences, (1.0 - self._guard.tripped) * (1.0 - decay))
        torch._foreach_add_(averaged, differences)

    def state(self) -> dict[str, torch.Tensor]:
        """The optimiser's tensors as PARAMETER/ENTRY: names, not positions, so that a reordered module can't mix them
        up.
        """
        return {
            f"{name}/{entry}": value
            for name, parameter in self.network.named_parameters()
            for entry, value in self._optimizer.state.get(parameter, {}).items()
        }

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `state`. ValueError for parameters that the network does not have."""
        parameters = dict(self.network.named_parameters())
        per_name: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            name, _, entry = key.rpartition("/")
            per_name.setdefault(name, {})[entry] = value
        unknown = sorted(set(per_name) - set(parameters))
        if unknown:
            raise ValueError(f"optimiser state for parameters that the network does not have: {', '.join(unknown)}")
        saved = self._optimizer.state_dict()
        saved["state"] = {
            index: {entry: _laid_out_as(parameter, value) for entry, value in per_name[name].items()}
            for index, (name, parameter) in enumerate(parameters.items())
            if name in per_name
        }
        self._optimizer.load_state_dict(saved)
        if self._fused:
            for group in self._optimizer.param_groups:
                group["lr"] = self._learning_rate


def _laid_out_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A copy with the parameter's strides: a fused kernel walks both with one index, and files hold plain order."""
    if value.shape != parameter.shape:
        return value.clone()
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
