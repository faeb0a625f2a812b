"""A sweep's trials under Ray Tune: which comes next, how many at once, which are stopped.

A trial is an actor that uses no CPU of its own and holds a group of workers (`sr_train.ray_workers`), where training
happens. Both stay for the trials that follow. Of what Tune keeps nothing is read again: a sweep goes on from its
trials' records, which are told to a new Tune as if the trials ran again (docs/decisions/0010).
"""

import logging
import math
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import tune
from ray.tune import schedulers
from ray.tune.experiment import Trial as TuneTrial

from sr_data.manifest import Manifest
from sr_data.shared_pairs import SharedPairs, decode_once, shared_stream
from sr_train.ray_cluster import set_defaults
from sr_train.ray_workers import POLL_INTERVAL_S, Workers
from sr_train.search_space import choices
from sr_train.sweep_plan import SweepPlan
from sr_train.tpe_search import PSNR, TpeSearch, as_config, name_in, sample_in
from sr_train.training_space import BATCH, LEARNING_RATE
from sr_train.trial import TrialTask, run_trial
from sr_train.trial_record import TrialRecord, record_from_json, record_to_json
from sr_train.worker import StreamPairs

_PATCHES, _RECORD, _CHECKPOINT_FILE = "patches_seen", "record", "record.json"
_BLOCK_IMAGES = 16
_STOP_TIMEOUT_S = 120.0


def decode_shared(sweep: SweepPlan) -> tuple[StreamPairs, list[SharedPairs]]:
    """Reads and decodes training and validation images once, for all trials. Keep the second value while they run."""
    base = sweep.base
    sets: dict[tuple[str, int, str], Manifest] = {}
    for manifest in (base.train, base.validation):
        sets.setdefault((manifest.uri, manifest.scale, manifest.fingerprint), manifest)
    shared = [
        decode_once(
            manifest.uri,
            manifest.images,
            manifest.scale,
            num_threads=base.config.data.decode_threads,
            block_images=_BLOCK_IMAGES,
        )
        for manifest in sets.values()
    ]
    return shared_stream(shared), shared


def run_sweep(task: TrialTask, *, on_record: Callable[[TrialRecord], None]) -> None:
    """Runs all trials. `on_record` is called in the caller's thread whenever a trial's record has changed; a trial that
    crashed too often is recorded as failed. Raises what Tune itself fails with.
    """
    sweep = task.sweep
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the records are the log
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the sweep has its own progress
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")  # a trial that fails early has no PSNR
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    _be_quiet()
    listener = _Listener(sweep.trial_patches)
    members = _members(sweep)
    if sweep.samples is not None and not members:
        return  # of this population, all are over
    is_population = sweep.config.search.scheduler == "pbt"
    with TemporaryDirectory(prefix="sr-ray-tune-", ignore_cleanup_errors=True) as state:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_TrialActor, task=task), _actor_resources(sweep)),
            param_space={} if sweep.samples is None else {"trial": tune.grid_search(members)},
            tune_config=tune.TuneConfig(
                search_alg=TpeSearch(sweep) if sweep.samples is None else None,
                scheduler=_scheduler(sweep),
                num_samples=sweep.num_trials if sweep.samples is None else 1,
                # Tune counts paused trials too, and a population is all of its members: its actors are limited by what
                # they reserve.
                max_concurrent_trials=None if is_population else sweep.max_concurrent,
                reuse_actors=True,
                trial_name_creator=lambda trial: name_in(trial.config),
                trial_dirname_creator=lambda trial: name_in(trial.config),
            ),
            run_config=tune.RunConfig(
                name=sweep.name,
                storage_path=state,
                verbose=0,
                callbacks=[listener],
                failure_config=tune.FailureConfig(max_failures=sweep.base.config.run.max_failures),
            ),
        )
        _fit_in_thread(tuner, listener, on_record)


def _fit_in_thread(tuner: tune.Tuner, listener: "_Listener", on_record: Callable[[TrialRecord], None]) -> None:
    """Tune in a thread, so that the caller's can be interrupted: Tune would take the signals for itself."""
    errors: list[Exception] = []

    def fit() -> None:
        try:
            tuner.fit()
        except Exception as error:  # noqa: BLE001  handed to the caller's thread, which raises it
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray-tune-fit", daemon=True)
    thread.start()
    alive = True
    while alive:
        thread.join(POLL_INTERVAL_S)
        alive = thread.is_alive()
        while not listener.records.empty():
            on_record(listener.records.get())
    if errors:
        raise errors[0]


