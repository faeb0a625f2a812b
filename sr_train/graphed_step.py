"""A step as one CUDA graph: thousands of kernels launched by one call, so that a fast GPU never waits for Python."""

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import torch

Batch = tuple[torch.Tensor, torch.Tensor]

_NUM_EAGER_STEPS = 3
"""Before the capture, as PyTorch's documentation asks: they choose algorithms, compile and allocate. They are ordinary
steps of the training."""


class GraphedStep:
    """Calls `work(batches)`: with a CUDA graph the first calls as they are, then once captured, replayed at every call.

    `work` must read nothing from the host that changes, wait for nothing, and get batches of one shape; what it writes
    are tensors that outlive it.
    """

    def __init__(self, work: Callable[[Sequence[Batch]], None], *, graph: Literal["no", "try", "must"]):
        """try: where the capture fails, with a warning, as without a graph."""
        self._work, self._enabled, self._may_fail = work, graph != "no", graph == "try"
        self._stream: torch.cuda.Stream | None = None
        self._num_eager = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[torch.Tensor] = []

    def __call__(self, batches: Sequence[Batch]) -> None:
        if not self._enabled:
            self._work(batches)
        elif self._num_eager < _NUM_EAGER_STEPS:
            self._num_eager += 1
            self._on_side_stream(batches)
        else:
            if self._graph is None:
                try:
                    self._graph = self._captured(batches)
                except RuntimeError as error:
                    if not self._may_fail:
                        raise
                    reason = str(error).strip().splitlines()[0]
                    logging.getLogger(__name__).warning("no CUDA graph, going on step by step: %s", reason)
                    self._enabled = False
                    self._work(batches)  # a capture does nothing but record
                    return
            else:
                torch._foreach_copy_(self._inputs, [tensor for batch in batches for tensor in batch])
            self._graph.replay()

    def forget(self) -> None:
        """Captures anew: after tensors that `work` uses were replaced by others."""
        self._graph, self._num_eager, self._inputs = None, 0, []

    def _on_side_stream(self, batches: Sequence[Batch]) -> None:
        """Not on the default stream, where autograd would leave work that a capture can't hold."""
        current = torch.cuda.current_stream()
        self._stream = self._stream or torch.cuda.Stream(batches[0][0].device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._work(batches)
        current.wait_stream(self._stream)
        for batch in batches:  # allocated on one stream, used on another
            for tensor in batch:
                tensor.record_stream(self._stream)

    def _captured(self, batches: Sequence[Batch]) -> torch.cuda.CUDAGraph:
        self._inputs = [tensor.clone() for batch in batches for tensor in batch]
        pairs = list(zip(self._inputs[::2], self._inputs[1::2], strict=True))
        graph = torch.cuda.CUDAGraph()
        # thread_local: the patch pool's feeder may allocate pinned memory meanwhile, which a global capture would
        # forbid.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._work(pairs)
        return graph
