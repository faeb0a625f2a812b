"""What describes a cluster, by Ray's own code and by what it must mean: cluster.yaml, on-premises, compose, KubeRay."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto.ec2.models.instance_types import INSTANCE_TYPES
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE
from ray.dashboard.modules.job.job_supervisor import JobSupervisor

from tests.support.process import Child, answers_http, free_ports

SECRET = re.compile(r"AKIA[A-Z0-9]{12,}|(?i:(secret|password|token)[a-z_]*\s*[:=]\s*[\"']?[A-Za-z0-9+/]{16,})")
CONFIGS = (
    "cluster.yaml",
    "cluster-onprem.yaml",
    "docker/compose.yaml",
    "docker/env.example",
    "docker/systemd/sr-ray-head.service",
    "docker/systemd/sr-ray-worker.service",
    "docker/kubernetes/common.yaml",
    "docker/kubernetes/mlflow.yaml",
    "docker/kubernetes/raycluster.yaml",
    "docker/kubernetes/rayjob.yaml",
)


@pytest.fixture
def aws(repo: Path) -> dict[str, Any]:
    """cluster.yaml as Ray completes it."""
    return prepared(repo / "cluster.yaml")


@pytest.fixture
def ec2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """boto3 talks to a moto server that lets everyone do everything, EC2 and IAM too (the shared one: S3 alone)."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    child = Child.start("moto", command, log_path=tmp_path / "moto.log", env=os.environ)
    try:
        child.wait_until(lambda: answers_http(f"{url}/moto-api/"))
        for name, value in {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield
    finally:
        child.stop()


@pytest.fixture(params=["raycluster", "rayjob"])
def ray_cluster(request: pytest.FixtureRequest, repo: Path) -> dict[str, Any]:
    """A RayCluster, or that of a RayJob, as KubeRay's autoscaler is given it."""
    [cluster] = [it for it in documents(repo, request.param) if it["kind"] in ("RayCluster", "RayJob")]
    spec = cluster["spec"]["rayClusterSpec"] if cluster["kind"] == "RayJob" else cluster["spec"]
    return {"metadata": cluster["metadata"], "spec": spec}


def prepared(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    return config


def documents(repo: Path, name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((repo / "docker" / "kubernetes" / f"{name}.yaml").read_text()))


def targets(repo: Path) -> set[str]:
    """Stages of docker/Dockerfile."""
    return set(re.findall(r"^FROM \S+ AS ([\w-]+)$", (repo / "docker" / "Dockerfile").read_text(), re.MULTILINE))


def environment(run_options: list[str]) -> dict[str, str]:
    """What `docker run` sets."""
    return dict(option.removeprefix("-e ").split("=", 1) for option in run_options if option.startswith("-e "))


def pods(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod specs by group."""
    spec = cluster["spec"]
    workers = {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"]["spec"], **workers}


def test_workers_of_aws_are_spot_instances_and_none_when_idle(aws: dict[str, Any]) -> None:
    types = aws["available_node_types"]
    head = types.pop(aws["head_node_type"])
    assert head["resources"]["CPU"] == 0 and "InstanceMarketOptions" not in head["node_config"]
    assert any("GPU" in it["resources"] for it in types.values())
    assert any("GPU" not in it["resources"] for it in types.values())
    for name, it in types.items():
        assert it["min_workers"] == 0, name
        assert 0 < it["max_workers"] <= aws["max_workers"], name
        assert it["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot", name


def test_nodes_of_aws_have_what_is_promised_for_them(aws: dict[str, Any]) -> None:
    """By the table of instance types that moto took from AWS."""
    for name, it in aws["available_node_types"].items():
        facts = INSTANCE_TYPES[it["node_config"]["InstanceType"]]
        gpus = sum(gpu["Count"] for gpu in facts.get("GpuInfo", {}).get("Gpus", []))
        assert it["resources"].get("GPU", 0) == gpus, name
        assert it["resources"]["CPU"] in ({0} if name == aws["head_node_type"] else {facts["VCpuInfo"]["DefaultVCpus"]})


@pytest.mark.usefixtures("ec2")
def test_ray_starts_these_nodes_on_aws(aws: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `ray up` and the autoscaler do before ssh, against moto's EC2 and IAM: keys, network, instances."""
    config, region = aws, aws["provider"]["region"]
    monkeypatch.setenv("HOME", str(tmp_path))  # the ssh key is written there
    monkeypatch.setenv("AWS_DEFAULT_REGION", region)
    iam = boto3.client("iam")
    profiles = {it["node_config"]["IamInstanceProfile"]["Name"] for it in config["available_node_types"].values()}
    for profile in profiles:
        iam.create_instance_profile(InstanceProfileName=profile)
    config = AWSNodeProvider.bootstrap_config(config)
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    started = {}
    for name, it in config["available_node_types"].items():
        tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: name}
        [instance_id] = provider.create_node(dict(it["node_config"]), tags, 1)
        started[instance_id] = name
    told = boto3.client("ec2", region_name=region).describe_instances(InstanceIds=list(started))
    instances = {started[it["InstanceId"]]: it for part in told["Reservations"] for it in part["Instances"]}
    for name, instance in instances.items():
        wanted = config["available_node_types"][name]["node_config"]
        assert instance["InstanceType"] == wanted["InstanceType"]
        assert instance["IamInstanceProfile"]["Arn"].endswith("/" + wanted["IamInstanceProfile"]["Name"])
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        assert (instance.get("InstanceLifecycle") == "spot") is (name != config["head_node_type"])


def test_every_node_gets_an_image_that_fits_and_can_be_built(repo: Path, aws: dict[str, Any]) -> None:
    for name, it in aws["available_node_types"].items():
        image = it.get("docker", {}).get("worker_image", aws["docker"]["image"])
        assert image.rpartition(":")[2] in targets(repo), name
        assert image.endswith(":gpu") is ("GPU" in it["resources"]), name


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster-onprem.yaml"])
def test_nothing_is_installed_on_nodes_and_dashboards_stay_on_loopback(repo: Path, name: str) -> None:
    config = prepared(repo / name)
    setup = str([config[key] for key in ("setup_commands", "head_setup_commands", "worker_setup_commands")])
    assert "install" not in setup, "Ray's defaults install a nightly build"
    [start] = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start and "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert not any("--dashboard-host" in command for command in config["worker_start_ray_commands"])
    assert "auth_token" in str(config["file_mounts"])


def test_there_is_time_for_a_checkpoint(repo: Path, aws: dict[str, Any]) -> None:
    onprem = prepared(repo / "cluster-onprem.yaml")
    starts = [*onprem["head_start_ray_commands"], *onprem["worker_start_ray_commands"]]
    assert "RAY_AUTH_MODE=token" in str(onprem["setup_commands"])
    assert "-e RAY_AUTH_MODE=token" in aws["docker"]["run_options"]
    settings = [environment(aws["docker"]["run_options"])]
    settings += [dict(re.findall(r"(RAY_\w+)=(\w+)", command)) for command in starts if "ray start" in command]
    assert len(settings) == 3
    for it in settings:
        assert int(it["RAY_JOB_STOP_WAIT_TIME_S"]) > JobSupervisor.DEFAULT_RAY_JOB_STOP_WAIT_TIME_S


@pytest.mark.parametrize("node", ["head", "worker"])
def test_jobs_on_a_systemd_node_find_python_and_a_stopped_node_may_drain(repo: Path, node: str) -> None:
    lines = (repo / "docker" / "systemd" / f"sr-ray-{node}.service").read_text().splitlines()
    env = dict(it.split("=", 1) for line in lines if line.startswith("Environment=") for it in line[12:].split())
    unit = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith(("#", "Environment=")))
    # Jobs get what the unit's environment has, and `python` is the first word of their command.
    assert env["PATH"].split(":")[0] == str(Path(unit["ExecStart"].split()[0]).parent)
    assert env["RAY_AUTH_MODE"] == "token" and unit["EnvironmentFile"].startswith("/etc/")
    assert "--block" in unit["ExecStart"].split(), "else nothing drains on SIGTERM"
    drain_s = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert (node == "head") is (drain_s == 0) and drain_s < int(unit.get("TimeoutStopSec", 90))


def test_what_nodes_run_beside_ray_is_in_their_image(repo: Path, aws: dict[str, Any]) -> None:
    commands = "\n".join(aws["worker_start_ray_commands"])
    programs = re.findall(r"/opt/sr-ray/(\S+)", commands)
    programs += re.findall(r"/opt/sr-ray/(\S+\.py)", (repo / "docker" / "kubernetes" / "rayjob.yaml").read_text())
    assert "docker/spot_notice.py" in programs
    allowed = [line[1:] for line in (repo / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for program in programs:
        assert (repo / program).is_file()
        assert any(program == it or program.startswith(f"{it}/") for it in allowed), program


@pytest.mark.parametrize("name", CONFIGS)
def test_no_secret_is_written_down(repo: Path, name: str) -> None:
    assert SECRET.search("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMIK7MDENG") is not None
    assert SECRET.search((repo / name).read_text()) is None


def test_kuberay_scales_gpus_and_cpus_from_zero(ray_cluster: dict[str, Any]) -> None:
    types = _derive_autoscaling_config_from_ray_cr(ray_cluster)["available_node_types"]
    head = types.pop("headgroup")
    assert ray_cluster["spec"]["enableInTreeAutoscaling"] is True
    assert head["resources"]["CPU"] == 0
    assert {name: it["resources"].get("GPU", 0) for name, it in types.items()} == {"gpu": 1, "cpu": 0}
    assert all(it["min_workers"] == 0 < it["max_workers"] for it in types.values())


def test_pods_are_not_root_and_have_time_to_drain(ray_cluster: dict[str, Any], repo: Path) -> None:
    assert ray_cluster["spec"]["authOptions"] == {"mode": "token"}
    for group, pod in pods(ray_cluster).items():
        [container] = pod["containers"]
        # What the operator lets the head do, change pods, no job on a worker may.
        assert (pod.get("automountServiceAccountToken") is False) is (group != "head")
        assert pod["securityContext"]["runAsNonRoot"] is True, group
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, group
        image = container["image"]
        assert image.rpartition(":")[2] in targets(repo) and image.endswith(":gpu") is (group == "gpu")
        env = {it["name"]: it for it in container["env"]}
        assert env["AWS_SECRET_ACCESS_KEY"]["valueFrom"]["secretKeyRef"]["optional"] is True
        drain_s = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]["value"])
        assert drain_s < pod["terminationGracePeriodSeconds"]


def test_a_rayjob_tried_again_goes_on_with_the_same_run(repo: Path) -> None:
    [job] = documents(repo, "rayjob")
    assert job["spec"]["backoffLimit"] > 0
    assert re.search(r"--run\.name \S+", job["spec"]["entrypoint"]) and "--resume" in job["spec"]["entrypoint"]
    assert "s3://" in job["spec"]["entrypoint"], "each attempt has a new cluster: nothing on its disks is left"


def test_the_rayjobs_cluster_is_the_raycluster(repo: Path) -> None:
    [cluster] = documents(repo, "raycluster")
    [job] = documents(repo, "rayjob")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_only_pods_of_ours_reach_ray_and_mlflow_on_kubernetes(repo: Path, ray_cluster: dict[str, Any]) -> None:
    account, policy = documents(repo, "common")
    [_, mlflow, _] = documents(repo, "mlflow")
    [job] = documents(repo, "rayjob")
    spec = ray_cluster["spec"]
    templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    templates += [job["spec"]["submitterPodTemplate"], mlflow["spec"]["template"]]
    ours = policy["spec"]["podSelector"]["matchLabels"]
    for template in templates:
        assert ours.items() <= template["metadata"]["labels"].items()
        assert template["spec"].get("serviceAccountName", account["metadata"]["name"]) == account["metadata"]["name"]
    [rule] = policy["spec"]["ingress"]
    pods_of_ours, operator = rule["from"]
    assert pods_of_ours == {"podSelector": {"matchLabels": ours}} and "namespaceSelector" in operator


def test_compose_shows_its_services_on_this_machine_only(repo: Path) -> None:
    services = yaml.safe_load((repo / "docker" / "compose.yaml").read_text())["services"]
    published = [port for it in services.values() for port in it.get("ports", [])]
    assert len(published) == 3 and all(port.startswith("127.0.0.1:") for port in published)
    for name, it in services.items():
        for other, condition in it.get("depends_on", {}).items():
            healthy = "healthcheck" in services[other] or "ray start" in services[other]["command"]  # the image's own
            assert condition["condition"] == ("service_healthy" if healthy else "service_completed_successfully"), name
    assert services["worker"]["deploy"]["replicas"] == 2
    assert int(services["head"]["environment"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) == 0
    drain_s = int(services["worker"]["environment"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert drain_s < int(services["worker"]["stop_grace_period"].removesuffix("s"))
    target = services["head"]["build"]["target"]
    assert re.sub(r"\$\{\w+:-(\w+)\}", r"\1", target) in targets(repo)
    images = {it["image"] for name, it in services.items() if name != "s3"}
    assert images == {f"sr-ray:{target}"}  # what is built is called after what it is


def test_compose_takes_secrets_from_a_file_that_git_ignores(repo: Path) -> None:
    text = (repo / "docker" / "compose.yaml").read_text()
    example = (repo / "docker" / "env.example").read_text()
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == set(re.findall(r"^(\w+)=$", example, re.MULTILINE))
    ignored = (repo / "docker" / ".gitignore").read_text().split()
    assert ".env" in ignored
