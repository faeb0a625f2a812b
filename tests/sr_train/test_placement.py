"""Device, CPUs and threads of workers on clusters of several shapes."""

from __future__ import annotations

import pytest

from sr_train.options import ConfigError, RunConfig
from sr_train.placement import ClusterFacts, num_fitting, place, placement_warnings


def cluster(*cpus: float, gpus: tuple[float, ...] = ()) -> ClusterFacts:
    return ClusterFacts(cpus_per_node=cpus, gpus_per_node=gpus or (0.0,) * len(cpus))


@pytest.mark.parametrize(
    ("facts", "num_workers", "expected"),
    [
        # One CPU each where that leaves some for decoding; threads share a node's CPUs evenly.
        (cluster(2), 1, ("cpu", 1.0, 2)),
        (cluster(16), 4, ("cpu", 1.0, 4)),
        (cluster(8, 8), 4, ("cpu", 1.0, 4)),
        (cluster(8, 8), 3, ("cpu", 1.0, 4)),
        # Else an even share of what decoding leaves.
        (cluster(2), 2, ("cpu", 0.75, 1)),
        (cluster(1), 1, ("cpu", 0.5, 1)),
        # A head node without CPUs holds no worker and takes no part.
        (cluster(0, 8, 8), 2, ("cpu", 1.0, 8)),
        # The node with the fewest threads per worker sets the pace.
        (cluster(4, 16), 2, ("cpu", 1.0, 4)),
        (cluster(1, 16), 4, ("cpu", 1.0, 1)),
        # A GPU each, on the nodes that have them.
        (cluster(4, 32, gpus=(0, 4)), 4, ("cuda", 1.0, 8)),
        (cluster(8, 8, gpus=(1, 1)), 2, ("cuda", 1.0, 8)),
        (cluster(8, gpus=(1,)), 2, ("cpu", 1.0, 4)),
    ],
)
def test_what_is_open_is_filled_in(facts: ClusterFacts, num_workers: int, expected: tuple[str, float, int]) -> None:
    run = place(RunConfig(num_workers=num_workers), facts)
    assert (run.device, run.cpus_per_worker, run.threads_per_worker) == expected


@pytest.mark.parametrize(
    ("facts", "share", "expected"),
    [
        # Parts of a GPU on one node, not parts that lie on two.
        (cluster(8, gpus=(1,)), 0.25, ("cuda", 1.0, 8)),
        (cluster(8, gpus=(0.5,)), 0.5, ("cuda", 1.0, 8)),
        (cluster(8, gpus=(0.25,)), 0.5, ("cpu", 1.0, 8)),
        (cluster(4, 16, gpus=(0, 0.3)), 0.3, ("cuda", 1.0, 16)),
    ],
)
def test_a_worker_may_take_a_part_of_a_gpu(facts: ClusterFacts, share: float, expected: tuple[str, float, int]) -> None:
    run = place(RunConfig(gpus_per_worker=share), facts)
    assert (run.device, run.cpus_per_worker, run.threads_per_worker) == expected


@pytest.mark.parametrize(
    ("facts", "share", "num_fits"),
    [
        (cluster(8, gpus=(1,)), 0.25, [4]),
        (cluster(2, gpus=(1,)), 0.25, [2]),
        (cluster(16, gpus=(3,)), 0.3, [9]),  # a part is of one GPU
        (cluster(16, gpus=(2,)), 0.2, [10]),  # 1 / 0.2 may be 4.999…
        (cluster(8, 8, gpus=(0.5, 2)), 1, [0, 2]),
        (cluster(8, 8, gpus=(0.5, 2)), None, [8, 8]),
    ],
)
def test_as_many_workers_as_a_nodes_gpus_hold(facts: ClusterFacts, share: float | None, num_fits: list[int]) -> None:
    assert list(num_fitting(facts, 1.0, share)) == num_fits


def test_what_is_given_is_kept() -> None:
    given = RunConfig(num_workers=2, device="cpu", cpus_per_worker=3, threads_per_worker=5)
    assert place(given, cluster(8, gpus=(2,))) == given


@pytest.mark.parametrize(
    ("facts", "run", "message"),
    [
        (cluster(8), RunConfig(device="cuda"), r"1 worker needs a GPU.* has 0.*--run.device cpu"),
        (cluster(8, gpus=(2,)), RunConfig(device="cuda", num_workers=4), r"4 workers need a GPU.* has 2.*--run.num-"),
        (
            cluster(8, gpus=(0.25,)),
            RunConfig(device="cuda", gpus_per_worker=0.5),
            r"worker needs 0.5 of a GPU.* has 0.25",
        ),
        # Half a GPU in all, and too little on every node.
        (
            cluster(8, 8, gpus=(0.25, 0.25)),
            RunConfig(device="cuda", gpus_per_worker=0.5),
            r"1 worker needs more.*--run.num-workers",
        ),
        (cluster(2), RunConfig(num_workers=2, cpus_per_worker=1), r"2 workers need .* 1 CPUs each.*\(2 CPUs\)"),
        (cluster(0.5), RunConfig(), r"1 worker needs more.*\(0.5 CPUs\).*--run.cpus-per-worker"),
        (cluster(), RunConfig(), "1 worker needs more"),
        # Enough in all, and too little on every node.
        (cluster(3, 3, 3), RunConfig(num_workers=2, cpus_per_worker=4), r"\(3 \+ 3 \+ 3 CPUs\)"),
        (cluster(16, 0.5, gpus=(0, 2)), RunConfig(num_workers=2, device="cuda"), r"\(16 \+ 0.5 CPUs\)"),
    ],
)
def test_what_does_not_fit_is_refused(facts: ClusterFacts, run: RunConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(run, facts)


@pytest.mark.parametrize(
    ("facts", "num_workers", "warning"),
    [
        (cluster(2), 2, None),
        (cluster(2), 3, "3 workers share 2 CPUs"),
        (cluster(8, gpus=(1,)), 2, "training on CPUs, though the cluster has GPUs: 1, for 2 workers"),
        (cluster(8, gpus=(2,)), 2, None),
    ],
)
def test_what_may_not_be_meant_is_said(facts: ClusterFacts, num_workers: int, warning: str | None) -> None:
    [*warnings] = placement_warnings(place(RunConfig(num_workers=num_workers), facts), facts)
    assert [text.startswith(warning) for text in warnings] == [True] if warning else warnings == []
