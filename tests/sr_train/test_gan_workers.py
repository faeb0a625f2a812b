"""Adversarial training on several workers: two, or three with unequal shares, train as one, each rank's gradient
counts, a restart changes no bit.

Real gloo processes. Each group of workers runs all its scenarios once; the tests compare what they report.
"""

import dataclasses
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from sr_data.sampling import worker_samples
from sr_data.storage import open_store
from sr_train.adversarial_learner import AdversarialLearner
from sr_train.checkpoint import Checkpoint, latest_key, read_checkpoint, write_checkpoint
from sr_train.collective import Collective
from sr_train.gan_options import GanConfig
from sr_train.graphed_step import Batch
from sr_train.learner import NonFiniteLossError
from tests.support.gan import (
    ALL_TERMS,
    CALM,
    WITH_BATCH_NORM,
    WITHOUT_BATCH_NORM,
    adversarial_learner,
    flat_state,
    patches,
)

Outcome = dict[str, Any]
RELATIVISTIC = dataclasses.replace(ALL_TERMS, relativistic=True)
ADVERSARIAL_ALONE = GanConfig(pixel_weight=0.0, perceptual_weight=0.0, adversarial_weight=1.0)
CLIPPED = dataclasses.replace(CALM, clip_grad_norm=0.1, ema_decay=0.9)
TRAININGS: dict[str, dict[str, Any]] = {
    "batch norm": {"configs": WITH_BATCH_NORM},
    "batch norm, relativistic": {"configs": WITH_BATCH_NORM, "gan": RELATIVISTIC},
    "spectral norm": {"configs": WITHOUT_BATCH_NORM},
    "spectral norm, relativistic, clipped": {
        "configs": WITHOUT_BATCH_NORM,
        "gan": RELATIVISTIC,
        "optim": CLIPPED,
    },
}
NUM_PATCHES, NUM_STEPS = 8, 3


