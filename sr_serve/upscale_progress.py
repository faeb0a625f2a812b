"""What a user sees of an upscaling run: the plan; a bar on a terminal, a line every few seconds elsewhere; the end."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from sr_data.storage import Store
from sr_serve.upscale_plan import FAILED_KEY, Plan
from sr_train.progress import TimeLeft, format_duration

LINE_INTERVAL_S = 5.0
_LISTED = 20


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


def announcement(plan: Plan, target: Store, *, dry_run: bool, overwrite: bool) -> str:
    """What there is to do."""
    recipe = plan.record.recipe
    verb = "would upscale" if dry_run else "upscaling"
    lines = [f"{verb} {len(plan.todo)} images x{recipe.scale}: {recipe.source} → {target.uri}"]
    lines.append(f"  model     {plan.record.model} ({recipe.model_sha256})")
    if plan.num_finished:
        lines.append(f"  finished  {plan.num_finished} images, which are left as they are")
    if plan.outdated:
        why = "to be made anew" if overwrite else "whose source has changed since"
        lines.append(f"  deleted   {len(plan.outdated)} images {why}")
    if plan.num_ignored:
        lines.append(f"  ignored   {plan.num_ignored} files that are no images by their names")
    return "\n".join(lines)


def summary(plan: Plan, target: Store, failures: Mapping[str, str], elapsed_s: float) -> str:
    """What was done, and why the rest was not; `failures`: key → what is wrong with the image."""
    num_made = len(plan.todo) - len(failures)
    num_there, num_all = num_made + plan.num_finished, len(plan.todo) + plan.num_finished
    lines = [f"{target.uri}: {'complete, ' if not failures else ''}{num_there} of {num_all} images"]
    if plan.todo:
        lines.append(f"  upscaled {num_made} in {elapsed_s:.1f} s ({num_made / max(elapsed_s, 1e-9):.3g} images/s)")
    if failures:
        lines.append(f"  {len(failures)} could not be upscaled ({target.uri_of(FAILED_KEY)}):")
        lines += [f"    {reason}" for _, reason in sorted(failures.items())[:_LISTED]]
    if len(failures) > _LISTED:
        lines.append(f"    and {len(failures) - _LISTED} more")
    return "\n".join(lines)
