"""A real `mlflow server` on SQLite, on loopback or another address of this machine."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.process import Child, answers_http, free_ports


@dataclass(frozen=True)
class MlflowServer:
    """A running tracking server and registry."""

    uri: str
    child: Child


def start_mlflow(folder: Path, *, host: str = "127.0.0.1", port: int | None = None) -> MlflowServer:
    """Database and artefacts lie in `folder`: the same folder and port bring a stopped server back."""
    port = port or free_ports(1)[0]
    uri = f"http://{host}:{port}"
    command: list[str | Path] = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", folder / "artifacts", "--workers", "1"]
    # Job execution costs eight processes and a gigabyte and serves nothing here.
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    child = Child.start("mlflow", command, log_path=folder / "server.log", env=env)
    try:
        child.wait_until(lambda: answers_http(f"{uri}/health"))
    except BaseException:
        child.stop()
        raise
    return MlflowServer(uri, child)
