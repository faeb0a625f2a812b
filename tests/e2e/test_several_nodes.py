"""One run over several nodes, each with an address of its own: submitted, trained, checkpointed to S3, registered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sr_train.checkpoint import key_of_step
from tests.support.machines import Machine
from tests.support.node_runs import BATCH, NodeRun, stage_photos, succeeded
from tests.support.nodes import TRAINING_WORKER, Site
from tests.support.pipeline import without_controller

pytestmark = pytest.mark.e2e

STEPS = 40


@dataclass(frozen=True)
class Trained:
    """A finished run, where it was seen to train, and what it said."""

    run: NodeRun
    nodes: tuple[Machine, ...]
    logs: str


@pytest.fixture(scope="module")
def trained(site: Site, _photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    bucket = stage_photos(site, _photos, tmp_path_factory.mktemp("photos"))
    run = NodeRun(site, bucket, "over-two-nodes", STEPS)
    job = run.start()
    job.wait_until_said(f"step {STEPS // 2}: PSNR")
    nodes = tuple(site.nodes.training())
    return Trained(run, nodes, succeeded(job).logs)


def test_one_worker_trains_on_each_node_and_none_on_the_head(trained: Trained) -> None:
    cluster = trained.run.site.nodes
    assert len(trained.nodes) == 2 and set(trained.nodes) == set(cluster.nodes)
    assert cluster.head_machine.pids(TRAINING_WORKER) == []
    assert "Traceback" not in without_controller(trained.logs), trained.logs


def test_checkpoints_and_result_lie_in_object_storage(trained: Trained, tmp_path: Path) -> None:
    saved = trained.run.checkpoints(tmp_path)
    assert sorted(saved) == [STEPS // 2, STEPS]
    assert saved[STEPS].meta["patches_seen"] == BATCH * STEPS
    assert trained.run.result["best_checkpoint"].startswith(f"{trained.run.bucket}/runs/")


def test_one_version_is_registered(trained: Trained) -> None:
    [version] = trained.run.versions()
    assert version.tags["checkpoint"].rpartition("/")[2] in map(key_of_step, (STEPS // 2, STEPS))
    assert f"models:/{version.name}/{version.version}" in trained.logs


def test_the_weights_are_those_of_the_same_run_on_one_node(trained: Trained, tmp_path: Path) -> None:
    alone = NodeRun(trained.run.site, trained.run.bucket, "on-one-node", STEPS)
    job = alone.start("--run.cpus-per-worker", 0.75)
    job.wait_until_said(f"step {STEPS // 2}: PSNR")
    assert [len(node.pids(TRAINING_WORKER)) for node in trained.run.site.nodes.training()] == [2]
    succeeded(job)
    assert_equal_tensors(trained.run.final_tensors(tmp_path), alone.final_tensors(tmp_path))


def assert_equal_tensors(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert expected.keys() == got.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, got[name])] == []
