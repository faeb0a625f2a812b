"""The audit of locked versions, against a package index and an OSV database of its own on loopback."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.process import PATIENCE_S

OSV_ID = "GHSA-xxxx-yyyy-zzzz"


@dataclass(kw_only=True)
class Services:
    """What index and database say of `thing` 1.0."""

    url: str = ""
    yanked: str | bool = False
    status: str = "active"
    vulnerable: bool = False
    osv_is_away: bool = False
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str, body: bytes) -> bytes | None:
        """The content at a path; None for 404."""
        self.asked.append(path)
        if path == "/index/thing/":
            wheel, name = thing_wheel(), "thing-1.0-py3-none-any.whl"
            file = {"filename": name, "url": f"/{name}", "hashes": {"sha256": hashlib.sha256(wheel).hexdigest()}}
            page = {"meta": {"api-version": "1.4"}, "name": "thing", "versions": ["1.0"]}
            page |= {"files": [file | {"yanked": self.yanked}], "project-status": {"status": self.status}}
            return json.dumps(page).encode()
        if path.endswith(".whl"):
            return thing_wheel()
        if self.osv_is_away:
            return None
        if path == "/v1/querybatch":
            found = {"vulns": [{"id": OSV_ID, "modified": "2026-01-01T00:00:00Z"}]} if self.vulnerable else {}
            return json.dumps({"results": [found for _ in json.loads(body)["queries"]]}).encode()
        if path == f"/v1/vulns/{OSV_ID}":
            events = [{"introduced": "0"}, {"fixed": "1.1"}]
            package = {"name": "thing", "ecosystem": "PyPI"}
            affected = [{"package": package, "ranges": [{"type": "ECOSYSTEM", "events": events}]}]
            known = {"id": OSV_ID, "summary": "runs what it reads", "modified": "2026-01-01T00:00:00Z"}
            return json.dumps(known | {"affected": affected}).encode()
        return None


def thing_wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in {
            "METADATA": "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }.items():
            archive.writestr(zipfile.ZipInfo(f"thing-1.0.dist-info/{name}"), text)
    return buffer.getvalue()


@pytest.fixture
def services() -> Iterator[Services]:
    known = Services()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = known.answer(self.path, self.rfile.read(int(self.headers.get("Content-Length", 0))))
            self.send_response(404 if content is None else 200)
            is_page = self.path.startswith("/index/")
            self.send_header("Content-Type", f"application/{'vnd.pypi.simple.v1+json' if is_page else 'json'}")
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        do_POST = do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    known.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield known
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def audit(repo: Path, services: Services, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs the audit of a lock that holds thing 1.0; returns its exit status and output."""
    lock = tmp_path / "lock.txt"
    lock.write_text(
        "# made by a test\nthing==1.0 ; python_version >= '3.11' \\\n    --hash=sha256:00\n    # via -r x\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    env |= {"UV_NO_CONFIG": "1", "UV_CACHE_DIR": str(tmp_path / "cache"), "UV_HTTP_RETRIES": "0"}

    def run(**changes: Any) -> tuple[int, str]:
        env.setdefault("UV_DEFAULT_INDEX", f"{services.url}/index/")
        command = [sys.executable, repo / "tools" / "audit_dependencies.py", lock, "--osv-url", services.url]
        done = subprocess.run(command, env=env | changes, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.stderr == ""
        return done.returncode, done.stdout

    return run


def test_a_sound_version_passes_and_was_looked_up(audit: Callable[..., tuple[int, str]], services: Services) -> None:
    assert audit() == (0, "1 locked versions: nothing found\n")
    assert {"/index/thing/", "/v1/querybatch"} <= set(services.asked)


def test_a_known_vulnerability_fails_and_says_what_mends_it(
    audit: Callable[..., tuple[int, str]], services: Services
) -> None:
    services.vulnerable = True
    status, said = audit()
    assert status == 1
    assert f"finding: thing==1.0: {OSV_ID}, runs what it reads (mended in 1.1; " in said


def test_withdrawn_releases_and_quarantined_projects_fail(
    audit: Callable[..., tuple[int, str]], services: Services
) -> None:
    services.yanked, services.status = "loses data", "deprecated"
    status, said = audit()
    assert status == 1
    assert '`thing==1.0` is yanked (reason: "loses data")' in said
    assert "thing: the index says that the project is deprecated" in said


def test_a_version_that_the_index_has_no_more_fails(audit: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text("thing==0.9\n")
    status, said = audit()
    assert status == 1
    assert "no version of thing==0.9" in said


def test_services_that_are_away_are_said_and_fail_nothing(
    audit: Callable[..., tuple[int, str]], services: Services
) -> None:
    services.osv_is_away = True
    status, said = audit()
    assert status == 0
    assert "not looked up: vulnerabilities, projects' status: error: " in said
    assert "nothing found in what could be looked up" in said
    status, said = audit(UV_DEFAULT_INDEX="http://127.0.0.1:9/index/")
    assert status == 0
    assert "not looked up: withdrawn releases, vulnerabilities: error: " in said
