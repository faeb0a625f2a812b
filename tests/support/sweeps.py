"""Sweeps of tiny EDSRs whose trials train in this process: planned and trained as always, but for Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sr_data.manifest import ImageRecord
from sr_data.pairs import DecodedPair, load_pair
from sr_data.storage import open_store
from sr_models.cost import ModelCost
from sr_models.edsr import EDSRConfig
from sr_train import checkpoint as ckpt
from sr_train.config import TrainConfig
from sr_train.learner import NonFiniteLossError
from sr_train.mailbox import Message
from sr_train.options import DataConfig, OptimConfig, RunConfig, TrackingConfig, ValidationConfig
from sr_train.pareto import Limits
from sr_train.placement import ClusterFacts
from sr_train.ray_workers import FitResult, TrainingFailedError, Workers
from sr_train.run_folder import checkpoint_store
from sr_train.sweep_config import SearchConfig, SweepConfig
from sr_train.sweep_plan import SweepPlan, make_sweep_plan
from sr_train.tracking import RunHandle
from sr_train.training_space import EDSRSpace, TrainingSpace, space_from_dict
from sr_train.trial import Report, TrialTask, run_trial, trial_store
from sr_train.trial_record import Point, Sample, Status, TrialRecord
from sr_train.worker import Job, StreamPairs, run_worker

Space = TrainingSpace[EDSRSpace]

BATCH = 4
TRIAL_PATCHES, GRACE_PATCHES = 6 * BATCH, 2 * BATCH
"""Of a tiny sweep: three validations."""

TWO_CPUS = ClusterFacts(cpus_per_node=(2.0,), gpus_per_node=(0.0,))

TINY: Sample = {
    "num_blocks": 1,
    "num_channels": 4,
    "schedule.kind": "constant",
    "schedule.learning_rate": 1e-3,
    "schedule.warmup_fraction": 0.0,
    "global_batch_size": BATCH,
    "patch_px_hr": 16,
}
"""The only point of the space of a sweep that varies nothing."""


def tiny_space(**texts: str) -> Space:
    """Of TINY's choices but for these: option ("num_blocks", "schedule__kind") → the text of its domain."""
    values = {name: str(value) for name, value in TINY.items()} | {"schedule.decay_every_fraction": "0.5"}
    return space_from_dict(Space, values | {name.replace("__", "."): text for name, text in texts.items()})


def tiny_sweep(
    photos: Path | str,
    storage: Path,
    *,
    space: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    run: Mapping[str, Any] | None = None,
    total_patches: int = 4 * TRIAL_PATCHES,
    **search: Any,
) -> SweepConfig[TrainConfig[EDSRConfig], EDSRSpace]:
    """A sweep called `mine` of trials that validate on one of the photos; `search`: options of SearchConfig."""
    settings = {"name": "mine", "storage": str(storage), "device": "cpu", "threads_per_worker": 1}
    return SweepConfig(
        base=TrainConfig(
            model=EDSRConfig(scale=2, num_blocks=1, num_channels=4),
            data=DataConfig(uri=str(photos), patch_px_hr=16),
            validation=ValidationConfig(num_images=1),
            optim=OptimConfig(total_patches=total_patches, global_batch_size=BATCH, ema_decay=0.5),
            tracking=TrackingConfig(experiment="sweeps"),
            run=RunConfig(**settings | dict(run or {})),  # type: ignore[arg-type]
        ),
        space=tiny_space(**(space or {})),
        search=SearchConfig(**{"trial_patches": TRIAL_PATCHES, "grace_patches": GRACE_PATCHES} | search),
        limits=limits or Limits(),
    )


def planned(photos: Path | str, storage: Path, *, resume: bool = False, **options: Any) -> SweepPlan:
    """The plan of `tiny_sweep(photos, storage, **options)` on two CPUs."""
    return make_sweep_plan(tiny_sweep(photos, storage, **options), TWO_CPUS, resume=resume)


class WorkersHere(Workers):
    """One worker on this process's CPU, in place of a group on a cluster."""

    def __init__(self) -> None:
        super().__init__(RunConfig())
        self.jobs: list[Job] = []
        """What was to be trained."""

    def fit(
        self,
        job: Job,
        *,
        on_message: Callable[[Message], None],
        goes_on: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> FitResult:
        self.jobs.append(job)
        try:
            position, measures = run_worker(
                job,
                device=torch.device("cpu"),
                send=lambda kind, values: on_message((kind, values)),
                goes_on=goes_on,
            )
        except NonFiniteLossError as error:
            raise TrainingFailedError(str(error)) from error
        return FitResult(position=position, measures=measures, num_restarts=0)


class Told:
    """A report that remembers; says no from the `stop_at`th on, fails at the `fail_at`th."""

    def __init__(self, *, stop_at: int | None = None, fail_at: int | None = None) -> None:
        self._stop_at, self._fail_at = stop_at, fail_at
        self.records: list[TrialRecord] = []

    def __call__(self, record: TrialRecord) -> bool:
        self.records.append(record)
        if len(self.records) == self._fail_at:
            raise InterruptedError("the sweep's driver is gone")
        return self._stop_at is None or len(self.records) < self._stop_at


def plain_pairs(uri: str, records: Iterable[ImageRecord], scale: int) -> Iterator[DecodedPair]:
    """The images as they are asked for, decoded here."""
    store = open_store(uri)
    return (load_pair(store, record, scale) for record in records)


def tried(
    sweep: SweepPlan,
    sample: Sample = TINY,
    *,
    name: str = "trial-1",
    report: Report | None = None,
    workers: WorkersHere | None = None,
    donor: TrialRecord | None = None,
    parent: RunHandle | None = None,
    stream_pairs: StreamPairs = plain_pairs,
    owner: str | None = None,
) -> TrialRecord:
    """`run_trial` in this process."""
    task = TrialTask(sweep=sweep, stream_pairs=stream_pairs, parent=parent, facts={"git_sha": "abc"}, owner=owner)
    return run_trial(task, name, sample, workers=workers or WorkersHere(), report=report or Told(), donor=donor)


def checkpoints_of(sweep: SweepPlan, name: str = "trial-1") -> list[int]:
    """The steps of a trial's checkpoints, oldest first."""
    keys = ckpt.list_keys(checkpoint_store(trial_store(sweep, name).uri))
    return [ckpt.step_of_key(key) or 0 for key in keys]


def tensors_of(sweep: SweepPlan, step: int, name: str = "trial-1") -> dict[str, torch.Tensor]:
    """Everything of a trial's checkpoint."""
    store = checkpoint_store(trial_store(sweep, name).uri)
    saved = ckpt.read_checkpoint(store, ckpt.key_of_step(step))
    return {f"{group}/{key}": value for group, values in saved.tensors.items() for key, value in values.items()}


def told_trial(
    name: str = "trial-1",
    *psnr_db: float,
    sample: Sample = TINY,
    status: Status = "finished",
    seconds: Mapping[str, float] | None = None,
    cost: ModelCost | None = None,
) -> TrialRecord:
    """The record of a trial that nobody trained, validated every GRACE_PATCHES."""
    history = tuple(
        Point(patches_seen=number * GRACE_PATCHES, psnr_db=db, ssim=0.5) for number, db in enumerate(psnr_db, start=1)
    )
    return TrialRecord(
        name=name,
        sample=sample,
        status=status,
        history=history,
        cost=cost or ModelCost(parameters=1000, flops=1e9),
        checkpoint=f"{name}/best" if history else None,
        seconds=seconds or {},
    )