def batches_of(step: int, num_micro: int, collective: Collective) -> list[Batch]:
    """This worker's part of each micro-batch."""
    lr_NCHW, hr_NCHW = patches(step, NUM_PATCHES)
    mine = worker_samples(NUM_PATCHES // num_micro, rank=collective.rank, num_workers=collective.world_size)
    part = slice(mine.start, mine.stop)
    parts = zip(lr_NCHW.chunk(num_micro), hr_NCHW.chunk(num_micro), strict=True)
    return [(lr[part], hr[part]) for lr, hr in parts]


def weighted(collective: Collective, num_micro: int) -> Collective:
    num_samples = sum(len(lr_NCHW) for lr_NCHW, _ in batches_of(0, num_micro, collective))
    return dataclasses.replace(collective, weight=num_samples * collective.world_size / NUM_PATCHES)


def trained(collective: Collective, num_micro: int, **options: Any) -> Outcome:
    ours = adversarial_learner(collective=weighted(collective, num_micro), **options)
    reports, states = [], []
    for step in range(NUM_STEPS):
        ours.step(batches_of(step, num_micro, collective), learning_rate=1e-3)
        reports.append(ours.report())
        states.append(flat_state(ours))
    return {"reports": reports, "states": states}


def own_gradients(collective: Collective, relativistic: bool) -> dict[str, float]:
    """Norms of what this rank alone backpropagates to the generator, before it is averaged over the workers."""
    gan = dataclasses.replace(ADVERSARIAL_ALONE, relativistic=relativistic)
    ours = adversarial_learner(WITH_BATCH_NORM, gan=gan, collective=collective)
    norms: dict[str, float] = {}
    for name, parameter in ours.network.named_parameters():
        parameter.register_hook(lambda gradient, name=name: norms.__setitem__(name, float(gradient.norm())))
    ours.step(batches_of(0, 1, collective), learning_rate=1e-3)
    assert len(norms) == len(list(ours.network.parameters()))
    return norms


def poisoned(collective: Collective, what: str) -> Outcome:
    """One good step, one that is bad on rank 1 alone, and another good one."""
    ours = adversarial_learner(WITHOUT_BATCH_NORM, collective=collective)
    ours.step(batches_of(0, 1, collective), learning_rate=1e-3)
    ours.report()
    before = flat_state(ours)
    ((lr_NCHW, hr_NCHW),) = batches_of(1, 1, collective)
    if collective.rank == 1 and what == "patch":
        hr_NCHW = hr_NCHW * math.inf
    if collective.rank == 1 and what == "generator's loss":
        ours._pixel_loss = lambda sr_NCHW, hr_NCHW: (sr_NCHW * math.inf).abs().mean()
    error: str | None = None
    ours.step([(lr_NCHW, hr_NCHW)], learning_rate=1e-3)
    try:
        ours.report()
    except NonFiniteLossError as bad:
        error = str(bad)
    after = flat_state(ours)
    changed = [name for name, it in before.items() if not torch.equal(it, after[name])]
    return {"error": error, "changed": changed}


def exchanges(collective: Collective, num_micro: int) -> list[str]:
    """Which networks' gradients went over the wire, in order, in a step."""
    ours = adversarial_learner(WITHOUT_BATCH_NORM, collective=collective)
    sent: list[str] = []

    def listen(name: str, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent.append(name)
        return allreduce_hook(None, bucket)

    ours._generator._parallel.register_comm_hook("generator", listen)
    ours._discriminator._parallel.register_comm_hook("discriminator", listen)
    ours.step(batches_of(0, num_micro, collective), learning_rate=1e-3)
    return sent


def _join(rank: int, world_size: int, folder: str) -> Collective:
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=patience)
    torch.set_num_threads(1)
    return Collective.of_process_group()


def all_scenarios(collective: Collective) -> Outcome:
    outcome: Outcome = {
        f"{name}, {num_micro}": trained(collective, num_micro, **options)
        for name, options in TRAININGS.items()
        for num_micro in (1, 2)
    }
    for relativistic in (False, True):
        outcome[f"own gradients {relativistic}"] = own_gradients(collective, relativistic)
    return outcome


def _two(rank: int, world_size: int, folder: str) -> None:
    collective = _join(rank, world_size, folder)
    outcome = all_scenarios(collective)
    for what in ("patch", "generator's loss"):
        outcome[f"poisoned {what}"] = poisoned(collective, what)
    outcome["exchanges"] = [exchanges(collective, num_micro) for num_micro in (1, 2)]
    torch.save(outcome, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> Outcome:
    return all_scenarios(Collective())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(_two, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def _three(rank: int, world_size: int, folder: str) -> None:
    """8 patches: 2, 3 and 3; as two micro-batches of 4: 1, 1 and 2."""
    collective = _join(rank, world_size, folder)
    outcome = {
        f"{name}, {num_micro}": trained(collective, num_micro, **options)
        for name, options in TRAININGS.items()
        for num_micro in (1, 2)
    }
    torch.save(outcome, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    folder = tmp_path_factory.mktemp("three")
    mp.spawn(_three, args=(3, str(folder)), nprocs=3)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(3)]


@pytest.mark.parametrize("workers", ["two", "three"])
@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize("name", TRAININGS)
def test_workers_train_as_one(
    name: str, num_micro: int, workers: str, alone: Outcome, request: pytest.FixtureRequest
) -> None:
    """To rounding, which grows where an activation changes sides, and so is small only after the first step."""
    expected = alone[f"{name}, {num_micro}"]
    first, second = [outcome[f"{name}, {num_micro}"] for outcome in request.getfixturevalue(workers)][:2]
    assert first["reports"] == second["reports"]
    assert first["reports"][0] == pytest.approx(expected["reports"][0], rel=1e-5, abs=1e-7)
    for step in range(NUM_STEPS):
        losses = {key: value for key, value in expected["reports"][step].items() if key.endswith("loss")}
        assert {key: first["reports"][step][key] for key in losses} == pytest.approx(losses, rel=2e-2), step
        assert all(torch.equal(value, second["states"][step][key]) for key, value in first["states"][step].items())
    for key, value in expected["states"][0].items():
        largest = float(value.abs().max()) if value.numel() else 0.0
        ours = first["states"][0][key].double()
        assert torch.allclose(ours, value.double(), rtol=0, atol=1e-4 * largest + 1e-7), key


def test_gradients_are_exchanged_once_per_network_and_step(two: list[Outcome]) -> None:
    """One bucket holds all of such a tiny network. The generator's update exchanges nothing of the discriminator's."""
    for outcome in two:
        assert outcome["exchanges"] == [["discriminator", "generator"]] * 2


@pytest.mark.parametrize("relativistic", [False, True])
def test_the_adversarial_term_alone_gives_every_rank_a_gradient(relativistic: bool, two: list[Outcome]) -> None:
    for rank, outcome in enumerate(two):
        norms = outcome[f"own gradients {relativistic}"]
        assert all(norm > 0 and math.isfinite(norm) for norm in norms.values()), (rank, norms)
    first, second = (outcome[f"own gradients {relativistic}"] for outcome in two)
    assert first != second  # of other patches, so not yet averaged


def test_one_ranks_bad_patch_stops_both_networks_of_all(two: list[Outcome]) -> None:
    for outcome in two:
        bad = outcome["poisoned patch"]
        assert bad["error"] is not None and "after 0 good steps" in bad["error"]
        assert [name for name in bad["changed"] if not name.endswith(("_u", "_v", "num_steps"))] == []


def test_one_ranks_bad_generator_loss_stops_all_generators(two: list[Outcome]) -> None:
    for outcome in two:
        bad = outcome["poisoned generator's loss"]
        assert bad["error"] is not None
        assert [name for name in bad["changed"] if name.startswith(("model/", "optimizer/"))] == []


def _resumes(rank: int, world_size: int, folder: str) -> None:
    """Three steps, and again two steps, a checkpoint file, a new learner, a step: what a restarted worker does."""
    collective = _join(rank, world_size, folder)
    outcome = {}
    for name in ("batch norm, relativistic", "spectral norm, relativistic, clipped"):
        store = open_store(f"{folder}/{name}")

        def new(options: dict[str, Any] = TRAININGS[name]) -> AdversarialLearner:
            return adversarial_learner(collective=collective, **options)

        straight, stopped = new(), new()
        for step in range(3):
            straight.step(batches_of(step, 2, collective), learning_rate=1e-3)
            if step == 2:
                if rank == 0:
                    write_checkpoint(store, Checkpoint(tensors=stopped.state(), meta={"step": 2}))
                dist.barrier()
                stopped = new()
                stopped.load_state(read_checkpoint(store, latest_key(store) or "").tensors)
            stopped.step(batches_of(step, 2, collective), learning_rate=1e-3)
        outcome[name] = [flat_state(straight), flat_state(stopped)]
    torch.save(outcome, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_restarted_workers_go_on_bit_for_bit(tmp_path: Path) -> None:
    mp.spawn(_resumes, args=(2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        for name, (straight, stopped) in torch.load(tmp_path / f"rank{rank}.pt", weights_only=True).items():
            assert straight.keys() == stopped.keys()
            for key, value in straight.items():
                assert torch.equal(value, stopped[key]), (rank, name, key)
