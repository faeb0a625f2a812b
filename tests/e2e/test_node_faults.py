"""Faults of nodes: whatever dies, is cut off or comes back, a run ends with the weights of an unharmed one.

SR_FAULT_ROUNDS=5 inflicts each at five random moments, SR_FAULT_RECORD names a file for what each one cost.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.support.faults import SEEDS, HarmedRun, budget_is_spent_once
from tests.support.machines import Machine
from tests.support.node_runs import STEPS_BETWEEN, FinishedRun, NodeRun, assert_equal_tensors
from tests.support.nodes import TRAINING_WORKER, Site
from tests.support.s3_gate import S3Gate

pytestmark = pytest.mark.e2e

DATA_TASK = "ray::MapBatches"


@pytest.fixture(scope="module")
def gate(site: Site) -> Iterator[S3Gate]:
    gate = S3Gate(site.s3.endpoint_url, checkpoint_s=0.7).start()
    yield gate
    gate.stop()


@pytest.fixture
def unharmed(unharmed_run: FinishedRun, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The last checkpoint of a run that nothing happened to."""
    return unharmed_run.run.final_tensors(tmp_path)


@pytest.fixture
def two_nodes(site: Site) -> Iterator[None]:
    """Two nodes that work, again when the test is over."""
    yield
    for node in list(site.nodes.nodes):
        if not node.is_up() or node.ip not in site.nodes.alive():
            site.nodes.remove(node)
    while len(site.nodes.nodes) < 2:
        site.nodes.start_node()


def assert_unharmed(harmed: HarmedRun, unharmed: dict[str, torch.Tensor], folder: Path) -> None:
    """Equal to the last bit, every patch once, every checkpoint whole, one version."""
    budget_is_spent_once(harmed.run, folder)
    assert_equal_tensors(unharmed, harmed.run.final_tensors(folder))
    assert len(harmed.run.versions()) == 1
    harmed.record("same weights to the last bit, one version")


def assert_names(lines: list[str], nodes: list[str]) -> None:
    """One line for each loss, which names the node, beside others that noticed."""
    assert len(lines) == len(nodes), lines
    assert [line for line, node in zip(lines, nodes, strict=True) if not re.search(rf" on {node}\b", line)] == []


def node_at(site: Site, ip: str) -> Machine:
    [node] = [node for node in site.nodes.nodes if node.ip == ip]
    return node


