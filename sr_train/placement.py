"""Where workers run: device, CPUs and threads of each, from what the cluster has."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from sr_train.options import ConfigError, RunConfig

CPUS_FOR_DECODING = 0.5
"""What workers leave free for Ray Data, which fetches and decodes images beside them."""


@dataclass(frozen=True, kw_only=True)
class ClusterFacts:
    """What the cluster offers now, node by node; a head node may offer nothing."""

    cpus_per_node: tuple[float, ...]
    gpus_per_node: tuple[float, ...]

    @property
    def num_cpus(self) -> float:
        return sum(self.cpus_per_node)

    @property
    def num_gpus(self) -> float:
        return sum(self.gpus_per_node)


def place(run: RunConfig, cluster: ClusterFacts) -> RunConfig:
    """`run` with device, CPUs and threads set. ConfigError if the cluster can't hold its workers."""
    needed, waits = run.fewest_workers, run.wait_for_nodes
    device = run.device
    if device == "auto":
        device = "cuda" if cluster.num_gpus >= needed * run.gpus_per_worker else "cpu"
        if waits and not _has_room(dataclasses.replace(run, device=device), cluster, needed):
            raise ConfigError(
                "--run.wait-for-nodes: what will the nodes train on? The cluster does not show it yet: --run.device "
                "cuda or cpu"
            )
    if device == "cuda" and cluster.num_gpus < needed * run.gpus_per_worker and not waits:
        raise ConfigError(
            f"--run.device cuda: {needed} {_workers(needed)} {_gpu(run)} each and the cluster has "
            f"{cluster.num_gpus:g}: lower {_number_flag(run)}, train on CPUs with --run.device cpu, or, where nodes "
            f"will be added, wait for them with --run.wait-for-nodes"
        )
    run = dataclasses.replace(run, device=device)
    cpus = run.cpus_per_worker
    if cpus is None:
        # One CPU each if that leaves some for decoding, else an even share of what is left. Ray's CPUs are a
        # reservation, not a limit.
        spare = cluster.num_cpus - CPUS_FOR_DECODING
        cpus = 1.0 if spare >= needed or waits else int(spare / needed * 100) / 100
    if not waits and (cpus <= 0 or not _has_room(dataclasses.replace(run, cpus_per_worker=cpus), cluster, needed)):
        each = f" with {cpus:g} CPUs each" if run.cpus_per_worker else ""
        nodes = " + ".join(f"{cpus:g}" for cpus in cluster.cpus_per_node)
        raise ConfigError(
            f"{needed} {_workers(needed)} more{each}, beside {CPUS_FOR_DECODING} CPUs for decoding, than the "
            f"cluster's nodes offer ({nodes} CPUs): lower {_number_flag(run)} or --run.cpus-per-worker, or, where "
            f"nodes will be added, wait for them with --run.wait-for-nodes"
        )
    run = dataclasses.replace(run, cpus_per_worker=cpus)
    threads = run.threads_per_worker or max(1, _threads(run, cluster))
    return dataclasses.replace(run, threads_per_worker=threads)


def _has_room(run: RunConfig, cluster: ClusterFacts, num_workers: int) -> bool:
    """Whether the cluster can hold so many workers as `run` describes, now, and still decode images."""
    num_cpus = (run.cpus_per_worker or 1.0) * num_workers + CPUS_FOR_DECODING
    return sum(_capacities(run, cluster)) >= num_workers and num_cpus <= cluster.num_cpus


def _capacities(run: RunConfig, cluster: ClusterFacts) -> tuple[int, ...]:
    """How many workers as `run` describes each node can hold."""
    gpus = run.gpus_per_worker if run.device == "cuda" else None
    return tuple(num_fitting(cluster, run.cpus_per_worker or 1.0, gpus))


def placement_warnings(run: RunConfig, cluster: ClusterFacts) -> Iterator[str]:
    """What a person may not have meant; `run` is as `place` made it."""
    if run.wait_for_nodes and not _has_room(run, cluster, run.fewest_workers):
        yield (
            f"the cluster has no room for {run.fewest_workers} workers now: training begins once nodes are added "
            f"(--run.wait-for-nodes)"
        )
        return
    if run.device == "cpu" and 0 < cluster.num_gpus < run.num_workers:
        yield (
            f"training on CPUs, though the cluster has GPUs: {cluster.num_gpus:g}, for {run.num_workers} workers "
            f"(--run.num-workers, --run.device)"
        )
    if run.device == "cpu" and run.num_workers > cluster.num_cpus:
        yield (
            f"{run.num_workers} workers share {cluster.num_cpus:g} CPUs: as many workers as CPUs would not be slower "
            f"(--run.num-workers)"
        )


def num_fitting(cluster: ClusterFacts, cpus: float, gpus: float | None) -> Iterator[int]:
    """How many workers with so many CPUs and GPUs each node can hold; None: they use no GPU."""
    for node_cpus, node_gpus in zip(cluster.cpus_per_node, cluster.gpus_per_node, strict=True):
        by_cpus = int(node_cpus / cpus + 1e-6)  # 1.5 / 0.3 is 4.999…
        if gpus is None:
            yield by_cpus
        elif gpus >= 1:
            yield min(by_cpus, int(node_gpus / gpus))
        else:  # a part is of one GPU: two of 0.4 fit on each
            whole, rest = divmod(node_gpus, 1.0)
            yield min(by_cpus, int(whole) * int(1 / gpus + 1e-6) + int(rest / gpus + 1e-6))


def _gpu(run: RunConfig) -> str:
    return "a GPU" if run.gpus_per_worker == 1 else f"{run.gpus_per_worker:g} of a GPU"


def _threads(run: RunConfig, cluster: ClusterFacts) -> int:
    """A node's CPUs shared among its workers, on the node where that is least, if they spread over all that can hold
    one.
    """
    capacities = _capacities(run, cluster)
    homes = [(int(cpus), fits) for cpus, fits in zip(cluster.cpus_per_node, capacities, strict=True) if fits]
    if sum(capacities) < run.num_workers:  # on nodes that are still to come
        return int(run.cpus_per_worker or 1.0)
    even_share = -(-run.num_workers // len(homes))
    return min(cpus // min(fits, even_share) for cpus, fits in homes)


def _workers(num_workers: int) -> str:
    return "worker needs" if num_workers == 1 else "workers need"


def _number_flag(run: RunConfig) -> str:
    return "--run.num-workers" if run.min_workers is None else "--run.min-workers"
