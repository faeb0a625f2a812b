"""One step of adversarial training: against a plain implementation, over workers and micro-batches, and restored."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss
from torch.nn.utils.parametrize import ParametrizationList

from sr_data.storage import open_store
from sr_train.checkpoint import Checkpoint, CheckpointError, read_checkpoint, write_checkpoint
from sr_train.gan_control import Control
from sr_train.gan_options import GanConfig
from sr_train.learner import NonFiniteLossError
from sr_train.options import OptimConfig
from sr_train.step_mode import StepMode
from sr_train.vgg_features import perceptual_loss
from tests.support.gan import (
    ALL_TERMS,
    CALM,
    EDSR,
    PERCEPTUAL,
    SRRESNET,
    WITH_BATCH_NORM,
    WITHOUT_BATCH_NORM,
    Networks,
    adversarial_learner,
    features,
    flat_state,
    networks,
    patches,
)

BOTH = pytest.mark.parametrize("configs", [WITH_BATCH_NORM, WITHOUT_BATCH_NORM], ids=["batch norm", "spectral norm"])


class PlainGan:
    """SRGAN's and ESRGAN's training step as one would write it down: two optimisers, one backward pass each."""

    def __init__(self, configs: Networks, gan: GanConfig) -> None:
        self.generator, self.discriminator = networks(configs)
        self.features, self.gan = features(), gan
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=1e-3, eps=CALM.adam_epsilon)
            for network in (self.generator, self.discriminator)
        ]

    def verdicts(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        if self.gan.relativistic:
            return real - fake.mean(), fake - real.mean()
        return real, fake

    def step(self, lr_NCHW: Tensor, hr_NCHW: Tensor) -> None:
        bce, gan = binary_cross_entropy_with_logits, self.gan
        sr_NCHW = self.generator(lr_NCHW)

        self.optimizers[1].zero_grad()
        self.discriminator.train()
        real = self.discriminator(hr_NCHW)
        for module in self.discriminator.modules():
            if isinstance(module, ParametrizationList):  # spectral norms are estimated once per step
                module.eval()
        real, fake = self.verdicts(real, self.discriminator(sr_NCHW.detach()))
        self.discriminator_loss = bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
        self.accuracies = (real > 0).float().mean(), (fake < 0).float().mean()
        self.discriminator_loss.backward()
        self.discriminator_gradients = gradients(self.discriminator)
        self.optimizers[1].step()

        self.optimizers[0].zero_grad()
        fake = self.discriminator(sr_NCHW)
        if gan.relativistic:
            real, fake = self.verdicts(self.discriminator(hr_NCHW).detach(), fake)
            adversarial = bce(real, torch.zeros_like(real)) + bce(fake, torch.ones_like(fake))
        else:
            adversarial = bce(fake, torch.ones_like(fake))
        self.losses = {
            "pixel": (gan.pixel_weight, l1_loss(sr_NCHW, hr_NCHW)),
            "perceptual": (gan.perceptual_weight, perceptual_loss(self.features, sr_NCHW, hr_NCHW, PERCEPTUAL)),
            "adversarial": (gan.adversarial_weight, adversarial),
        }
        self.norms = {
            name: torch.autograd.grad(weight * loss, sr_NCHW, retain_graph=True)[0].norm()
            for name, (weight, loss) in self.losses.items()
        }
        self.colour_shift = (sr_NCHW - hr_NCHW).mean(dim=(0, 2, 3)).abs().max()
        self.loss = torch.stack([weight * loss for weight, loss in self.losses.values()]).sum()
        self.loss.backward()
        self.generator_gradients = gradients(self.generator)
        self.optimizers[0].step()


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: it.grad.clone() for name, it in network.named_parameters() if it.grad is not None}


def close(actual: Tensor, expected: Tensor) -> bool:
    """To rounding: relative to the largest value of the tensor; sums that cancel leave some 1e-7 of terms around 1."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(actual, expected, rtol=0, atol=1e-4 * largest + 1e-6)


