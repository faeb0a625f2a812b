"""One training worker: from a job description to the end of the loop. It knows PyTorch and the process group, not
Ray.
"""

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from sr_data.batch_feed import BatchFeed
from sr_data.manifest import ImageRecord, Manifest
from sr_data.pairs import DecodedPair
from sr_data.patch_pool import FeedError, PatchPool
from sr_data.sampling import SamplePlan, worker_samples
from sr_data.storage import open_store
from sr_data.storage_patience import Patience, warn
from sr_models.architectures import architecture_name, build_model
from sr_models.architectures import config_to_dict as model_config_to_dict
from sr_models.cost import latency_s
from sr_models.network import SRNetwork
from sr_train import checkpoint as ckpt
from sr_train.collective import Collective
from sr_train.config import TrainConfig, config_to_dict
from sr_train.loop import GoesOn, Leave, LoopPlan, Position, train
from sr_train.method import Assets
from sr_train.methods import method_of
from sr_train.run_folder import OwnedStore, checkpoint_store, claim_start
from sr_train.run_observer import RunObserver, Send
from sr_train.spool import spool_root
from sr_train.step_mode import step_mode
from sr_train.tracking import RunHandle, Tracker
from sr_train.validator import Validator

SPOOL = spool_root()
"""What could not be sent to MLflow yet, per machine and run: the next worker, or the driver, sends what one left."""

StreamPairs = Callable[[str, Iterable[ImageRecord], int], Iterator[DecodedPair]]
"""(dataset's URI, records, scale) → decoded pairs in that order, lazily."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker is told; plain values, the same for every worker."""

    config: TrainConfig[Any]
    train: Manifest
    validation: Manifest
    samples: SamplePlan
    run_uri: str
    owner: str
    """This driver's claim on the run, see `sr_train.run_folder`."""
    git_sha: str
    """Commit of the code that trains; "unknown" where there is no way to tell."""
    tracking: RunHandle | None
    init_state: Mapping[str, torch.Tensor] | None
    """Weights to start from; None for the architecture's own initialisation."""
    assets: Assets
    """What the method prepared."""
    stream_pairs: StreamPairs
    script_started_s: float
    """time.time() when the user started the run."""
    measures_latency: bool = False
    """Whether to measure, and tell, how long the network takes for an image before it is trained."""


def run_worker(
    job: Job,
    *,
    start: int = 1,
    device: torch.device,
    send: Send,
    goes_on: GoesOn | None = None,
    leave: Leave = lambda: None,
) -> tuple[Position, dict[str, float]]:
    """Goes on from the run's newest checkpoint, or begins, and trains to the end. Returns where it ended, and what it
    cost. Raises `Left`, and whatever training raises.

    `start` counts the driver's starts of workers: a later one takes the run from an earlier one. `send` tells the
    driver something, and does nothing but on rank 0. `goes_on` and `leave` as for `sr_train.loop.train`; with
    `job.measures_latency` it is asked before the first step too, with `latency_s`.
    """
    config = job.config
    collective = Collective.of_process_group()
    batch = config.optim.global_batch_size
    weight = len(_samples_of(job, collective)) * collective.world_size / batch
    collective = replace(collective, weight=weight)
    if device.type == "cpu":
        torch.set_num_threads(config.run.threads_per_worker or 1)
    else:
        torch.backends.cudnn.benchmark = True  # patches have one size: the fastest algorithm is worth looking for
    mode = step_mode(config.step, device_type=device.type, num_workers=collective.world_size)
    parts = method_of(config).build(config, _initial_network(job), job.assets, device, mode, collective)
    learner = parts.learner
    run = open_store(job.run_uri)
    patience, absent = _patience(config, send, collective), "the run's folder can't be used"
    if collective.rank == 0:
        patience.spend(partial(claim_start, run, job.owner, start), on=absent)
    store = OwnedStore(checkpoint_store(job.run_uri).uri, run, job.owner, start)
    newest = partial(patience.spend, partial(ckpt.newest_whole, store), on=absent)
    key = collective.first(newest() if collective.rank == 0 else None)
    position = Position()
    if key is not None:
        saved = patience.spend(partial(ckpt.read_checkpoint, store, key), on=f"the checkpoint {key} can't be read")
        learner.load_state(saved.tensors)
        position = Position.from_meta(saved.meta)
    hosts, ips, pids = zip(*collective.gather((*_name_and_address(), os.getpid())), strict=True)
    where = {"pids": pids, "hosts": hosts, "ips": ips}
    send("start", {"step": position.step, "checkpoint": key, "device": str(device), **where})

    if job.measures_latency and not _latency_told(job, position, device, goes_on, collective):
        return position, {}
    tracker = None
    if job.tracking is not None and collective.rank == 0:
        tracker = Tracker(job.tracking, spool=SPOOL)
    observer = RunObserver(
        send=send,
        tracker=tracker,
        total_steps=config.optim.total_steps,
        global_batch_size=config.optim.global_batch_size,
        protocol=config.validation.protocol,
        script_started_s=job.script_started_s,
    )
    pool = _pool(job, position.step, device, collective)
    validator = _validator(job, observer, collective, leave)
    try:
        if position.step == 0 and tracker is not None:
            observer.on_first_batch(*pool.batch(0, 0, config.optim.accumulation_steps))
        position = train(
            loop_plan(config, job.assets.best_by),
            learner=learner,
            feed=BatchFeed(pool, num_micro=config.optim.accumulation_steps, device=device, ahead=mode.batch_ahead),
            validate=validator,
            store=store,
            meta={
                "architecture": architecture_name(config.model),
                "model_config": model_config_to_dict(config.model),
                "config": config_to_dict(config),
                "dataset_fingerprint": job.train.fingerprint,
                "git_sha": job.git_sha,
            },
            position=position,
            observer=observer,
            collective=collective,
            watchdog=parts.watchdog,
            goes_on=goes_on,
            leave=leave,
        )
    except FeedError as error:
        raise (error.__cause__ or error) from None
    finally:
        pool.close()
        validator.close()
        undelivered = tracker.close() if tracker is not None else 0
    return position, observer.measures() | {"undelivered_tracking_items": float(undelivered)}


