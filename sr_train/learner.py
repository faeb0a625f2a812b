"""What one optimiser step is: the networks of a method, their optimisers, and how batches change them.

The loop knows a method only by the `Learner` protocol. `PixelLearner` (one network, one pixel loss) serves EDSR and
every other network that is trained that way; an adversarial method is another Learner.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import nn

from sr_train.averages import Averages
from sr_train.collective import Collective
from sr_train.graphed_step import Batch, GraphedStep
from sr_train.optimizer import FiniteGuard, Updater, backward
from sr_train.options import OptimConfig
from sr_train.parallel_network import CompileFallback, ParallelNetwork
from sr_train.step_mode import StepMode

State = dict[str, dict[str, torch.Tensor]]

LOSSES = {"l1": nn.functional.l1_loss, "mse": nn.functional.mse_loss}
"""Pixel losses on RGB in [0, 1]; EDSR: L1 (Lim et al. 2017, section 4.2), SRCNN, VDSR, SRResNet: MSE."""


class NonFiniteLossError(ArithmeticError):
    """A loss or a gradient became infinite or NaN on some worker; raised on every worker. The weights are those before
    that step.
    """


class Learner(Protocol):
    """All tensors of a method. Every worker holds the same state after every step."""

    def step(self, batches: Sequence[Batch], *, learning_rate: float) -> None:
        """One optimiser step from this worker's micro-batches (lr_NCHW, hr_NCHW), float32 in [0, 1]. Doesn't wait for a
        GPU.
        """
        ...

    def report(self) -> dict[str, float]:
        """Losses and the like, averaged over workers and the steps since the last report; waits for the GPU.

        All workers call it after the same step. Raises NonFiniteLossError if one of those steps was bad: from that step
        on no weight has changed.
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
    """One network trained on one pixel loss."""

    def __init__(
        self,
        network: nn.Module,
        config: OptimConfig,
        *,
        device: torch.device,
        mode: StepMode,
        collective: Collective,
    ):
        self._collective = collective
        self._loss = LOSSES[config.loss]
        self._parallel = ParallelNetwork(network, mode=mode, device=device, collective=collective)
        self.network = self._parallel.network
        self._guard = FiniteGuard(device)
        self._updater = Updater(
            self.network,
            config,
            device=device,
            fused=mode.fused_optimizer,
            guard=self._guard,
            ema_decay=config.ema_decay,
        )
        self._averages = Averages(("loss", "grad_norm"), device)
        work = CompileFallback(self._work, (self._parallel,), mode)
        self._graphed = GraphedStep(work, graph=mode.cuda_graph)

    def step(self, batches: Sequence[Batch], *, learning_rate: float) -> None:
        self._updater.set_learning_rate(learning_rate)
        self._graphed(batches)

    def _work(self, batches: Sequence[Batch]) -> None:
        """All that happens on the device."""
        self._updater.zero_grad()
        losses = []
        for index, (lr_NCHW, hr_NCHW) in enumerate(batches):
            is_last = index == len(batches) - 1
            with nullcontext() if is_last else self._parallel.without_exchange():
                loss = self._loss(self._parallel(lr_NCHW), hr_NCHW) * self._collective.weight / len(batches)
                backward(loss)
            losses.append(loss.detach())
        norm = self._updater.step()
        self._guard.end_step()
        self._averages.add({"loss": torch.stack(losses).sum(), "grad_norm": norm})

    def report(self) -> dict[str, float]:
        values = self._averages.read(self._collective)
        num_good_steps = self._guard.read()
        if num_good_steps is not None:
            raise NonFiniteLossError(
                f"loss {values['loss']}, gradient norm {values['grad_norm']} after {num_good_steps} good steps since "
                "the last report"
            )
        return values

    def inference_network(self) -> nn.Module:
        return self.network if self._updater.average is None else self._updater.average

    def state(self) -> State:
        groups: State = {"model": dict(self.network.state_dict())}
        if self._updater.average is not None:
            groups["ema"] = dict(self._updater.average.state_dict())
        groups["optimizer"] = self._updater.state()
        return groups

    def load_state(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self.network.load_state_dict(dict(state["model"]))
        if self._updater.average is not None:
            self._updater.average.load_state_dict(dict(state["ema"]))
        self._updater.load_state(state.get("optimizer", {}))
        self._guard.reset()
        self._graphed.forget()
