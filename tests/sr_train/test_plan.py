"""Plans for clusters that are described, not running."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sr_models.edsr import EDSRConfig
from sr_train.config import TrainConfig
from sr_train.options import DataConfig, OptimConfig, RunConfig, TrackingConfig, ValidationConfig
from sr_train.placement import ClusterFacts
from sr_train.plan import Plan, PlanError, make_plan
from sr_train.plan_report import describe

ONE_NODE = ClusterFacts(cpus_per_node=(4.0,), gpus_per_node=(0.0,))
THREE_NODES = ClusterFacts(cpus_per_node=(0.0, 8.0, 8.0), gpus_per_node=(0.0,) * 3)


@pytest.fixture
def config(tiny_photos: Path, tmp_path: Path) -> TrainConfig[EDSRConfig]:
    """Trained on the photos, validated on one of their own."""
    (tmp_path / "valid").mkdir()
    with Image.open(tiny_photos / "photo-0.png") as photo:
        photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "valid" / "flipped.png")
    return TrainConfig(
        model=EDSRConfig(scale=2, num_blocks=1, num_channels=4),
        data=DataConfig(uri=str(tiny_photos), patch_px_hr=32),
        validation=ValidationConfig(uri=str(tmp_path / "valid")),
        optim=OptimConfig(total_patches=100),
    )


def planned(config: TrainConfig[Any], cluster: ClusterFacts = ONE_NODE, **sections: Any) -> Plan:
    """`sections`: options to change, as {section: {option: value}}."""
    changed = {
        name: dataclasses.replace(getattr(config, name), **values) if isinstance(values, dict) else values
        for name, values in sections.items()
    }
    return make_plan(dataclasses.replace(config, **changed), cluster, resume=False, now=datetime(2026, 1, 2, 3, 4, 5))


def test_nothing_is_left_open(config: TrainConfig[EDSRConfig], tmp_path: Path) -> None:
    plan = planned(config)
    run, tracking = plan.config.run, plan.config.tracking
    assert run == RunConfig(
        name="edsr-x2-20260102-030405",
        storage=f"{tmp_path}/runs",
        device="cpu",
        cpus_per_worker=1.0,
        threads_per_worker=4,
    )
    assert tracking == TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", register_as="edsr-x2")
    assert plan.config.data.window_images == plan.samples.num_images == 6
    assert (plan.run_uri, plan.warnings) == (f"{tmp_path}/runs/edsr-x2-20260102-030405", ())
    assert (plan.goes_on_from, plan.initial_weights, plan.tracking_reachable) == (None, None, True)


def test_a_plan_can_be_planned_again(config: TrainConfig[EDSRConfig]) -> None:
    plan = planned(config)
    assert make_plan(plan.config, ONE_NODE, resume=False) == plan


def test_shards_cover_the_images(config: TrainConfig[EDSRConfig]) -> None:
    plan = planned(config, run={"num_workers": 2})
    assert (plan.shard_slots(0), plan.shard_slots(1)) == (range(3), range(3, 6))


def test_places_that_other_nodes_may_not_see_are_warned_of(config: TrainConfig[EDSRConfig], tmp_path: Path) -> None:
    assert [warning.split()[0] for warning in planned(config, THREE_NODES).warnings] == [
        f"{tmp_path}/runs",
        f"{tmp_path}/tiny_photos",
        f"{tmp_path}/valid",
        f"sqlite:///{tmp_path}/mlflow.db",
    ]
    everywhere = {"data": {"uri": "builtin://photos"}, "validation": {"uri": "builtin://photos"}}
    warnings = planned(config, THREE_NODES, **everywhere).warnings
    assert len(warnings) == 2 and "--run.storage" in warnings[0] and "--tracking.uri" in warnings[1]


def test_the_plan_as_text(config: TrainConfig[EDSRConfig], tmp_path: Path) -> None:
    text = describe(planned(config, THREE_NODES, run={"num_workers": 2, "name": "mine"}))
    assert f"run             mine in {tmp_path}/runs/mine\n" in text
    assert "100 patches (112, as the last step is whole) = 7 steps of 16" in text
    assert "2 on cpu, each with 1 CPU and 8 threads" in text
    assert "all 6 images at once" in text


def test_problems_come_together_each_once_and_indented(config: TrainConfig[EDSRConfig]) -> None:
    nowhere = {"uri": "/nowhere"}
    with pytest.raises(PlanError) as caught:
        planned(config, data={"uri": "/nowhere"}, validation=nowhere, run={"device": "cuda"})
    assert len(caught.value.problems) == 2
    first, *lines = str(caught.value).splitlines()
    assert first == "2 problems:"
    assert [line[:2] for line in lines if not line.startswith("  ")] == ["- ", "- "]


def test_a_single_problem_stands_alone(config: TrainConfig[EDSRConfig]) -> None:
    with pytest.raises(PlanError, match=r"^--run.device cuda: 1 worker needs a GPU"):
        planned(config, run={"device": "cuda"})


def test_the_manifests_are_kept_for_the_next_plan(config: TrainConfig[EDSRConfig]) -> None:
    read: list[int] = []
    for _ in range(2):
        make_plan(config, ONE_NODE, resume=False, progress=lambda done, total: read.append(done))
    assert read == [1, 2, 3, 4, 5, 6]
