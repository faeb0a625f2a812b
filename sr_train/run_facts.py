"""What a run ran on: versions, hardware, code. Only what is listed here is ever recorded of a machine's environment."""

import os
import platform
import shutil
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "ray", "mlflow", "numpy", "pyarrow", "pillow", "s3fs")
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "RAY_JOB_ID")
"""Environment variables that explain speed or placement. None may ever hold a secret: all MLflow users see them."""
COMMAND_TIMEOUT_S = 10.0


def run_facts() -> dict[str, str]:
    """Describe this process's machine and code as flat strings, fit for MLflow tags.

    The commit comes from SR_GIT_SHA (and SR_GIT_DIRTY=1), for code that was shipped without its .git, else from `git`.
    GPUs are asked of nvidia-smi and not of torch, which would start a CUDA context in a driver that never trains.
    """
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "cpus": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "gpus": ", ".join(_lines("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"))
        or "none",
        "git_sha": os.environ.get("SR_GIT_SHA") or "unknown",
        "git_dirty": {"1": "true", "0": "false"}.get(os.environ.get("SR_GIT_DIRTY", ""), "unknown"),
    }
    facts.update({package: _version(package) for package in PACKAGES})
    facts.update({f"env.{name}": os.environ[name] for name in VARIABLES if name in os.environ})
    if facts["git_sha"] == "unknown":
        project = str(Path(__file__).resolve().parent.parent)
        if head := _lines("git", "-C", project, "rev-parse", "HEAD"):
            facts["git_sha"] = head[0]
            facts["git_dirty"] = str(bool(_lines("git", "-C", project, "status", "--porcelain"))).lower()
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _lines(*command: str) -> list[str]:
    """The lines a command prints; none if it is missing, fails, or takes too long."""
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    except (subprocess.SubprocessError, OSError):
        return []
    return done.stdout.splitlines()
