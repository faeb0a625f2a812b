"""What a person sees of a sweep: lines, and on a pseudo-terminal the live table."""

import io
import os
import pty
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest

from sr_models.cost import ModelCost
from sr_train.sweep_progress import SweepProgress
from sr_train.trial_record import Point, Status, TrialRecord

PATCHES = 9600


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def trial(
    number: int, *psnr_db: float, step: int = 3200, status: Status = "running", reason: str | None = None
) -> TrialRecord:
    history = tuple(Point(patches_seen=step * i, psnr_db=db, ssim=0.9) for i, db in enumerate(psnr_db, start=1))
    return TrialRecord(
        name=f"trial-{number:08x}",
        sample={"num_blocks": number, "schedule.kind": "cosine"},
        status=status,
        history=history,
        cost=ModelCost(parameters=1, flops=1e9 * number),
        reason=reason,
    )


def test_elsewhere_a_line_for_each_trial_that_ends() -> None:
    clock, out = Clock(), io.StringIO()
    progress = SweepProgress(num_trials=3, trial_patches=PATCHES, stream=out, clock=clock)
    for number, psnr_db in ((1, (30.0, 31.0, 31.219)), (2, (31.0, 31.402, 31.4))):
        progress.update(trial(number))
        for seen in (1, 2, 3):
            clock.now_s += 10
            progress.update(trial(number, *psnr_db[:seen]))
        progress.update(trial(number, *psnr_db, status="finished"))
    progress.update(trial(3))
    clock.now_s += 12
    progress.update(trial(3, 10.0, status="failed", reason="loss is not finite\nTraceback (most …"))
    progress.close()
    assert out.getvalue().splitlines() == [
        "trial 1/3 trial-00000001 finished: PSNR 31.22 dB after 9,600 patches, 30 s | num_blocks=1 "
        "schedule.kind=cosine | best so far 31.22 dB (trial-00000001) | 1 min 00 s left",
        "trial 2/3 trial-00000002 finished: PSNR 31.40 dB after 9,600 patches, 30 s | num_blocks=2 "
        "schedule.kind=cosine | best so far 31.40 dB (trial-00000002) | 30 s left",
        "trial 3/3 trial-00000003 failed: loss is not finite after 3,200 patches, 12 s | num_blocks=3 "
        "schedule.kind=cosine | best so far 31.40 dB (trial-00000002) | 0 s left",
        "3 of 3 trials, 1 failed, 0 running, best 31.40 dB (trial-00000002), 0 s left",
    ]


def test_a_minute_of_silence_ends_with_a_summary() -> None:
    clock, out = Clock(), io.StringIO()
    progress = SweepProgress(num_trials=None, trial_patches=PATCHES, stream=out, clock=clock)
    progress.update(trial(1))
    clock.now_s += 59
    progress.update(trial(1, 30.0))
    assert out.getvalue() == ""
    clock.now_s += 1
    progress.update(trial(2))
    assert out.getvalue() == "0 trials, 2 running, best 30.00 dB (trial-00000001), ? left\n"
    clock.now_s += 30
    progress.message("something else")
    clock.now_s += 59
    progress.update(trial(1, 30.0, 30.5))
    assert out.getvalue().splitlines()[1:] == ["something else"]
    progress.close()
    progress.close()
    assert out.getvalue().splitlines()[2:] == ["0 trials, 2 running, best 30.50 dB (trial-00000001), ? left"]


def test_a_trial_that_was_not_trained_says_why_at_once() -> None:
    out = io.StringIO()
    progress = SweepProgress(num_trials=3, trial_patches=PATCHES, stream=out, clock=Clock())
    progress.update(trial(1, status="over limit", reason="120 GFLOPs are over the limit of 100"))
    assert out.getvalue() == (
        "trial 1/3 trial-00000001 over limit: 120 GFLOPs are over the limit of 100 | num_blocks=1 "
        "schedule.kind=cosine | best so far - | ? left\n"
    )


