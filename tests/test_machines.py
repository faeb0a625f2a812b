"""The machines that tests of several nodes run on: they reach each other unless they are cut off, and leave nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.support.machines import DISK, Machine, Network, start_network, why_no_machines
from tests.support.pipeline import REPO


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    if reason := why_no_machines():
        absent(reason, "SR_EXPECT_NAMESPACES")
    network = start_network(tmp_path)
    yield network
    network.close()


def idle_machine(network: Network, name: str, **settings: int) -> Machine:
    return network.start_machine(name, ["sleep", "infinity"], env=os.environ, **settings)


def reaches(machine: Machine, ip: str, port: int) -> bool:
    try:
        machine.run("timeout", "0.5", "bash", "-c", f"exec 3<>/dev/tcp/{ip}/{port}")
    except subprocess.CalledProcessError:
        return False
    return True


def runs(pid: str) -> bool:
    """Whether the process is there, and no zombie that nobody reaped yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60  # the kernel takes its time with namespaces when many end at once
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_machines_have_names_disks_and_processes_of_their_own(network: Network) -> None:
    one, other = idle_machine(network, "one", disk_mib=4), idle_machine(network, "other")
    assert (one.run("hostname").strip(), one.pids("sleep"), one.ip != other.ip) == ("one", [1], True)
    one.fill_disk()
    with pytest.raises(subprocess.CalledProcessError):
        one.run("bash", "-c", f"echo full > {DISK}/file")
    other.run("bash", "-c", f"echo free > {DISK}/file")
    one.free_disk()
    one.run("bash", "-c", f"echo free > {DISK}/file")


def test_a_machine_can_be_cut_off_and_reconnected(network: Network) -> None:
    machine = idle_machine(network, "one")
    with socket.create_server((network.host_ip, 0)) as server:
        port = server.getsockname()[1]
        assert reaches(machine, network.host_ip, port)
        for cut in (machine.cut_off, lambda: machine.cut_off_from(network.host_ip)):
            cut()
            assert not reaches(machine, network.host_ip, port)
            machine.reconnect()
            wait_until(lambda: reaches(machine, network.host_ip, port))


def test_an_address_is_free_for_the_next_machine_at_once(network: Network) -> None:
    """Else a head that is restarted is not heard for as long as the kernel takes to end the namespace of the last."""
    says = "import os, socket; server = socket.create_server(('', 9000))\n"
    says += "while True: server.accept()[0].send(os.uname()[1].encode())"

    def who_answers(ip: str) -> str:
        try:
            with socket.create_connection((ip, 9000), timeout=0.5) as connection:
                return connection.recv(100).decode()
        except OSError:
            return ""

    before = network.start_machine("before", [sys.executable, "-c", says], env=os.environ)
    wait_until(lambda: who_answers(before.ip) == "before")
    after = network.start_machine("after", [sys.executable, "-c", says], env=os.environ, ip=before.ip)
    started_s = time.monotonic()
    wait_until(lambda: who_answers(after.ip) == "after")  # though the one before has not even ended
    assert time.monotonic() - started_s < 20


def test_nothing_outlives_a_test_process_that_is_killed(network: Network, tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys\n"
        "from tests.support.machines import start_network\n"
        "network = start_network(pathlib.Path(sys.argv[1]))\n"
        "machine = network.start_machine('one', ['sleep', 'infinity'], env=os.environ)\n"
        "print(network.host_link, machine.pid_1(), network.holder.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=REPO, capture_output=True, text=True, timeout=60)
    link, *pids = done.stdout.split()
    wait_until(lambda: not any(runs(pid) for pid in pids))
    wait_until(lambda: not (Path("/sys/class/net") / link).exists())
