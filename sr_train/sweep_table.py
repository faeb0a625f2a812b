"""A sweep's trials as a table for people, and as CSV with everything for programs."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from sr_models.cost import OUTPUT_PX
from sr_train.pareto import COSTS, CostName, pareto_front
from sr_train.trial_record import Point, TrialRecord, Value

ABSENT = "–"
FRONT = "front"
MAX_REASON_CHARS = 60
_RIGHT_ALIGNED = ("#", "parameters", "GFLOPs", "latency ms", "patches", "PSNR dB")


def best_first(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Highest PSNR first, then those without one, last those that failed or are over a limit; else as given."""
    return sorted(
        records,
        key=lambda record: (not _counts(record), -record.psnr_db if record.psnr_db is not None else float("inf")),
    )


def best_of(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial with the highest PSNR so far, running ones included; None if none has one or those that do failed."""
    scored = [record for record in records if record.psnr_db is not None and _counts(record)]
    return best_first(scored)[0] if scored else None


def varied_options(records: Sequence[TrialRecord]) -> list[str]:
    """Options that take more than one value in these trials, in the order in which the samples name them.

    An option that some samples lack (it has no meaning for them) is varied only if the others differ in it.
    """
    names = dict.fromkeys(name for record in records for name in record.sample)
    return [name for name in names if len({record.sample[name] for record in records if name in record.sample}) > 1]


def value_text(value: Value) -> str:
    """An option's value; of a float, three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def short_reason(record: TrialRecord) -> str:
    """The first line of the reason why a trial failed or is over a limit, cut to `MAX_REASON_CHARS`; "" if none."""
    line = next((line.strip() for line in (record.reason or "").splitlines() if line.strip()), "")
    return line if len(line) <= MAX_REASON_CHARS else f"{line[: MAX_REASON_CHARS - 1]}…"


def trial_rows(records: Sequence[TrialRecord]) -> list[dict[str, str]]:
    """A row per trial, in the order of `best_first`: heading → text; the same headings in every row.

    `#` is a trial's place in `records`, from 1. Options are those of `varied_options`. GFLOPs and latency are of one
    image of 1280×720; the latency has a column if it was measured for any trial. PSNR is that of the best validation.
    """
    numbers = {record.name: number for number, record in enumerate(records, start=1)}
    options = varied_options(records)
    timed = any(record.cost is not None and record.cost.latency_s is not None for record in records)
    return [_row(record, numbers[record.name], options, timed=timed) for record in best_first(records)]


def table_lines(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The headings and a line per row, in columns two blanks apart; no rows, no lines.

    Counts and measures stand to the right, the rest to the left.
    """
    if not rows:
        return []
    widths = {heading: max(len(heading), *(len(row[heading]) for row in rows)) for heading in rows[0]}
    lines = [{heading: heading for heading in widths}, *rows]
    return ["  ".join(_cell(heading, row[heading], widths[heading]) for heading in widths).rstrip() for row in lines]


def sweep_table(records: Sequence[TrialRecord], *, cost_name: CostName | None = None) -> str:
    """The trials as plain text, best first, with what the columns refer to.

    `cost_name` adds a column that marks the Pareto front of PSNR against that cost, see `sr_train.pareto`.
    """
    if not records:
        return "no trials"
    rows = trial_rows(records)
    height_px, width_px = OUTPUT_PX
    notes = [f"GFLOPs and latency: for an output of {width_px}×{height_px}"]
    if cost_name is not None:
        front = {record.name for record in pareto_front(records, cost_name)}
        rows = [{FRONT: "*" if row["trial"] in front else "", **row} for row in rows]
        notes += [f"{FRONT} *: no trial has more PSNR at the same or a lower cost ({COSTS[cost_name].label})"]
    return "\n".join([*table_lines(rows), *notes])


def sweep_csv(records: Sequence[TrialRecord]) -> str:
    """Everything that is known of each trial, in the order given, as CSV with a heading line and unrounded numbers.

    PSNR and SSIM are of the validation with the highest PSNR; columns that end in `_s` are seconds. What is not known
    of a trial, or has no meaning for it, is empty.
    """
    options = dict.fromkeys(name for record in records for name in record.sample)
    parts = dict.fromkeys(name for record in records for name in record.seconds)
    headings = [
        *("trial", "status", *options, "parameters", "gflops", "latency_ms", "patches_seen", "psnr_db", "ssim"),
        *(f"{part}_s" for part in parts),
        *("reason", "checkpoint", "mlflow_run"),
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, headings, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_csv_row(record) for record in records)
    return text.getvalue()


def _counts(record: TrialRecord) -> bool:
    return record.status not in ("failed", "over limit")


def _best_point(record: TrialRecord) -> Point | None:
    return max(record.history, key=lambda point: point.psnr_db, default=None)


def _row(record: TrialRecord, number: int, options: Sequence[str], *, timed: bool) -> dict[str, str]:
    cost, best = record.cost, _best_point(record)
    row = {"#": str(number), "trial": record.name}
    row |= {name: value_text(record.sample[name]) if name in record.sample else ABSENT for name in options}
    row["parameters"] = f"{cost.parameters:,}" if cost is not None else ABSENT
    row["GFLOPs"] = f"{cost.flops / 1e9:,.1f}" if cost is not None else ABSENT
    if timed:
        latency_s = cost.latency_s if cost is not None else None
        row["latency ms"] = f"{1000 * latency_s:,.1f}" if latency_s is not None else ABSENT
    row["patches"] = f"{record.patches_seen:,}"
    row["PSNR dB"] = f"{best.psnr_db:.2f}" if best is not None else ABSENT
    reason = short_reason(record)
    row["status"] = f"{record.status}: {reason}" if reason else record.status
    return row


def _cell(heading: str, text: str, width: int) -> str:
    return text.rjust(width) if heading in _RIGHT_ALIGNED else text.ljust(width)


def _csv_row(record: TrialRecord) -> dict[str, Any]:
    row: dict[str, Any] = {"trial": record.name, "status": record.status, **record.sample}
    if (cost := record.cost) is not None:
        row |= {"parameters": cost.parameters, "gflops": cost.flops / 1e9}
        row["latency_ms"] = 1000 * cost.latency_s if cost.latency_s is not None else None
    row["patches_seen"] = record.patches_seen
    if (best := _best_point(record)) is not None:
        row |= {"psnr_db": best.psnr_db, "ssim": best.ssim}
    row |= {f"{part}_s": seconds for part, seconds in record.seconds.items()}
    return row | {"reason": record.reason, "checkpoint": record.checkpoint, "mlflow_run": record.mlflow_run}
