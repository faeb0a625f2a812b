"""One optimiser step: the same on one worker and two, clipped, averaged, and restored with its optimiser."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from sr_data.sampling import worker_samples
from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.srresnet import SRResNetConfig
from sr_train.collective import Collective
from sr_train.learner import LOSSES, NonFiniteLossError, PixelLearner
from sr_train.options import OptimConfig
from sr_train.presets import EDSR_PRESETS
from sr_train.step_mode import REFERENCE, StepMode

TINY = EDSRConfig(scale=2, num_blocks=2, num_channels=8)
CPU = torch.device("cpu")


def learner(config: OptimConfig, collective: Collective | None = None, *, mode: StepMode = REFERENCE) -> PixelLearner:
    network = build_model(TINY, seed=1)
    return PixelLearner(network, config, device=CPU, mode=mode, collective=collective or Collective())


def stepped(ours: PixelLearner, *batches: tuple[torch.Tensor, torch.Tensor], learning_rate: float) -> dict[str, float]:
    """The values of one step."""
    ours.step(batches, learning_rate=learning_rate)
    return ours.report()


def patches(num: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    hr_NCHW = torch.rand(num, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return nn.functional.avg_pool2d(hr_NCHW, 2), hr_NCHW


def test_the_step_is_adam_on_the_pixel_loss() -> None:
    for loss, function in LOSSES.items():
        ours = learner(OptimConfig(loss=loss))  # type: ignore[arg-type]
        plain = copy.deepcopy(ours.network)
        adam = torch.optim.Adam(plain.parameters(), lr=1e-3)
        for seed in range(3):
            lr_NCHW, hr_NCHW = patches(4, seed=seed)
            values = stepped(ours, (lr_NCHW, hr_NCHW), learning_rate=1e-3)
            adam.zero_grad()
            expected = function(plain(lr_NCHW), hr_NCHW)
            expected.backward()
            adam.step()
            assert values["loss"] == pytest.approx(float(expected.detach()), rel=1e-6)
        for name, value in plain.state_dict().items():
            assert torch.allclose(value, ours.network.state_dict()[name], atol=1e-7), name


@pytest.mark.parametrize("preset", EDSR_PRESETS)
def test_every_preset_takes_a_step(preset: str) -> None:
    config = EDSR_PRESETS[preset]
    network, scale = build_model(config.model, seed=0), config.model.scale
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ours = PixelLearner(network, config.optim, device=CPU, mode=REFERENCE, collective=Collective())
    hr_NCHW = torch.rand(1, 3, 6 * scale, 6 * scale, generator=torch.Generator().manual_seed(0))
    values = stepped(ours, (nn.functional.avg_pool2d(hr_NCHW, scale), hr_NCHW), learning_rate=1e-4)
    assert 0 < values["loss"] < 1
    assert [name for name, value in ours.network.state_dict().items() if torch.equal(value, before[name])] == []


def test_every_parameter_gets_a_gradient() -> None:
    ours = learner(OptimConfig())
    ours.step([patches(4)], learning_rate=1e-3)
    for name, parameter in ours.network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"no gradient for {name}"


def test_clipping_bounds_the_gradient_that_adam_sees() -> None:
    ours = learner(OptimConfig(clip_grad_norm=1e-3))
    reported = stepped(ours, patches(4), learning_rate=1e-3)["grad_norm"]
    norm = nn.utils.get_total_norm(
        [parameter.grad for parameter in ours.network.parameters() if parameter.grad is not None]
    )
    assert reported > 1e-3
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_the_moving_average_follows_its_definition() -> None:
    ours = learner(OptimConfig(ema_decay=0.3))
    expected = {name: value.clone() for name, value in ours.network.named_parameters()}
    for step, decay in enumerate((2 / 11, 3 / 12, 0.3, 0.3)):  # (1 + n) / (10 + n), at most what was asked for
        ours.step([patches(4, seed=step)], learning_rate=1e-2)
        for name, value in ours.network.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach()
    averaged = dict(ours.inference_network().named_parameters())
    for name, value in expected.items():
        assert torch.allclose(averaged[name], value, atol=1e-6), name
        assert not torch.equal(averaged[name], dict(ours.network.named_parameters())[name])


def test_the_moving_average_has_statistics_that_belong_to_its_weights() -> None:
    network = build_model(SRResNetConfig(scale=2, num_blocks=1, num_channels=4), seed=0)
    optim = OptimConfig(ema_decay=0.9)
    ours = PixelLearner(network, optim, device=CPU, mode=REFERENCE, collective=Collective())
    name = next(name for name, _ in network.named_buffers() if name.endswith("running_mean"))
    expected = dict(network.named_buffers())[name].clone()
    for step, decay in enumerate((2 / 11, 3 / 12)):
        ours.step([patches(4, seed=step)], learning_rate=1e-2)
        expected = decay * expected + (1 - decay) * dict(network.named_buffers())[name]
    assert torch.allclose(dict(ours.inference_network().named_buffers())[name], expected, atol=1e-6)


def test_bf16_stays_close_to_float32() -> None:
    exact, fast = learner(OptimConfig()), learner(OptimConfig(), mode=StepMode(bf16=True))
    for seed in range(5):
        batch = patches(8, seed=seed)
        expected = stepped(exact, batch, learning_rate=1e-4)["loss"]
        assert stepped(fast, batch, learning_rate=1e-4)["loss"] == pytest.approx(expected, rel=2e-2)


def _on_rank(rank: int, world_size: int, folder: str, poisoned_rank: int | None) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    mine = worker_samples(8, rank=rank, num_workers=world_size, unit=2)  # of three workers, one has half as many
    share = slice(mine.start, mine.stop)
    collective = replace(Collective.of_process_group(), weight=len(mine) * world_size / 8)
    ours = learner(OptimConfig(clip_grad_norm=0.5, ema_decay=0.9), collective)
    losses: list[float] = []
    error: str | None = None
    lr_NCHW, hr_NCHW = patches(8)
    if rank == poisoned_rank:
        hr_NCHW = hr_NCHW * torch.inf
    try:
        for _ in range(3):
            halves = [(lr_NCHW[share][part::2], hr_NCHW[share][part::2]) for part in range(2)]
            losses.append(stepped(ours, *halves, learning_rate=1e-3)["loss"])
    except NonFiniteLossError as bad:
        error = str(bad)
    torch.save({"losses": losses, "state": ours.state(), "error": error}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def on_workers(folder: Path, world_size: int, poisoned_rank: int | None = None) -> list[dict[str, Any]]:
    folder.mkdir()
    mp.spawn(_on_rank, args=(world_size, str(folder), poisoned_rank), nprocs=world_size)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def _resumes_on_rank(rank: int, world_size: int, folder: str) -> None:
    """Six steps, and again three steps, a new learner, three steps: what a restarted worker does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    lr_NCHW, hr_NCHW = patches(6)
    batch = [(lr_NCHW[rank::world_size], hr_NCHW[rank::world_size])]
    straight, stopped = (learner(OptimConfig(), Collective.of_process_group()) for _ in range(2))
    for step in range(6):
        straight.step(batch, learning_rate=1e-3)
        if step == 3:
            saved = copy.deepcopy(stopped.state())
            stopped = learner(OptimConfig(), Collective.of_process_group())
            stopped.load_state(saved)
        stopped.step(batch, learning_rate=1e-3)
    torch.save({"straight": straight.state(), "stopped": stopped.state()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_three_workers_add_in_the_same_order_after_a_restart(tmp_path: Path) -> None:
    mp.spawn(_resumes_on_rank, args=(3, str(tmp_path)), nprocs=3)
    states = torch.load(tmp_path / "rank0.pt", weights_only=True)
    for group, values in states["straight"].items():
        for name, value in values.items():
            assert torch.equal(value, states["stopped"][group][name]), (group, name)


@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_train_as_one(tmp_path: Path, num_workers: int) -> None:
    (alone,) = on_workers(tmp_path / "one", 1)
    first, second, *_ = on_workers(tmp_path / "several", num_workers)
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for group, values in alone["state"].items():
        for name, value in values.items():
            assert torch.equal(first["state"][group][name], second["state"][group][name]), (group, name)
            assert torch.allclose(first["state"][group][name], value, atol=1e-5), (group, name)


def test_one_workers_bad_loss_stops_all_before_the_step(tmp_path: Path) -> None:
    before = learner(OptimConfig(ema_decay=0.9)).state()["model"]
    for outcome in on_workers(tmp_path / "two", 2, poisoned_rank=1):
        assert outcome["error"] is not None and outcome["losses"] == []
        assert all(torch.equal(outcome["state"]["model"][name], value) for name, value in before.items())
