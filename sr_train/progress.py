"""How far training is: a bar on a terminal, a line every few seconds elsewhere.

A Ray worker's output is no terminal while the driver's is, so what is known about a step travels as a `ProgressUpdate`
(rank 0 makes it) and `Progress` shows it where the person sits.
"""

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

BAR_CELLS = 24
REDRAW_INTERVAL_S = 0.1
RATE_WINDOW_S = 60.0
"""Time left is judged by the last minute: long enough to smooth, short enough to follow a change of workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressUpdate:
    """What is known after a step: plain values, so that it can be sent as JSON."""

    step: int
    """Optimiser steps done, of `total_steps`."""
    total_steps: int
    loss: float
    patches_per_s: float
    """Of all workers together."""
    data_wait_share: float
    """Share of the time, in [0, 1], in which training waited for images."""
    learning_rate: float
    psnr_db: float | None = None
    """Of the last validation; None before the first."""


def format_line(update: ProgressUpdate, time_left_s: float | None = None) -> str:
    """Everything about a step in one line, without its end."""
    done = f"{100 * update.step / update.total_steps:3.0f} %" if update.total_steps else "  0 %"
    psnr = f"PSNR {update.psnr_db:.2f} dB" if update.psnr_db is not None else "PSNR -"
    parts = (
        f"step {update.step:>{len(str(update.total_steps))}}/{update.total_steps} {done}",
        f"{_short(update.patches_per_s)} patches/s",
        f"data wait {100 * update.data_wait_share:.0f} %",
        f"loss {update.loss:.4f}",
        psnr,
        f"learning rate {update.learning_rate:.1e}",
        f"{format_duration(time_left_s)} left",
    )
    return " | ".join(parts)


def format_duration(seconds: float | None) -> str:
    """`45 s`, `12 min 05 s`, `3 h 20 min`, `2 d 04 h`; `?` if not known."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


class TimeLeft:
    """Estimates the time to the last step from the pace of the last minute: what came before a resume does not count.

    Nor does the time until the first step, in which workers, data and kernels start.
    """

    def __init__(self, total_steps: int) -> None:
        """Estimate the time until `total_steps` steps are done."""
        self._total_steps = total_steps
        self._marks: deque[tuple[float, int]] = deque()

    def at(self, step: int, now_s: float) -> float | None:
        """Seconds left after `step` at `now_s`; None until two steps are known."""
        if self._marks and step < self._marks[-1][1]:  # workers were restarted from a checkpoint
            self._marks.clear()
        self._marks.append((now_s, step))
        while len(self._marks) > 2 and self._marks[1][0] <= now_s - RATE_WINDOW_S:
            self._marks.popleft()
        first_s, first_step = self._marks[0]
        if step >= self._total_steps:
            return 0.0
        if step == first_step or now_s <= first_s:
            return None
        return (self._total_steps - step) * (now_s - first_s) / (step - first_step)


class Progress:
    """Shows updates: a bar that redraws itself if `stream` is a terminal, else one line every `interval_s`."""

    def __init__(
        self,
        *,
        total_steps: int,
        interval_s: float = 5.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stream` is standard error if None; `clock` gives seconds."""
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._interval_s = REDRAW_INTERVAL_S if self._is_terminal else interval_s
        self._clock = clock
        self._time_left = TimeLeft(total_steps)
        self._shown_s: float | None = None
        self._latest: tuple[ProgressUpdate, float | None] | None = None
        self._latest_is_shown = True

    def update(self, update: ProgressUpdate) -> None:
        """Take note of a step; shown if the last one was shown long enough ago."""
        now_s = self._clock()
        self._latest = update, self._time_left.at(update.step, now_s)
        self._latest_is_shown = False
        due = self._shown_s is None or now_s - self._shown_s >= self._interval_s
        if due or update.step == update.total_steps:
            self._shown_s = now_s
            self._draw()

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        self._stream.write(f"\r\x1b[K{text}\n" if self._is_terminal else f"{text}\n")
        if self._is_terminal and self._latest is not None:
            self._draw()
        self._stream.flush()

    def close(self) -> None:
        """Show the last update, if it was not, and leave the bar's line."""
        if self._latest is not None and not self._latest_is_shown:
            self._draw()
        if self._is_terminal and self._latest is not None:
            self._stream.write("\n")
            self._stream.flush()
        self._latest = None

    def _draw(self) -> None:
        assert self._latest is not None  # callers have checked
        update, time_left_s = self._latest
        line = format_line(update, time_left_s)
        if self._is_terminal:
            columns = shutil.get_terminal_size().columns
            line = f"{_bar(update)} {line}" if len(line) + BAR_CELLS + 3 < columns else line
            self._stream.write(f"\r\x1b[K{line[: columns - 1]}")  # a full line would wrap and could not be redrawn
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
        self._latest_is_shown = True


def _bar(update: ProgressUpdate) -> str:
    filled = BAR_CELLS * update.step // update.total_steps if update.total_steps else 0
    return f"[{'#' * filled}{'.' * (BAR_CELLS - filled)}]"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