def test_what_earlier_sessions_ended_is_counted_and_not_printed_again() -> None:
    clock, out = Clock(), io.StringIO()
    progress = SweepProgress(num_trials=6, trial_patches=PATCHES, stream=out, clock=clock)
    before = [
        trial(1, 30.0, 31.0, 32.0, status="finished"),
        trial(2, 30.0, status="stopped"),
        trial(3, 30.0, status="failed"),
        trial(4, 30.0, 31.0),
    ]
    progress.known(before)
    for record in before:
        progress.update(record)
    clock.now_s += 10
    progress.update(trial(4, 30.0, 31.0, 31.5, status="finished"))  # a third of it in 10 s
    assert out.getvalue().splitlines() == [
        "going on: 2 trials are finished, 1 failed, 1 goes on from its checkpoint",
        "trial 4/6 trial-00000004 finished: PSNR 31.50 dB after 9,600 patches, 10 s | num_blocks=4 "
        "schedule.kind=cosine | best so far 32.00 dB (trial-00000001) | 1 min 00 s left",
    ]


def test_the_time_of_a_trial_that_is_tried_again_is_that_of_the_last_try() -> None:
    clock, out = Clock(), io.StringIO()
    progress = SweepProgress(num_trials=2, trial_patches=PATCHES, stream=out, clock=clock)
    for status in ("failed", "finished"):
        progress.update(trial(1))
        clock.now_s += 20
        progress.update(trial(1, 30.0, status=status))
    assert [line.split(" | ")[0] for line in out.getvalue().splitlines()] == [
        "trial 1/2 trial-00000001 failed: PSNR 30.00 dB after 3,200 patches, 20 s",
        "trial 1/2 trial-00000001 finished: PSNR 30.00 dB after 3,200 patches, 20 s",
    ]


class Screen:
    """A pseudo-terminal with what a terminal would show of it."""

    def __init__(self, lines: int, columns: int) -> None:
        self.lines, self.columns = lines, columns
        self.output = b""
        self.has_more = threading.Condition()
        self.stream: TextIO

    def wait_for(self, text: str) -> None:
        """Until the last line begins with a text."""
        with self.has_more:
            assert self.has_more.wait_for(lambda: self.rows()[-1].startswith(text), timeout=30), self.rows()

    def rows(self) -> list[str]:
        """All lines, those that were scrolled off included; the cursor can't go back to them."""
        rows, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|.", self.output.decode(), re.DOTALL):
            if part == "\r":
                column = 0
            elif part == "\n" or (not part.startswith("\x1b") and column == self.columns):
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            elif part.startswith("\x1b") and part.endswith("A"):
                row = max(row - 1, len(rows) - self.lines, 0)
            elif part.startswith("\x1b") and part.endswith("K"):
                rows[row] = ""
            if part not in "\r\n" and not part.startswith("\x1b"):
                rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + 1 :]
                column += 1
        return [row.rstrip() for row in rows]


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, *, lines: int, columns: int) -> Iterator[Screen]:
    """A pseudo-terminal of a size, which is the process's in all that `SweepProgress` can see."""
    for name, value in {"TERM": "xterm", "LINES": str(lines), "COLUMNS": str(columns)}.items():
        monkeypatch.setenv(name, value)
    screen = Screen(lines, columns)
    ours, theirs = pty.openpty()

    def read() -> None:
        try:
            while part := os.read(ours, 65536):
                with screen.has_more:
                    screen.output += part
                    screen.has_more.notify_all()
        except OSError:  # all of it was read, and nobody can write any more
            os.close(ours)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as screen.stream:
        yield screen
    reader.join()


