"""Every means of computing a step gives the reference's training: same losses, same weights, same PSNR."""

import math

import pytest
import torch
from torch import nn

from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_train.collective import Collective
from sr_train.learner import PixelLearner
from sr_train.optimizer import FiniteGuard
from sr_train.options import ConfigError, OptimConfig, StepConfig
from sr_train.step_mode import REFERENCE, StepMode, step_mode

TINY = EDSRConfig(scale=2, num_blocks=2, num_channels=8)
CPU = torch.device("cpu")
OPTIM = OptimConfig(ema_decay=0.9, clip_grad_norm=0.5, weight_decay=0.01)


def patches(step: int, num: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth random patches, so that a short training has something to learn."""
    noise = torch.rand(num, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    hr_NCHW = nn.functional.interpolate(noise, size=(32, 32), mode="bicubic").clamp(0, 1)
    return nn.functional.avg_pool2d(hr_NCHW, 2), hr_NCHW


def trained(mode: StepMode, num_steps: int, *, num_micro: int = 1) -> tuple[PixelLearner, list[float]]:
    learner = PixelLearner(build_model(TINY, seed=0), OPTIM, device=CPU, mode=mode, collective=Collective())
    losses = []
    for step in range(num_steps):
        lr_NCHW, hr_NCHW = patches(step)
        parts = list(zip(lr_NCHW.chunk(num_micro), hr_NCHW.chunk(num_micro), strict=True))
        learner.step(parts, learning_rate=2e-3)
        losses.append(learner.report()["loss"])
    return learner, losses


def psnr_db(learner: PixelLearner) -> float:
    lr_NCHW, hr_NCHW = patches(10_000, num=32)
    with torch.no_grad():
        mse = nn.functional.mse_loss(learner.inference_network()(lr_NCHW).clamp(0, 1), hr_NCHW)
    return -10 * math.log10(float(mse))


@pytest.mark.parametrize(
    "mode",
    [
        StepMode(channels_last=True),
        StepMode(fused_optimizer=True),
        StepMode(channels_last=True, fused_optimizer=True, compile="must"),
    ],
    ids=str,
)
def test_float32_means_change_nothing_but_rounding(mode: StepMode) -> None:
    reference, expected = trained(REFERENCE, 6)
    fast, losses = trained(mode, 6)
    assert losses == pytest.approx(expected, rel=1e-4)
    for group in ("model", "ema"):
        for name, value in reference.state()[group].items():
            assert torch.allclose(value, fast.state()[group][name], atol=2e-4), (group, name)


def test_bf16_follows_the_reference_and_reaches_its_psnr() -> None:
    reference, expected = trained(REFERENCE, 50)
    fast, losses = trained(StepMode(bf16=True, channels_last=True, fused_optimizer=True), 50)
    assert losses[:5] == pytest.approx(expected[:5], rel=2**-7)  # bfloat16 has 8 significant bits
    untrained = psnr_db(trained(REFERENCE, 0)[0])
    assert psnr_db(reference) > untrained + 3
    assert psnr_db(fast) == pytest.approx(psnr_db(reference), abs=0.3)


def test_fused_steps_freeze_at_the_first_bad_gradient_and_stay_frozen() -> None:
    learner, _ = trained(StepMode(fused_optimizer=True, channels_last=True), 2)
    before = {group: {name: value.clone() for name, value in named.items()} for group, named in learner.state().items()}
    lr_NCHW, hr_NCHW = patches(2)
    learner.step([(lr_NCHW, hr_NCHW * torch.inf)], learning_rate=1e-3)
    learner.step([(lr_NCHW, hr_NCHW)], learning_rate=1e-3)  # the host does not know yet
    for group, named in before.items():
        for name, value in named.items():
            assert torch.equal(value, learner.state()[group][name]), (group, name)
    with pytest.raises(ArithmeticError, match="after 0 good steps"):
        learner.report()
    learner.load_state(before)
    learner.step([(lr_NCHW, hr_NCHW)], learning_rate=1e-3)
    assert math.isfinite(learner.report()["loss"])


def test_a_restored_optimiser_goes_on_in_the_layout_of_its_weights() -> None:
    """Files hold plain order; a fused kernel walks weights and moments with one index."""
    mode = StepMode(fused_optimizer=True, channels_last=True)
    straight, _ = trained(mode, 6)
    stopped, _ = trained(mode, 3)
    plain = {
        group: {name: value.contiguous().clone() for name, value in named.items()}
        for group, named in stopped.state().items()
    }
    resumed = PixelLearner(build_model(TINY, seed=5), OPTIM, device=CPU, mode=mode, collective=Collective())
    resumed.load_state(plain)
    for step in range(3, 6):
        resumed.step([patches(step)], learning_rate=2e-3)
    for group, named in straight.state().items():
        for name, value in named.items():
            assert torch.equal(value, resumed.state()[group][name]), (group, name)


def test_the_guard_counts_the_steps_before_the_bad_one() -> None:
    guard = FiniteGuard(CPU)
    for value in (1.0, 2.0, float("nan"), 3.0):
        guard.check(torch.tensor(value))
        guard.end_step()
    assert guard.read() == 2
    guard.reset()
    guard.check(torch.tensor(1.0))
    guard.end_step()
    assert guard.read() is None


def test_a_compiler_that_is_missing_costs_speed_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(module: nn.Module, inputs: object) -> object:
        raise RuntimeError("no compiler here")

    compile_as_is = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile_as_is(module, backend=broken, **options))
    _, expected = trained(REFERENCE, 2)
    _, losses = trained(StepMode(compile="try"), 2)
    assert losses == expected
    assert "going on without it" in caplog.text
    with pytest.raises(Exception, match="no compiler here"):
        trained(StepMode(compile="must"), 1)


def test_auto_is_what_is_safe_on_a_device() -> None:
    assert step_mode(StepConfig(), device_type="cpu", num_workers=2) == StepMode(
        channels_last=True, fused_optimizer=True
    )
    alone = step_mode(StepConfig(precision="bf16"), device_type="cuda", num_workers=1)
    assert (alone.bf16, alone.compile, alone.cuda_graph, alone.batch_ahead) == (True, "try", "try", True)
    assert step_mode(StepConfig(), device_type="cuda", num_workers=2).cuda_graph == "no"
    plain_adam = step_mode(StepConfig(fused_optimizer=False), device_type="cuda", num_workers=1)
    assert plain_adam.cuda_graph == "no"  # it waits for the device, which a capture forbids
    off = StepConfig(
        precision="float32",
        channels_last=False,
        compile="off",
        cuda_graph="off",
        fused_optimizer=False,
        batch_ahead=False,
    )
    assert step_mode(off, device_type="cuda", num_workers=1) == REFERENCE


@pytest.mark.parametrize(
    ("device_type", "num_workers", "fused"), [("cpu", 1, True), ("cuda", 2, True), ("cuda", 1, False)]
)
def test_a_graph_that_cannot_be_had_is_refused_by_its_flag(device_type: str, num_workers: int, fused: bool) -> None:
    with pytest.raises(ConfigError, match="--step.cuda-graph on"):
        step_mode(StepConfig(cuda_graph="on", fused_optimizer=fused), device_type=device_type, num_workers=num_workers)
