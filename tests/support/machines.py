"""Machines on a network of their own: Linux namespaces joined by a bridge, gone with the test process.

Each machine has its own address, host name, /etc/hosts, PIDs, /tmp/ray and /dev/shm; all else of the file system is
shared. The bridge lies in a namespace without a name, which a process holds, and every cable ends there: when that
process ends, and the kernel ends it with the test process, nothing is left.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.process import PATIENCE_S, Child, ServerError

PROGRAMS = ("ip", "unshare", "nsenter", "setpriv")
DISK = "/tmp/ray"
"""A machine's own disk, of known size. TMPDIR lies there too."""
NOWHERE = "02:00:00:00:00:ff"
"""A hardware address that no machine has: what is sent there is lost without a word."""

_PREPARE_AND_RUN = """
set -e
hostname "$1"; disk_mib=$2; hosts=$3; ip=$4; shift 4
mount --bind "$hosts" /etc/hosts
mount -t tmpfs -o size=1g none /dev/shm
mount -t tmpfs -o size="${disk_mib}m" none /tmp/ray
mkdir /tmp/ray/tmp
until ip -4 -o address show dev eth0 up 2>/dev/null | grep -q " $ip/"; do sleep 0.02; done
exec "$@"
"""


def why_no_machines() -> str | None:
    """Why this machine can't make others; None if it can."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(missing)} not found (Debian: iproute2, util-linux)"
    trial = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--", "sh", "-c"]
    trial.append(
        "ip link add bridge0 type bridge && ip link add sr0 type veth peer name sr1 && mount -t tmpfs none /mnt"
    )
    done = subprocess.run(trial, capture_output=True, text=True)
    if done.returncode != 0:
        return f"network namespaces can't be made here ({done.stderr.strip().splitlines()[-1:]}): that takes root"
    if os.geteuid() != 0:
        return "network namespaces can't be joined to this one: that takes root"
    return None


@dataclass
class Machine:
    """One machine; its first process is what it was started with, as in a container."""

    name: str
    ip: str
    cable: str
    """The bridge's end of it."""
    network: Network
    child: Child

    def is_up(self) -> bool:
        """Whether its first process runs."""
        return self.child.process.poll() is None

    def pid_1(self) -> int:
        """Its first process, as this process numbers it."""
        outer = self.child.process.pid
        while self.is_up():
            if inner := Path(f"/proc/{outer}/task/{outer}/children").read_text().split():
                return int(inner[0])
            time.sleep(0.01)
        raise ServerError(f"{self.name} is off:\n{self.child.log_tail()}")

    def run(self, *command: str) -> str:
        """Runs a command there; its standard output. subprocess.CalledProcessError if it fails."""
        inside = ["nsenter", "--target", str(self.pid_1()), "--net", "--mount", "--uts", "--pid", "--"]
        return subprocess.run([*inside, *command], check=True, capture_output=True, text=True, timeout=30).stdout

    def file(self, path: str) -> Path:
        """A file of that machine, as this process reaches it."""
        return Path(f"/proc/{self.pid_1()}/root{path}")

    def pids(self, title: str) -> list[int]:
        """Processes whose command line begins so, oldest first, by their numbers there."""
        found = []
        for path in self.file("/proc").glob("[0-9]*/cmdline"):
            try:
                if path.read_bytes().replace(b"\0", b" ").decode(errors="replace").startswith(title):
                    found.append(int(path.parent.name))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
        return sorted(found)

    def signal(self, pid: int, number: signal.Signals) -> None:
        """Sends a signal to one of its processes, by its number there."""
        self.run("kill", f"-{int(number)}", str(pid))

    def terminate(self) -> None:
        """SIGTERM to its first process: `docker stop`, the end of a Kubernetes pod, a spot notice."""
        os.kill(self.pid_1(), signal.SIGTERM)

    def wait_until_off(self, *, timeout_s: float = PATIENCE_S) -> None:
        """Returns once its first process has ended."""
        self.child.process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL to all that runs there: others see their connections closed, as when a container is removed."""
        self.child.process.kill()
        self.child.process.wait()

    def power_off(self) -> None:
        """The same without a word to anyone: its cable is pulled first."""
        self.cut_off()
        self.kill()

    def cut_off(self) -> None:
        """Pulls its cable."""
        self.network.inside("ip", "link", "set", self.cable, "down")

    def cut_off_from(self, *ips: str) -> None:
        """Loses what it sends to these machines; others, say its object storage, it still reaches."""
        for ip in ips:
            neighbour = ["replace", ip, "lladdr", NOWHERE, "dev", "eth0", "nud", "permanent"]
            self.run("ip", "neighbour", *neighbour)

    def reconnect(self) -> None:
        """Undoes `cut_off` and `cut_off_from`."""
        self.network.inside("ip", "link", "set", self.cable, "up")
        if self.is_up():
            self.run("ip", "neighbour", "flush", "dev", "eth0", "nud", "permanent")

    def fill_disk(self) -> None:
        """Leaves no byte free on its disk."""
        with self.file(f"{DISK}/filler").open("wb", buffering=0) as filler:
            for size in (1 << 20, 1):
                try:
                    while filler.write(bytes(size)):
                        pass
                except OSError:
                    continue

    def free_disk(self) -> None:
        """Undoes `fill_disk`."""
        self.file(f"{DISK}/filler").unlink()


@dataclass
class Network:
    """A bridge, machines on it, and an address of this process on it."""

    prefix: str
    """First three numbers of all addresses."""
    folder: Path
    """Logs and the machines' /etc/hosts."""
    holder: Child
    host_link: str
    """This process's end of its cable."""
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(2))
    _machines: list[Machine] = field(default_factory=list)

    @property
    def host_ip(self) -> str:
        """Where servers of the test process listen for the machines."""
        return f"{self.prefix}.1"

    def inside(self, *command: str, check: bool = True) -> str:
        """Runs a command where the bridge is."""
        there = ["nsenter", "--target", str(self.holder.process.pid), "--net", "--"]
        return subprocess.run([*there, *command], check=check, capture_output=True, text=True, timeout=30).stdout

    def start_machine(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        ip: str | None = None,
        disk_mib: int = 1024,
    ) -> Machine:
        """A machine whose first process is `command`; `ip`: the address of one that is off by now. `{ip}` in the
        command stands for its address.
        """
        number = next(self._numbers)
        if ip is not None:
            self._free(ip)
        ip = ip or f"{self.prefix}.{number}"
        hosts = self.folder / f"hosts-{number}"
        hosts.write_text(f"127.0.0.1 localhost\n{ip} {name}\n")
        Path(DISK).mkdir(parents=True, exist_ok=True)  # where its own is mounted
        # KILL: unshare waits for its child with SIGTERM blocked.
        isolated = [
            *("setpriv", "--pdeathsig", "KILL", "--", "unshare", "--net", "--mount", "--uts", "--pid", "--fork")
        ]
        isolated += ["--kill-child", "--mount-proc", "--"]
        script = ["bash", "-c", _PREPARE_AND_RUN, "bash", name, str(disk_mib), str(hosts), ip]
        told = [part.replace("{ip}", ip) for part in command]
        own = {"TMPDIR": f"{DISK}/tmp"}
        child = Child.start(
            name, [*isolated, *script, *told], log_path=self.folder / f"{name}-{number}.log", env={**env, **own}
        )
        machine = Machine(name=name, ip=ip, cable=f"to-{number}", network=self, child=child)
        self._machines.append(machine)
        _wait_for_own_network(child)
        pid = str(child.process.pid)
        self.inside("ip", "link", "add", machine.cable, "type", "veth", "peer", "name", "eth0", "netns", pid)
        self.inside("ip", "link", "set", machine.cable, "master", "bridge", "up")
        in_machine = ["nsenter", "--target", pid, "--net", "--"]
        for change in (["address", "add", f"{ip}/24", "dev", "eth0"], ["link", "set", "lo", "up"]):
            subprocess.run([*in_machine, "ip", *change], check=True, capture_output=True, timeout=30)
        subprocess.run([*in_machine, "ip", "link", "set", "eth0", "up"], check=True, capture_output=True, timeout=30)
        return machine

    def _free(self, ip: str) -> None:
        """The kernel may take minutes to end a namespace, which answers for its address as long."""
        for machine in self._machines:
            if machine.ip == ip:
                self.inside("ip", "link", "del", machine.cable, check=False)  # it may be gone already
        _ip("neighbour", "flush", "to", ip, "dev", self.host_link)

    def close(self) -> None:
        """Ends all machines and the network."""
        for machine in self._machines:
            if machine.is_up():
                machine.kill()
        # The namespace's end takes its cables along, but some time later.
        subprocess.run(["ip", "link", "del", self.host_link], capture_output=True, timeout=30)
        self.holder.stop()