@pytest.mark.parametrize("relativistic", [False, True])
@BOTH
def test_a_step_is_that_of_a_plain_implementation(configs: Networks, relativistic: bool) -> None:
    gan = dataclasses.replace(ALL_TERMS, relativistic=relativistic)
    ours, plain = adversarial_learner(configs, gan=gan), PlainGan(configs, gan)
    for step in range(2):  # a third one amplifies rounding, where an activation changes sides
        ours.step([patches(step)], learning_rate=1e-3)
        plain.step(*patches(step))
        values = ours.report()
        for network, expected in (
            (ours.network, plain.generator_gradients),
            (ours.discriminator, plain.discriminator_gradients),
        ):
            assert gradients(network).keys() == expected.keys()
            for name, gradient in gradients(network).items():
                assert close(gradient, expected[name]), (step, name)
        reported = {
            "loss": plain.loss,
            "discriminator_loss": plain.discriminator_loss,
            "discriminator_accuracy_real": plain.accuracies[0],
            "discriminator_accuracy_fake": plain.accuracies[1],
            "colour_shift": plain.colour_shift,
            "grad_norm": nn.utils.get_total_norm(list(plain.generator_gradients.values())),
            "discriminator_grad_norm": nn.utils.get_total_norm(list(plain.discriminator_gradients.values())),
        }
        reported |= {f"{name}_loss": loss for name, (_, loss) in plain.losses.items()}
        reported |= {f"{name}_gradient_norm": norm for name, norm in plain.norms.items()}
        expected_values = {name: value.item() for name, value in reported.items()}
        expected_values |= {"learning_rate_factor": 1.0, "discriminator_paused": 0.0}
        assert values == pytest.approx(expected_values, rel=1e-4, abs=1e-7)
    for mine, theirs in ((ours.network, plain.generator), (ours.discriminator, plain.discriminator)):
        for name, value in theirs.state_dict().items():
            assert close(mine.state_dict()[name].double(), value.double()), name


@BOTH
def test_nothing_but_its_own_loss_reaches_a_network(configs: Networks) -> None:
    """The generator's update leaves no gradient in the discriminator, the discriminator's none in the generator, and
    VGG19 never gets one.
    """
    ours = adversarial_learner(configs)
    heard: dict[str, list[Tensor]] = {}

    def listens(name: str) -> Callable[[Tensor], None]:
        return lambda gradient: heard.setdefault(name, []).append(gradient)

    for network in (ours.network, ours.discriminator):
        for name, parameter in network.named_parameters():
            parameter.register_hook(listens(f"{id(network)}/{name}"))
    extractor = ours._features
    assert extractor is not None
    before = [parameter.clone() for parameter in extractor.parameters()]
    ours.step([patches(0)], learning_rate=1e-3)
    assert len(heard) == sum(len(list(network.parameters())) for network in (ours.network, ours.discriminator))
    for name, times in heard.items():
        # A weight that two passes share hears each of them, or their sum: never a third one.
        assert len(times) <= 2 and all(gradient.abs().max() > 0 for gradient in times), name
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in extractor.parameters())
    assert all(torch.equal(now, then) for now, then in zip(extractor.parameters(), before, strict=True))
    assert all(parameter.requires_grad for parameter in ours.discriminator.parameters())


@pytest.mark.parametrize("relativistic", [False, True])
def test_the_adversarial_term_alone_teaches_the_generator(relativistic: bool) -> None:
    """More than "not zero": its gradient makes patches look more real to the discriminator that it came from."""
    gan = GanConfig(perceptual_weight=0.0, adversarial_weight=1.0, relativistic=relativistic)
    ours = adversarial_learner(WITH_BATCH_NORM, gan=gan, optim=OptimConfig())
    ours.control = Control(discriminator_pause_steps_left=20)
    losses = []
    for _ in range(20):
        ours.step([patches(0)], learning_rate=1e-3)
        for name, parameter in ours.network.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"no gradient for {name}"
        losses.append(ours.report()["adversarial_loss"])
    assert losses[-1] < 0.9 * losses[0]


def test_accumulation_changes_memory_and_not_the_training() -> None:
    whole, split = (adversarial_learner(WITHOUT_BATCH_NORM) for _ in range(2))
    for step in range(3):
        lr_NCHW, hr_NCHW = patches(step)
        whole.step([(lr_NCHW, hr_NCHW)], learning_rate=1e-3)
        split.step(list(zip(lr_NCHW.chunk(2), hr_NCHW.chunk(2), strict=True)), learning_rate=1e-3)
        assert split.report() == pytest.approx(whole.report(), rel=1e-4, abs=1e-7)
    expected = flat_state(whole)
    for name, value in flat_state(split).items():
        assert close(value.double(), expected[name].double()), name