class _Listener(tune.Callback):
    """Takes what Tune hears of its trials to the driver's thread."""

    def __init__(self, trial_patches: int) -> None:
        self._trial_patches = trial_patches
        self.records: queue.Queue[TrialRecord] = queue.Queue()
        self._last: dict[str, TrialRecord] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its callbacks, which nobody reads again."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        if trial.trial_id not in self._last:
            self._tell(trial, TrialRecord(name=str(trial), sample=sample_in(trial.config)))

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        self._tell(trial, record_from_json(result[_RECORD]))

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        record = self._last.get(trial.trial_id)
        if record is not None and not record.is_over:  # Tune stopped it, so its actor has nothing more to tell
            is_whole = record.patches_seen >= self._trial_patches
            self._tell(trial, replace(record, status="finished" if is_whole else "stopped"))

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        record = self._last.get(trial.trial_id) or TrialRecord(name=str(trial), sample=sample_in(trial.config))
        lines = str(trial.get_error() or "its actor was lost").strip().splitlines()
        self._tell(trial, replace(record, status="failed", reason=lines[-1]))

    def _tell(self, trial: TuneTrial, record: TrialRecord) -> None:
        self._last[trial.trial_id] = record
        self.records.put(record)


class _Talk:
    """Between Tune, which calls for each validation, and the thread that trains one trial: each trial has its own, so
    that one which could not be ended in time is never taken for the next one.
    """

    def __init__(self) -> None:
        self.told: queue.Queue[tuple[TrialRecord, bool] | BaseException] = queue.Queue()
        """Records, and whether the trial is over; or why it broke off."""
        self.answers: queue.Queue[bool] = queue.Queue()
        """Whether to train on, after each record that is not the last."""
        self._is_stopped = False

    def report(self, record: TrialRecord) -> bool:
        """Waits for the answer; after a first False nobody listens any more."""
        if not self._is_stopped:
            self.told.put((record, False))
            self._is_stopped = not self.answers.get()
        return not self._is_stopped


class _TrialActor(tune.Trainable):
    """Trials, one after another, and the workers that train them."""

    def setup(self, config: dict[str, Any], task: TrialTask) -> None:  # type: ignore[override]  # tune.with_parameters
        set_defaults()
        _be_quiet()
        self._task = task
        self._workers = Workers(task.sweep.base.config.run)
        self._earlier: tuple[threading.Thread, _Talk] | None = None
        self._begin()

    def _begin(self) -> None:
        self._thread: threading.Thread | None = None
        self._talk = _Talk()
        self._record: TrialRecord | None = None
        self._donor: TrialRecord | None = None

    def step(self) -> dict[str, Any]:
        """Trains to the next validation, or to the end."""
        if self._thread is None:
            self._end_earlier()
            self._thread = threading.Thread(target=self._train, args=(self._talk,), name="trial", daemon=True)
            self._thread.start()
        else:
            self._talk.answers.put(True)
        told = self._talk.told.get()
        if isinstance(told, BaseException):
            raise told
        self._record, is_end = told
        scores: dict[str, Any] = {}
        if self._record.history:
            point = self._record.history[-1]
            scores = {PSNR: point.psnr_db, _PATCHES: point.patches_seen}
        return {**scores, _RECORD: record_to_json(self._record), "done": is_end}

    def _train(self, talk: _Talk) -> None:
        """In a thread: Tune calls `step` for each validation, while training is one call."""
        try:
            record = run_trial(
                self._task,
                self.trial_name,
                sample_in(self.config),
                workers=self._workers,
                report=talk.report,
                donor=self._donor,
            )
        except BaseException as error:  # noqa: BLE001  raised where Tune waits
            talk.told.put(error)
        else:
            talk.told.put((record, True))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in this actor, or (PBT) this one with what it shall go on with. It takes no time: a trial
        whose actor is lost before this returns fails for good, one that is lost in a step is tried again.
        """
        if self._thread is not None:
            self._earlier = self._thread, self._talk
        self._begin()
        return True

    def cleanup(self) -> None:
        self._end_earlier()
        if self._thread is not None:
            self._end(self._thread, self._talk)
        self._workers.close()

    def _end_earlier(self) -> None:
        if self._earlier is not None:
            self._end(*self._earlier)
            self._earlier = None

    def _end(self, thread: threading.Thread, talk: _Talk) -> None:
        """Of a trial that Tune stopped: it waits for an answer, ends its workers' order and writes its record."""
        talk.answers.put(False)
        thread.join(_STOP_TIMEOUT_S)
        if thread.is_alive():  # a server hangs; the next trial must not share its workers
            self._workers.close(wait=False)
            self._workers = Workers(self._task.sweep.base.config.run)

    # What PBT's trials give one another: the record, which says where the checkpoint is.

    def save_checkpoint(self, checkpoint_dir: str) -> Any:
        assert self._record is not None  # Tune saves after a step
        (Path(checkpoint_dir) / _CHECKPOINT_FILE).write_text(record_to_json(self._record))
        return checkpoint_dir

    def load_checkpoint(self, checkpoint: Any) -> None:
        self._donor = record_from_json((Path(checkpoint) / _CHECKPOINT_FILE).read_text())


