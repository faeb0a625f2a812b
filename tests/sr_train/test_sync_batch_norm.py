"""BatchNorm over the global batch: two workers with half the patches each are one worker with all of them.

Two gloo processes run every scenario once (`workers`); the tests compare what they report with a plain network in one
process.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sr_models.architectures import build_model
from sr_models.discriminators import DiscriminatorConfig, build_discriminator
from sr_models.srresnet import SRResNetConfig
from sr_train.sync_batch_norm import GlobalBatchNorm, synchronise_batch_norm

Report = dict[str, Any]
CPU = torch.device("cpu")
SHARES = {"equal": (4, 4), "unequal": (3, 5), "all on one": (0, 8)}
DDP_OPTIONS = [
    {"broadcast_buffers": broadcast, "find_unused_parameters": unused}
    for broadcast in (True, False)
    for unused in (True, False)
]


def generator() -> nn.Module:
    return build_model(SRResNetConfig(scale=2, num_blocks=2, num_channels=4), seed=0)


def discriminator() -> nn.Module:
    return build_discriminator(DiscriminatorConfig(num_channels=4), patch_px_hr=16, seed=0)


def patches(num: int, px: int, *, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(num, 3, px, px, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def share(values: Tensor, rank: int, world_size: int) -> Tensor:
    return values[rank * len(values) // world_size : (rank + 1) * len(values) // world_size]


class Worker:
    """A network as one of the workers holds it: alone, it is the plain network."""

    def __init__(self, network: nn.Module, rank: int, world_size: int, **ddp_options: bool) -> None:
        self.network = synchronise_batch_norm(network, world_size=world_size, device=CPU)
        self.ddp = DistributedDataParallel(self.network, **ddp_options) if world_size > 1 else None
        self.rank, self.world_size = rank, world_size

    def __call__(self, values: Tensor) -> Tensor:
        """The output for this worker's share."""
        return (self.ddp or self.network)(share(values, self.rank, self.world_size))

    def no_sync(self) -> AbstractContextManager[None]:
        return self.ddp.no_sync() if self.ddp is not None else nullcontext()

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.network.parameters():
            parameter -= 0.05 * parameter.grad
            parameter.grad = None

    def report(self, outputs: list[Tensor]) -> Report:
        gradients = {name: parameter.grad for name, parameter in self.network.named_parameters()}
        return {"outputs": outputs, "gradients": gradients, "state": dict(self.network.state_dict())}


def trains_a_generator(rank: int, world_size: int, dtype: torch.dtype, **ddp_options: bool) -> Report:
    """Two steps and a third backward pass, each of two micro-batches of four patches."""
    worker, outputs = Worker(generator().to(dtype), rank, world_size, **ddp_options), []
    for step in range(3):
        if step:
            worker.step()
        for micro in range(2):
            lr_NCHW = patches(4, 6, seed=10 * step + micro, dtype=dtype)
            target_NCHW = patches(4, 12, seed=10 * step + micro + 5, dtype=dtype)
            with worker.no_sync() if micro == 0 else nullcontext():
                sr_NCHW = worker(lr_NCHW)
                ((sr_NCHW - share(target_NCHW, rank, world_size)).square().mean() / 2).backward()
            outputs.append(sr_NCHW.detach())
    return worker.report(outputs)


def trains_a_discriminator(rank: int, world_size: int, dtype: torch.dtype, **ddp_options: bool) -> Report:
    """Two steps and a third backward pass; it sees real patches, then fake ones, before one backward pass."""
    worker, outputs = Worker(discriminator().to(dtype), rank, world_size, **ddp_options), []
    for step in range(3):
        if step:
            worker.step()
        real = worker(patches(8, 16, seed=2 * step, dtype=dtype))
        fake = worker(patches(8, 16, seed=2 * step + 1, dtype=dtype).square())
        (nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()).backward()
        outputs += [real.detach(), fake.detach()]
    return worker.report(outputs)


TRAININGS: dict[str, Callable[..., Report]] = {
    "generator": trains_a_generator,
    "discriminator": trains_a_discriminator,
}


def features(num: int, *, offset: float, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return (torch.randn(num, 5, 4, 3, generator=draw, dtype=torch.float64) + offset).to(dtype)


def a_layer(dtype: torch.dtype, **options: Any) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(5, **options).to(dtype)
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2.0, 5))
            layer.bias.copy_(torch.linspace(-1.0, 1.0, 5))
    return layer


def passes_a_layer(layer: nn.Module, x_NCHW: Tensor, weights_NCHW: Tensor) -> Report:
    """The layer on features in training mode, and the gradients of a weighted sum of its output."""
    x_NCHW = x_NCHW.clone().requires_grad_()
    output_NCHW = layer(x_NCHW)
    (output_NCHW * weights_NCHW).sum().backward()
    return {
        "output": output_NCHW.detach(),
        "features": x_NCHW.grad,
        "parameters": [parameter.grad for parameter in layer.parameters()],
        "buffers": list(layer.buffers()),
    }


def _join(rank: int, world_size: int, folder: str) -> None:
    init, patience = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size, timeout=patience)
    torch.set_num_threads(1)


