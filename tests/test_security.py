"""What is promised about security: no pickle out of storage, and no password in what is printed or recorded."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from sr_data.errors import StorageError
from sr_data.storage import open_store
from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.errors import ModelError
from sr_models.weights import save_model
from sr_train.checkpoint import CheckpointError
from sr_train.config import TrainConfig, config_to_dict
from sr_train.model_registry import register_model
from sr_train.options import DataConfig, OptimConfig, TrackingConfig
from sr_train.placement import ClusterFacts
from sr_train.plan import Plan, PlanError, make_plan
from sr_train.plan_report import describe
from sr_train.tracking import start_run
from sr_train.upscaler import open_network
from tests.support.mlflow_server import MlflowServer
from tests.support.s3 import S3Server

SOURCES = ("sr_data", "sr_models", "sr_serve", "sr_train", "pipelines", "benchmarks", "docker", "tools")
RUN_CODE = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "shelve.open", "marshal.load", "marshal.loads"),
    *("eval", "exec", "torch.jit.load", "torch.package.PackageImporter", "torch.export.load", "torch.hub.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "mlflow.pytorch.load_model", "mlflow.sklearn.load_model"),
}
"""What runs whatever is in the file that it reads."""
RUN_CODE_PACKAGES = {"joblib", "dill", "cloudpickle", "jsonpickle", "pickle5"}
PANDAS_READERS = {"read_pickle", "read_hdf"}
ALLOWED = {
    # Between the driver and tasks of Ray Data, through Ray's own object store: never from a file or a bucket.
    ("sr_data/ray_source.py", "pickle.loads"),
}


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`a.b.c` of an expression, with what its first part was imported as; "" for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def code_runners(source: str) -> Iterator[str]:
    """The names of what a module mentions that would run code from a file: calls, and functions handed on."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    safe: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in RUN_CODE_PACKAGES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            if node.module.partition(".")[0] in RUN_CODE_PACKAGES:
                yield node.module
    names = {name: whole.replace("numpy", "np", 1) for name, whole in names.items()} | {"numpy": "np"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            options = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            name = dotted(node.func, names)
            harmless = {
                "torch.load": options.get("weights_only") is True,
                "np.load": not options.get("allow_pickle", False),
                "yaml.load": "Safe" in "".join(ast.dump(word.value) for word in node.keywords),
            }
            if harmless.get(name, False):
                safe.add(id(node.func))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in safe:
            name = dotted(node, names)
            if name in RUN_CODE | {"torch.load", "np.load"} or name.rpartition(".")[2] in PANDAS_READERS:
                yield name


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch.load(path)", ["torch.load"]),
        ("import torch\ntorch.load(path, weights_only=False)", ["torch.load"]),
        ("from torch import load as read\nread(path)", ["torch.load"]),
        ("import torch\nreader = partial(torch.load, path)", ["torch.load"]),
        ("import torch\ntorch.load(path, weights_only=True)", []),
        ("import pickle as p\np.loads(data)", ["pickle.loads"]),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", ["np.load"]),
        ("import numpy\nnumpy.load(path)", []),
        ("import joblib", ["joblib"]),
        ("import pandas as pd\npd.read_pickle(path)", ["pandas.read_pickle"]),
        ("import yaml\nyaml.load(text, Loader=yaml.Loader)", ["yaml.load"]),
        ("import yaml\nyaml.load(text, Loader=yaml.SafeLoader)\nyaml.safe_load(text)", []),
        ("eval(text)\nmodel.eval()", ["eval"]),
    ],
)
def test_what_runs_code_from_a_file_is_found(source: str, found: list[str]) -> None:
    assert list(code_runners(source)) == found


def test_nothing_in_the_project_runs_code_from_a_file(repo: Path) -> None:
    paths = [path for folder in SOURCES for path in sorted((repo / folder).rglob("*.py"))]
    assert len(paths) > 100
    found = {(path.relative_to(repo).as_posix(), name) for path in paths for name in code_runners(path.read_text())}
    assert found == ALLOWED


