"""A run that is harmed: moments to do it at, what it cost, and a record of every fault."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from mlflow import MlflowClient

from sr_train.checkpoint import key_of_step, step_of_key
from tests.support.node_runs import BATCH, STEPS, STEPS_BETWEEN, NodeRun
from tests.support.process import PATIENCE_S, ServerError
from tests.support.ray_head import Job, JobOutcome
from tests.support.s3_gate import S3Gate

SEEDS = range(int(os.environ.get("SR_FAULT_ROUNDS", "1")))
"""SR_FAULT_ROUNDS=5: each fault at five different random moments."""
RECORD = os.environ.get("SR_FAULT_RECORD")
"""File to which each fault is appended, as a line of JSON."""


@dataclass
class HarmedRun:
    """A run and what is done to it."""

    run: NodeRun
    gate: S3Gate
    seed: int
    arguments: tuple[object, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    faults: list[dict[str, object]] = field(default_factory=list)
    job: Job = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        # Kept: making one costs more than the questions that are asked all the time.
        self.s3 = self.run.site.s3.client()
        self.submit()

    def submit(self) -> None:
        """The same command, whether or not the run has begun."""
        env = {"AWS_ENDPOINT_URL": self.gate.url, **self.env}
        arguments = ["--resume", "--run.max-failures", 10, *self.arguments]
        self.job = self.run.start(*arguments, env=env)

    def random_moment(self, after_step: int) -> None:
        """Returns up to a second after the first checkpoint at or after this step: some checkpoints' distance."""
        self._wait_for_checkpoint(after_step)
        time.sleep(self.rng.uniform(0, 1))

    def _wait_for_checkpoint(self, step: int, *, timeout_s: float = PATIENCE_S) -> int:
        """The newest step that is saved, once that is `step` or later."""
        deadline = time.monotonic() + timeout_s
        while (newest := self.newest_saved()) < step:
            if self.job.client.get_job_status(self.job.job_id).is_terminal() or time.monotonic() > deadline:
                raise ServerError(f"no checkpoint of step {step} or later:\n{self.job.logs()}")
            time.sleep(0.1)
        return newest

    def newest_saved(self) -> int:
        """Step of its newest checkpoint; 0 without any."""
        bucket = self.run.bucket.removeprefix("s3://")
        answer = self.s3.list_objects_v2(Bucket=bucket, Prefix=f"runs/{self.run.name}/checkpoints/")
        return max((step_of_key(item["Key"].rpartition("/")[2]) or 0 for item in answer.get("Contents", [])), default=0)

    def checkpoint_path(self, step: int) -> str:
        """What the request that saves that step begins with."""
        bucket = self.run.bucket.removeprefix("s3://")
        return f"PUT /{bucket}/runs/{self.run.name}/checkpoints/{key_of_step(step)}"

    def next_checkpoint(self) -> int:
        """The step of a checkpoint that is not begun yet."""
        return (self.newest_saved() // STEPS_BETWEEN + 2) * STEPS_BETWEEN

    def inflict(self, fault: str, do: Callable[[], object]) -> None:
        """Does it, and notes what and when."""
        self.faults.append({"fault": fault, "seed": self.seed, "newest_checkpoint": self.newest_saved()})
        do()

    def wait_until_going_on(self, *, times: int = 1, timeout_s: float = PATIENCE_S) -> None:
        """Returns once this job's log has said so many times from where the run goes on."""
        deadline = time.monotonic() + timeout_s
        while len(self.said("going on from step")) < times:
            if self.job.client.get_job_status(self.job.job_id).is_terminal() or time.monotonic() > deadline:
                raise ServerError(f"the run did not go on (expected: {times} times):\n{self.job.logs()}")
            time.sleep(0.2)

    def said(self, start: str) -> list[str]:
        """Lines of this job's log that begin so."""
        return [line for line in self.job.logs().splitlines() if line.startswith(start)]

    def rank_0_host(self) -> str:
        """Name of the machine with the first worker: the one that writes checkpoints and tells MLflow."""
        lines = [line for line in self.job.logs().splitlines() if line.startswith(("training begins", "going on from"))]
        return lines[-1].rpartition(" on ")[2].split(",")[0].rstrip(")")

    def finish(self) -> JobOutcome:
        """Waits for the good end of the job."""
        outcome = self.job.wait()
        assert outcome.exit_code == 0, outcome.logs
        return outcome

    def record(self, outcome: str) -> None:
        """Appends each fault to the record, with what became of the run."""
        redone = self._redone_steps()
        for number, fault in enumerate(self.faults):
            # All of the run together where it is not clear which fault cost which steps.
            steps = redone[number] if len(redone) == len(self.faults) else sum(redone)
            fault |= {"run": self.run.name, "steps_redone": steps, "outcome": outcome}
        if RECORD:
            with Path(RECORD).open("a") as file:
                file.writelines(json.dumps(fault) + "\n" for fault in self.faults)

    def _redone_steps(self) -> list[int]:
        """For each time that training went back: how many steps back, as far as MLflow was told."""
        uri = self.run.site.mlflow.uri
        client = MlflowClient(uri, uri)
        [version] = self.run.versions() or [None]
        if version is None or version.run_id is None:
            return []
        points = sorted(client.get_metric_history(version.run_id, "loss"), key=lambda point: point.timestamp)
        steps = [point.step for point in points]
        return [before - after + 1 for before, after in pairwise(steps) if after <= before]  # reported after a step


def budget_is_spent_once(run: NodeRun, folder: Path) -> None:
    """The last checkpoint has seen every patch of the budget, and all checkpoints can be read."""
    saved = run.checkpoints(folder)
    assert saved[STEPS].meta["patches_seen"] == STEPS * BATCH
    assert all(checkpoint.meta["patches_seen"] == step * BATCH for step, checkpoint in saved.items())
