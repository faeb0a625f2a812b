"""One run over several nodes, each with an address of its own: submitted, trained, checkpointed to S3, registered."""

from __future__ import annotations

from pathlib import Path

import pytest

from sr_train.checkpoint import key_of_step
from tests.support.node_runs import BATCH, STEPS, STEPS_BETWEEN, FinishedRun, NodeRun, assert_equal_tensors, succeeded
from tests.support.nodes import TRAINING_WORKER
from tests.support.pipeline import without_controller

pytestmark = pytest.mark.e2e


def test_one_worker_trains_on_each_node_and_none_on_the_head(unharmed_run: FinishedRun) -> None:
    assert len({node.ip for node in unharmed_run.nodes}) == 2
    assert unharmed_run.run.site.nodes.head_machine.ip not in {node.ip for node in unharmed_run.nodes}
    [begins] = [line for line in unharmed_run.logs.splitlines() if line.startswith("training begins with 2 workers")]
    assert [node.name for node in unharmed_run.nodes if node.name not in begins] == []
    assert "Traceback" not in without_controller(unharmed_run.logs), unharmed_run.logs


def test_checkpoints_and_result_lie_in_object_storage(unharmed_run: FinishedRun, tmp_path: Path) -> None:
    saved = unharmed_run.run.checkpoints(tmp_path)
    assert sorted(saved) == list(range(STEPS_BETWEEN, STEPS + 1, STEPS_BETWEEN))
    assert saved[STEPS].meta["patches_seen"] == BATCH * STEPS
    assert unharmed_run.run.result["best_checkpoint"].startswith(f"{unharmed_run.run.bucket}/runs/")


def test_one_version_is_registered(unharmed_run: FinishedRun) -> None:
    [version] = unharmed_run.run.versions()
    assert version.tags["checkpoint"].rpartition("/")[2] in map(key_of_step, (STEPS // 2, STEPS))
    assert f"models:/{version.name}/{version.version}" in unharmed_run.logs


def test_the_weights_are_those_of_the_same_run_on_one_node(unharmed_run: FinishedRun, tmp_path: Path) -> None:
    over_two = unharmed_run.run
    alone = NodeRun(over_two.site, over_two.bucket, "on-one-node")
    job = alone.start("--run.cpus-per-worker", 0.75)
    job.wait_until_said(f"step {STEPS // 2}: PSNR")
    assert [len(node.pids(TRAINING_WORKER)) for node in over_two.site.nodes.training()] == [2]
    succeeded(job)
    assert_equal_tensors(over_two.final_tensors(tmp_path), alone.final_tensors(tmp_path))
