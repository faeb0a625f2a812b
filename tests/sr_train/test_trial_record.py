"""Records: saved and read back, and what a validation, or a repeated one, makes of them."""

import json
from dataclasses import replace
from typing import Any, get_args

import pytest

from sr_models.cost import ModelCost
from sr_train.trial_record import Point, Status, TrialRecord, record_from_json, record_to_json

FULL = TrialRecord(
    name="trial-0a1b2c3d",
    sample={"num_blocks": 8, "schedule.kind": "cosine", "schedule.learning_rate": 0.1 + 0.2},
    status="failed",
    history=(Point(patches_seen=8, psnr_db=20.5, ssim=0.5), Point(patches_seen=16, psnr_db=19.5, ssim=0.6)),
    cost=ModelCost(parameters=10, flops=2e9, latency_s=0.25),
    reason="loss nan",
    checkpoint="s3://bucket/best",
    newest_checkpoint="s3://bucket/newest",
    mlflow_run="abc",
    seconds={"training": 1.5},
)


@pytest.mark.parametrize("record", [FULL, TrialRecord(name="trial-1", sample={})], ids=["full", "empty"])
def test_a_record_is_read_back_as_it_was(record: TrialRecord) -> None:
    assert record_from_json(record_to_json(record)) == record


def changed(**values: Any) -> str:
    return json.dumps({**json.loads(record_to_json(FULL)), **values})


@pytest.mark.parametrize(
    "text",
    [
        "",
        record_to_json(FULL)[:-20],
        "[]",
        "{}",
        "null",
        changed(history=3),
        changed(history=[{"patches_seen": 8}]),
        changed(cost={"parameters": 1}),
        changed(colour="red"),
    ],
)
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  of JSON or of the record
        record_from_json(text)


def test_its_score_is_its_best_and_its_length_its_last() -> None:
    assert (FULL.psnr_db, FULL.patches_seen) == (20.5, 16)
    empty = TrialRecord(name="trial-1", sample={})
    assert (empty.psnr_db, empty.patches_seen) == (None, 0)


def test_every_end_is_one() -> None:
    over = {status for status in get_args(Status) if replace(FULL, status=status).is_over}
    assert over == {"finished", "stopped", "failed", "over limit"}


def test_a_validation_that_is_repeated_replaces_the_earlier_and_what_came_after() -> None:
    again = Point(patches_seen=8, psnr_db=21.0, ssim=0.7)
    assert FULL.with_point(again).history == (again,)
    later = Point(patches_seen=24, psnr_db=22.0, ssim=0.8)
    assert FULL.with_point(later).history == (*FULL.history, later)
