"""A network as training steps call it: on its device, laid out for it, synchronised over the workers, compiled."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sr_train.collective import Collective
from sr_train.step_mode import StepMode
from sr_train.sync_batch_norm import synchronise_batch_norm


class ParallelNetwork:
    """Calls are forward passes whose gradients become, in backward, the mean over all workers.

    BatchNorm takes its statistics from the global batch. So every forward pass of a network that has it, also one
    without gradients, is a collective call.
    """

    def __init__(self, network: nn.Module, *, mode: StepMode, device: torch.device, collective: Collective):
        self._mode, self._device = mode, device
        self.network = network.to(device).train()
        """The plain one: what is saved, averaged and validated."""
        if mode.channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = synchronise_batch_norm(self.network, world_size=collective.world_size, device=device)
        self._parallel: nn.Module = self.network
        if collective.world_size > 1:
            # DDP regroups its buckets after the first backward pass, and with three and more workers the grouping
            # decides the order in which a ring all-reduce adds. Looking for unused parameters keeps the first grouping,
            # so that a resumed run adds in the same order as one that was never stopped. On CUDA sums are not
            # repeatable anyway, and the regrouped buckets overlap better.
            with warnings.catch_warnings():
                # PyTorch 2.13 calls it forward_sync_buffers, which 2.11 does not know.
                warnings.filterwarnings("ignore", ".*broadcast_buffers.* is deprecated", FutureWarning)
                self._parallel = DistributedDataParallel(
                    self.network,
                    device_ids=[device] if device.type == "cuda" else None,
                    find_unused_parameters=device.type == "cpu",
                    broadcast_buffers=False,  # they are equal: constants, or statistics of the global batch
                )
        self._forward: Callable[[torch.Tensor], torch.Tensor] = self._parallel
        self._plain_forward: Callable[[torch.Tensor], torch.Tensor] = self.network
        if mode.compile != "no":
            # Outside of DDP: it then splits the graph at DDP's buckets, so that their exchange overlaps backward.
            self._forward = torch.compile(self._parallel, dynamic=False)
            self._plain_forward = torch.compile(self.network, dynamic=False)

    def __call__(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Under autocast where the mode asks for it; the result is float32."""
        return self._call(self._forward, images_NCHW)

    def frozen(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """As a call, but the gradient reaches the images alone, and DDP, which would wait for the parameters', hears of
        nothing.
        """
        self.network.requires_grad_(False)
        try:
            return self._call(self._plain_forward, images_NCHW)
        finally:
            self.network.requires_grad_(True)

    def without_gradient(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """As a call, but nothing is kept for backward, and BatchNorm's running statistics stay as they were."""
        with torch.no_grad(), _same_buffers_after(self.network):
            return self._call(self._plain_forward, images_NCHW)

    def _call(self, forward: Callable[[torch.Tensor], torch.Tensor], images_NCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mode.bf16):
            output = forward(images_NCHW)
        return output.float()

    def without_exchange(self) -> AbstractContextManager[None]:
        """For all micro-batches of a step but the last: gradients add up on each worker."""
        if isinstance(self._parallel, DistributedDataParallel):
            return self._parallel.no_sync()
        return nullcontext()

    def give_up_compiling(self) -> None:
        """From now on without torch.compile."""
        self._forward, self._plain_forward = self._parallel, self.network


@contextmanager
def _same_buffers_after(network: nn.Module) -> Iterator[None]:
    before = [buffer.clone() for buffer in network.buffers()]
    yield
    for buffer, value in zip(network.buffers(), before, strict=True):
        buffer.copy_(value)


class CompileFallback:
    """Calls a step's work; where the first call fails to compile and may do without, says so and calls it again."""

    def __init__(self, work: Callable[..., None], networks: tuple[ParallelNetwork, ...], mode: StepMode):
        self._work, self._networks = work, networks
        self._may_fail = mode.compile == "try"

    def __call__(self, *arguments: object) -> None:
        if not self._may_fail:
            self._work(*arguments)
            return
        from torch._dynamo.exc import TorchDynamoException  # here: it imports for 5 s what only compiling needs

        try:
            self._work(*arguments)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            logging.getLogger(__name__).warning("torch.compile failed, going on without it: %s", reason)
            for network in self._networks:
                network.give_up_compiling()
            self._work(*arguments)
        self._may_fail = False
