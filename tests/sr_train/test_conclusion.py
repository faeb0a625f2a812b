"""A run that has nothing left to train, and those that only seem so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sr_models.edsr import EDSRConfig
from sr_train import checkpoint as ckpt
from sr_train.conclusion import finished_result
from sr_train.config import TrainConfig
from sr_train.loop import Position
from sr_train.options import DataConfig, OptimConfig, RunConfig, ScheduleConfig, ValidationConfig
from sr_train.placement import ClusterFacts
from sr_train.plan import Plan, make_plan
from sr_train.run_folder import checkpoint_store

BATCH, TOTAL_STEPS = 4, 20
BEST = {"step": 10, "key": ckpt.key_of_step(10), "psnr_db": 31.0}


@pytest.fixture
def plan(tiny_photos: Path, tmp_path: Path) -> Plan:
    photos = str(tiny_photos)
    config = TrainConfig(
        model=EDSRConfig(scale=2, num_blocks=1, num_channels=4),
        data=DataConfig(uri=photos, patch_px_hr=16, layout="folder"),
        validation=ValidationConfig(uri=photos, layout="folder", num_images=2, interval_patches=10 * BATCH),
        optim=OptimConfig(total_patches=TOTAL_STEPS * BATCH, global_batch_size=BATCH),
        schedule=ScheduleConfig(warmup_patches=0),
        run=RunConfig(name="mine", storage=str(tmp_path), device="cpu"),
    )
    cluster = ClusterFacts(cpus_per_node=(2.0,), gpus_per_node=(0.0,))
    return replace(make_plan(config, cluster, resume=False), goes_on_from=ckpt.key_of_step(TOTAL_STEPS))


def save(plan: Plan, position: Position) -> str:
    store = checkpoint_store(plan.run_uri)
    return ckpt.write_checkpoint(store, ckpt.Checkpoint(meta=position.to_meta(), tensors={}))


def test_a_run_that_was_validated_at_its_end_is_finished(plan: Plan) -> None:
    save(plan, Position(step=TOTAL_STEPS, best=BEST))
    result = finished_result(plan)
    assert result is not None and result.position.best == BEST


@pytest.mark.parametrize(
    "position",
    [
        Position(step=TOTAL_STEPS - 1, best=BEST),
        Position(step=TOTAL_STEPS, best=None),
        Position(step=TOTAL_STEPS, best=BEST, validation_pending=True),
    ],
    ids=["steps are left", "never validated", "stopped in its last validation"],
)
def test_a_run_that_has_something_left_to_do_is_not(plan: Plan, position: Position) -> None:
    save(plan, position)
    assert finished_result(plan) is None


def test_a_damaged_checkpoint_at_its_end_is_passed_over(plan: Plan) -> None:
    save(plan, Position(step=10, best=BEST))
    checkpoint_store(plan.run_uri).write(ckpt.key_of_step(TOTAL_STEPS), b"not a checkpoint")
    assert finished_result(plan) is None
