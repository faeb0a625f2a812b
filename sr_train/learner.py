"""What one optimiser step is: the networks of a method, their optimisers, and how batches change them.

The loop knows a method only by the `Learner` protocol. `PixelLearner` (one network, one pixel loss) serves EDSR and
every other network that is trained that way; an adversarial method is another Learner.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sr_train.collective import Collective
from sr_train.config import OptimConfig

State = dict[str, dict[str, torch.Tensor]]
Batch = tuple[torch.Tensor, torch.Tensor]

LOSSES = {"l1": nn.functional.l1_loss, "mse": nn.functional.mse_loss}
"""Pixel losses on RGB in [0, 1]; EDSR: L1 (Lim et al. 2017, section 4.2), SRCNN, VDSR, SRResNet: MSE."""


class NonFiniteLossError(ArithmeticError):
    """A loss or a gradient became infinite or NaN on some worker; raised on every worker, before the optimiser's
    step.
    """


class Learner(Protocol):
    """All tensors of a method. Every worker holds the same state after every step."""

    def step(self, batches: Sequence[Batch], *, learning_rate: float) -> dict[str, float]:
        """One optimiser step from this worker's micro-batches (lr_NCHW, hr_NCHW, float32 in [0, 1]); losses averaged
        over workers.

        Raises NonFiniteLossError, with the weights untouched.
        """
        ...

    def inference_network(self) -> nn.Module:
        """The network to validate and to register."""
        ...

    def state(self) -> State:
        """Everything that the next step depends on, by group."""
        ...

    def load_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Goes on from `state()` of a learner of the same configuration."""
        ...


class PixelLearner:
    """One network trained on one pixel loss with Adam (AdamW when weight decay is asked for)."""

    def __init__(
        self,
        network: nn.Module,
        config: OptimConfig,
        *,
        device: torch.device,
        precision: str,
        collective: Collective,
    ):
        self.network = network.to(device).train()
        self._config, self._device, self._collective = config, device, collective
        self._autocast = precision == "bf16"
        self._loss = LOSSES[config.loss]
        self._average = copy.deepcopy(self.network).eval() if config.ema_decay is not None else None
        self._optimizer = make_optimizer(self.network, config, device)
        self._parallel: nn.Module = self.network
        if collective.world_size > 1:
            # DDP regroups its buckets after the first backward pass, and with three and more workers the grouping
            # decides the order in which a ring all-reduce adds. Looking for unused parameters keeps the first grouping,
            # so that a resumed run adds in the same order as one that was never stopped. On CUDA sums are not
            # repeatable anyway, and the regrouped buckets overlap better.
            self._parallel = DistributedDataParallel(
                self.network,
                device_ids=[device] if device.type == "cuda" else None,
                find_unused_parameters=device.type == "cpu",
            )

    def step(self, batches: Sequence[Batch], *, learning_rate: float) -> dict[str, float]:
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._device)
        for index, (lr_NCHW, hr_NCHW) in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last or self._collective.world_size == 1 else self._parallel.no_sync():  # type: ignore[operator]
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
                    sr_NCHW = self._parallel(lr_NCHW)
                loss = self._loss(sr_NCHW.float(), hr_NCHW) / len(batches)
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        loss_value = float(self._collective.mean(total))
        norm = nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        grad_norm = float(norm)
        if not (torch.isfinite(norm) and abs(loss_value) < float("inf")):
            raise NonFiniteLossError(f"loss {loss_value}, gradient norm {grad_norm}, learning rate {learning_rate:.3g}")
        if self._config.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.network.parameters(), self._config.clip_grad_norm, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._update_average()
        return {"loss": loss_value, "grad_norm": grad_norm}

    @torch.no_grad()
    def _update_average(self) -> None:
        if self._average is None or self._config.ema_decay is None:
            return
        averaged, current = list(self._average.parameters()), list(self.network.parameters())
        torch._foreach_lerp_(averaged, current, 1 - self._config.ema_decay)  # type: ignore[arg-type]
        for target, source in zip(self._average.buffers(), self.network.buffers(), strict=True):
            target.copy_(source)

    def inference_network(self) -> nn.Module:
        return self.network if self._average is None else self._average

    def state(self) -> State:
        groups: State = {"model": dict(self.network.state_dict())}
        if self._average is not None:
            groups["ema"] = dict(self._average.state_dict())
        groups["optimizer"] = optimizer_tensors(self.network, self._optimizer)
        return groups

    def load_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self.network.load_state_dict(dict(state["model"]))
        if self._average is not None:
            self._average.load_state_dict(dict(state["ema"]))
        load_optimizer_tensors(self.network, self._optimizer, state.get("optimizer", {}))


def make_optimizer(network: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015), or AdamW (Loshchilov & Hutter 2019) when weight_decay > 0; the learning rate is set at
    every step.
    """
    kind = torch.optim.AdamW if config.weight_decay > 0 else torch.optim.Adam
    return kind(
        network.parameters(),
        lr=0.0,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=device.type == "cuda",
    )


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's tensors as PARAMETER/ENTRY: names, not positions, so that a reordered module can't mix them
    up.
    """
    return {
        f"{name}/{entry}": value
        for name, parameter in network.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """The inverse of `optimizer_tensors`; through load_state_dict, which moves each tensor to where its parameter
    is.
    """
    per_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        per_name.setdefault(name, {})[entry] = value
    names = [name for name, _ in network.named_parameters()]
    unknown = sorted(set(per_name) - set(names))
    if unknown:
        raise ValueError(f"optimiser state for parameters that the network does not have: {', '.join(unknown)}")
    saved = optimizer.state_dict()
    saved["state"] = {index: per_name[name] for index, name in enumerate(names) if name in per_name}
    optimizer.load_state_dict(saved)
