"""The training loop: from a position to the end of the budget, with validations and checkpoints on the way.

    for step in position … total_steps:
        batches ← feed(step)                      a pure function of (seed, step): nothing to replay after a restart
        learner.step(batches, learning_rate(patches seen))
        about every second:  losses, read from the device in one go → do they collapse? → back to the last checkpoint
                             is a worker told to leave? → checkpoint, and out
        every validation interval:  scores → is it the best? → early stop?
        every checkpoint interval and after each validation:  everything → one atomic file, written meanwhile

It knows neither Ray nor MLflow: data, validation, storage and reporting reach it as arguments. Every worker runs it, in
step; nothing in it waits for the device but reports, validations and checkpoints.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import nn

from sr_data.batch_feed import BatchFeed
from sr_data.errors import StorageError
from sr_data.storage import Store
from sr_data.storage_patience import Patience
from sr_train import checkpoint as ckpt
from sr_train.checkpoint_writer import CheckpointWriter, Written
from sr_train.collective import Collective
from sr_train.learner import Learner, NonFiniteLossError
from sr_train.options import OptimConfig, ScheduleConfig
from sr_train.schedule import learning_rate_at

Validate = Callable[[nn.Module, int], Mapping[str, float] | None]
"""(network in eval mode, step) → the same values on every worker; None, on every worker, if one was told to leave
before the validation's end.
"""

GoesOn = Callable[[Mapping[str, Any]], bool]
"""Asked with a validation's values and `step`, on rank 0: whether to train on."""


Leave = Callable[[], str | None]
"""Asked on every worker, at each report: why training should leave its workers now (someone stops it, a node will be
taken away); None to go on.
"""


class Left(Exception):
    """Training left its workers before the end, as one of them was told to; raised on all of them. A checkpoint holds
    all of it.
    """

    def __init__(self, reason: str, step: int):
        self.reason, self.step = reason, step
        super().__init__(reason, step)

    def __str__(self) -> str:
        return f"left at step {self.step}: {self.reason}"


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; raised on every worker, at the next checkpoint or the end. Earlier checkpoints
    are as they were.
    """


class Observer(Protocol):
    """Hears what happens; called on every worker, and free to do nothing on all but one."""

    def on_steps(self, values: Mapping[str, float], *, step: int, num_steps: int, seconds: float) -> None:
        """Averages of the last `num_steps` steps: the learner's, learning_rate, patches_per_s, data_wait_share."""

    def on_validation(self, values: Mapping[str, float], *, step: int, is_best: bool) -> None: ...

    def on_checkpoint(self, key: str, *, step: int, seconds: float, stalled_s: float) -> None:
        """A checkpoint is in storage, `seconds` after it was begun; training stood still for `stalled_s` of them."""

    def on_recovery(self, message: str, *, step: int) -> None:
        """Training collapsed and went back to an earlier checkpoint's weights."""

    def on_trouble(self, message: str, step: int) -> None:
        """Storage refuses the checkpoint of this step, or no longer does; called by another thread."""


class Watchdog(Protocol):
    """Sees when a method's training collapses, and knows how to go on. It judges alike on every worker."""

    def judge(self, values: Mapping[str, float], *, step: int) -> str | None:
        """What is wrong with a report's or a validation's values; None if nothing is."""

    def recover(self, saved: Mapping[str, Mapping[str, torch.Tensor]], *, step: int, reason: str) -> str:
        """Puts the learner back to a checkpoint's state, made gentler; says what it did. Raises if it was too often."""


