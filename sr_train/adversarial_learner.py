"""One step of adversarial training: a discriminator learns to tell generated from real patches, a generator to be taken
for real, and to be like the original.

SRGAN: Ledig et al. 2017 (https://arxiv.org/abs/1609.04802), section 2; ESRGAN: Wang et al. 2018
(https://arxiv.org/abs/1809.00219), section 3.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from sr_train.averages import Averages
from sr_train.checkpoint import CheckpointError
from sr_train.collective import Collective
from sr_train.gan_control import Control
from sr_train.gan_losses import accuracies, discriminator_loss, generator_loss, relative_to_average
from sr_train.gan_options import GanConfig
from sr_train.graphed_step import Batch, GraphedStep
from sr_train.learner import LOSSES, NonFiniteLossError, State
from sr_train.optimizer import FiniteGuard, Updater, backward
from sr_train.options import OptimConfig
from sr_train.parallel_network import CompileFallback, ParallelNetwork
from sr_train.perceptual_weights import PerceptualConfig
from sr_train.step_mode import StepMode
from sr_train.vgg_features import VGGFeatures, perceptual_loss

_COLOURS = ("red", "green", "blue")


class AdversarialLearner:
    """Two networks and a frozen third one: the `Learner` of SRGAN and ESRGAN.

    A step updates the discriminator on real and on generated patches, which it sees in two passes, since the paper's
    BatchNorm must not mix their statistics; then the generator against the updated discriminator. Each of the
    generator's loss terms is differentiated by the SR patches first. The sum of these gradients is what the generator
    gets, and their norms tell which term leads.

    Accumulation: with one micro-batch the generator runs once per step, with several twice, since keeping its graphs
    until the discriminator is updated would cost the memory that accumulation saves. What is a function of the batch
    is then one of the micro-batch: BatchNorm's statistics, and the averages of relativistic losses. With neither,
    accumulation changes nothing but rounding.

    Spectral norms are estimated by one step of power iteration per step, as in Miyato et al. 2018, algorithm 1, not one
    at each of the discriminator's passes: real and generated patches are judged by the same weights, however they are
    divided into micro-batches.

    A paused discriminator takes steps with a learning rate of 0, in place of none, so that a captured CUDA graph holds:
    its weights stay, its optimiser's averages go on following the gradient.

    A bad gradient stops both networks. If it is the generator's, the discriminator has taken its half of that step.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        features: VGGFeatures | None,
        *,
        optim: OptimConfig,
        gan: GanConfig,
        perceptual: PerceptualConfig,
        device: torch.device,
        mode: StepMode,
        collective: Collective,
    ):
        """`features` may be None if the perceptual weight is 0."""
        self._gan, self._perceptual, self._collective = gan, perceptual, collective
        self._device, self._mode = device, mode
        self._pixel_loss: Callable[[Tensor, Tensor], Tensor] = LOSSES[optim.loss]
        self._weights = {"pixel": gan.pixel_weight, "adversarial": gan.adversarial_weight}
        self._features: VGGFeatures | None = None
        if gan.perceptual_weight > 0:
            if features is None:
                raise ValueError(f"--gan.perceptual-weight={gan.perceptual_weight} needs VGG19's features")
            self._weights["perceptual"] = gan.perceptual_weight
            self._features = features.to(device)
            if mode.channels_last:
                self._features = self._features.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        self._generator = ParallelNetwork(generator, mode=mode, device=device, collective=collective)
        # Not compiled: with spectral norms in three variants that took 50 to 150 s on a CPU, and all there is to win is
        # fused activations.
        eager = replace(mode, compile="no")
        self._discriminator = ParallelNetwork(discriminator, mode=eager, device=device, collective=collective)
        self.network, self.discriminator = self._generator.network, self._discriminator.network
        self._parametrizations = [it for it in self.discriminator.modules() if isinstance(it, ParametrizationList)]

        self._guard = FiniteGuard(device)
        self._updater, self._discriminator_updater = (
            Updater(network, optim, device=device, fused=mode.fused_optimizer, guard=self._guard, ema_decay=ema_decay)
            for network, ema_decay in ((self.network, optim.ema_decay), (self.discriminator, None))
        )
        self.control = Control()
        self._averages = Averages(self._value_names(), device)
        work = CompileFallback(self._work, (self._generator,), mode)
        self._graphed = GraphedStep(work, graph=mode.cuda_graph)

    def step(self, batches: Sequence[Batch], *, learning_rate: float) -> None:
        control = self.control
        learning_rate *= control.learning_rate_factor
        paused = control.discriminator_pause_steps_left > 0
        self._updater.set_learning_rate(learning_rate)
        self._discriminator_updater.set_learning_rate(
            0.0 if paused else learning_rate * self._gan.discriminator_learning_rate_factor
        )
        self._graphed(batches)
        self.control = replace(
            control,
            discriminator_pause_steps_left=max(0, control.discriminator_pause_steps_left - 1),
            num_steps=control.num_steps + 1,
        )

    def _work(self, batches: Sequence[Batch]) -> None:
        """All that happens on the device."""
        self._updater.zero_grad()
        self._discriminator_updater.zero_grad()
        values = dict.fromkeys(self._value_names(), torch.zeros((), device=self._device))
        generated = [self._generator(lr_NCHW) for lr_NCHW, _ in batches] if len(batches) == 1 else []
        self._estimate_spectral_norms(True)
        share = self._collective.weight / len(batches)
        for index, (lr_NCHW, hr_NCHW) in enumerate(batches):
            sr_NCHW = generated[index].detach() if generated else self._generator.without_gradient(lr_NCHW)
            is_last = index == len(batches) - 1
            with nullcontext() if is_last else self._discriminator.without_exchange():
                self._teach_discriminator(sr_NCHW, hr_NCHW, values, share=share)
        values["discriminator_grad_norm"] = self._discriminator_updater.step()

        for index, (lr_NCHW, hr_NCHW) in enumerate(batches):
            is_last = index == len(batches) - 1
            with nullcontext() if is_last else self._generator.without_exchange():
                sr_NCHW = generated[index] if generated else self._generator(lr_NCHW)
                self._teach_generator(sr_NCHW, hr_NCHW, values, share=share)
        values["grad_norm"] = self._updater.step()
        self._guard.end_step()
        self._averages.add(values)

    def _teach_discriminator(
        self, sr_NCHW: Tensor, hr_NCHW: Tensor, values: dict[str, Tensor], *, share: float
    ) -> None:
        """Adds to the discriminator's gradients."""
        real_logits = self._discriminator(hr_NCHW)
        self._estimate_spectral_norms(False)
        fake_logits = self._discriminator(sr_NCHW)
        if self._gan.relativistic:
            real_logits, fake_logits = relative_to_average(real_logits, fake_logits, self._collective)
        loss = discriminator_loss(real_logits, fake_logits) * share
        backward(loss)
        real_accuracy, fake_accuracy = accuracies(real_logits.detach(), fake_logits.detach())
        _add(
            values,
            {
                "discriminator_loss": loss.detach(),
                "discriminator_accuracy_real": real_accuracy * share,
                "discriminator_accuracy_fake": fake_accuracy * share,
            },
        )

    def _teach_generator(self, sr_NCHW: Tensor, hr_NCHW: Tensor, values: dict[str, Tensor], *, share: float) -> None:
        """Adds to the generator's gradients."""
        leaf_NCHW = sr_NCHW.detach().requires_grad_()
        total_loss, total_gradient_NCHW = torch.zeros_like(values["loss"]), torch.zeros_like(leaf_NCHW)
        for name, weight in self._weights.items():
            loss = self._generator_term(name, leaf_NCHW, hr_NCHW)
            (gradient_NCHW,) = torch.autograd.grad(loss * (weight * share), leaf_NCHW)
            total_gradient_NCHW += gradient_NCHW
            total_loss += loss.detach() * (weight * share)
            square = gradient_NCHW.square().sum()
            _add(values, {f"{name}_loss": loss.detach() * share, f"{name}_gradient_square": square})
        # As in `backward`: what is not finite must reach the guard, on all workers.
        poison = torch.where(total_loss.isfinite(), 0.0, float("nan"))
        torch.autograd.backward([sr_NCHW], [total_gradient_NCHW + poison])
        shifts = (leaf_NCHW.detach() - hr_NCHW).mean(dim=(0, 2, 3)) * share
        colours = {f"colour_shift_{colour}": shift for colour, shift in zip(_COLOURS, shifts, strict=True)}
        _add(values, {"loss": total_loss, **colours})

    def _generator_term(self, name: str, sr_NCHW: Tensor, hr_NCHW: Tensor) -> Tensor:
        if name == "pixel":
            return self._pixel_loss(sr_NCHW, hr_NCHW)
        if name == "perceptual":
            assert self._features is not None
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mode.bf16):
                return perceptual_loss(self._features, sr_NCHW, hr_NCHW, self._perceptual)
        fake_logits = self._discriminator.frozen(sr_NCHW)
        if not self._gan.relativistic:
            return generator_loss(fake_logits)
        with torch.no_grad():
            real_logits = self._discriminator.frozen(hr_NCHW)
        real_logits, fake_logits = relative_to_average(real_logits, fake_logits, self._collective)
        return generator_loss(fake_logits, real_logits)

    def _estimate_spectral_norms(self, refine: bool) -> None:
        """Whether the discriminator's next pass does a step of power iteration; without, the last estimate is used."""
        for parametrization in self._parametrizations:
            parametrization.train(refine)

    def _value_names(self) -> tuple[str, ...]:
        per_term = [f"{name}_{value}" for name in self._weights for value in ("loss", "gradient_square")]
        of_discriminator = [f"discriminator_{name}" for name in ("loss", "accuracy_real", "accuracy_fake", "grad_norm")]
        colours = [f"colour_shift_{colour}" for colour in _COLOURS]
        return ("loss", "grad_norm", *per_term, *of_discriminator, *colours)

    def report(self) -> dict[str, float]:
        """As `Learner.report`. Besides losses, what tells how the two networks stand to each other:

        discriminator_accuracy_real, _fake: shares that it is right about (of relative logits, if relativistic).
        pixel_, perceptual_, adversarial_gradient_norm: L2 norm over the global batch of that loss term's gradient,
        weighted, at the SR patches; root of the mean square over steps. colour_shift: of red, green and blue the
        largest distance between the means of SR and HR patches. grad_norm, discriminator_grad_norm: before clipping.
        """
        values = self._averages.read(self._collective)
        num_good_steps = self._guard.read()
        if num_good_steps is not None:
            raise NonFiniteLossError(
                f"generator's loss {values['loss']}, gradient norm {values['grad_norm']}, discriminator's loss "
                f"{values['discriminator_loss']}, gradient norm {values['discriminator_grad_norm']} after "
                f"{num_good_steps} good steps since the last report"
            )
        for name in self._weights:
            # Of workers with a W-th of the batch each, whose losses are means over their part: W times the gradient.
            square = values.pop(f"{name}_gradient_square") / self._collective.world_size
            values[f"{name}_gradient_norm"] = square**0.5
        values["colour_shift"] = max(abs(values.pop(f"colour_shift_{colour}")) for colour in _COLOURS)
        values["learning_rate_factor"] = self.control.learning_rate_factor
        values["discriminator_paused"] = float(self.control.discriminator_pause_steps_left > 0)
        return values

    def inference_network(self) -> nn.Module:
        """The generator, averaged where the run keeps an average."""
        return self.network if self._updater.average is None else self._updater.average

    def state(self) -> State:
        groups: State = {"model": dict(self.network.state_dict())}
        if self._updater.average is not None:
            groups["ema"] = dict(self._updater.average.state_dict())
        groups["optimizer"] = self._updater.state()
        groups["discriminator"] = dict(self.discriminator.state_dict())
        groups["discriminator_optimizer"] = self._discriminator_updater.state()
        groups["control"] = self.control.to_tensors()
        return groups

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """As `Learner.load_state`. CheckpointError, and nothing is changed, if a group is missing."""
        needed = ["model", "discriminator", "control"]
        if self._updater.average is not None:
            needed.append("ema")
        if "control" in state:
            control = Control.from_tensors(state["control"])
            if control.num_steps > 0:  # before that they are empty, and a file holds no empty groups
                needed += ["optimizer", "discriminator_optimizer"]
        missing = [group for group in needed if not state.get(group)]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {', '.join(missing)}: it is of another method, or of other options"
            )
        self.network.load_state_dict(dict(state["model"]))
        self.discriminator.load_state_dict(dict(state["discriminator"]))
        if self._updater.average is not None:
            self._updater.average.load_state_dict(dict(state["ema"]))
        self._updater.load_state(state.get("optimizer", {}))
        self._discriminator_updater.load_state(state.get("discriminator_optimizer", {}))
        self.control = control
        self._guard.reset()
        self._graphed.forget()


def _add(values: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        values[name] = values[name] + value
