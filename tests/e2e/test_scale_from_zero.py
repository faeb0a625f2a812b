"""cluster.yaml's CPU nodes under Ray's autoscaler: none at first, those that a run waits for, and none again."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from tests.support.machines import start_network, why_no_machines
from tests.support.nodes import DASHBOARD_PORT, GCS_PORT, once_head_is_ready
from tests.support.pipeline import REPO
from tests.support.process import Child
from tests.support.ray_head import ON_A_BUSY_MACHINE, RAY, RayHead, until_it_starts

pytestmark = pytest.mark.e2e

IDLE_MINUTES = 0.2
NODE = "cpu_worker"


@dataclass(frozen=True)
class ScalingCluster:
    """A head that starts and ends nodes by itself."""

    head: RayHead

    def num_nodes(self) -> int:
        """Nodes that are there beside the head."""
        return len(self._node_ids())

    def actors_of_nodes(self) -> list[str]:
        """Those that live there: to Ray's second autoscaler, which `ray up cluster.yaml` starts and which can't be had
        for nodes like these, a node with one is never idle.
        """
        with urllib.request.urlopen(f"{self.head.jobs_url}/api/v0/actors?detail=True&limit=1000", timeout=30) as answer:
            found = json.load(answer)["data"]["result"]["result"]
        nodes = self._node_ids()
        return [it["class_name"] for it in found if it["state"] == "ALIVE" and it["node_id"] in nodes]

    def _node_ids(self) -> set[str]:
        from ray._raylet import GcsClient  # here: it takes a second

        nodes = GcsClient(address=self.head.address).get_all_node_info().values()
        return {node.node_id.hex() for node in nodes if node.state == 0 and not node.is_head_node}


@pytest.fixture
def cluster(repo: Path, tmp_path: Path) -> Iterator[ScalingCluster]:
    """Ray's provider of nodes that are processes of the head's machine; it expects the head at Ray's usual port, so
    that machine is one of its own.
    """
    if reason := why_no_machines():
        pytest.skip(reason)
    config = prepare_config(yaml.safe_load((repo / "cluster.yaml").read_text()))
    types = {"ray.head.default": config["available_node_types"]["head"], NODE: config["available_node_types"][NODE]}
    for it in types.values():
        it["node_config"] = {}
    types[NODE]["resources"] = {"CPU": 2}  # a second node is needed for the second worker
    # Its nodes begin with Ray running, and have one address.
    provider = {"type": "fake_multinode", "disable_node_updaters": True, "use_node_id_as_ip": True}
    config |= {"provider": provider, "available_node_types": types, "docker": {}}
    config |= {"head_node_type": "ray.head.default", "file_mounts": {}, "initialization_commands": []}
    config["idle_timeout_minutes"] = IDLE_MINUTES
    written = tmp_path / "cluster.yaml"
    written.write_text(yaml.safe_dump(config))
    dropped = ("RAY_", "AWS_", "MLFLOW_", "PYTEST_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    env |= {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": "/tmp", "RAY_USAGE_STATS_ENABLED": "0", "RAY_FAKE_CLUSTER": "1"}
    env |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "OMP_WAIT_POLICY": "PASSIVE"} | ON_A_BUSY_MACHINE
    network = start_network(tmp_path)
    try:
        command = [RAY, "start", "--head", "--block", "--node-ip-address={ip}", "--dashboard-host={ip}", "--num-cpus=0"]
        command += [f"--port={GCS_PORT}", f"--dashboard-port={DASHBOARD_PORT}", f"--autoscaling-config={written}"]
        command += ["--object-store-memory=150000000", "--disable-usage-stats"]
        head = until_it_starts(lambda: once_head_is_ready(network.start_machine("head", command, env=env)))
        url = f"http://{head.ip}:{DASHBOARD_PORT}"
        yield ScalingCluster(RayHead(f"{head.ip}:{GCS_PORT}", url, head.child))
    finally:
        network.close()


def test_nodes_come_for_a_run_that_waits_for_them_and_go_when_it_has_ended(
    cluster: ScalingCluster, tmp_path: Path
) -> None:
    assert cluster.num_nodes() == 0
    command = [
        *(sys.executable, REPO / "pipelines" / "train_edsr.py", "--run.wait-for-nodes", "--run.device", "cpu"),
        *("--model.num-blocks", "1", "--model.num-channels", "4", "--data.patch-px-hr", "32"),
        *("--optim.total-patches", "640", "--optim.global-batch-size", "16", "--schedule.warmup-patches", "16"),
        *("--data.window-images", "2", "--data.window-reuse-patches", "16"),  # enough images for Ray Data to be asked
        *("--validation.interval-patches", "640", "--run.num-workers", "2", "--run.cpus-per-worker", "1.5"),
        *("--run.storage", str(tmp_path / "runs"), "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"),
    ]
    # No --working-dir: these nodes share the head's session, and one that ends would take the job's folder along.
    submit = [RAY, "job", "submit", "--address", cluster.head.jobs_url, "--", *command]
    job = Child.start("ray job submit", submit, log_path=tmp_path / "job.log", env=os.environ)
    most = 0
    while job.process.poll() is None:
        most = max(most, cluster.num_nodes())
        time.sleep(1)
    said = (tmp_path / "job.log").read_text()
    assert job.process.returncode == 0, said
    # The head has no CPU, and a node has room for one of the two workers.
    assert "no room for 2 workers now: training begins once nodes are added" in said
    assert most >= 2
    assert cluster.actors_of_nodes() == []
    deadline = time.monotonic() + 60 * IDLE_MINUTES + 120
    while (num_nodes := cluster.num_nodes()) > 0:
        assert time.monotonic() < deadline, f"{num_nodes} idle nodes are still there"
        time.sleep(1)
