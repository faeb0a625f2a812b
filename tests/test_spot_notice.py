"""docker/spot_notice.py against a server that answers as AWS's metadata service does, and a real Ray node."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.process import Child, free_ports
from tests.support.ray_head import RAY

BUSY_NODE = """
import json, sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR")

@ray.remote(num_cpus=1)
class Busy:
    def node(self):
        return ray.get_runtime_context().get_node_id()

busy = Busy.remote()  # without work, a draining node ends at once
print(ray.get(busy.node.remote()), flush=True)
sys.stdin.readline()
print(json.dumps(ray._private.state.state.get_draining_nodes()), flush=True)
"""


@dataclass
class Imds:
    """What the metadata service knows, and what it was asked."""

    url: str = ""
    documents: dict[str, dict[str, str]] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    valid: set[str] = field(default_factory=set)
    first_answer: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def imds() -> Iterator[Imds]:
    """An instance's metadata service, version 2: nothing without a token."""
    known = Imds()

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            ttl_s = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if self.path != "/latest/api/token" or not 1 <= int(ttl_s) <= 21600:
                return self.answer(400)
            known.tokens.append(f"token-{len(known.tokens)}")
            known.valid = {known.tokens[-1]}
            return self.answer(200, known.tokens[-1])

        def do_GET(self) -> None:
            if self.headers.get("X-aws-ec2-metadata-token") not in known.valid:
                return self.answer(401)
            document = known.documents.get(self.path.removeprefix("/latest/meta-data"))
            self.answer(404) if document is None else self.answer(200, json.dumps(document))
            known.first_answer.set()
            return None

        def answer(self, status: int, body: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    known.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield known
    server.shutdown()
    server.server_close()


@pytest.fixture
def program(repo: Path) -> ModuleType:
    """docker/spot_notice.py, imported; it belongs to no package."""
    spec = importlib.util.spec_from_file_location("spot_notice", repo / "docker" / "spot_notice.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["spot_notice"] = module
    spec.loader.exec_module(module)
    return module


def in_seconds(remaining_s: float) -> str:
    """So many seconds from now, as AWS writes it."""
    return (datetime.now(UTC) + timedelta(seconds=remaining_s)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_a_notice_says_how_long_is_left(program: ModuleType, imds: Imds) -> None:
    metadata = program.Metadata(imds.url)
    assert program.find_notice(metadata, on_rebalance=True) is None
    imds.documents["/spot/instance-action"] = {"action": "terminate", "time": in_seconds(120)}
    notice = program.find_notice(metadata, on_rebalance=False)
    assert 110 <= notice.remaining_s <= 120 and "terminate" in notice.what
    imds.documents["/spot/instance-action"] = {"action": "terminate", "time": in_seconds(-5)}
    assert program.find_notice(metadata, on_rebalance=False).remaining_s == 0
    assert len(imds.tokens) == 1, "a token is good for hours"


def test_a_token_that_ran_out_is_replaced(program: ModuleType, imds: Imds) -> None:
    metadata = program.Metadata(imds.url)
    assert metadata.get("/spot/instance-action") is None
    imds.valid.clear()
    imds.documents["/spot/instance-action"] = {"action": "stop", "time": in_seconds(60)}
    assert "stop" in metadata.get("/spot/instance-action")
    assert imds.tokens == ["token-0", "token-1"]


def test_a_rebalance_recommendation_drains_only_if_wanted(program: ModuleType, imds: Imds) -> None:
    metadata = program.Metadata(imds.url)
    imds.documents["/events/recommendations/rebalance"] = {"noticeTime": in_seconds(0)}
    assert program.find_notice(metadata, on_rebalance=False) is None
    assert program.find_notice(metadata, on_rebalance=True).remaining_s > 0


def start(repo: Path, metadata_url: str, folder: Path) -> Child:
    """The program, as it runs beside Ray, but impatient."""
    command = [sys.executable, repo / "docker" / "spot_notice.py", "--interval-s", "0.05"]
    command += ["--metadata-url", metadata_url]
    return Child.start("spot_notice", command, log_path=folder / "log", env=os.environ)


def test_a_notice_without_a_time_is_said_and_asked_for_again(repo: Path, imds: Imds, tmp_path: Path) -> None:
    imds.documents["/spot/instance-action"] = {"action": "terminate"}  # not as AWS documents it
    child = start(repo, imds.url, tmp_path)
    try:
        child.wait_until(lambda: "can't be asked: KeyError: 'time'" in child.log_tail())
        imds.documents.clear()
        child.wait_until(lambda: "answers again" in child.log_tail())
    finally:
        child.stop()


def test_a_service_that_does_not_answer_is_asked_again(repo: Path, tmp_path: Path) -> None:
    (nobody,) = free_ports(1)
    child = start(repo, f"http://127.0.0.1:{nobody}", tmp_path)
    try:
        child.wait_until(lambda: "can't be asked" in child.log_tail())
        server = ThreadingHTTPServer(("127.0.0.1", nobody), BaseHTTPRequestHandler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        child.wait_until(lambda: "501" in child.log_tail())  # it lives, and says what is different now
        server.shutdown()
        server.server_close()
        assert child.log_tail().count("can't be asked") == 2, "each problem is said once"
    finally:
        child.stop()


@pytest.mark.e2e
def test_a_notice_drains_the_node_that_it_is_about(repo: Path, imds: Imds, tmp_path: Path) -> None:
    port, manager = free_ports(2)
    program = (sys.executable, repo / "docker" / "spot_notice.py")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
        command += [
            "--include-dashboard=false",
            "--num-cpus=1",
            f"--temp-dir={folder}",
            f"--node-manager-port={manager}",
        ]
        command += ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
        env = os.environ | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
        head = Child.start("ray head", command, log_path=tmp_path / "head.log", env=env)
        try:
            head.wait_until(lambda: "--address=" in head.log_tail())
            [address] = re.findall(r"--address='([\d.]+:\d+)'", head.log_tail())  # as its raylet was told it
            with subprocess.Popen(
                [sys.executable, "-c", BUSY_NODE, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as busy:
                assert busy.stdin is not None and busy.stdout is not None
                node_id = busy.stdout.readline().strip()
                watcher = Child.start(
                    "spot_notice",
                    [*program, "--interval-s", "0.1", "--address", address, "--metadata-url", imds.url],
                    log_path=tmp_path / "spot.log",
                    env=env | {"PATH": f"{Path(RAY).parent}:{os.environ['PATH']}"},
                )
                assert imds.first_answer.wait(30)
                assert watcher.process.poll() is None, "no notice: it goes on watching"
                imds.documents["/spot/instance-action"] = {"action": "terminate", "time": in_seconds(120)}
                assert watcher.process.wait(60) == 0, watcher.log_tail()
                draining, _ = busy.communicate("\n", timeout=60)
            [(drained, deadline_ms)] = json.loads(draining).items()
            assert drained == node_id
            assert 60 < deadline_ms / 1000 - time.time() <= 120
            assert f"draining {node_id}" in watcher.log_tail()
        finally:
            head.stop()
