"""Small training runs on a cluster of several nodes: submitted, read back, compared."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from sr_train.checkpoint import Checkpoint, key_of_step, step_of_key
from tests.support.machines import Machine
from tests.support.nodes import Site
from tests.support.pipeline import REPO, run_script
from tests.support.ray_head import Job, JobOutcome

BATCH, STEPS, STEPS_BETWEEN = 8, 300, 15
"""Patches of a step, steps of a run, steps between two of its checkpoints."""
CPUS_PER_WORKER = 1.5
"""Of a node's two: one worker on each node, and half a CPU on each for decoding."""


@dataclass(frozen=True)
class NodeRun:
    """A run of two workers, by name: it may not have begun yet."""

    site: Site
    bucket: str
    """`s3://…` with the images, made by `stage_photos`; the run lies there too."""
    name: str

    def command(self, *arguments: object) -> str:
        """What stands behind `ray job submit --working-dir . --`."""
        said = [
            *("--preset", "edsr-small-x2", "--model.num-blocks", 1, "--model.num-channels", 8),
            *("--data.uri", f"{self.bucket}/train", "--data.split", "train", "--data.patch-px-hr", 32),
            # Two images at once, exchanged all the time: Ray Data works as long as training does.
            *("--data.window-images", 2, "--data.window-reuse-patches", 10 * BATCH),
            *("--optim.global-batch-size", BATCH, "--optim.total-patches", BATCH * STEPS),
            *("--schedule.warmup-patches", BATCH * 4, "--checkpoint.keep-last", 1000),
            *("--checkpoint.interval-patches", BATCH * STEPS_BETWEEN),
            *("--validation.uri", f"{self.bucket}/valid", "--validation.interval-patches", BATCH * STEPS // 2),
            *("--run.storage", f"{self.bucket}/runs", "--run.name", self.name),
            *("--run.num-workers", 2, "--run.cpus-per-worker", CPUS_PER_WORKER, "--run.threads-per-worker", 1),
            *("--tracking.experiment", "nodes", "--tracking.register-as", self.name, *arguments),
        ]
        return " ".join([sys.executable, "pipelines/train_edsr.py", *map(str, said)])

    def start(self, *arguments: object, env: Mapping[str, str] | None = None) -> Job:
        """Submits it to the cluster as it is now."""
        told = {**self.site.env, **(env or {})}
        return self.site.nodes.head.start_job(self.command(*arguments), working_dir=REPO, env=told)

    @cached_property
    def objects(self) -> dict[str, bytes]:
        """All that lies in its folder, by key; read once."""
        s3, bucket, prefix = self.site.s3.client(), self.bucket.removeprefix("s3://"), f"runs/{self.name}/"
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {key.removeprefix(prefix): s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    @property
    def result(self) -> dict[str, Any]:
        """Its result file."""
        return dict(json.loads(self.objects["result.json"]))

    def checkpoints(self, folder: Path) -> dict[int, Checkpoint]:
        """All of its checkpoints by step, each read as the product does: whole, or CheckpointError."""
        from sr_data.storage import open_store
        from sr_train.checkpoint import read_checkpoint

        read = {}
        for key, content in self.objects.items():
            if (step := step_of_key(key.removeprefix("checkpoints/"))) is not None:
                (folder / key_of_step(step)).write_bytes(content)
                read[step] = read_checkpoint(open_store(str(folder)), key_of_step(step))
        return read

    def final_tensors(self, folder: Path) -> dict[str, torch.Tensor]:
        """Everything of the checkpoint at the end of the budget: weights, moving average, optimiser."""
        groups = self.checkpoints(folder)[STEPS].tensors
        return {f"{group}/{name}": value for group, tensors in groups.items() for name, value in tensors.items()}

    def versions(self) -> list[ModelVersion]:
        """What was registered by it."""
        uri = self.site.mlflow.uri
        return list(MlflowClient(uri, uri).search_model_versions(f"name='{self.name}'"))


@dataclass(frozen=True)
class FinishedRun:
    """A run that nothing happened to, where it was seen to train, and what its driver said."""

    run: NodeRun
    nodes: tuple[Machine, ...]
    logs: str


def run_unharmed(site: Site, bucket: str) -> FinishedRun:
    """From its first step to its registered model."""
    run = NodeRun(site, bucket, "unharmed")
    job = run.start()
    job.wait_until_said(f"step {STEPS // 2}: PSNR")
    nodes = tuple(site.nodes.training())
    return FinishedRun(run, nodes, succeeded(job).logs)


def assert_equal_tensors(expected: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert expected.keys() == got.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, got[name])] == []


def stage_photos(site: Site, photos: Path, folder: Path) -> str:
    """Four photos to train on and two to validate on, in a bucket of their own; its URI."""
    bucket = site.s3.new_bucket()
    for number, path in enumerate(sorted(photos.iterdir())):
        part = folder / ("train" if number < 4 else "valid")
        part.mkdir(exist_ok=True)
        shutil.copy(path, part)
    for part_name in ("train", "valid"):
        arguments = ["--target", f"{bucket}/{part_name}", "--source", folder / part_name]
        done = run_script("prepare_dataset.py", *arguments, cwd=folder, env=site.env)
        assert done.returncode == 0, done.stderr
    return bucket


def succeeded(job: Job) -> JobOutcome:
    """Waits for its end, which must be a good one."""
    outcome = job.wait()
    assert outcome.exit_code == 0, outcome.logs
    return outcome
