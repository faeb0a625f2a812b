"""Tiny runs on a cluster that the test started: planned, fitted, and read back, below the driver's talk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from sr_data.storage import open_store
from sr_models.edsr import EDSRConfig
from sr_train import checkpoint as ckpt
from sr_train.config import TrainConfig
from sr_train.driver import make_job
from sr_train.mailbox import Message
from sr_train.options import CheckpointConfig, DataConfig, OptimConfig, RunConfig, ValidationConfig
from sr_train.plan import Plan, make_plan
from sr_train.ray_cluster import cluster_facts
from sr_train.ray_workers import FitResult, Workers
from sr_train.run_folder import checkpoint_store, claim
from sr_train.worker import StreamPairs

BATCH, TOTAL_STEPS, CHECKPOINT_STEPS = 4, 24, 5


def planned(photos: Path, storage: Path, name: str, **run: object) -> Plan:
    """Two workers on a rolling window of four of the photos: one image is replaced at every step."""
    settings = {"name": name, "storage": str(storage), "num_workers": 2, "threads_per_worker": 1, "device": "cpu"}
    return make_plan(
        TrainConfig(
            model=EDSRConfig(scale=2, num_blocks=1, num_channels=4),
            data=DataConfig(uri=str(photos), patch_px_hr=16, window_images=4, window_reuse_patches=BATCH),
            validation=ValidationConfig(uri=str(photos), num_images=2, interval_patches=10 * BATCH),
            optim=OptimConfig(total_patches=TOTAL_STEPS * BATCH, global_batch_size=BATCH, ema_decay=0.9),
            checkpoint=CheckpointConfig(interval_patches=CHECKPOINT_STEPS * BATCH),
            run=RunConfig(**(settings | run)),  # type: ignore[arg-type]
        ),
        cluster_facts(),
        resume=False,
    )


def run(plan: Plan, messages: list[Message], feed: StreamPairs | None = None) -> FitResult:
    """Trains on the cluster; `feed` takes the place of the images' stream."""
    owner = claim(open_store(plan.run_uri))
    job = make_job(plan, tracking=None, owner=owner, git_sha="unknown", script_started_s=0.0)
    with Workers(plan.config.run) as workers:
        return workers.fit(replace(job, stream_pairs=feed or job.stream_pairs), on_message=messages.append)


def final_tensors(plan: Plan) -> Mapping[str, torch.Tensor]:
    """Everything of the last checkpoint."""
    store = checkpoint_store(plan.run_uri)
    saved = ckpt.read_checkpoint(store, ckpt.key_of_step(TOTAL_STEPS))
    return {f"{group}/{name}": value for group, values in saved.tensors.items() for name, value in values.items()}
