"""A Ray cluster of several nodes, each on a machine of its own (`tests/support/machines.py`)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.machines import Machine, Network
from tests.support.mlflow_server import MlflowServer
from tests.support.process import PATIENCE_S, ServerError, answers_http
from tests.support.ray_head import ON_A_BUSY_MACHINE, RAY, RayHead, until_it_starts
from tests.support.s3 import S3Server

GCS_PORT, DASHBOARD_PORT, AGENT_PORT = 6379, 8265, 52365
TRAINING_WORKER = "ray::RayTrainWorker"
"""How the command line of a training worker's process begins."""

# So that a lost node is seen in seconds. A real cluster keeps Ray's own values, half a minute: a node that is slow to
# answer is no lost one.
SEES_LOSSES_SOON = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    # How long a node waits for a head that is away: one that was cut off is still there when it is connected again.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
}


@dataclass
class RayNodes:
    """A head, on which nothing is trained, and nodes that train."""

    network: Network
    cpus_per_node: int
    env: dict[str, str]
    head_machine: Machine = field(init=False)
    nodes: list[Machine] = field(default_factory=list)
    """Those that were started and not ended by `remove`."""
    _num_started: int = 0

    def __post_init__(self) -> None:
        self.head_machine = self._start_head(None)

    @property
    def head(self) -> RayHead:
        """For `submit_job` and `start_job`."""
        ip = self.head_machine.ip
        return RayHead(f"{ip}:{GCS_PORT}", f"http://{ip}:{DASHBOARD_PORT}", self.head_machine.child)

    def start_node(self, *, disk_mib: int = 1024) -> Machine:
        """One more; returns once the head knows it."""
        command = [RAY, "start", f"--address={self.head.address}", "--node-ip-address={ip}", "--block"]
        command += [f"--num-cpus={self.cpus_per_node}", "--num-gpus=0", "--object-store-memory=150000000"]
        command.append("--disable-usage-stats")

        def start() -> Machine:
            self._num_started += 1
            node = self.network.start_machine(f"node-{self._num_started}", command, env=self.env, disk_mib=disk_mib)
            return _once(node, lambda: node.ip in self.alive())

        self.nodes.append(until_it_starts(start))
        return self.nodes[-1]

    def wait_until_lost(self, ip: str, *, timeout_s: float = PATIENCE_S) -> None:
        """Returns once the head knows that no node lives at that address."""
        deadline = time.monotonic() + timeout_s
        while ip in self.alive():
            if time.monotonic() > deadline:
                raise ServerError(f"the head still believes in {ip}")
            time.sleep(0.2)

    def alive(self) -> set[str]:
        """Addresses of the nodes that the head takes for alive, without its own."""
        from ray._raylet import GcsClient  # here: it takes a second

        client = GcsClient(address=self.head.address)
        alive = {info.node_manager_address for info in client.get_all_node_info().values() if info.state == 0}
        return alive - {self.head_machine.ip}

    def training(self) -> list[Machine]:
        """Nodes on which training workers run."""
        return [node for node in self.nodes if node.is_up() and node.pids(TRAINING_WORKER)]

    def remove(self, node: Machine) -> None:
        """Ends a node, however it stands, and forgets it."""
        self.nodes.remove(node)
        if node.is_up():
            node.kill()

    def kill_head(self) -> None:
        """SIGKILL to all of the head, the drivers of its jobs included."""
        self.head_machine.kill()

    def restart_head(self) -> None:
        """A new head at the old address, which knows nothing of the old cluster. The nodes are started again too, as a
        container's restart policy does: they end when they find a head that does not know them.
        """
        if self.head_machine.is_up():
            self.kill_head()
        num_nodes = len(self.nodes)
        for node in list(self.nodes):
            self.remove(node)
        self.head_machine = self._start_head(self.head_machine.ip)
        for _ in range(num_nodes):
            self.start_node()

    def _start_head(self, ip: str | None) -> Machine:
        command = [RAY, "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address={ip}"]
        command += ["--num-cpus=0", "--num-gpus=0", "--object-store-memory=150000000", f"--port={GCS_PORT}"]
        command += ["--dashboard-host={ip}", f"--dashboard-port={DASHBOARD_PORT}"]

        def start() -> Machine:
            machine = self.network.start_machine("head", command, env=self.env, ip=ip)
            return once_head_is_ready(machine)

        return until_it_starts(start)


def once_head_is_ready(machine: Machine) -> Machine:
    """The machine, once its dashboard answers and the agent that starts jobs; else ServerError, and it is off."""
    ready = (f"http://{machine.ip}:{DASHBOARD_PORT}/api/version",)
    ready += (f"http://{machine.ip}:{AGENT_PORT}/api/local_raylet_healthz",)
    return _once(machine, lambda: all(map(answers_http, ready)))


def _once(machine: Machine, ready: Callable[[], bool]) -> Machine:
    try:
        machine.child.wait_until(ready)
    except ServerError:
        machine.kill()
        raise
    return machine


@dataclass(frozen=True)
class Site:
    """A cluster with the servers that its runs need, all on one network."""

    nodes: RayNodes
    s3: S3Server
    mlflow: MlflowServer

    @property
    def env(self) -> dict[str, str]:
        """What a job is given in its environment."""
        return {**self.s3.env, "MLFLOW_TRACKING_URI": self.mlflow.uri}


def start_nodes(network: Network, *, num_nodes: int, cpus_per_node: int) -> RayNodes:
    """A head and `num_nodes` nodes. They end with the network."""
    dropped = ("RAY_", "AWS_", "MLFLOW_", "PYTEST_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    # On a network of their own: whoever can reach it belongs to this test.
    env |= {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": "/tmp", "RAY_USAGE_STATS_ENABLED": "0"}
    env |= ON_A_BUSY_MACHINE | SEES_LOSSES_SOON | {"OMP_WAIT_POLICY": "PASSIVE", "RAY_COLOR_PREFIX": "0"}
    cluster = RayNodes(network=network, cpus_per_node=cpus_per_node, env=env)
    for _ in range(num_nodes):
        cluster.start_node()
    return cluster