def _members(sweep: SweepPlan) -> list[dict[str, Any]]:
    """The trials of a sweep that knows them. A member of a population changes what it trains with, so its name does not
    say it.
    """
    samples = sweep.samples or ()
    if sweep.config.search.scheduler != "pbt":
        return [as_config(sample)["trial"] for sample in samples]
    known = {record.name: record for record in sweep.known}
    members = []
    for number, sample in enumerate(samples):
        name = f"member-{number:03d}"
        if name not in known:
            members.append(as_config(sample, name)["trial"])
        elif not known[name].is_over:  # those that are over give nothing to the others any more
            members.append(as_config(known[name].sample, name)["trial"])
    return members


def _largest_batch(sweep: SweepPlan) -> int:
    return max((int(sample.get(BATCH, 0)) for sample in sweep.samples or ()), default=0)


def _be_quiet() -> None:
    """The sweep tells what there is to tell."""
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _actor_resources(sweep: SweepPlan) -> dict[str, float]:
    """A byte: Tune wants something to reserve, and a share of a CPU would be missing where workers take whole ones.
    The members of a population stay on the driver's node, of which there is 1: what they give one another lies on its
    disk.
    """
    if sweep.config.search.scheduler != "pbt":
        return {"memory": 1.0}
    node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return {"memory": 1.0, f"node:{node}": math.floor(1e4 / sweep.max_concurrent) / 1e4}


def _scheduler(sweep: SweepPlan) -> schedulers.TrialScheduler:
    search = sweep.config.search
    if search.scheduler == "asha":
        return schedulers.ASHAScheduler(
            time_attr=_PATCHES,
            metric=PSNR,
            mode="max",
            max_t=sweep.trial_patches,
            grace_period=sweep.grace_patches,
            reduction_factor=search.reduction_factor,
            stop_last_trials=False,  # they end by themselves, with their last validation
        )
    if search.scheduler == "pbt":
        domain = sweep.config.space.schedule.learning_rate
        values = choices(domain)
        rates = list(values) if values is not None else tune.loguniform(*map(float, domain.values))
        lowest, highest = min(map(float, domain.values)), max(map(float, domain.values))

        def within(config: dict[str, Any]) -> dict[str, Any]:
            """After Tune has multiplied a rate by 0.8 or 1.2."""
            sample = config["trial"]["sample"]
            sample[LEARNING_RATE] = min(max(sample[LEARNING_RATE], lowest), highest)
            return config

        return schedulers.PopulationBasedTraining(
            time_attr=_PATCHES,
            metric=PSNR,
            mode="max",
            # Validations come after whole steps, a little late: the next one is less than an interval away.
            perturbation_interval=max(1, sweep.grace_patches - _largest_batch(sweep)),
            hyperparam_mutations={"trial": {"sample": {LEARNING_RATE: rates}}},
            custom_explore_fn=within,
            log_config=False,
        )
    return schedulers.FIFOScheduler()  # type: ignore[no-untyped-call]
