"""What only a GPU can show of adversarial training: the fast step follows the reference, and nothing in it waits."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

from sr_train.adversarial_learner import AdversarialLearner
from sr_train.graphed_step import Batch
from sr_train.options import StepConfig
from sr_train.step_mode import REFERENCE, StepMode, step_mode
from tests.support.gan import ALL_TERMS, WITH_BATCH_NORM, WITHOUT_BATCH_NORM, Networks, adversarial_learner, patches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BOTH = pytest.mark.parametrize("configs", [WITH_BATCH_NORM, WITHOUT_BATCH_NORM], ids=["batch norm", "spectral norm"])
FAST = step_mode(StepConfig(), device_type="cuda", num_workers=1)
EAGER = StepMode(bf16=True, channels_last=True, fused_optimizer=True)
RELATIVISTIC = dataclasses.replace(ALL_TERMS, relativistic=True)
LOSSES = ("loss", "pixel_loss", "perceptual_loss", "adversarial_loss", "discriminator_loss")


def on_gpu(configs: Networks, mode: StepMode) -> AdversarialLearner:
    return adversarial_learner(configs, gan=RELATIVISTIC, mode=mode, device="cuda")


def batches(step: int, num_micro: int = 1) -> list[Batch]:
    lr_NCHW, hr_NCHW = (it.cuda() for it in patches(step, num=8))
    return list(zip(lr_NCHW.chunk(num_micro), hr_NCHW.chunk(num_micro), strict=True))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any call that makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize(
    ("mode", "tolerance"),
    [
        (StepMode(channels_last=True, fused_optimizer=True, cuda_graph="must"), 2e-2),
        (EAGER, 5e-2),
        (FAST, 5e-2),
    ],
    ids=str,
)
@BOTH
def test_every_fast_path_follows_the_reference(
    configs: Networks, mode: StepMode, tolerance: float, num_micro: int
) -> None:
    reference, fast = on_gpu(configs, REFERENCE), on_gpu(configs, mode)
    for step in range(6):  # the fourth is captured, later ones replay it
        for ours in (reference, fast):
            ours.step(batches(step, num_micro), learning_rate=1e-4)
        expected, values = reference.report(), fast.report()
        for name in LOSSES:
            assert values[name] == pytest.approx(expected[name], rel=tolerance), (step, name)


@pytest.mark.parametrize("mode", [FAST, EAGER], ids=str)
@BOTH
def test_steps_never_wait_for_the_gpu(configs: Networks, mode: StepMode, request: pytest.FixtureRequest) -> None:
    ours, given = on_gpu(configs, mode), [batches(step) for step in range(12)]
    for step in range(6):  # compiled, captured
        ours.step(given[step], learning_rate=1e-4)
    request.getfixturevalue("no_waiting")
    for step in range(6, 12):
        ours.step(given[step], learning_rate=1e-4)
    torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(ours.report()["loss"])


@BOTH
def test_a_pause_and_its_end_reach_a_captured_step(configs: Networks) -> None:
    ours = on_gpu(configs, FAST)
    for step in range(6):
        ours.step(batches(step), learning_rate=1e-3)
    ours.control = dataclasses.replace(ours.control, discriminator_pause_steps_left=1, learning_rate_factor=0.5)
    for learns in (False, True):
        before = [[it.clone() for it in net.parameters()] for net in (ours.network, ours.discriminator)]
        ours.step(batches(7), learning_rate=1e-3)
        assert all(
            torch.equal(now, then) != learns
            for now, then in zip(ours.discriminator.parameters(), before[1], strict=True)
        )
        assert not any(torch.equal(now, then) for now, then in zip(ours.network.parameters(), before[0], strict=True))


@BOTH
def test_a_captured_step_goes_on_from_a_restored_state(configs: Networks) -> None:
    ours = on_gpu(configs, FAST)
    for step in range(6):
        ours.step(batches(step), learning_rate=1e-3)
    saved = {group: {name: it.clone() for name, it in named.items()} for group, named in ours.state().items()}
    ours.report()
    losses = []
    for _ in range(2):
        for step in range(6, 12):
            ours.step(batches(step), learning_rate=1e-3)
        losses.append(ours.report()["loss"])
        ours.load_state(saved)
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)