def test_batch_norm_and_relative_verdicts_are_of_a_micro_batch() -> None:
    """Where accumulation does change the training, and as what: BatchNorm's running statistics follow each micro-batch
    once, though the generator runs twice.
    """
    normed = (SRRESNET, WITHOUT_BATCH_NORM[1])
    relativistic = dataclasses.replace(ALL_TERMS, relativistic=True)
    for configs, gan in ((normed, ALL_TERMS), (WITHOUT_BATCH_NORM, relativistic)):
        whole, split = (adversarial_learner(configs, gan=gan, optim=OptimConfig()) for _ in range(2))
        for step in range(6):
            lr_NCHW, hr_NCHW = patches(step)
            whole.step([(lr_NCHW, hr_NCHW)], learning_rate=1e-3)
            split.step(list(zip(lr_NCHW.chunk(2), hr_NCHW.chunk(2), strict=True)), learning_rate=1e-3)
        ours, theirs = split.report()["discriminator_loss"], whole.report()["discriminator_loss"]
        assert ours == pytest.approx(theirs, rel=0.05)
        assert ours != pytest.approx(theirs, rel=5e-6)
    split = adversarial_learner(normed)
    parts = [patches(0, num=2), patches(1, num=2)]
    split.step(parts, learning_rate=1e-3)
    alone = networks(normed)[0].train()
    for lr_NCHW, _ in parts:
        alone(lr_NCHW)
    for (name, value), expected in zip(split.network.named_buffers(), alone.buffers(), strict=True):
        assert torch.equal(value, expected), name


def test_clipping_bounds_what_both_optimisers_see() -> None:
    ours = adversarial_learner(WITH_BATCH_NORM, optim=dataclasses.replace(CALM, clip_grad_norm=1e-3))
    ours.step([patches(0)], learning_rate=1e-3)
    values = ours.report()
    for network, reported in ((ours.network, "grad_norm"), (ours.discriminator, "discriminator_grad_norm")):
        assert values[reported] > 1e-3
        norm = nn.utils.get_total_norm(list(gradients(network).values()))
        assert float(norm) == pytest.approx(1e-3, rel=2e-3)


def test_the_generator_alone_is_averaged_and_validated() -> None:
    ours = adversarial_learner(WITH_BATCH_NORM, optim=dataclasses.replace(CALM, ema_decay=0.9))
    before = {name: value.clone() for name, value in ours.network.named_parameters()}
    ours.step([patches(0)], learning_rate=1e-2)
    average = ours.inference_network()
    assert average is not ours.network and not average.training
    for name, value in average.named_parameters():
        towards = (value - before[name]) / (ours.network.get_parameter(name) - before[name])
        assert 0 < towards.mean().item() < 1, name
    everything = {"model", "ema", "optimizer", "discriminator", "discriminator_optimizer", "control"}
    assert set(ours.state()) == everything
    without = adversarial_learner(WITH_BATCH_NORM)
    assert set(without.state()) == everything - {"ema"}
    assert without.inference_network() is without.network


def test_learning_rates_are_the_schedules_times_their_factors() -> None:
    doubled = dataclasses.replace(ALL_TERMS, discriminator_learning_rate_factor=2.0)
    ours, reference = (adversarial_learner(WITHOUT_BATCH_NORM, gan=gan) for gan in (doubled, ALL_TERMS))
    ours.control = Control(learning_rate_factor=0.25)
    before = flat_state(ours)
    ours.step([patches(0)], learning_rate=4e-3)
    reference.step([patches(0)], learning_rate=1e-3)
    for name, weight in ours.discriminator.named_parameters():
        then, theirs = before[f"discriminator/{name}"], reference.discriminator.get_parameter(name)
        assert torch.allclose(weight - then, 2 * (theirs - then), atol=1e-6), name
    assert ours.report()["learning_rate_factor"] == 0.25