def _name_and_address() -> tuple[str, str]:
    """Of this machine: the address that its name stands for, where gloo listens."""
    name = socket.gethostname()
    try:
        return name, socket.gethostbyname(name)
    except OSError:
        return name, ""


def _patience(config: TrainConfig[Any], send: Send, collective: Collective) -> Patience:
    """With storage at the start: else workers that come back while storage is away would fail once more."""

    def say(message: str) -> None:
        if collective.rank == 0:
            send("trouble", {"message": message, "step": 0})
        else:
            warn(message)

    return Patience(seconds=config.checkpoint.patience_s, say=say)


def _latency_told(
    job: Job, position: Position, device: torch.device, goes_on: GoesOn | None, collective: Collective
) -> bool:
    """Whether training goes on, on every worker, now that the network's latency is known."""
    answer = True
    if collective.rank == 0 and goes_on is not None:
        answer = goes_on({"step": position.step, "latency_s": latency_s(build_model(job.config.model, seed=0), device)})
    return collective.first(answer)


def _initial_network(job: Job) -> SRNetwork:
    network = build_model(job.config.model, seed=job.config.optim.seed)
    if job.init_state is not None:
        network.load_state_dict(dict(job.init_state))
    return network


def _samples_of(job: Job, collective: Collective) -> range:
    """Which samples of each batch this worker trains on."""
    return worker_samples(
        job.config.optim.global_batch_size,
        rank=collective.rank,
        num_workers=collective.world_size,
        unit=job.config.optim.accumulation_steps,
    )


def _pool(job: Job, start_step: int, device: torch.device, collective: Collective) -> PatchPool:
    """This worker's part of the training images, filling itself in the background."""
    part = _samples_of(job, collective)
    pool = PatchPool(
        job.samples,
        [(record.height, record.width) for record in job.train.images],
        first_sample=part.start,
        num_samples=len(part),
        start_step=start_step,
        device=device,
        placement=job.config.data.placement,
    )
    records = (job.train.images[image] for _, image in pool.needs)
    pool.feed(job.stream_pairs(job.train.uri, records, job.train.scale))
    return pool


def _validator(job: Job, observer: RunObserver, collective: Collective, leave: Leave) -> Validator:
    def load(manifest: Manifest) -> Iterator[DecodedPair]:
        by_name = sorted(manifest.images, key=lambda record: record.name)
        return job.stream_pairs(manifest.uri, by_name[collective.rank :: collective.world_size], manifest.scale)

    return Validator(
        job.validation,
        job.config.validation,
        load=load,
        collective=collective,
        num_pictures=job.config.tracking.sample_images,
        on_picture=observer.on_picture,
        lpips=job.assets.lpips,
        title=job.assets.title,
        reference=_reference_network(job) if collective.rank == 0 else None,
        leave=leave,
    )


def _reference_network(job: Job) -> tuple[str, torch.nn.Module] | None:
    reference = job.assets.reference
    if reference is None:
        return None
    network = build_model(reference.config)
    network.load_state_dict(dict(reference.state))
    return reference.title, network


def loop_plan(config: TrainConfig[Any], best_by: Literal["psnr", "lpips", "newest"]) -> LoopPlan:
    """The loop's part of the config."""
    return LoopPlan(
        optim=config.optim,
        schedule=config.schedule,
        validation_interval_patches=config.validation.interval_patches,
        checkpoint_interval_patches=config.checkpoint.interval_patches,
        keep_last=config.checkpoint.keep_last,
        checkpoint_patience_s=config.checkpoint.patience_s,
        early_stop_after=config.validation.early_stop_after,
        early_stop_min_gain_db=config.validation.early_stop_min_gain_db,
        best_by=best_by,
    )
