"""A sweep's trials as text, and as CSV that holds all of them."""

import csv
import io

from sr_models.cost import ModelCost
from sr_train.sweep_table import MAX_REASON_CHARS, best_of, sweep_csv, sweep_table, trial_rows
from sr_train.trial_record import Point, Sample, Status, TrialRecord


def trial(
    name: str,
    sample: Sample,
    *psnr_db: float,
    status: Status = "finished",
    cost: ModelCost | None = None,
    reason: str | None = None,
) -> TrialRecord:
    history = tuple(
        Point(patches_seen=1600 * number, psnr_db=db, ssim=db / 100) for number, db in enumerate(psnr_db, start=1)
    )
    return TrialRecord(name=name, sample=sample, status=status, history=history, cost=cost, reason=reason)


def cost(parameters: int, gflops: float, latency_s: float | None = None) -> ModelCost:
    return ModelCost(parameters=parameters, flops=1e9 * gflops, latency_s=latency_s)


SMALL, LARGE = {"num_blocks": 4, "schedule.kind": "step"}, {"num_blocks": 16, "schedule.kind": "step"}


def test_a_table_for_people() -> None:
    records = [
        trial("trial-1", SMALL, 30.0, 31.239, 31.0, cost=cost(1_234_567, 56.78, 0.0123)),
        trial("trial-2", LARGE, 29.0, cost=cost(2_000, 1234.5), status="stopped"),
        trial("trial-3", LARGE, 32.0, status="failed", reason="\nloss is not finite\nTraceback"),
        trial("trial-4", LARGE, status="running"),
        trial("trial-5", SMALL, 32.5, cost=cost(999, 0.1)),
    ]
    assert sweep_table(records).splitlines() == [
        "#  trial    num_blocks  parameters   GFLOPs  latency ms  patches  PSNR dB  status",
        "5  trial-5  4                  999      0.1           –    1,600    32.50  finished",
        "1  trial-1  4            1,234,567     56.8        12.3    4,800    31.24  finished",
        "2  trial-2  16               2,000  1,234.5           –    1,600    29.00  stopped",
        "4  trial-4  16                   –        –           –        0        –  running",
        "3  trial-3  16                   –        –           –    1,600    32.00  failed: loss is not finite",
        "GFLOPs and latency: for an output of 1280×720",
    ]
    assert sweep_table([]) == "no trials"


def test_the_front_of_a_cost_is_marked() -> None:
    records = [
        trial("a", SMALL, 30.0, cost=cost(100, 5.0)),
        trial("b", SMALL, 31.0, cost=cost(200, 4.0)),
        trial("c", SMALL, 29.0, cost=cost(300, 3.0)),
    ]
    for cost_name, marks in (("parameters", {"a", "b"}), ("gflops", {"b", "c"})):
        lines = sweep_table(records, cost_name=cost_name).splitlines()
        assert {line.split()[2] for line in lines[1:4] if line.startswith("*")} == marks
        assert {line.split()[1] for line in lines[1:4] if not line.startswith("*")} == {"a", "b", "c"} - marks


def test_only_options_that_differ_are_shown() -> None:
    records = [
        trial("a", {"kind": "step", "decay": 0.25, "rate": 0.000123456, "batch": 16}),
        trial("b", {"kind": "cosine", "rate": 0.01, "batch": 16}),
        trial("c", {"kind": "step", "decay": 0.25, "rate": 0.01, "batch": 16, "extra": 1}),
        trial("d", {"kind": "step", "decay": 0.25, "rate": 0.01, "batch": 16, "extra": 2}),
    ]
    rows = [{heading: row[heading] for heading in row if heading in records[0].sample or heading == "extra"}
            for row in trial_rows(records)]  # fmt: skip
    assert rows == [
        {"kind": "step", "rate": "0.000123", "extra": "–"},
        {"kind": "cosine", "rate": "0.01", "extra": "–"},
        {"kind": "step", "rate": "0.01", "extra": "1"},
        {"kind": "step", "rate": "0.01", "extra": "2"},
    ]


def test_a_latency_that_was_never_measured_has_no_column() -> None:
    assert "latency ms" not in trial_rows([trial("a", SMALL, cost=cost(1, 1.0))])[0]


def test_a_long_reason_is_cut() -> None:
    (row,) = trial_rows([trial("a", SMALL, status="over limit", reason="x" * 200)])
    assert row["status"] == f"over limit: {'x' * (MAX_REASON_CHARS - 1)}…"


def test_the_best_is_one_that_did_not_fail() -> None:
    failed = trial("failed", SMALL, 40.0, status="failed")
    assert best_of([failed, trial("new", SMALL, status="running")]) is None
    best = best_of([failed, trial("a", SMALL, 30.0), trial("b", SMALL, 30.0, 31.0, 29.0, status="running")])
    assert best is not None and best.name == "b"


def test_csv_holds_everything_and_reads_back() -> None:
    first = TrialRecord(
        name="trial-1",
        sample={"num_blocks": 4, "rate": 0.000123456},
        status="finished",
        history=(
            Point(patches_seen=1600, psnr_db=31.23456789, ssim=0.91),
            Point(patches_seen=3200, psnr_db=31.0, ssim=0.92),
        ),
        cost=cost(1_234_567, 56.78, 0.0125),
        checkpoint="s3://bucket/a,b.safetensors",
        mlflow_run="abc",
        seconds={"training": 12.5, "validation": 3.25},
    )
    second = trial("trial-2", {"num_blocks": 4, "kind": "step"}, status="failed", reason='out of "memory"\nTraceback')
    text = sweep_csv([first, second])
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows[0] == {
        "trial": "trial-1", "status": "finished", "num_blocks": "4", "rate": "0.000123456", "kind": "",
        "parameters": "1234567", "gflops": "56.78", "latency_ms": "12.5",
        "patches_seen": "3200", "psnr_db": "31.23456789", "ssim": "0.91",
        "training_s": "12.5", "validation_s": "3.25",
        "reason": "", "checkpoint": "s3://bucket/a,b.safetensors", "mlflow_run": "abc",
    }  # fmt: skip
    assert rows[1] == dict.fromkeys(rows[0], "") | {
        "trial": "trial-2", "status": "failed", "num_blocks": "4", "kind": "step", "patches_seen": "0",
        "reason": 'out of "memory"\nTraceback',
    }  # fmt: skip
