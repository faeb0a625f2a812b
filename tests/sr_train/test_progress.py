"""Lines, bars, and the time left."""

import io
import json
from dataclasses import asdict

import pytest

from sr_train.progress import Progress, ProgressUpdate, TimeLeft, format_duration, format_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def feed(progress: Progress, step: int, total_steps: int, psnr_db: float | None = None) -> None:
    progress.update(
        ProgressUpdate(
            step=step, total_steps=total_steps, loss=0.0421, patches_per_s=640.4, data_wait_share=0.034,
            learning_rate=1e-4, psnr_db=psnr_db,
        )
    )  # fmt: skip


def test_a_line_says_everything() -> None:
    update = ProgressUpdate(
        step=50, total_steps=1000, loss=0.04211, patches_per_s=1234.5, data_wait_share=0.034, learning_rate=1e-4,
        psnr_db=28.417,
    )  # fmt: skip
    assert format_line(update, 754.0) == (
        "step   50/1000   5 % | 1,234 patches/s | data wait 3 % | loss 0.0421 | PSNR 28.42 dB | "
        "learning rate 1.0e-04 | 12 min 34 s left"
    )
    assert ProgressUpdate(**json.loads(json.dumps(asdict(update)))) == update


def test_durations() -> None:
    assert [format_duration(s) for s in (None, 0, 59, 60, 3599, 3600, 90061)] == [
        "?", "0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "1 d 01 h",
    ]  # fmt: skip


def test_elsewhere_a_line_every_interval_and_at_the_end() -> None:
    clock, out = Clock(), io.StringIO()
    progress = Progress(total_steps=100, interval_s=5.0, stream=out, clock=clock)
    for step in range(1, 101):
        clock.now_s += 0.125
        feed(progress, step, 100)
    progress.close()
    lines = out.getvalue().splitlines()
    assert [line.split("|")[0].split("/")[0].split()[1] for line in lines] == ["1", "41", "81", "100"]
    assert "\r" not in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_close_shows_what_was_not_shown_yet() -> None:
    clock, out = Clock(), io.StringIO()
    progress = Progress(total_steps=100, interval_s=5.0, stream=out, clock=clock)
    feed(progress, 1, 100)
    feed(progress, 2, 100)
    progress.close()
    progress.close()
    assert [line.split("/")[0] for line in out.getvalue().splitlines()] == ["step   1", "step   2"]


def test_on_a_terminal_one_line_is_redrawn_and_messages_stand_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    clock, out = Clock(), Terminal()
    progress = Progress(total_steps=4, stream=out, clock=clock)
    for step in range(1, 5):
        clock.now_s += 1
        feed(progress, step, 4, psnr_db=30.0)
        if step == 2:
            progress.message("validated")
    progress.close()
    screen = [line.rpartition("\x1b[K")[2] for line in out.getvalue().split("\n")]
    assert screen[0] == "validated"
    assert screen[1].startswith("[########################] step 4/4 100 %")
    assert screen[2] == ""


def test_a_narrow_terminal_never_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    feed(Progress(total_steps=1000, stream=out), 1, 1000)
    assert max(len(part.removeprefix("\x1b[K")) for part in out.getvalue().split("\r")) < 40


def test_time_left_after_a_resume_is_judged_by_the_new_pace() -> None:
    time_left = TimeLeft(10_000)
    assert time_left.at(9_001, 30.0) is None  # when it started, and where, says nothing about the pace
    assert time_left.at(9_011, 40.0) == pytest.approx(989.0)  # one step a second


def test_time_left_follows_a_change_of_pace_and_a_restart() -> None:
    time_left = TimeLeft(100_000)
    for second in range(1, 101):
        time_left.at(10 * second, float(second))
    for second in range(101, 201):  # half of the workers are gone
        left_s = time_left.at(1000 + 5 * (second - 100), float(second))
    assert left_s == pytest.approx((100_000 - 1500) / 5)
    assert time_left.at(1200, 230.0) is None  # back at a checkpoint
    assert time_left.at(1210, 240.0) == pytest.approx((100_000 - 1210) / 1.0)
    assert time_left.at(100_000, 270.0) == 0.0
