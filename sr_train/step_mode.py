"""How steps are computed on a device: which of `StepConfig`'s means are used there."""

from dataclasses import dataclass
from typing import Literal

import torch

from sr_train.options import ConfigError, StepConfig


@dataclass(frozen=True, kw_only=True)
class StepMode:
    """The means in use; the default is the reference that all others are compared with."""

    bf16: bool = False
    """Forward and backward under bfloat16 autocast; weights, losses and optimiser stay float32."""
    channels_last: bool = False
    compile: Literal["no", "try", "must"] = "no"
    """try: on failure, with a warning, the same without."""
    cuda_graph: Literal["no", "try", "must"] = "no"
    """try: on failure, with a warning, the same step by step."""
    fused_optimizer: bool = False
    batch_ahead: bool = False

    def __str__(self) -> str:
        parts = [
            "bf16 autocast" if self.bf16 else "float32",
            "channels_last" if self.channels_last else "",
            {"no": "", "try": "compiled if that works", "must": "compiled"}[self.compile],
            {"no": "", "try": "one CUDA graph if that works", "must": "one CUDA graph"}[self.cuda_graph],
            "fused Adam" if self.fused_optimizer else "",
            "next batch cut meanwhile" if self.batch_ahead else "",
        ]
        return ", ".join(part for part in parts if part)


REFERENCE = StepMode()


def step_mode(config: StepConfig, *, device_type: str, num_workers: int) -> StepMode:
    """What `config` means on a device; "auto" is on where it is safe.

    A GPU without bfloat16 (before Ampere) computes in float32 under "auto". ConfigError for what can't be had there.
    """
    on_cuda = device_type == "cuda"
    if config.cuda_graph == "on" and not on_cuda:
        raise ConfigError(f"--step.cuda-graph on: there are no CUDA graphs on {device_type}; use auto or off")
    if config.cuda_graph == "on" and num_workers > 1:
        raise ConfigError(
            f"--step.cuda-graph on: a graph holds the step of one worker, and gradients of --run.num-workers "
            f"{num_workers} are exchanged outside of it; use auto or off"
        )
    if config.cuda_graph == "on" and not config.fused_optimizer:
        raise ConfigError("--step.cuda-graph on needs the fused optimiser: leave out --step.no-fused-optimizer")
    may_graph = config.cuda_graph == "auto" and on_cuda and num_workers == 1 and config.fused_optimizer
    # On the driver there may be no GPU to ask; every one that is bought today has bfloat16.
    has_bf16 = on_cuda and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False))
    return StepMode(
        bf16=config.precision == "bf16" or (config.precision == "auto" and has_bf16),
        channels_last=config.channels_last,
        compile="must" if config.compile == "on" else "try" if config.compile == "auto" and on_cuda else "no",
        cuda_graph="must" if config.cuda_graph == "on" else "try" if may_graph else "no",
        fused_optimizer=config.fused_optimizer,
        batch_ahead=config.batch_ahead and on_cuda,
    )