def kill_a_data_task(site: Site, *, timeout_s: float = 60.0) -> None:
    """SIGKILL to the next process that is seen at work for Ray Data: what the kernel does when memory runs out."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for node in site.nodes.nodes:
            for pid in node.pids(DATA_TASK):
                with suppress(subprocess.CalledProcessError):  # it has ended
                    node.signal(pid, signal.SIGSTOP)  # its task may be over since it was looked at
                    is_at_work = pid in node.pids(DATA_TASK)
                    node.signal(pid, signal.SIGKILL if is_at_work else signal.SIGCONT)
                    if is_at_work:
                        return
    pytest.fail(f"no process {DATA_TASK!r} within {timeout_s:.0f} s")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("two_nodes")
def test_killed_workers_and_nodes_change_nothing(
    unharmed_run: FinishedRun, gate: S3Gate, unharmed: dict[str, torch.Tensor], tmp_path: Path, seed: int
) -> None:
    site = unharmed_run.run.site
    harmed = HarmedRun(NodeRun(site, unharmed_run.run.bucket, f"killed-{seed}"), gate, seed)

    harmed.random_moment(2 * STEPS_BETWEEN)
    node = harmed.rng.choice(site.nodes.training())
    [worker] = node.pids(TRAINING_WORKER)
    lost = [node.name]
    harmed.inflict("training worker killed", lambda: node.signal(worker, signal.SIGKILL))
    harmed.wait_until_going_on(times=1)

    harmed.random_moment(harmed.newest_saved() + STEPS_BETWEEN)
    node = harmed.rng.choice(site.nodes.training())
    lost.append(node.name)
    harmed.inflict("node killed", lambda: site.nodes.remove(node))
    site.nodes.start_node()
    harmed.wait_until_going_on(times=2)

    held = gate.hold(harmed.checkpoint_path(harmed.next_checkpoint()))
    held.wait()
    writer = node_at(site, held.client_ip)
    lost.append(writer.name)
    harmed.inflict("node without power during a checkpoint", writer.power_off)
    held.tear()
    site.nodes.start_node()
    harmed.wait_until_going_on(times=3)

    harmed.finish()
    assert_unharmed(harmed, unharmed, tmp_path)
    assert_names(harmed.said("lost:"), lost)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("two_nodes")
def test_a_node_that_was_cut_off_harms_nothing_when_it_is_back(
    unharmed_run: FinishedRun, gate: S3Gate, unharmed: dict[str, torch.Tensor], tmp_path: Path, seed: int
) -> None:
    site = unharmed_run.run.site
    harmed = HarmedRun(NodeRun(site, unharmed_run.run.bucket, f"cut-off-{seed}"), gate, seed)

    harmed.random_moment(2 * STEPS_BETWEEN)
    node = harmed.rng.choice(site.nodes.training())
    harmed.inflict("node cut off", node.cut_off)
    site.nodes.start_node()
    harmed.wait_until_going_on(times=1)
    assert node.is_up(), "it still waits for the head"
    node.reconnect()

    # From the cluster only: it still reaches the object storage, and writes there when others have taken over.
    held = gate.hold(harmed.checkpoint_path(harmed.next_checkpoint()))
    held.wait()
    writer = node_at(site, held.client_ip)
    others = [site.nodes.head_machine.ip, *(node.ip for node in site.nodes.nodes if node is not writer)]
    harmed.inflict("node cut off during a checkpoint", lambda: writer.cut_off_from(*others))
    site.nodes.start_node()
    harmed.wait_until_going_on(times=2)
    held.release()
    writer.reconnect()

    harmed.finish()
    assert_unharmed(harmed, unharmed, tmp_path)
    assert_names(harmed.said("lost:"), [node.name, writer.name])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("two_nodes")
def test_a_job_submitted_again_goes_on_after_driver_and_head_were_killed(
    unharmed_run: FinishedRun, gate: S3Gate, unharmed: dict[str, torch.Tensor], tmp_path: Path, seed: int
) -> None:
    site = unharmed_run.run.site
    harmed = HarmedRun(NodeRun(site, unharmed_run.run.bucket, f"driver-and-head-{seed}"), gate, seed)

    harmed.random_moment(2 * STEPS_BETWEEN)
    driver = harmed.job.driver_pid()
    harmed.inflict("driver killed", lambda: site.nodes.head_machine.signal(driver, signal.SIGKILL))
    assert harmed.job.wait().exit_code != 0
    harmed.submit()
    harmed.wait_until_going_on()

    harmed.random_moment(harmed.newest_saved() + STEPS_BETWEEN)
    harmed.inflict("head killed and restarted", site.nodes.restart_head)
    harmed.submit()
    harmed.wait_until_going_on()

    harmed.finish()
    assert_unharmed(harmed, unharmed, tmp_path)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("two_nodes")
def test_a_data_task_without_memory_a_node_that_is_told_to_end_and_a_full_disk_cost_not_a_step(
    unharmed_run: FinishedRun, gate: S3Gate, unharmed: dict[str, torch.Tensor], tmp_path: Path, seed: int
) -> None:
    site = unharmed_run.run.site
    site.nodes.start_node()  # where there is room when the notice comes
    harmed = HarmedRun(NodeRun(site, unharmed_run.run.bucket, f"no-step-{seed}"), gate, seed)

    harmed.random_moment(2 * STEPS_BETWEEN)
    harmed.inflict("Ray Data task killed, as when memory runs out", lambda: kill_a_data_task(site))

    harmed.random_moment(harmed.newest_saved() + STEPS_BETWEEN)
    told = harmed.rng.choice(site.nodes.training())
    harmed.inflict("spot notice: SIGTERM to a node", told.terminate)
    harmed.wait_until_going_on()
    told.wait_until_off()

    harmed.random_moment(harmed.newest_saved() + STEPS_BETWEEN)
    [node] = [node for node in site.nodes.nodes if node.name == harmed.rank_0_host()]
    harmed.inflict("disk full on the first worker's node", node.fill_disk)
    try:
        harmed.finish()
    finally:
        node.free_disk()
    assert_unharmed(harmed, unharmed, tmp_path)
    [left] = [line for line in harmed.said("step ") if "taken away" in line]
    [going_on] = harmed.said("going on from step")
    assert going_on.split(" (")[0].split()[-1] == left.split(":")[0].split()[-1]  # that very step was saved
    assert told.name not in going_on and harmed.said("lost:") == []
    assert {fault["steps_redone"] for fault in harmed.faults} == {0}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("two_nodes")
def test_an_elastic_run_shrinks_with_its_nodes_and_grows_with_them(
    unharmed_run: FinishedRun, gate: S3Gate, tmp_path: Path, seed: int
) -> None:
    elastic = ("--run.min-workers", 1, "--run.resize-interval-s", 2)
    site = unharmed_run.run.site
    run = NodeRun(site, unharmed_run.run.bucket, f"elastic-{seed}")
    # How long it hopes for the old size before it is content with less.
    env = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
    harmed = HarmedRun(run, gate, seed, elastic, env)

    harmed.random_moment(2 * STEPS_BETWEEN)
    node = harmed.rng.choice(site.nodes.training())
    harmed.inflict("elastic: node killed, none in its place", lambda: site.nodes.remove(node))
    harmed.wait_until_going_on()
    assert "1 worker on" in harmed.said("going on from step")[0]

    harmed.random_moment(harmed.newest_saved() + STEPS_BETWEEN)
    with gate.checkpoints_take(8):  # else it ends before a busy machine has started a node
        harmed.inflict("elastic: node added", site.nodes.start_node)
        harmed.wait_until_going_on(times=2)
    assert "2 workers on" in harmed.said("going on from step")[1]

    harmed.finish()
    budget_is_spent_once(run, tmp_path)
    assert len(run.versions()) == 1
    harmed.record("every patch of the budget once, one version")
