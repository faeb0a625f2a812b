"""The scripts of pipelines/ as a user runs them: one command line, one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.process import PATIENCE_S

REPO = Path(__file__).resolve().parent.parent.parent


def command(script: str, *arguments: object) -> list[str]:
    """`python pipelines/SCRIPT ARGUMENTS…` by absolute paths: it can run in any folder."""
    return [sys.executable, str(REPO / "pipelines" / script), *map(str, arguments)]


def run_script(
    script: str, *arguments: object, cwd: Path, env: Mapping[str, str], timeout_s: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    """Runs it to its end, with `env` on top of this process's environment."""
    return subprocess.run(
        command(script, *arguments),
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def without_controller(said: str) -> str:
    """What was said, but for Ray Train's controller: on a busy machine it shows tracebacks of what may be ignored."""
    return "\n".join(line for line in said.splitlines() if "(TrainController pid=" not in line)