def start_network(folder: Path) -> Network:
    """`folder` takes logs and the like. ServerError, or subprocess.CalledProcessError, where `why_no_machines`."""
    holder = Child.start(
        "network", ["unshare", "--net", "--", "sleep", "infinity"], log_path=folder / "network.log", env=os.environ
    )
    ours = f"sr{os.getpid()}x{random.randrange(16**4):04x}"  # at most 15 characters
    network = Network(prefix=_free_prefix(), folder=folder, holder=holder, host_link=ours)
    try:
        _wait_for_own_network(holder)
        network.inside("ip", "link", "add", "bridge", "type", "bridge")
        network.inside("ip", "link", "set", "bridge", "up")
        _ip("link", "add", ours, "type", "veth", "peer", "name", "to-host", "netns", str(holder.process.pid))
        network.inside("ip", "link", "set", "to-host", "master", "bridge", "up")
        _ip("address", "add", f"{network.host_ip}/24", "dev", ours)
        _ip("link", "set", ours, "up")
    except BaseException:
        network.close()
        raise
    return network


def _free_prefix() -> str:
    """Of a /24 network that this machine has no route to; random, since other test runs choose at the same time."""
    routes = _ip("-4", "route", "show") + _ip("-4", "-o", "address", "show")
    while True:
        prefix = f"10.{random.randrange(100, 250)}.{random.randrange(1, 255)}"
        if f"{prefix}." not in routes:
            return prefix


def _wait_for_own_network(child: Child) -> None:
    ours, its = os.readlink("/proc/self/ns/net"), f"/proc/{child.process.pid}/ns/net"
    child.wait_until(lambda: os.readlink(its) != ours)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30).stdout