def test_the_generators_learning_rate_has_the_factor_too() -> None:
    content_only = dataclasses.replace(ALL_TERMS, adversarial_weight=1e-12)
    ours, reference = (adversarial_learner(WITHOUT_BATCH_NORM, gan=content_only) for _ in range(2))
    ours.control = Control(learning_rate_factor=0.25)
    ours.step([patches(0)], learning_rate=4e-3)
    reference.step([patches(0)], learning_rate=1e-3)
    for name, weight in ours.network.named_parameters():
        assert torch.allclose(weight, reference.network.get_parameter(name), atol=1e-7), name


@BOTH
def test_a_paused_discriminator_keeps_its_weights_for_so_many_steps(configs: Networks) -> None:
    ours = adversarial_learner(configs)
    ours.step([patches(0)], learning_rate=1e-2)
    ours.control = dataclasses.replace(ours.control, discriminator_pause_steps_left=2)
    for step, learns in ((1, False), (2, False), (3, True)):
        before = {name: it.clone() for net in (ours.network, ours.discriminator) for name, it in net.named_parameters()}
        ours.step([patches(step)], learning_rate=1e-2)
        assert all(torch.equal(it, before[name]) != learns for name, it in ours.discriminator.named_parameters())
        assert not any(torch.equal(it, before[name]) for name, it in ours.network.named_parameters())
        assert ours.report()["discriminator_paused"] == (step == 1)


def test_bf16_stays_close_to_float32() -> None:
    exact = adversarial_learner(WITHOUT_BATCH_NORM)
    fast = adversarial_learner(WITHOUT_BATCH_NORM, mode=StepMode(bf16=True))
    for step in range(3):
        for ours in (exact, fast):
            ours.step([patches(step)], learning_rate=1e-3)
        expected, values = exact.report(), fast.report()
        for name in ("loss", "pixel_loss", "perceptual_loss", "adversarial_loss", "discriminator_loss"):
            assert values[name] == pytest.approx(expected[name], rel=2e-2), name
        for name in ("grad_norm", "discriminator_grad_norm", "adversarial_gradient_norm"):
            assert values[name] == pytest.approx(expected[name], rel=0.1), name
    assert all(value.dtype == torch.float32 for value in fast.network.parameters())


