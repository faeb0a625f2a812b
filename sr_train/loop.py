"""The training loop: from a position to the end of the budget, with validations and checkpoints on the way.

    for step in position … total_steps:
        batches ← pool(step)                      a pure function of (seed, step): nothing to replay after a restart
        learner.step(batches, learning_rate(patches seen))
        every validation interval:  scores → is it the best? → early stop?
        every checkpoint interval and after each validation:  everything → one atomic file

It knows neither Ray nor MLflow: data, validation, storage and reporting reach it as arguments. Every worker runs it, in
step.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from sr_data.errors import StorageError
from sr_data.storage import Store
from sr_train import checkpoint as ckpt
from sr_train.collective import Collective
from sr_train.config import OptimConfig, ScheduleConfig
from sr_train.learner import Learner
from sr_train.schedule import learning_rate_at


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; raised on every worker. Earlier checkpoints are as they were."""


class BatchSource(Protocol):
    """This worker's part of every batch, as `sr_data.patch_pool.PatchPool` gives it."""

    def batch(self, step: int, micro: int = 0, num_micro: int = 1) -> tuple[torch.Tensor, torch.Tensor]: ...


class Observer(Protocol):
    """Hears what happens; called on every worker, and free to do nothing on all but one."""

    def on_steps(self, values: Mapping[str, float], *, step: int, num_steps: int, seconds: float) -> None:
        """Averages of the last `num_steps` steps: loss, learning_rate, grad_norm, patches_per_s, data_wait_share."""

    def on_validation(self, values: Mapping[str, float], *, step: int, is_best: bool) -> None: ...

    def on_checkpoint(self, key: str, *, step: int, seconds: float) -> None: ...


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
    report_interval_s: float = 1.0
    metric: str = "psnr_db"
    """Which of the validation's values is the one to maximise."""

    def patches_at(self, step: int) -> int:
        return step * self.optim.global_batch_size

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

    def to_meta(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "best": dict(self.best) if self.best else None,
            "validations_without_gain": self.validations_without_gain,
        }

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> "Position":
        return cls(
            step=meta["step"], best=meta["best"], validations_without_gain=meta.get("validations_without_gain", 0)
        )


@dataclass(kw_only=True)
class _Window:
    """Sums since the last report."""

    started_s: float = field(default_factory=time.perf_counter)
    steps: int = 0
    waited_s: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, values: Mapping[str, float], waited_s: float) -> None:
        self.steps += 1
        self.waited_s += waited_s
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    @property
    def elapsed_s(self) -> float:
        return max(time.perf_counter() - self.started_s, 1e-9)

    def report(self, global_batch_size: int) -> dict[str, float]:
        elapsed_s = self.elapsed_s
        means = {name: total / self.steps for name, total in self.sums.items()}
        return means | {
            "patches_per_s": self.steps * global_batch_size / elapsed_s,
            "data_wait_share": self.waited_s / elapsed_s,
        }


