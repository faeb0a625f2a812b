"""Downloads into torch.hub's cache, from HTTP servers on loopback that behave well and badly."""

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sr_train.hub_download import DownloadError, hash_in_name, hub_file

CONTENT = bytes(range(256)) * 400
NAME = f"net-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch.hub puts files in these tests."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The URL of NAME on a server that answers a GET with `answer`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            """A client that closes early is what some of these tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/models/{NAME}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, content: bytes, *, announced: int | None = None) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content) if announced is None else announced))
    handler.end_headers()
    handler.wfile.write(content)


def test_a_file_is_downloaded_once_and_then_found_without_the_server(cache: Path) -> None:
    with serving(lambda handler: send(handler, CONTENT)) as url:
        assert hub_file(url) == cache / NAME
    assert hub_file(url).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda handler: send(handler, CONTENT[:-1000], announced=len(CONTENT)), id="breaks off"),
        pytest.param(lambda handler: send(handler, b"<html>please log in</html>"), id="a captive portal's page"),
    ],
)
def test_half_a_file_or_another_one_is_an_error_and_leaves_nothing_behind(
    cache: Path, broken: Callable[[BaseHTTPRequestHandler], None]
) -> None:
    with serving(broken) as url, pytest.raises(DownloadError, match=f"^{url}: invalid hash"):
        hub_file(url)
    assert list(cache.iterdir()) == []
    with serving(lambda handler: send(handler, CONTENT)) as url:  # so the next run is not poisoned
        assert hub_file(url).read_bytes() == CONTENT


def test_a_missing_file_is_said_with_the_servers_answer() -> None:
    with serving(lambda handler: handler.send_error(404)) as url, pytest.raises(DownloadError, match="404"):
        hub_file(url)


def test_a_server_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/{NAME}"
        started = time.monotonic()
        with pytest.raises(DownloadError, match=r"no answer within 0\.3 s|timed out"):
            hub_file(url, answer_within_s=0.3)
        assert time.monotonic() - started < 5


def test_a_download_that_stalls_is_given_up_and_the_processs_timeout_is_as_before(cache: Path) -> None:
    done = threading.Event()

    def stall(handler: BaseHTTPRequestHandler) -> None:
        send(handler, CONTENT[:1000], announced=len(CONTENT))
        handler.wfile.flush()
        done.wait(60)

    started = time.monotonic()
    with serving(stall) as url:
        try:
            with pytest.raises(DownloadError, match="timed out"):
                hub_file(url, stalled_after_s=0.3)
        finally:
            done.set()
    assert time.monotonic() - started < 10
    assert list(cache.iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_a_cache_that_can_not_be_written_is_said_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "torch").write_text("a file where the folder should be")
    with (
        serving(lambda handler: send(handler, CONTENT)) as url,
        pytest.raises(DownloadError, match=str(tmp_path / "torch")),
    ):
        hub_file(url)


def test_the_hash_in_a_files_name_is_torchvisions_only() -> None:
    assert hash_in_name("vgg19-dcbb9e9d.pth") == "dcbb9e9d"
    assert hash_in_name("vgg16_features-amdegroot-88682ab5.pth") == "88682ab5"
    assert hash_in_name("vgg19.pth") is hash_in_name("vgg19-imagenet.pth") is hash_in_name("a-deadbeef.txt") is None
