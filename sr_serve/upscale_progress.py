"""How far upscaling is: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time

from tqdm import tqdm

from sr_train.progress import TimeLeft, format_duration

LINE_INTERVAL_S = 5.0


class UpscaleProgress:
    """Counts images as they are finished, and shows it on standard error."""

    def __init__(self, total: int) -> None:
        """Of `total` images. Shows nothing before the first."""
        self._total, self._done, self._bad = total, 0, 0
        self._first_s, self._said_s = 0.0, time.monotonic()
        self._time_left = TimeLeft(total)
        self._bar = tqdm(total=total, unit="image", disable=None, dynamic_ncols=True)

    def one_more(self, *, is_bad: bool) -> None:
        """An image is finished, or could not be."""
        self._done += 1
        self._bad += is_bad
        now_s = time.monotonic()
        if self._done == 1:  # what comes before it is the start of the actors
            self._first_s = now_s
        left_s = self._time_left.at(self._done, now_s)
        if not self._bar.disable:
            if self._bad:
                self._bar.set_postfix_str(f"{self._bad} bad", refresh=False)
            self._bar.update()
        elif now_s - self._said_s >= LINE_INTERVAL_S or self._done == self._total:
            self._said_s = now_s
            rate = f"{(self._done - 1) / (now_s - self._first_s):.3g}" if now_s > self._first_s else "?"
            bad = f", {self._bad} bad" if self._bad else ""
            line = f"{self._done}/{self._total} images, {rate} images/s, {format_duration(left_s)} left{bad}"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the terminal to what comes after."""
        self._bar.close()
