"""What a person reads of a sweep before and after it, and what goes into its folder and MLflow."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sr_models.cost import ModelCost
from sr_train.pareto import Limits
from sr_train.sweep_plan import SweepPlan
from sr_train.sweep_report import (
    SweepTimes,
    describe_sweep,
    outcome_files,
    outcome_metrics,
    outcome_report,
    time_line,
)
from sr_train.trial_record import Status, TrialRecord
from tests.support.sweeps import TINY, planned, told_trial


@pytest.fixture
def plan(tiny_photos: Path, tmp_path: Path) -> SweepPlan:
    """Two trials at once, on two CPUs."""
    return planned(tiny_photos, tmp_path / "runs", space={"num_blocks": "1,2,3"}, num_trials=3)


def spent(name: str, start_up_s: float, training_s: float, status: Status = "finished") -> TrialRecord:
    return told_trial(name, 30.0, status=status, seconds={"start_up": start_up_s, "training": training_s})


def test_the_plan_as_text(tiny_photos: Path, tmp_path: Path) -> None:
    text = describe_sweep(
        planned(
            tiny_photos,
            tmp_path / "runs",
            space={"num_blocks": "1,2"},
            limits=Limits(max_parameters=50_000),
            num_trials=4,
            trial_patches=3600,
            grace_patches=400,
            search_seed=8,
        )
    )
    lines = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in text.splitlines() if line[0] != " "}
    assert lines["sweep"] == f"mine in {tmp_path}/runs/mine"
    assert lines["model"] == "edsr x2"
    assert "  --space.num-blocks" in text and " 1,2\n" in text
    assert lines["trials"] == "2 by random search (seed 8); the space holds no more"
    assert lines["budget"] == ("3,600 patches each, validated every 400; ASHA lets one in 3 go on to the next rung")
    assert lines["limits"] == "max_parameters 50,000"
    assert "6 images" in lines["training set"] and "1 image," in lines["validation set"]
    assert lines["workers"] == "2 trials at once, 1 on cpu each, with 1 CPU and 1 threads"
    assert lines["tracking"] == f"sqlite:///{tmp_path}/mlflow.db, experiment 'sweeps'"
    assert lines["registers"] == "the best trial's model as edsr-x2@challenger"
    assert "validation images are training images too" in lines["WARNING"]


def test_the_plan_says_what_is_out_of_the_ordinary(tiny_photos: Path, tmp_path: Path) -> None:
    plan = planned(
        tiny_photos,
        tmp_path / "runs",
        space={"num_channels": "4,400"},
        limits=Limits(max_parameters=50_000),
        search="grid",
        scheduler="none",
    )
    known = told_trial("trial-1", 30.0), told_trial("trial-2", status="running"), told_trial("trial-3", status="failed")
    base = replace(plan.base, tracking_reachable=False)
    text = describe_sweep(replace(plan, known=known, base=base))
    assert "going on: 2 trials are over, 1 were begun" in text
    assert "1 points left out, above the limits" in text
    assert "none is stopped early" in text
    assert "NOT REACHABLE, the sweep goes on without it" in text


def test_decoded_images_are_counted_once(plan: SweepPlan) -> None:
    """Of six photos of 3 bytes per pixel, each with an LR image of a quarter of its pixels; validation uses one."""
    sides = [(96, 72), (120, 96), (96, 74), (128, 80), (80, 112), (104, 104)]
    gib = sum(3 * width * height for width, height in sides) * 1.25 / 2**30
    assert f"{gib:.2g} GiB of decoded images, once on each node" in describe_sweep(plan)


def test_where_the_time_went(plan: SweepPlan) -> None:
    """Two at a time for 100 s, of which the four trials trained 20 + 30 + 40 + 50 s: 140 of 200 s."""
    records = [spent(f"trial-{n}", start, 10.0 * n) for n, start in ((2, 9.0), (3, 0.5), (4, 0.25), (5, 1.5))]
    line = time_line(plan, records, SweepTimes(before_trials=12.0, trials=100.0))
    assert line == (
        "12 s until the first trial began, 1 min 40 s for 4 trials, 2 at a time: 70% of that was training and "
        "validation; start-up to a trial's first step: 1.5 s (median), 9.0 s (longest, with its workers)"
    )


def test_earlier_attempts_do_not_count_in_this_ones_time(plan: SweepPlan) -> None:
    known = spent("trial-1", 4.0, 30.0), spent("trial-2", 5.0, 40.0, status="running")
    now = [known[0], spent("trial-2", 5.0 + 2.0, 40.0 + 9.0), spent("trial-3", 3.0, 6.0)]
    line = time_line(replace(plan, known=known), now, SweepTimes(before_trials=1.0, trials=10.0))
    assert "10 s for 2 trials, 2 at a time: 75%" in line  # 9 + 6 of 20 s
    assert "3.0 s (median), 3.0 s (longest" in line


def test_where_nothing_was_left_to_run_no_time_went_into_trials(plan: SweepPlan) -> None:
    known = (spent("trial-1", 4.0, 30.0),)
    assert time_line(replace(plan, known=known), known, SweepTimes(before_trials=1.0, trials=0.1)) == "no trial was run"


def four(*psnr_db: float) -> list[TrialRecord]:
    """Trials that differ in blocks, which decide the score, and in the rate, which does not."""
    return [
        told_trial(
            f"trial-{number}",
            db,
            sample={**TINY, "num_blocks": number, "schedule.learning_rate": 1e-3 * (1 + number % 2)},
            cost=ModelCost(parameters=1000 * number, flops=1e9 * number),
        )
        for number, db in enumerate(psnr_db, start=1)
    ]


def test_the_outcome_is_a_table_importances_and_the_time(plan: SweepPlan) -> None:
    report = outcome_report(plan, four(30.0, 31.0, 32.0, 33.0), SweepTimes(before_trials=1.0, trials=2.0))
    lines = report.splitlines()
    assert [name for name in ("trial-4", "trial-3", "trial-2", "trial-1") if name in report] == [
        line.split()[2] for line in lines[1:5]
    ]
    assert [line.split()[0] for line in lines[-2:]] == ["importance", "time"]
    importance = lines[-2]
    assert importance.index("num_blocks") < importance.index("schedule.learning_rate")
    few = outcome_report(plan, four(30.0, 31.0), SweepTimes(before_trials=1.0, trials=2.0))
    assert not any(line.startswith("importance") for line in few.splitlines()), "two trials say nothing about options"


def test_files_are_tables_and_pictures(plan: SweepPlan) -> None:
    records = four(30.0, 31.0, 32.0, 33.0)
    files = outcome_files(plan, records)
    rows = list(csv.DictReader(io.StringIO(files["trials.csv"].decode())))
    assert [(row["trial"], float(row["psnr_db"])) for row in rows] == [(it.name, it.psnr_db) for it in records]
    assert b"trial-4" in files["trials.txt"]
    pictures = [name for name in files if name.endswith(".png")]
    assert set(pictures) == {"pareto.png", "parallel_coordinates.png", "importance.png"}
    for name in pictures:
        with Image.open(io.BytesIO(files[name])) as picture:
            assert min(picture.size) > 100
            assert picture.convert("L").getextrema() != (255, 255)


def test_numbers_for_mlflow() -> None:
    records = [
        *four(30.0, 31.0, 33.0, 32.0),
        told_trial("trial-5", status="over limit"),
        told_trial("trial-6", status="failed"),
        told_trial("trial-7", 20.0, status="running"),
    ]
    metrics = outcome_metrics(records, records[2])
    assert {name: value for name, value in metrics.items() if not name.startswith("importance/")} == {
        "trials/finished": 4.0,
        "trials/stopped": 0.0,
        "trials/failed": 1.0,
        "trials/over_limit": 1.0,
        "trials/running": 1.0,
        "best_psnr_db": 33.0,
    }
    shares = {name: value for name, value in metrics.items() if name.startswith("importance/")}
    assert shares["importance/num_blocks"] > shares["importance/schedule.learning_rate"]
    assert "best_psnr_db" not in outcome_metrics(records, None)