def _on_rank(rank: int, world_size: int, folder: str) -> None:
    _join(rank, world_size, folder)
    report: Report = {}
    for name, training in TRAININGS.items():
        for options in DDP_OPTIONS:
            report[f"{name} {options}"] = training(rank, world_size, torch.float64, **options)
        for attempt in range(2):
            report[f"{name} float32 {attempt}"] = training(rank, world_size, torch.float32, **DDP_OPTIONS[-1])

    def layer_of(dtype: torch.dtype, **options: Any) -> nn.Module:
        return synchronise_batch_norm(a_layer(dtype, **options), world_size=world_size, device=CPU)

    def pass_share(layer: nn.Module, shares: tuple[int, int], *, offset: float, dtype: torch.dtype) -> Report:
        mine = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
        x_NCHW, weights_NCHW = features(8, offset=offset, dtype=dtype), features(8, offset=1.0, dtype=torch.float64)
        return passes_a_layer(layer, x_NCHW[mine], weights_NCHW[mine].flip(2).to(dtype))

    for name, shares in SHARES.items():
        report[f"layer {name}"] = pass_share(layer_of(torch.float64), shares, offset=0.5, dtype=torch.float64)
    for options in ({"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        layer = layer_of(torch.float64, **options)
        for _ in range(2):
            report[f"layer {options}"] = pass_share(layer, (4, 4), offset=0.5, dtype=torch.float64)
    report["far from 0"] = pass_share(layer_of(torch.float32), (4, 4), offset=1000.0, dtype=torch.float32)
    report["bfloat16"] = pass_share(layer_of(torch.float32), (4, 4), offset=3.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        report["autocast"] = pass_share(layer_of(torch.float32), (4, 4), offset=3.0, dtype=torch.bfloat16)
    try:
        layer_of(torch.float32)(torch.rand(1 - rank, 5, 1, 1))
    except ValueError as error:
        report["single value"] = str(error)
    if rank == 0:  # the other one takes no part
        layer = layer_of(torch.float32).eval()
        report["evaluation"] = layer(features(8, offset=0.5, dtype=torch.float32)).detach()
    torch.save(report, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(_on_rank, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", DDP_OPTIONS, ids=str)
@pytest.mark.parametrize("name", TRAININGS)
def test_two_workers_train_as_one(workers: list[Report], name: str, options: dict[str, bool]) -> None:
    expected = TRAININGS[name](0, 1, torch.float64)
    reports = [worker[f"{name} {options}"] for worker in workers]
    for index, output in enumerate(expected["outputs"]):
        close(torch.cat([report["outputs"][index] for report in reports]), output)
    for report in reports:
        assert report["state"].keys() == expected["state"].keys()
        for group in ("gradients", "state"):
            for key, tensor in expected[group].items():
                close(report[group][key], tensor)


@pytest.mark.parametrize("name", TRAININGS)
def test_one_worker_alone_would_differ(name: str) -> None:
    """The comparison above means something: statistics of half a batch are others."""
    whole = TRAININGS[name](0, 1, torch.float64)
    network = {"generator": generator, "discriminator": discriminator}[name]().double()
    half = share(patches(4, 6, seed=0, dtype=torch.float64), 0, 2)
    if name == "discriminator":
        half = share(patches(8, 16, seed=0, dtype=torch.float64), 0, 2)
    assert (network(half) - whole["outputs"][0][: len(half)]).abs().max() > 1e-3


@pytest.mark.parametrize("name", TRAININGS)
def test_the_same_inputs_give_the_same_bits_on_every_worker(workers: list[Report], name: str) -> None:
    """Without broadcast_buffers: nothing but the layers keeps the workers' statistics equal."""
    first, again = (workers[0][f"{name} float32 {attempt}"] for attempt in range(2))
    other = workers[1][f"{name} float32 0"]
    assert all(torch.equal(*pair) for pair in zip(first["outputs"], again["outputs"], strict=True))
    for key, tensor in first["state"].items():
        assert torch.equal(tensor, again["state"][key]), key
        assert torch.equal(tensor, other["state"][key]), key


@pytest.mark.parametrize("name", SHARES)
def test_workers_may_have_unequal_shares(workers: list[Report], name: str) -> None:
    reports = [worker[f"layer {name}"] for worker in workers]
    assert [len(report["output"]) for report in reports] == list(SHARES[name])
    _is_the_layer_on_all_patches(reports, a_layer(torch.float64), num_passes=1)


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=lambda options: str(options)
)
def test_options_of_the_layer_are_kept(workers: list[Report], options: dict[str, Any]) -> None:
    reports = [worker[f"layer {options}"] for worker in workers]
    _is_the_layer_on_all_patches(reports, a_layer(torch.float64, **options), num_passes=2)


def _is_the_layer_on_all_patches(reports: list[Report], layer: nn.Module, *, num_passes: int) -> None:
    x_NCHW, weights_NCHW = (features(8, offset=offset, dtype=torch.float64) for offset in (0.5, 1.0))
    for _ in range(num_passes):
        expected = passes_a_layer(layer, x_NCHW, weights_NCHW.flip(2))
    for key in ("output", "features"):
        close(torch.cat([report[key] for report in reports]), expected[key])
    # Both workers' shares of a sum: what DDP adds up.
    for *parts, whole in zip(*(report["parameters"] for report in reports), expected["parameters"], strict=True):
        close(parts[0] + parts[1], whole)
    for report in reports:
        for actual, buffer in zip(report["buffers"], expected["buffers"], strict=True):
            close(actual, buffer)


def test_features_far_from_0_keep_their_variance(workers: list[Report]) -> None:
    """In float32 the difference of a mean of squares of 1e6 and a squared mean has one digit left."""
    x_NCHW = features(8, offset=1000.0, dtype=torch.float32).double()
    plain = a_layer(torch.float64)
    output_NCHW = plain(x_NCHW).detach()
    running_var = workers[0]["far from 0"]["buffers"][1]
    torch.testing.assert_close(running_var.double(), plain.running_var, rtol=1e-5, atol=0.0)
    actual_NCHW = torch.cat([worker["far from 0"]["output"] for worker in workers]).double()
    torch.testing.assert_close(actual_NCHW, output_NCHW, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["bfloat16", "autocast"])
def test_statistics_of_bfloat16_features_are_float32(workers: list[Report], name: str) -> None:
    x_NCHW = features(8, offset=3.0, dtype=torch.bfloat16)
    plain = a_layer(torch.float32)
    expected = passes_a_layer(plain, x_NCHW.float(), features(8, offset=1.0, dtype=torch.float64).flip(2).bfloat16())
    for worker in workers:
        assert worker[name]["output"].dtype == worker[name]["features"].dtype == torch.bfloat16
        for actual, buffer in zip(worker[name]["buffers"], expected["buffers"], strict=True):
            torch.testing.assert_close(actual, buffer, rtol=1e-5, atol=1e-6)
    for key in ("output", "features"):
        actual = torch.cat([worker[name][key] for worker in workers]).float()
        torch.testing.assert_close(actual, expected[key], rtol=1e-2, atol=1e-2)


def test_a_single_value_stops_every_worker(workers: list[Report]) -> None:
    assert [worker["single value"] for worker in workers] == [
        "BatchNorm needs more than 1 value per channel in the global batch to train"
    ] * 2


def test_evaluation_talks_to_nobody(workers: list[Report]) -> None:
    plain = a_layer(torch.float32).eval()
    assert torch.equal(workers[0]["evaluation"], plain(features(8, offset=0.5, dtype=torch.float32)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("network", [generator, discriminator, lambda: nn.BatchNorm2d(5)])
def test_names_and_tensors_stay(network: Callable[[], nn.Module], device: str) -> None:
    plain, original = network(), network()
    parameters = dict(original.named_parameters())
    converted = synchronise_batch_norm(original, world_size=2, device=torch.device(device))
    kind = GlobalBatchNorm if device == "cpu" else nn.SyncBatchNorm
    norms = [module for module in converted.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, kind) for norm in norms)
    assert list(converted.state_dict()) == list(plain.state_dict())
    assert all(parameter is parameters[name] for name, parameter in converted.named_parameters())
    converted.load_state_dict(plain.state_dict())
    plain.load_state_dict(converted.state_dict())
    again = synchronise_batch_norm(converted, world_size=2, device=torch.device(device))
    assert list(again.state_dict()) == list(plain.state_dict())


def test_one_worker_keeps_its_plain_layers() -> None:
    network = generator()
    kinds = [type(module) for module in network.modules()]
    assert synchronise_batch_norm(network, world_size=1, device=CPU) is network
    assert [type(module) for module in network.modules()] == kinds


def _on_rank_of_a_gpu(rank: int, world_size: int, folder: str) -> None:
    _join(rank, world_size, folder)  # NCCL refuses two workers on one GPU; SyncBatchNorm talks through gloo as well
    device = torch.device("cuda", 0)
    layer = synchronise_batch_norm(a_layer(torch.float32).to(device), world_size=world_size, device=device)
    x_NCHW, weights_NCHW = (features(8, offset=offset, dtype=torch.float32).to(device) for offset in (0.5, 1.0))
    report = passes_a_layer(layer, share(x_NCHW, rank, world_size), share(weights_NCHW.flip(2), rank, world_size))
    torch.save(report, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_two_workers_on_a_gpu_are_one(tmp_path: Path) -> None:
    mp.spawn(_on_rank_of_a_gpu, args=(2, str(tmp_path)), nprocs=2)
    reports = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True, map_location="cpu") for rank in range(2)]
    x_NCHW, weights_NCHW = (features(8, offset=offset, dtype=torch.float32) for offset in (0.5, 1.0))
    expected = passes_a_layer(a_layer(torch.float32), x_NCHW, weights_NCHW.flip(2))
    for key in ("output", "features"):
        torch.testing.assert_close(torch.cat([report[key] for report in reports]), expected[key], rtol=1e-4, atol=1e-5)
    for report in reports:
        torch.testing.assert_close(report["buffers"], expected["buffers"], rtol=1e-5, atol=1e-6)
