"""Adversarial losses against the papers' formulas, and over workers against the same losses of one."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sr_train.collective import Collective
from sr_train.gan_losses import accuracies, discriminator_loss, generator_loss, relative_to_average

ALONE = Collective()


def logits(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 1), (3, 1, 2, 2)], ids=["one logit per image", "logits per region"])
def test_standard_losses_are_goodfellows_and_srgans(shape: tuple[int, ...]) -> None:
    real, fake = logits(*shape, seed=0), logits(*shape, seed=1)
    d_real, d_fake = torch.sigmoid(real), torch.sigmoid(fake)
    torch.testing.assert_close(discriminator_loss(real, fake), -d_real.log().mean() - (1 - d_fake).log().mean())
    torch.testing.assert_close(generator_loss(fake), -d_fake.log().mean())
    assert float(discriminator_loss(0 * real, 0 * fake)) == pytest.approx(math.log(4))


@pytest.mark.parametrize("shape", [(6, 1), (3, 1, 2, 2)], ids=["one logit per image", "logits per region"])
def test_relativistic_losses_are_esrgans(shape: tuple[int, ...]) -> None:
    """Wang et al. 2018, equations 1 and 2 and the one before them."""
    real, fake = logits(*shape, seed=0), logits(*shape, seed=1)
    d_real_fake, d_fake_real = torch.sigmoid(real - fake.mean()), torch.sigmoid(fake - real.mean())
    relative = relative_to_average(real, fake, ALONE)
    expected = -d_real_fake.log().mean() - (1 - d_fake_real).log().mean()
    torch.testing.assert_close(discriminator_loss(*relative), expected)
    expected = -(1 - d_real_fake).log().mean() - d_fake_real.log().mean()
    torch.testing.assert_close(generator_loss(relative[1], relative[0]), expected)


def test_a_discriminator_that_is_sure_still_teaches_the_generator() -> None:
    """log(1 - D) would give nothing there; a sigmoid before the logarithm would give infinity."""
    fake = torch.tensor([-200.0, -40.0], requires_grad=True)
    loss = generator_loss(fake)
    (gradient,) = torch.autograd.grad(loss, fake)
    assert loss.item() == pytest.approx(120.0)
    assert gradient.tolist() == pytest.approx([-0.5, -0.5])


def test_accuracies_are_shares_of_right_verdicts() -> None:
    real, fake = accuracies(torch.tensor([[3.0], [0.1], [-1.0], [2.0]]), torch.tensor([[-2.0], [1.0], [0.5], [-9.0]]))
    assert (float(real), float(fake)) == (0.75, 0.5)


def _on_rank(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    share = slice(rank * 6 // world_size, (rank + 1) * 6 // world_size)
    real, fake = (logits(6, 1, seed=seed)[share].requires_grad_() for seed in range(2))
    relative = relative_to_average(real, fake, Collective.of_process_group())
    loss = discriminator_loss(*relative) + 2 * generator_loss(relative[1], relative[0])
    loss.backward()
    torch.save({"loss": loss.detach(), "real": real.grad, "fake": fake.grad}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_averages_are_those_of_all_workers_and_so_are_their_gradients(tmp_path: Path) -> None:
    outcomes = {}
    for world_size in (1, 3):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        mp.spawn(_on_rank, args=(world_size, str(folder)), nprocs=world_size)
        outcomes[world_size] = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]
    (alone,), three = outcomes[1], outcomes[3]
    torch.testing.assert_close(torch.stack([it["loss"] for it in three]).mean(), alone["loss"])
    for name in ("real", "fake"):
        # DDP averages over the workers what each one backpropagates.
        torch.testing.assert_close(torch.cat([it[name] for it in three]) / 3, alone[name])