@pytest.mark.parametrize(
    "mode",
    [StepMode(channels_last=True, fused_optimizer=True), StepMode(fused_optimizer=True, compile="must")],
    ids=str,
)
def test_faster_means_change_nothing_but_rounding(mode: StepMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced and differentiated is shown here; generating code for it takes a minute and is PyTorch's."""
    compile_as_is = torch.compile
    monkeypatch.setattr(torch, "compile", lambda it, **options: compile_as_is(it, backend="aot_eager", **options))
    reference, fast = adversarial_learner(WITHOUT_BATCH_NORM), adversarial_learner(WITHOUT_BATCH_NORM, mode=mode)
    for step in range(4):
        lr_NCHW, hr_NCHW = patches(step)
        num_micro = 1 + step // 2
        parts = list(zip(lr_NCHW.chunk(num_micro), hr_NCHW.chunk(num_micro), strict=True))
        for ours in (reference, fast):
            ours.step(parts, learning_rate=1e-3)
        assert fast.report() == pytest.approx(reference.report(), rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("mode", [StepMode(), StepMode(channels_last=True, fused_optimizer=True)], ids=str)
@BOTH
def test_it_goes_on_from_a_checkpoint_bit_for_bit(configs: Networks, mode: StepMode, tmp_path: Path) -> None:
    optim = dataclasses.replace(CALM, ema_decay=0.9, clip_grad_norm=0.5)
    gan = dataclasses.replace(ALL_TERMS, relativistic=True)
    straight, stopped = (adversarial_learner(configs, optim=optim, gan=gan, mode=mode) for _ in range(2))
    for ours in (straight, stopped):
        ours.control = Control(learning_rate_factor=0.5, discriminator_pause_steps_left=3, num_recoveries=2)
        for step in range(2):
            ours.step([patches(step)], learning_rate=1e-3)
    store = open_store(str(tmp_path))
    saved = read_checkpoint(store, write_checkpoint(store, Checkpoint(tensors=stopped.state(), meta={"step": 2})))
    resumed = adversarial_learner(configs, optim=optim, gan=gan, mode=mode, seed=7)
    resumed.load_state(saved.tensors)
    for ours in (straight, resumed):
        for step in range(2, 5):
            ours.step([patches(step)], learning_rate=1e-3)
    assert resumed.control.num_recoveries == 2 and resumed.control.num_steps == 5
    expected, got = flat_state(straight), flat_state(resumed)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_a_group_that_is_missing_is_named_and_nothing_is_loaded() -> None:
    ours = adversarial_learner(WITHOUT_BATCH_NORM, seed=1)
    ours.step([patches(0)], learning_rate=1e-3)
    other = adversarial_learner(WITHOUT_BATCH_NORM)
    before = flat_state(other)
    for group in ours.state():
        parts = {name: tensors for name, tensors in ours.state().items() if name != group}
        with pytest.raises(CheckpointError, match=f"lacks .*{group}"):
            other.load_state(parts)
    averaging = adversarial_learner(WITHOUT_BATCH_NORM, optim=dataclasses.replace(CALM, ema_decay=0.9))
    with pytest.raises(CheckpointError, match="lacks ema"):
        averaging.load_state(ours.state())
    assert all(torch.equal(value, before[name]) for name, value in flat_state(other).items())


def test_a_state_from_before_the_first_step_takes_the_optimisers_back(tmp_path: Path) -> None:
    ours = adversarial_learner(WITHOUT_BATCH_NORM)
    store = open_store(str(tmp_path))
    saved = read_checkpoint(store, write_checkpoint(store, Checkpoint(tensors=ours.state(), meta={"step": 0})))
    assert not {"optimizer", "discriminator_optimizer"} & set(saved.tensors)
    straight = adversarial_learner(WITHOUT_BATCH_NORM)
    ours.step([patches(5)], learning_rate=1e-3)
    ours.load_state(saved.tensors)
    for learner in (ours, straight):
        learner.step([patches(0)], learning_rate=1e-3)
    expected = flat_state(straight)
    for name, value in flat_state(ours).items():
        assert torch.equal(value, expected[name]), name


def test_a_bad_patch_stops_both_networks() -> None:
    ours = adversarial_learner(WITHOUT_BATCH_NORM, mode=StepMode(fused_optimizer=True))
    ours.step([patches(0)], learning_rate=1e-3)
    ours.report()
    before = [it.clone() for network in (ours.network, ours.discriminator) for it in network.parameters()]
    lr_NCHW, hr_NCHW = patches(1)
    ours.step([(lr_NCHW, hr_NCHW * math.inf)], learning_rate=1e-3)
    ours.step([(lr_NCHW, hr_NCHW)], learning_rate=1e-3)  # the host does not know yet
    now = [it for network in (ours.network, ours.discriminator) for it in network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
    with pytest.raises(NonFiniteLossError, match="after 0 good steps"):
        ours.report()


def test_a_bad_generator_loss_reaches_the_guard_though_its_gradient_may_be_finite() -> None:
    """L1's gradient of an infinite error is a finite 1."""
    gan = GanConfig(pixel_weight=1.0, perceptual_weight=0.0)
    ours = adversarial_learner(WITHOUT_BATCH_NORM, gan=gan)
    before = [parameter.clone() for parameter in ours.network.parameters()]
    ours._pixel_loss = lambda sr_NCHW, hr_NCHW: l1_loss(sr_NCHW, hr_NCHW * math.inf)
    ours.step([patches(0)], learning_rate=1e-3)
    with pytest.raises(NonFiniteLossError):
        ours.report()
    assert all(torch.equal(a, b) for a, b in zip(ours.network.parameters(), before, strict=True))


def test_features_are_needed_only_for_a_perceptual_loss() -> None:
    ours = adversarial_learner((EDSR, WITHOUT_BATCH_NORM[1]), gan=GanConfig(pixel_weight=1.0, perceptual_weight=0.0))
    ours.step([patches(0)], learning_rate=1e-3)
    assert not [name for name in ours.report() if name.startswith("perceptual")]
    generator, discriminator = networks(WITHOUT_BATCH_NORM)
    with pytest.raises(ValueError, match="--gan.perceptual-weight=0.2 needs"):
        type(ours)(
            generator,
            discriminator,
            None,
            optim=CALM,
            gan=ALL_TERMS,
            perceptual=PERCEPTUAL,
            device=torch.device("cpu"),
            mode=StepMode(),
            collective=ours._collective,
        )
