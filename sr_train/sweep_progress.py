"""How far a sweep is: a live table on a terminal, a line per trial elsewhere."""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from sr_train.progress import format_duration
from sr_train.sweep_table import best_first, best_of, short_reason, table_lines, trial_rows, value_text
from sr_train.sweep_time import SweepTimeLeft
from sr_train.trial_record import TrialRecord

NUM_BEST = 8
REDRAWS_PER_S = 4
MAX_SILENCE_S = 60.0
_FIRST_COLUMNS = ("trial", "status", "patches", "PSNR dB", "GFLOPs")
"""A narrow terminal cuts off what comes after them."""


class SweepProgress:
    """Shows the trials of a sweep.

    If `stream` is a terminal: a table of the running trials and the best others, and a line that sums up. It fits into
    the terminal, and what else the process prints there goes above it. Elsewhere: a line for each trial that ends, and
    the line that sums up when nothing was printed for a minute.
    """

    def __init__(
        self,
        *,
        num_trials: int | None,
        trial_patches: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`num_trials` in all, None if not known; `trial_patches` is the whole budget of each.

        `stream` is standard error if None; `clock` gives seconds.
        """
        self._num_trials = num_trials
        self._trial_patches = trial_patches
        self._stream = stream or sys.stderr
        self._clock = clock
        self._lock = threading.Lock()  # the live table is drawn by a thread of its own
        self._records: dict[str, TrialRecord] = {}
        self._began_s: dict[str, float] = {}
        self._time_left = SweepTimeLeft(num_trials=num_trials, trial_patches=trial_patches)
        self._printed_s = clock()
        self._summary_is_due = False
        self._live: Live | None = None
        if self._stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown"):
            self._live = self._make_live()

    def known(self, records: Sequence[TrialRecord]) -> None:
        """Take note of what earlier sessions of the sweep have left, before the first `update`; says so in a line."""
        with self._lock:
            self._records |= {record.name: record for record in records}
            self._time_left.known(records)
        if records:
            self.message(_going_on(records))

    def update(self, record: TrialRecord) -> None:
        """Take note of a trial's record: when it starts, after each validation, and when it ends."""
        now_s = self._clock()
        with self._lock:
            before = self._records.get(record.name)
            self._records[record.name] = record
            self._time_left.note(record, now_s)
            if not record.is_over and (before is None or before.is_over or record.name not in self._began_s):
                self._began_s[record.name] = now_s
            has_ended = record.is_over and (before is None or not before.is_over)
        self._summary_is_due = True
        if self._live is not None:
            self._live.start()
            if has_ended and record.status == "failed":
                self.message(self._ended_line(record, now_s))
        elif has_ended:
            self._print(self._ended_line(record, now_s))
        elif now_s - self._printed_s >= MAX_SILENCE_S:
            self._print(self.summary())
            self._summary_is_due = False

    def message(self, text: str) -> None:
        """Print lines of their own, above the table."""
        if self._live is not None:
            self._live.console.print(Text(text), soft_wrap=True)
        else:
            self._print(text)

    def close(self) -> None:
        """Leave the table as it is now; elsewhere, sum up if anything has changed since that was done."""
        if self._live is not None:
            self._live.stop()
        elif self._summary_is_due:
            self._print(self.summary())
        self._summary_is_due = False

    def summary(self) -> str:
        """Trials that are over, failed and running, the best, and the time left, in one line."""
        with self._lock:
            records = list(self._records.values())
            num_running, time_left_s = self._time_left.num_running, self._time_left.at(self._clock())
        num_over = sum(record.is_over for record in records)
        num_failed = sum(record.status == "failed" for record in records)
        of_all = f" of {self._num_trials}" if self._num_trials is not None else ""
        parts = [f"{num_over}{of_all} trials"]
        parts += [f"{num_failed} failed"] if num_failed else []
        parts += [f"{num_running} running", f"best {_best(records)}", f"{format_duration(time_left_s)} left"]
        return ", ".join(parts)

    def _print(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()
        self._printed_s = self._clock()

    def _ended_line(self, record: TrialRecord, now_s: float) -> str:
        with self._lock:
            records = list(self._records.values())
            time_left_s = self._time_left.at(now_s)
        number = f"{sum(it.is_over for it in records)}{f'/{self._num_trials}' if self._num_trials is not None else ''}"
        spent = f", {format_duration(now_s - self._began_s[record.name])}" if record.name in self._began_s else ""
        trained = f" after {record.patches_seen:,} patches{spent}" if record.patches_seen or spent else ""
        psnr = f"PSNR {record.psnr_db:.2f} dB" if record.psnr_db is not None else "no PSNR"
        parts = (
            f"trial {number} {record.name} {record.status}: {short_reason(record) or psnr}{trained}",
            " ".join(f"{name}={value_text(value)}" for name, value in record.sample.items()),
            f"best so far {_best(records)}",
            f"{format_duration(time_left_s)} left",
        )
        return " | ".join(parts)

    def _make_live(self) -> Live:
        console = Console(file=self._stream, force_terminal=True, force_interactive=True, highlight=False)
        # What others print would break the table, so it is led round it; unless it goes elsewhere anyway.
        return Live(
            console=console,
            get_renderable=lambda: self._view(console),
            refresh_per_second=REDRAWS_PER_S,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    def _view(self, console: Console) -> Group:
        """Headings, running trials, the best of the others, and the summary: lines that fit into the terminal."""
        with self._lock:
            records = list(self._records.values())
        running = [record for record in records if not record.is_over and record.name in self._began_s]
        others = [record for record in best_first(records) if record.is_over]
        room = max(0, console.size.height - 3)  # headings, summary, and a line left free
        shown = [*running[:room], *others[: min(NUM_BEST, max(0, room - len(running)))]]
        rows = {row["trial"]: row for row in trial_rows(records)}
        lines = table_lines([self._live_row(record, rows[record.name]) for record in shown])
        texts = [Text(line, style="" if number else "bold") for number, line in enumerate(lines)]
        texts.append(Text(self.summary(), style="bold"))
        for text in texts:
            text.no_wrap, text.overflow = True, "ellipsis"
        return Group(*texts)

    def _live_row(self, record: TrialRecord, row: dict[str, str]) -> dict[str, str]:
        share = min(1.0, record.patches_seen / self._trial_patches)
        row["status"] = record.status if record.is_over else f"running {share:.0%}"
        first = {heading: row[heading] for heading in _FIRST_COLUMNS}
        return first | {heading: text for heading, text in row.items() if heading not in ("#", "parameters")}


def _best(records: Sequence[TrialRecord]) -> str:
    best = best_of(records)
    return f"{best.psnr_db:.2f} dB ({best.name})" if best is not None else "-"


def _going_on(records: Sequence[TrialRecord]) -> str:
    num_failed = sum(record.status == "failed" for record in records)
    num_done = sum(record.is_over for record in records) - num_failed
    num_begun = sum(not record.is_over and record.patches_seen > 0 for record in records)
    parts = [f"{num_done} trial{' is' if num_done == 1 else 's are'} finished"]
    parts += [f"{num_failed} failed"] if num_failed else []
    if num_begun:
        parts += ["1 goes on from its checkpoint" if num_begun == 1 else f"{num_begun} go on from their checkpoints"]
    return f"going on: {', '.join(parts)}"
