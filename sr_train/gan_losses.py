"""Adversarial losses: functions of what a discriminator says about real and about generated images.

Goodfellow et al. 2014, "Generative Adversarial Nets" (https://arxiv.org/abs/1406.2661), section 3, the generator's loss
in its non-saturating form; SRGAN, Ledig et al. 2017, equation 6 (https://arxiv.org/abs/1609.04802). Relativistic:
ESRGAN, Wang et al. 2018, section 3.2 (https://arxiv.org/abs/1809.00219), after Jolicoeur-Martineau 2018
(https://arxiv.org/abs/1807.00734).

Logits are float32 of any shape, one per image or several; above 0 means real. Losses are scalars: means over all
logits (SRGAN's equation 6 is a sum over images). Natural logarithms.
"""

from typing import Any

from torch import Tensor, autograd, stack
from torch.nn.functional import logsigmoid

from sr_train.collective import Collective


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Binary cross-entropy: -mean log D(real) - mean log(1 - D(fake)), D being the logits' sigmoid. ln 4 for a guess.

    ESRGAN's is the same function of `relative_to_average` logits.
    """
    return -logsigmoid(real_logits).mean() - logsigmoid(-fake_logits).mean()


def generator_loss(fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
    """-mean log D(fake); with real logits, -mean log(1 - D(real)) on top of it.

    The former is SRGAN's adversarial loss. ESRGAN's is the latter on `relative_to_average` logits.
    """
    loss = -logsigmoid(fake_logits).mean()
    return loss if real_logits is None else loss - logsigmoid(-real_logits).mean()


def relative_to_average(real_logits: Tensor, fake_logits: Tensor, collective: Collective) -> tuple[Tensor, Tensor]:
    """Real logits minus the mean of the fake ones, and fake logits minus the mean of the real ones (real, fake).

    The sigmoids of these are ESRGAN's D_Ra(real, fake) and D_Ra(fake, real). The means are over all workers' logits, so
    that two workers see what one with all patches sees; when gradients are accumulated, over a micro-batch. All
    workers must call it together, and those whose result is differentiated must do that together too.
    """
    own_means = stack([real_logits.mean(), fake_logits.mean()])
    real_mean, fake_mean = _mean_over_workers(own_means * collective.weight, collective).unbind()
    return real_logits - fake_mean, fake_logits - real_mean


def accuracies(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of real logits above 0 and of fake logits below 0: what a discriminator is right about."""
    return (real_logits > 0).float().mean(), (fake_logits < 0).float().mean()


def _mean_over_workers(values: Tensor, collective: Collective) -> Tensor:
    if collective.world_size == 1:
        return values
    mean: Tensor = _MeanOverWorkers.apply(values, collective)  # type: ignore[no-untyped-call]
    return mean


class _MeanOverWorkers(autograd.Function):
    """A worker's value reaches the losses of all of them, and DDP averages over workers what each one backpropagates:
    so the gradient of the mean loss is the mean of all workers' gradients.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, collective: Collective) -> Tensor:
        ctx.collective = collective
        return collective.mean(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        collective: Collective = ctx.collective
        return collective.mean(gradient), None