def train(
    plan: LoopPlan,
    *,
    learner: Learner,
    source: BatchSource,
    validate: Callable[[nn.Module, int], Mapping[str, float]],
    store: Store,
    meta: Mapping[str, Any],
    position: Position,
    observer: Observer,
    collective: Collective,
) -> Position:
    """Trains from `position` to the end of the budget (or an early stop) and returns where it ended.

    `validate(network, step)` returns the same values on every worker, `plan.metric` among them. `meta` goes into each
    checkpoint beside the position. Raises NonFiniteLossError, CheckpointWriteError, and whatever `source` and
    `validate` raise.
    """
    optim = plan.optim
    window = _Window()
    first_step = position.step + 1
    while position.step < optim.total_steps and not _stops_early(plan, position):
        patches_seen = plan.patches_at(position.step)
        learning_rate = learning_rate_at(plan.schedule, patches_seen=patches_seen, total_patches=optim.total_patches)
        # A network with randomness of its own (dropout) draws the same numbers after a restart: no generator state to
        # save.
        torch.manual_seed(((optim.seed * 1_000_003 + position.step) * 1_009 + collective.rank) % 2**63)
        asked_s = time.perf_counter()
        num_micro = optim.accumulation_steps
        batches = [source.batch(position.step, micro, num_micro) for micro in range(num_micro)]
        waited_s = time.perf_counter() - asked_s
        values = learner.step(batches, learning_rate=learning_rate)
        window.add(values | {"learning_rate": learning_rate}, waited_s)

        step = position.step + 1
        position = Position(step=step, best=position.best, validations_without_gain=position.validations_without_gain)
        validation_due = plan.is_due(plan.validation_interval_patches, step)
        checkpoint_due = validation_due or plan.is_due(plan.checkpoint_interval_patches, step)
        if step == first_step or checkpoint_due or window.elapsed_s >= plan.report_interval_s:
            observer.on_steps(
                window.report(optim.global_batch_size), step=step, num_steps=window.steps, seconds=window.elapsed_s
            )
            window = _Window()
        if validation_due:
            position = _validated(plan, position, learner, validate, observer)
        if checkpoint_due:
            _save(plan, position, learner, store, meta, observer, collective)
            window = _Window()
    if position.best is None:  # the budget was cut to what a checkpoint without a validation had reached
        position = _validated(plan, position, learner, validate, observer)
        _save(plan, position, learner, store, meta, observer, collective)
    return position


def _stops_early(plan: LoopPlan, position: Position) -> bool:
    return plan.early_stop_after is not None and position.validations_without_gain >= plan.early_stop_after


def _validated(
    plan: LoopPlan,
    position: Position,
    learner: Learner,
    validate: Callable[[nn.Module, int], Mapping[str, float]],
    observer: Observer,
) -> Position:
    """The position after a validation: whether this step is the best so far, and for how long none was better."""
    network = learner.inference_network()
    was_training = network.training
    network.eval()
    values = dict(validate(network, position.step))
    network.train(was_training)
    best = position.best
    is_best = best is None or values[plan.metric] > best[plan.metric]
    gained = best is None or values[plan.metric] >= best[plan.metric] + plan.early_stop_min_gain_db
    observer.on_validation(values, step=position.step, is_best=is_best)
    return Position(
        step=position.step,
        best={"step": position.step, "key": ckpt.key_of_step(position.step), **values} if is_best else best,
        validations_without_gain=0 if gained else position.validations_without_gain + 1,
    )


def _save(
    plan: LoopPlan,
    position: Position,
    learner: Learner,
    store: Store,
    meta: Mapping[str, Any],
    observer: Observer,
    collective: Collective,
) -> None:
    """Rank 0 writes; all ranks learn whether it worked, so that they stop together if it did not."""
    started_s = time.perf_counter()
    error: str | None = None
    if collective.rank == 0:
        whole = {**meta, **position.to_meta(), "patches_seen": plan.patches_at(position.step)}
        try:
            ckpt.write_checkpoint(store, ckpt.Checkpoint(tensors=learner.state(), meta=whole))
        except StorageError as failure:
            error = str(failure)
        else:
            _tidy(plan, position, store)
    error = collective.first(error)
    if error is not None:
        raise CheckpointWriteError(
            f"the checkpoint of step {position.step} could not be written, earlier ones are untouched: {error}"
        )
    observer.on_checkpoint(ckpt.key_of_step(position.step), step=position.step, seconds=time.perf_counter() - started_s)


def _tidy(plan: LoopPlan, position: Position, store: Store) -> None:
    try:
        ckpt.keep(store, last=plan.keep_last, best_key=position.best["key"] if position.best else None)
    except StorageError as failure:  # costs space, not the run; the next checkpoint tries again
        logging.getLogger(__name__).warning("old checkpoints could not be deleted: %s", failure)