def test_on_a_terminal_a_table_is_redrawn_below_the_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with terminal(monkeypatch, lines=24, columns=200) as screen:
        progress = SweepProgress(num_trials=8, trial_patches=PATCHES, stream=screen.stream, clock=clock)
        progress.known([trial(9, 30.0, 30.1, 30.2, status="finished")])
        for number in (1, 2, 3):
            progress.update(trial(number))
        screen.wait_for("1 of 8 trials, 3 running, best 30.20 dB (trial-00000009), ? left")
        clock.now_s += 30
        progress.update(trial(1, 30.0, 31.0, 32.0, status="finished"))
        progress.message("[bold]as it is written")
        progress.update(trial(2, 33.0))
        progress.update(trial(3, 10.0, status="failed", reason="loss is not finite"))
        progress.close()
    # Two and a third trials took 90 s; the four that are still to come share two places.
    assert screen.rows() == [
        "going on: 1 trial is finished",
        "[bold]as it is written",
        "trial 3/8 trial-00000003 failed: loss is not finite after 3,200 patches, 30 s | num_blocks=3 "
        "schedule.kind=cosine | best so far 33.00 dB (trial-00000002) | 1 min 17 s left",
        "trial           status       patches  PSNR dB  GFLOPs  num_blocks",
        "trial-00000002  running 33%    3,200    33.00     2.0  2",
        "trial-00000001  finished       9,600    32.00     1.0  1",
        "trial-00000009  finished       9,600    30.20     9.0  9",
        "trial-00000003  failed         3,200    10.00     3.0  3",
        "3 of 8 trials, 1 failed, 1 running, best 33.00 dB (trial-00000002), 1 min 17 s left",
        "",
    ]


def test_in_a_small_terminal_the_table_leaves_out_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, lines=7, columns=44) as screen:
        progress = SweepProgress(num_trials=20, trial_patches=PATCHES, stream=screen.stream, clock=Clock())
        for number in range(1, 9):
            progress.update(trial(number, 30.0 + number, status="finished"))
        screen.wait_for("8 of 20 trials")
        progress.message("a message")
        progress.update(trial(9))
        progress.update(trial(10))
        progress.close()
    assert screen.rows() == [
        "a message",
        "trial           status      patches  PSNR d…",
        "trial-00000009  running 0%        0        …",
        "trial-0000000a  running 0%        0        …",
        "trial-00000008  finished      3,200    38.0…",
        "trial-00000007  finished      3,200    37.0…",
        "8 of 20 trials, 2 running, best 38.00 dB (t…",
        "",
    ]


def test_the_best_eight_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, lines=50, columns=120) as screen:
        progress = SweepProgress(num_trials=20, trial_patches=PATCHES, stream=screen.stream, clock=Clock())
        for number in range(1, 13):
            progress.update(trial(number, 30.0 + number, status="finished"))
        progress.close()
    assert [row[:14] for row in screen.rows()[1:-2]] == [f"trial-{number:08x}" for number in range(12, 4, -1)]


def test_what_others_print_on_the_terminal_goes_above_and_elsewhere_where_it_should(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = io.StringIO()
    with terminal(monkeypatch, lines=24, columns=120) as screen:
        for name, stream in (("stdout", elsewhere), ("stderr", screen.stream)):
            monkeypatch.setattr(sys, name, stream)
        progress = SweepProgress(num_trials=20, trial_patches=PATCHES, clock=Clock())
        progress.update(trial(1))
        screen.wait_for("0 of 20 trials, 1 running")
        print("a warning", file=sys.stderr)
        print("a result")
        progress.close()
    assert [row.partition("  ")[0] for row in screen.rows()[:3]] == ["a warning", "trial", "trial-00000001"]
    assert elsewhere.getvalue() == "a result\n"


def test_a_terminal_without_a_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, lines=24, columns=120) as screen:
        monkeypatch.setenv("TERM", "dumb")
        progress = SweepProgress(num_trials=1, trial_patches=PATCHES, stream=screen.stream, clock=Clock())
        progress.update(trial(1, 30.0, status="finished"))
        progress.close()
    assert screen.rows()[0].startswith("trial 1/1 trial-00000001 finished: PSNR 30.00 dB")
