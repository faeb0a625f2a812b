"""BatchNorm over the global batch: the same statistics, outputs and gradients however many workers share the patches.

Ioffe, Szegedy: "Batch Normalization", ICML 2015 (https://arxiv.org/abs/1502.03167). PyTorch's SyncBatchNorm does this
on CUDA and refuses the CPU, where `GlobalBatchNorm` is its counterpart.

In training mode every forward pass of a layer is a collective call, and so is every backward pass. All workers must
therefore run the same layers in the same order, equally often: a worker that skips a batch, or a network that branches
on its data, leaves the others waiting for ever. In evaluation mode nothing is exchanged.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise_batch_norm(module: nn.Module, *, world_size: int, device: torch.device) -> nn.Module:
    """The module with BatchNorm layers of the global batch; itself, changed in place, unless it is such a layer.

    `device` is where it will run. Layers keep their parameters and buffers, under the same names: state dicts fit both
    ways, and an optimiser made before still holds the right tensors. One worker alone keeps its plain layers. The
    workers are those of the default process group, which must exist when the module is first used.
    """
    if world_size == 1:
        return module
    if device.type == "cuda":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return converted
    return _with_global_layers(module)


def _with_global_layers(module: nn.Module) -> nn.Module:
    if isinstance(module, _BatchNorm):
        return module if isinstance(module, GlobalBatchNorm) else GlobalBatchNorm.like(module)
    for name, child in module.named_children():
        setattr(module, name, _with_global_layers(child))
    return module


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm of any number of dimensions (N×C×…) over all workers' batches, which may differ in size.

    Statistics are float32 at least, also for bfloat16 features; the output has the features' dtype. The workers' shares
    are added in float64 and in rank order on every worker: the same inputs give the same bits, whatever algorithm the
    process group chooses, and all workers' running statistics stay equal without being broadcast.
    """

    @classmethod
    def like(cls, layer: _BatchNorm) -> "GlobalBatchNorm":
        """A layer that shares the other's options, parameters and buffers."""
        with torch.device("meta"):
            twin = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(twin, name, getattr(layer, name))  # None where the layer has none
        return twin.train(layer.training)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 (the name is PyTorch's)
        if input.dim() < 2:
            raise ValueError(f"features must have at least 2 dimensions, not {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name is PyTorch's)
        """Features N×C×…, of the same shape in and out.

        ValueError, on all workers, if the global batch has a single value per channel.
        """
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        mean_C, variance_C, count = _global_statistics(input.detach())
        if count <= 1:
            raise ValueError(f"BatchNorm needs more than {count} value per channel in the global batch to train")
        self._update_running_statistics(mean_C, variance_C * (count / (count - 1)))
        output: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, mean_C, variance_C, count, self.eps
        )
        return output

    @torch.no_grad()
    def _update_running_statistics(self, mean_C: Tensor, unbiased_variance_C: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased_variance_C.to(self.running_var.dtype), share)


class _Normalise(torch.autograd.Function):
    """(features - mean) / deviation · weight + bias, mean and deviation being functions of all workers' features.

    As in Ioffe & Szegedy, section 3: with x̂ = (x - mean) / deviation and g the gradient of x̂ · weight + bias, that of x
    is weight / deviation · (g - mean of g - x̂ · mean of g·x̂), means over the global batch. DDP averages the parameters'
    gradients, so those are this worker's own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        mean_C: Tensor,
        variance_C: Tensor,
        count: int,
        eps: float,
    ) -> Tensor:
        exact = _at_least_float32(features)
        mean_C, variance_C = mean_C.to(exact.dtype), variance_C.to(exact.dtype)
        ctx.save_for_backward(features, weight_C, mean_C, variance_C)
        ctx.count, ctx.eps = count, eps
        return nn.functional.batch_norm(exact, mean_C, variance_C, weight_C, bias_C, eps=eps).to(features.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight_C, mean_C, variance_C = ctx.saved_tensors
        gradient, exact = _at_least_float32(output_gradient), _at_least_float32(features)
        normalised = nn.functional.batch_norm(exact, mean_C, variance_C, eps=ctx.eps)
        others = [dim for dim in range(features.dim()) if dim != 1]
        bias_gradient_C = gradient.sum(dim=others)
        weight_gradient_C = (gradient * normalised).sum(dim=others)
        features_gradient = None
        if ctx.needs_input_grad[0]:
            shares_W2C = _from_all_workers(torch.cat([bias_gradient_C, weight_gradient_C]))
            mean_gradient_C, mean_product_C = (shares_W2C.sum(dim=0) / ctx.count).to(exact.dtype).chunk(2)
            factor_C = (variance_C + ctx.eps).rsqrt()
            if weight_C is not None:
                factor_C = factor_C * weight_C
            shape = [1, -1] + [1] * (features.dim() - 2)
            # In place, as every pass over the features counts: x̂ is not needed any more.
            features_gradient = normalised.mul_(mean_product_C.view(shape)).add_(mean_gradient_C.view(shape))
            features_gradient = features_gradient.neg_().add_(gradient).mul_(factor_C.view(shape)).to(features.dtype)
        return (
            features_gradient,
            weight_gradient_C if ctx.needs_input_grad[1] else None,
            bias_gradient_C if ctx.needs_input_grad[2] else None,
            *(None,) * 4,
        )


@torch.no_grad()
def _global_statistics(features: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance per channel in float64, and the number of values behind each.

    Each worker sends mean and variance instead of sum and sum of squares, whose difference would lose the variance of
    features that lie far from 0 (Chan, Golub, LeVeque 1979).
    """
    num_channels = features.shape[1]
    count = features.numel() // num_channels
    if count > 0:
        # torch.var_mean over these dimensions takes 3 (NCHW) to 30 times (channels last) as long, on one thread.
        mean_C, variance_C = torch.batch_norm_update_stats(_at_least_float32(features), None, None, 0.0)
    else:  # a worker without patches takes part all the same
        mean_C, variance_C = features.new_zeros(2, num_channels).unbind()
    message = torch.cat([mean_C.double(), variance_C.double(), mean_C.new_tensor([count], dtype=torch.float64)])
    gathered_WK = _from_all_workers(message)
    means_WC, variances_WC = gathered_WK[:, :-1].chunk(2, dim=1)
    counts_W1 = gathered_WK[:, -1:]
    total = int(counts_W1.sum())
    shares_W1 = counts_W1 / max(total, 1)
    global_mean_C = (shares_W1 * means_WC).sum(dim=0)
    global_variance_C = (shares_W1 * (variances_WC + (means_WC - global_mean_C).square())).sum(dim=0)
    return global_mean_C, global_variance_C, total


def _from_all_workers(values: Tensor) -> Tensor:
    """Every worker's values as float64, in rank order: W×K from K."""
    values = values.double().contiguous()
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
