"""Child processes of the tests: start one, wait until it is ready, stop exactly what was started."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

LOG_TAIL_CHARS = 4000
PATIENCE_S = 600.0
"""How long a process that works is waited for. Far beyond what it takes, because a busy machine is four times slower
than an idle one: it only ends what hangs, and pytest's own limit may come first.
"""


class ServerError(RuntimeError):
    """A server of the tests did not start; the message holds the end of its log."""


def free_ports(num_ports: int) -> list[int]:
    """Different TCP ports that were free on 127.0.0.1 a moment ago."""
    with ExitStack() as sockets:
        ports = []
        for _ in range(num_ports):
            sock = sockets.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            ports.append(int(sock.getsockname()[1]))
        return ports


def answers_http(url: str) -> bool:
    """Whether an HTTP server answers at `url`, whatever the status below 500."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


def accepts_tcp(port: int) -> bool:
    """Whether something listens on this loopback port."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


@dataclass(frozen=True)
class Child:
    """A process with a process group of its own, its output in a file."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path

    @classmethod
    def start(cls, name: str, command: Sequence[str | Path], *, log_path: Path, env: Mapping[str, str]) -> Child:
        """Starts `command`; where util-linux is there, the kernel ends it if the test run dies."""
        guard = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*guard, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=log_path.parent,
                start_new_session=True,
            )
        return cls(name, process, log_path)

    def log_tail(self) -> str:
        """The end of what the process has written."""
        return self.log_path.read_text(errors="replace")[-LOG_TAIL_CHARS:]

    def wait_until(self, ready: Callable[[], bool], *, timeout_s: float = PATIENCE_S) -> None:
        """Polls `ready`; ServerError with the log if the process ends or the deadline passes first."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if self.process.poll() is not None:
                raise ServerError(f"{self.name} ended with {self.process.returncode}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} was not ready within {timeout_s:.0f} s:\n{self.log_tail()}")
            time.sleep(0.1)

    def send(self, sig: signal.Signals) -> None:
        """Signals the whole group (SIGSTOP and SIGCONT make a server hang and come back)."""
        os.killpg(self.process.pid, sig)

    def stop(self, *, timeout_s: float = 15.0) -> None:
        """Ends the process and what it left in its group; a process that ended already is no error."""
        if self.process.poll() is None:
            self.send(signal.SIGCONT)
            # The leader alone: it ends its children in order (`ray start --block` stops its daemons).
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        with suppress(ProcessLookupError):
            self.send(signal.SIGKILL)  # the group outlives its leader while it has members
        self.process.wait(timeout_s)
