"""The record of inflicted faults (SR_FAULT_RECORD) as a table: `python -m tests.support.fault_table RECORD`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def fault_table(record: Path) -> str:
    """Markdown: how often each fault was inflicted, what became of the runs, and how many steps were done again."""
    by_fault: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in record.read_text().splitlines():
        entry = json.loads(line)
        by_fault[entry["fault"]].append(entry)
    rows = ["| fault | inflicted | the run ended with | steps done again |", "|---|---|---|---|"]
    for fault, entries in by_fault.items():
        redone = sorted(entry["steps_redone"] for entry in entries)
        outcomes = "; ".join(sorted({entry["outcome"] for entry in entries}))
        spread = f"{redone[0]}" if redone[0] == redone[-1] else f"{redone[0]} to {redone[-1]}"
        rows.append(f"| {fault} | {len(entries)} | {outcomes} | {spread} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(fault_table(Path(sys.argv[1])))