class Hostile:
    """Makes a folder when it is unpickled: what a malicious file would do is up to its author."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(Path("executed").absolute()),)


def saved_by_torch() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": torch.zeros(3), "more": Hostile()}, buffer)
    return buffer.getvalue()


def plainly_pickled() -> bytes:
    return pickle.dumps(Hostile())


def tiny_model(folder: Path) -> Path:
    config = EDSRConfig(scale=2, num_blocks=1, num_channels=4)
    save_model(folder, config, build_model(config, seed=0).state_dict(), notes={})
    return folder


def a_checkpoint(hostile: bytes, _server: MlflowServer) -> str:
    Path("step-000000001.safetensors").write_bytes(hostile)
    return "step-000000001.safetensors"


def a_saved_model(hostile: bytes, _server: MlflowServer) -> str:
    (tiny_model(Path("model")) / "weights.safetensors").write_bytes(hostile)
    return "model"


def a_saved_models_config(hostile: bytes, _server: MlflowServer) -> str:
    (tiny_model(Path("model")) / "config.json").write_bytes(hostile)
    return "model"


def a_registered_model(hostile: bytes, server: MlflowServer) -> str:
    """Every file of it but MLmodel, which says where the weights are."""
    run = start_run(tracking_uri=server.uri, experiment="security", run_name="r", params={}, tags={}, texts={})
    sample = np.zeros((8, 8, 3), np.uint8)
    found = register_model(run, tiny_model(Path("model")), name="security", tags={}, sample_lr_HWC=sample)
    source = MlflowClient(server.uri, server.uri).get_model_version_download_uri("security", found.version)
    folder = server.child.log_path.parent / "artifacts" / source.partition("mlflow-artifacts:/")[2]
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "MLmodel"]
    assert "weights.safetensors" in {path.name for path in files}
    for path in files:
        path.write_bytes(hostile)
    return found.uri


@pytest.mark.parametrize("hostile", [saved_by_torch, plainly_pickled])
@pytest.mark.parametrize("place", [a_checkpoint, a_saved_model, a_saved_models_config, a_registered_model])
def test_a_pickle_in_place_of_a_model_is_refused_and_not_run(
    place: Callable[[bytes, MlflowServer], str], hostile: Callable[[], bytes], mlflow_server: MlflowServer
) -> None:
    model = place(hostile(), mlflow_server)
    with pytest.raises((ModelError, CheckpointError)) as caught:
        open_network(model, tracking_uri=mlflow_server.uri)
    assert model in str(caught.value)
    assert not Path("executed").exists()
    pickle.loads(plainly_pickled())  # what would have happened
    assert Path("executed").is_dir()


SECRET = "open-sesame-4711"


class _Unauthorized(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_error(401)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def locked_server() -> Iterator[str]:
    """`host:port` of a tracking server that answers 401 to everybody."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Unauthorized)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def planned(photos: Path, **tracking: object) -> Plan:
    config = TrainConfig(
        model=EDSRConfig(scale=2, num_blocks=1, num_channels=4),
        data=DataConfig(uri=str(photos), patch_px_hr=32),
        optim=OptimConfig(total_patches=16),
        tracking=TrackingConfig(**tracking),  # type: ignore[arg-type]
    )
    return make_plan(config, ClusterFacts(cpus_per_node=(4.0,), gpus_per_node=(0.0,)), resume=False)


@pytest.mark.parametrize("place", ["URI", "password variable", "token variable"])
def test_a_password_that_a_tracking_server_refuses_is_not_said(
    place: str, locked_server: str, tiny_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://me:{SECRET}@{locked_server}" if place == "URI" else f"http://{locked_server}"
    if place == "password variable":
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    elif place == "token variable":
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    with pytest.raises(PlanError, match="401") as caught:
        planned(tiny_photos, uri=uri)
    assert SECRET not in str(caught.value)
    assert locked_server in str(caught.value)
    offline = planned(tiny_photos, uri=uri, allow_offline=True)
    # What is printed, and what goes into the run's folder, MLflow and every checkpoint.
    assert SECRET not in describe(offline) + json.dumps(config_to_dict(offline.config))


def test_a_secret_that_object_storage_refuses_is_not_said(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = s3.new_bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY") as caught:
        open_store(f"{bucket}/runs").check_writable()
    assert SECRET not in str(caught.value) and s3.secret_key not in str(caught.value)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_password_in_a_storage_uri_is_refused_without_being_said(scheme: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_store(f"{scheme}://key:{SECRET}@bucket/div2k")
    assert "bucket/div2k" in str(caught.value) and SECRET not in str(caught.value)


def test_an_endpoint_that_is_no_url_is_refused_without_being_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"key:{SECRET}@localhost:9000")
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL is no URL") as caught:
        open_store("s3://bucket/runs").exists("config.json")
    assert SECRET not in str(caught.value)


def processes_below(pid: int) -> list[int]:
    """A process and all that it has started, and they."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def listening(pids: list[int]) -> list[tuple[IPv4Address | IPv6Address, int]]:
    """Addresses and ports on which these processes take TCP connections."""
    inodes = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(path))
            except OSError:
                continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in inodes:
                address, _, port = local.partition(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.append((ip_address(b"".join(words)), int(port, 16)))
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets are looked up in Linux's /proc")
def test_a_cluster_that_a_script_starts_listens_on_loopback_only() -> None:
    """No other machine can reach Ray's dashboard, which starts jobs, nor anything else of it."""
    code = "from sr_train.ray_cluster import connect; connect(); print('ready', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "ready\n"
        sockets = listening(processes_below(child.pid))
        child.stdin.write("\n")
    assert len(sockets) >= 5  # GCS, raylet, dashboard, agents
    mapped = {getattr(address, "ipv4_mapped", None) or address for address, _ in sockets}
    assert all(address.is_loopback for address in mapped), sockets
