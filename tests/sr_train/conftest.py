"""What tests of training's parts share."""

import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No internet, on any machine: requests beyond loopback go to a proxy that isn't there. torch.hub's cache, whose
    folder this is, does not exist yet.
    """
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    urllib.request.install_opener(None)  # urlopen keeps the proxies it saw first
    yield tmp_path / "torch" / "hub" / "checkpoints"
    urllib.request.install_opener(None)
