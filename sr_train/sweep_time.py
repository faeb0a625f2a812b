"""How long a sweep still takes, judged by its trials' paces and by how many run at once."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from sr_train.trial_record import TrialRecord

MIN_SHARE = 0.05
"""Without a trial that has ended, this share of the sweep's work must be done before it is judged by it."""


@dataclass(slots=True)
class _Watched:
    """A trial, from its first record in this session on."""

    began_s: float
    first_patches: int
    """Seen before that."""
    latest_s: float
    """When `latest_patches` was known: its last validation, or its end."""
    latest_patches: int
    is_over: bool = False

    @property
    def span_s(self) -> float:
        return self.latest_s - self.began_s

    def share(self, trial_patches: int) -> float:
        """The part of a whole trial that was done in this session, in [0, 1]: a trial is whole where it ends."""
        whole = self.latest_patches if self.is_over else trial_patches
        return min(1.0, max(0, self.latest_patches - self.first_patches) / whole) if whole else 0.0


class SweepTimeLeft:
    """Estimates the time until the last trial ends.

    A trial still to come is expected to take as long as one did on average: the time of all trials of this session over
    the trials done in it, where one that is running counts as the part that it has done, and one that ended as a whole,
    however early. A running trial is expected to see its whole budget at its own pace. The trials to come are put one
    after the other where there is room first, as many at once as ran when the last one started. That is exact for equal
    trials. What was done in earlier sessions, and trials that ended untrained, say
    nothing about the pace.
    """

    def __init__(self, *, num_trials: int | None, trial_patches: int) -> None:
        """`num_trials` in all, None if not known; `trial_patches` is the whole budget of each."""
        self._num_trials = num_trials
        self._trial_patches = trial_patches
        self._known: dict[str, TrialRecord] = {}
        self._watched: dict[str, _Watched] = {}
        self._num_slots = 0

    def known(self, records: Sequence[TrialRecord]) -> None:
        """Take note of trials of earlier sessions."""
        self._known = {record.name: record for record in records}

    def note(self, record: TrialRecord, now_s: float) -> None:
        """Take note of a trial's record when it has changed."""
        watched = self._watched.get(record.name)
        if watched is None or (watched.is_over and not record.is_over):
            seen = record.patches_seen
            watched = _Watched(began_s=now_s, first_patches=seen, latest_s=now_s, latest_patches=seen)
            self._watched[record.name] = watched
            if not record.is_over:
                self._num_slots = self.num_running
        if record.is_over or record.patches_seen != watched.latest_patches:
            watched.latest_s, watched.latest_patches = now_s, record.patches_seen
        watched.is_over = record.is_over

    @property
    def num_running(self) -> int:
        """Trials that have started in this session and not ended."""
        return sum(not watched.is_over for watched in self._watched.values())

    def at(self, now_s: float) -> float | None:
        """Seconds left at `now_s`, 0 or more; None if `num_trials` is, and until a trial has ended or 5 % are done."""
        if self._num_trials is None:
            return None
        running = [watched for watched in self._watched.values() if not watched.is_over]
        waiting = [record for name, record in self._known.items() if name not in self._watched and not record.is_over]
        before = [record for name, record in self._known.items() if name not in self._watched and record.is_over]
        num_new = max(0, self._num_trials - len(self._watched) - len(waiting) - len(before))
        if not (running or waiting or num_new):
            return 0.0
        whole_s = self._whole_s(self._num_trials - len(before))
        if whole_s is None:
            return None
        free_at_s = [self._left_s(watched, whole_s, now_s) for watched in running]
        free_at_s += [0.0] * (self._num_slots - len(running))
        heapq.heapify(free_at_s)
        done = [min(1.0, record.patches_seen / self._trial_patches) for record in waiting]
        for share in [*(1.0 - share for share in done), *[1.0] * num_new]:
            heapq.heapreplace(free_at_s, free_at_s[0] + share * whole_s)
        return max(free_at_s)

    def _whole_s(self, num_trials: int) -> float | None:
        """Of one whole trial; None if too little is known."""
        parts = [(watched, watched.share(self._trial_patches)) for watched in self._watched.values()]
        done = fsum(share for _, share in parts)
        has_ended = any(watched.is_over and share > 0 for watched, share in parts)
        if done == 0.0 or not (has_ended or done >= MIN_SHARE * num_trials):
            return None
        return fsum(watched.span_s for watched, share in parts if share > 0) / done

    def _left_s(self, watched: _Watched, whole_s: float, now_s: float) -> float:
        share = watched.share(self._trial_patches)
        own_whole_s = watched.span_s / share if share > 0 else whole_s
        to_do = 1.0 - min(1.0, watched.latest_patches / self._trial_patches)
        return max(0.0, to_do * own_whole_s - (now_s - watched.latest_s))
