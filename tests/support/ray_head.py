"""A real Ray cluster of one node, started with `ray start --head` and driven by `ray job submit`."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tests.support.process import PATIENCE_S, Child, ServerError, answers_http, free_ports

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

T = TypeVar("T")
RAY = str(Path(sys.executable).parent / "ray")
ON_A_BUSY_MACHINE = {"RAY_worker_niceness": "0", "RAY_agent_register_timeout_ms": "120000"}
"""Where other tests run too, workers at Ray's own niceness, 15, starve, and an agent takes more than Ray's 30 s."""


@dataclass(frozen=True)
class JobOutcome:
    """How a submitted job ended."""

    exit_code: int
    logs: str


@dataclass(frozen=True)
class Job:
    """A submitted job, running or ended."""

    job_id: str
    entrypoint: str
    client: JobSubmissionClient

    def logs(self) -> str:
        """What it has printed so far."""
        return self.client.get_job_logs(self.job_id)

    def wait_until_said(self, text: str, *, timeout_s: float = PATIENCE_S) -> None:
        """Returns once the job's log holds `text`; ServerError with the log if it ends or takes longer."""
        deadline = time.monotonic() + timeout_s
        while text not in (logs := self.logs()):
            if self.client.get_job_status(self.job_id).is_terminal() or time.monotonic() > deadline:
                raise ServerError(f"{self.entrypoint!r} did not say {text!r}:\n{logs}")
            time.sleep(0.1)

    def driver_pid(self) -> int:
        """The process that runs the entry point, once it has joined the cluster."""
        driver = self.client.get_job_info(self.job_id).driver_info
        if driver is None:
            raise ServerError(f"{self.entrypoint!r} has not joined the cluster:\n{self.logs()}")
        return int(driver.pid)

    def wait(self, *, timeout_s: float = PATIENCE_S) -> JobOutcome:
        """How it ended; TimeoutError (with the log) stops it."""
        from ray.job_submission import JobStatus

        # Waiting is done here, because the command's exit code is 0 or 1, not the entry point's own.
        deadline = time.monotonic() + timeout_s
        while not (status := self.client.get_job_status(self.job_id)).is_terminal():
            if time.monotonic() > deadline:
                self.client.stop_job(self.job_id)
                raise TimeoutError(f"{self.entrypoint!r} ran past {timeout_s:.0f} s:\n{self.logs()}")
            time.sleep(0.25)
        code = self.client.get_job_info(self.job_id).driver_exit_code
        if code is None:  # the driver was never started: its runtime environment failed, or it was stopped
            code = 0 if status is JobStatus.SUCCEEDED else 1
        return JobOutcome(code, self.logs())


@dataclass(frozen=True)
class RayHead:
    """A running head node."""

    address: str
    """`host:port` for `ray.init(address)` and RAY_ADDRESS."""
    jobs_url: str
    """The dashboard, for `ray job submit --address`."""
    child: Child

    def submit_job(
        self, entrypoint: str, *, working_dir: Path, env: Mapping[str, str] | None = None, timeout_s: float = PATIENCE_S
    ) -> JobOutcome:
        """`ray job submit --working-dir DIR -- ENTRYPOINT`, then waits; TimeoutError (with the log) stops the job."""
        return self.start_job(entrypoint, working_dir=working_dir, env=env).wait(timeout_s=timeout_s)

    def start_job(self, entrypoint: str, *, working_dir: Path, env: Mapping[str, str] | None = None) -> Job:
        """The same with `--no-wait`."""
        from ray.job_submission import JobSubmissionClient  # here: a second that most tests can do without

        job_id = f"job-{uuid.uuid4().hex[:8]}"
        command = [RAY, "job", "submit", "--address", self.jobs_url, "--submission-id", job_id, "--no-wait"]
        command += ["--working-dir", str(working_dir), "--runtime-env-json", json.dumps({"env_vars": dict(env or {})})]
        done = subprocess.run(
            [*command, "--", *shlex.split(entrypoint)], capture_output=True, text=True, timeout=PATIENCE_S
        )
        if done.returncode != 0:
            raise ServerError(f"ray job submit exited with {done.returncode}:\n{done.stderr[-2000:]}")
        return Job(job_id, entrypoint, JobSubmissionClient(self.jobs_url))


def start_ray_head(folder: Path, *, num_cpus: int = 3, env: Mapping[str, str] | None = None) -> RayHead:
    """`folder` must have a short path: Ray's Unix sockets lie in it (limit 107 characters). What the node's environment
    has (`env`), every process of every job has.
    """
    return until_it_starts(lambda: _start_ray_head(folder, num_cpus=num_cpus, env=env))


def until_it_starts(start: Callable[[], T]) -> T:
    """What `start` returns, the third time at the latest: a node gives up on itself where its start takes more than
    30 s, which nothing can change, and ports that were free a moment ago may be another's by the time Ray takes them.

    `start` leaves nothing behind when it raises ServerError.
    """
    for _ in range(2):
        with suppress(ServerError):
            return start()
    return start()


def _start_ray_head(folder: Path, *, num_cpus: int, env: Mapping[str, str] | None) -> RayHead:
    names = (
        "port",
        "dashboard-port",
        "ray-client-server-port",
        "node-manager-port",
        "object-manager-port",
        "metrics-export-port",
        "runtime-env-agent-port",
        "dashboard-agent-grpc-port",
        "dashboard-agent-listen-port",
    )
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command: list[str | Path] = [
        Path(sys.executable).parent / "ray",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
    ]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
    command += [f"--num-cpus={num_cpus}", "--num-gpus=0", f"--temp-dir={folder}", "--object-store-memory=400000000"]
    # 0: the kernel chooses. The default range, 10002 to 19999, would be shared with other clusters of this machine.
    command += ["--min-worker-port=0", "--max-worker-port=0"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    # Ray Data leaves a detached actor in the cluster, so draining at the end would wait its full time, 30 s.
    inherited |= {"RAY_AUTH_MODE": "disabled", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"} | ON_A_BUSY_MACHINE
    child = Child.start("ray head", command, log_path=folder / "head.log", env=inherited | dict(env or {}))
    jobs_url = f"http://127.0.0.1:{ports['dashboard-port']}"
    agent_url = f"http://127.0.0.1:{ports['dashboard-agent-listen-port']}"
    try:
        # Jobs are started by the node's agent, which is up a moment after the dashboard.
        ready = (f"{jobs_url}/api/version", f"{agent_url}/api/local_raylet_healthz")
        child.wait_until(lambda: all(map(answers_http, ready)), timeout_s=120)
    except BaseException:
        child.stop()
        raise
    return RayHead(f"127.0.0.1:{ports['port']}", jobs_url, child)