@dataclass(frozen=True, kw_only=True)
class LoopPlan:
    """When things happen, in patches seen."""

    optim: OptimConfig
    schedule: ScheduleConfig
    validation_interval_patches: int
    checkpoint_interval_patches: int
    keep_last: int
    early_stop_after: int | None
    early_stop_min_gain_db: float
    checkpoint_patience_s: float = 0.0
    """How long storage may refuse a checkpoint."""
    report_interval_s: float = 1.0
    best_by: Literal["psnr", "lpips", "newest"] = "psnr"
    """What makes a validated checkpoint the best, and counts as a gain for the early stop."""

    def patches_at(self, step: int) -> int:
        return step * self.optim.global_batch_size

    def score(self, values: Mapping[str, float], step: int) -> float:
        """What the best checkpoint has most of."""
        if self.best_by == "newest":
            return step
        if self.best_by == "psnr":
            return values["psnr_db"]
        return -values.get("lpips", math.inf)  # a run that went on where LPIPS can be had compares from there on

    def is_due(self, interval_patches: int, step: int) -> bool:
        """Whether a multiple of the interval was passed by the step that ended at `step`, or the budget ended."""
        passed = self.patches_at(step) // interval_patches > self.patches_at(step - 1) // interval_patches
        return passed or step == self.optim.total_steps


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands: with the learner's tensors, all that going on needs."""

    step: int = 0
    best: Mapping[str, Any] | None = None
    """step, key, the validation's values of the best checkpoint so far; None before the first validation."""
    validations_without_gain: int = 0
    good_step: int | None = None
    """Of the last validation that nothing was wrong with: its checkpoint is what a collapse goes back to."""
    validation_pending: bool = False
    """Whether the validation that was due at this step is still to come: training left before it had ended."""

    def to_meta(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "best": dict(self.best) if self.best else None,
            "validations_without_gain": self.validations_without_gain,
            "good_step": self.good_step,
            "validation_pending": self.validation_pending,
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> "Position":
        return cls(
            step=meta["step"],
            best=meta["best"],
            validations_without_gain=meta.get("validations_without_gain", 0),
            good_step=meta.get("good_step"),
            validation_pending=meta.get("validation_pending", False),
        )


_MOST_STEPS = 50
"""Between two reports: training that becomes slower all at once must still hear in time that it is to leave."""


@dataclass(kw_only=True)
class _Window:
    """The time and the steps since the last report, and after how many steps the next one is due."""

    interval_s: float
    due_after: int = 1
    started_s: float = field(default_factory=time.perf_counter)
    steps: int = 0
    learning_rates: float = 0.0

    def add(self, learning_rate: float) -> None:
        self.steps += 1
        self.learning_rates += learning_rate

    def next(self, seconds: float) -> "_Window":
        """The window after one that took `seconds` on rank 0: reports are collective, so all workers count alike. It
        grows slowly, since the first steps compile and wait for images.
        """
        fitting = int(self.interval_s * self.steps / max(seconds, 1e-9))
        return _Window(interval_s=self.interval_s, due_after=max(1, min(fitting, 4 * self.due_after, _MOST_STEPS)))


def train(
    plan: LoopPlan,
    *,
    learner: Learner,
    feed: BatchFeed,
    validate: Validate,
    store: Store,
    meta: Mapping[str, Any],
    position: Position,
    observer: Observer,
    collective: Collective,
    watchdog: Watchdog | None = None,
    goes_on: GoesOn | None = None,
    leave: Leave = lambda: None,
) -> Position:
    """Trains from `position` to the end of the budget (or an early stop) and returns where it ended.

    `meta` goes into each checkpoint beside the position. `goes_on` is asked once a validated checkpoint is in storage;
    if it says no, all workers stop there. Raises Left, NonFiniteLossError, CheckpointWriteError, and whatever `feed`,
    `validate` and `watchdog` raise.
    """
    writer = CheckpointWriter(
        store, keep_last=plan.keep_last, patience_s=plan.checkpoint_patience_s, on_trouble=observer.on_trouble
    )
    try:
        return _Run(
            plan, learner, feed, validate, store, writer, meta, observer, collective, watchdog, goes_on, leave
        ).train(position)
    finally:
        writer.close()


@dataclass(frozen=True)
class _Run:
    """The parts of a run, so that its functions take what changes: the position."""

    plan: LoopPlan
    learner: Learner
    feed: BatchFeed
    validate: Validate
    store: Store
    writer: CheckpointWriter
    meta: Mapping[str, Any]
    observer: Observer
    collective: Collective
    watchdog: Watchdog | None
    goes_on: GoesOn | None
    leave: Leave

    def train(self, position: Position) -> Position:
        plan, optim, goes_on = self.plan, self.plan.optim, True
        if position.validation_pending:
            position, fault, leave, values = self._validated(position)
            # Before the first good validation there is nothing to go back to.
            fault = fault if position.good_step is not None else None
            goes_on = self._settled(position, fault, leave, values)
        elif self.watchdog is not None and position.step == 0:
            # What training is compared with, and goes back to, from the first step on.
            position, _, leave, _ = self._validated(position)
            self._settled(position, None, leave, None)
        window = _Window(interval_s=plan.report_interval_s)
        while goes_on and position.step < optim.total_steps and not _stops_early(plan, position):
            learning_rate = learning_rate_at(
                plan.schedule, patches_seen=plan.patches_at(position.step), total_patches=optim.total_patches
            )
            # A network with randomness of its own (dropout) draws the same numbers after a restart: no generator state
            # to save.
            torch.manual_seed(((optim.seed * 1_000_003 + position.step) * 1_009 + self.collective.rank) % 2**63)
            self.learner.step(self.feed.take(position.step), learning_rate=learning_rate)
            window.add(learning_rate)
            step = position.step + 1
            position = replace(position, step=step)
            if step < optim.total_steps:
                self.feed.prepare(step)

            validation_due = plan.is_due(plan.validation_interval_patches, step)
            checkpoint_due = validation_due or plan.is_due(plan.checkpoint_interval_patches, step)
            if not checkpoint_due and window.steps < window.due_after:
                continue
            seconds, fault, leave = self._report(window, step)
            values = None
            if validation_due and fault is None:
                if leave is None:
                    position, fault, leave, values = self._validated(position)
                else:
                    position = replace(position, validation_pending=True)
            window = window.next(seconds)  # what training stands still for a checkpoint counts, a validation does not
            if checkpoint_due or fault is not None or leave is not None:
                goes_on = self._settled(position, fault, leave, values)
        if position.best is None:  # the budget was cut to what a checkpoint without a validation had reached
            position, _, leave, _ = self._validated(position)
            self._settled(position, None, leave, None)
        self._finish_write()
        return position

    def _report(self, window: _Window, step: int) -> tuple[float, str | None, str | None]:
        """Tells how the window went: its seconds on rank 0, what the watchdog finds wrong, why to leave."""
        try:
            values = self.learner.report()
        except NonFiniteLossError as error:
            if self.watchdog is None:
                raise NonFiniteLossError(
                    f"{error}; learning rate {window.learning_rates / window.steps:.3g}"
                ) from error
            return self.collective.first(time.perf_counter() - window.started_s), str(error), None
        seconds = max(time.perf_counter() - window.started_s, 1e-9)
        values |= {
            "learning_rate": window.learning_rates / window.steps,
            "patches_per_s": window.steps * self.plan.optim.global_batch_size / seconds,
            "data_wait_share": self.feed.waited_s() / seconds,
        }
        self.observer.on_steps(values, step=step, num_steps=window.steps, seconds=seconds)
        self._tell_written(self.writer.finished())
        fault = self.watchdog.judge(values, step=step) if self.watchdog is not None else None
        seconds_of_all, reasons = zip(*self.collective.gather((seconds, self.leave())), strict=True)
        return seconds_of_all[0], fault, _first_reason(reasons)

    def _settled(
        self, position: Position, fault: str | None, leave: str | None, values: Mapping[str, float] | None
    ) -> bool:
        """Saves, after going back if something is wrong; whether training goes on after this validation's values, if
        there was one. Raises Left if told to leave.
        """
        if fault is not None:
            self._recover(position, fault)
        self._save(position)  # also then, else a worker lost now would go back to the collapse
        if leave is not None:
            self._finish_write()
            raise Left(leave, position.step)
        return fault is not None or values is None or self._asked(values, position.step)

    def _asked(self, values: Mapping[str, float], step: int) -> bool:
        """Whether training goes on after a validation, on every worker."""
        if self.goes_on is None:
            return True
        self._finish_write()  # what is decided on must be there to go on from
        return self.collective.first(self.goes_on({**values, "step": step}) if self.collective.rank == 0 else True)

    def _validated(self, position: Position) -> tuple[Position, str | None, str | None, Mapping[str, float] | None]:
        """The position after a validation: whether this step is the best so far, and for how long none was better; what
        the watchdog finds wrong, in which case nothing else changes; why to leave, in which case the validation is
        still to come; and the validation's values.
        """
        plan, network = self.plan, self.learner.inference_network()
        was_training = network.training
        network.eval()
        validated = self.validate(network, position.step)
        network.train(was_training)
        if validated is None:
            reason = _first_reason(self.collective.gather(self.leave()))
            return replace(position, validation_pending=True), None, reason or "a worker was told to leave", None
        values = dict(validated)
        fault = self.watchdog.judge(values, step=position.step) if self.watchdog is not None else None
        best = position.best
        gain = plan.score(values, position.step) - plan.score(best, best["step"]) if best is not None else math.inf
        is_best = fault is None and gain > 0
        gained = gain >= plan.early_stop_min_gain_db
        self.observer.on_validation(values, step=position.step, is_best=is_best)
        if fault is not None:
            return replace(position, validation_pending=False), fault, None, values
        after = Position(
            step=position.step,
            best={"step": position.step, "key": ckpt.key_of_step(position.step), **values} if is_best else best,
            validations_without_gain=0 if gained else position.validations_without_gain + 1,
            good_step=position.step,
        )
        return after, None, None, values

    def _save(self, position: Position) -> None:
        """Rank 0 begins to write; all ranks learn whether the last write worked, so that they stop together if not."""
        started_s = time.perf_counter()
        self._finish_write()
        if self.collective.rank == 0:
            patches_seen = self.plan.patches_at(position.step)
            meta = {**self.meta, **position.to_meta(), "patches_seen": patches_seen}
            self.writer.write(self.learner.state(), meta, asked_s=started_s)

    def _finish_write(self) -> None:
        error: str | None = None
        if self.collective.rank == 0:
            try:
                self._tell_written(self.writer.finish())
            except StorageError as failure:
                error = str(failure)
        error = self.collective.first(error)
        if error is not None:
            raise CheckpointWriteError(f"a checkpoint could not be written, earlier ones are untouched: {error}")

    def _tell_written(self, written: Written | None) -> None:
        if written is not None:
            self.observer.on_checkpoint(
                written.key, step=written.step, seconds=written.seconds, stalled_s=written.stalled_s
            )

    def _recover(self, position: Position, fault: str) -> None:
        """Back to the weights of the last good validation: a later checkpoint may hold the beginning of the collapse.
        Steps and patches count on: a batch is a function of its step, and what was spent is spent.
        """
        assert self.watchdog is not None
        assert position.good_step is not None, "with a watchdog, the first validation is before the first step"
        self._finish_write()
        key = ckpt.key_of_step(position.good_step)
        saved = Patience(seconds=self.plan.checkpoint_patience_s).spend(
            partial(ckpt.read_checkpoint, self.store, key), on=f"the checkpoint {key} can't be read"
        )
        did = self.watchdog.recover(saved.tensors, step=position.step, reason=fault)
        self.observer.on_recovery(f"{fault}: back to {key}, {did}", step=position.step)


def _stops_early(plan: LoopPlan, position: Position) -> bool:
    return plan.early_stop_after is not None and position.validations_without_gain >= plan.early_stop_after


def _first_reason(reasons: Sequence[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)
