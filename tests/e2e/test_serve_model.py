"""serve_model.py as its users meet it: a page in a browser, an HTTP API, uploads of all kinds, a new champion."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.image_file import read_picture
from sr_models.upscaling import upscale_file
from sr_models.weights import save_model
from sr_train.model_registry import RegisteredVersion, register_model
from sr_train.tracking import start_run
from tests.support.mlflow_server import MlflowServer
from tests.support.pipeline import command
from tests.support.process import Child, accepts_tcp, free_ports

pytestmark = pytest.mark.e2e

CONFIG = EDSRConfig(scale=2, num_blocks=1, num_channels=4)
LIMITS = ["--max-mb", 0.3, "--max-mpx", 0.06, "--upload-timeout-s", 60, "--max-ongoing", 8, "--max-queued", 8]


@dataclass(frozen=True)
class Served:
    """The script while it serves `models:/served@champion`."""

    url: str
    port: int
    child: Child
    register: Any

    def upscale(self, data: Any, accept: str | None = None, **options: Any) -> requests.Response:
        headers = {"Accept": accept} if accept else {}
        return requests.post(f"{self.url}api/upscale", data=data, params=options, headers=headers, timeout=120)


@pytest.fixture(scope="module")
def served(mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    run = start_run(tracking_uri=mlflow_server.uri, experiment="page", run_name="r", params={}, tags={}, texts={})

    def register(config: EDSRConfig) -> RegisteredVersion:
        saved = folder / f"x{config.scale}"
        save_model(saved, config, build_model(config, seed=0).state_dict())
        sample = np.zeros((8, 8, 3), np.uint8)
        return register_model(run, saved, name="page", tags={}, sample_lr_HWC=sample, alias="champion")

    register(CONFIG)
    (port,) = free_ports(1)
    script = command("serve_model.py", "models:/page@champion", "--port", port, "--poll-s", 0.3, *LIMITS)
    # A cluster of its own, whatever else runs on this machine.
    env = os.environ | {"MLFLOW_TRACKING_URI": mlflow_server.uri, "RAY_ADDRESS": "local"}
    env |= {"RAY_raylet_start_wait_time_s": "120"}  # where other tests keep the machine busy
    child = Child.start("serve_model", script, log_path=folder / "serve.log", env=env)
    try:
        child.wait_until(lambda: f" is at http://127.0.0.1:{port}/ " in child.log_tail())
        yield Served(f"http://127.0.0.1:{port}/", port, child, register)
    finally:
        child.stop(timeout_s=120)


def levels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), channels), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)[:height, :width].squeeze()


def encoded(image_HWC: np.ndarray, file_format: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    Image.fromarray(image_HWC).save(target, file_format, **options)
    return target.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data))).astype(int)


def expected(data: bytes, **options: Any) -> np.ndarray:
    return pixels(upscale_file(build_model(CONFIG, seed=0), data, name="expected", **options))


def test_it_says_which_model_answers(served: Served, mlflow_server: MlflowServer) -> None:
    from mlflow import MlflowClient

    facts = requests.get(f"{served.url}api/model", timeout=60).json()
    version = MlflowClient(mlflow_server.uri).get_model_version("page", "1")
    assert (facts["name"], facts["version"], facts["scale"]) == ("page", "1", 2)
    assert facts["weights"] == version.tags["weights_sha256"]
    assert facts["limits"]["max_mb"] == 0.3
    assert requests.get(f"{served.url}healthz", timeout=60).json() == {"status": "ok"}
    assert "/api/upscale" in requests.get(f"{served.url}openapi.json", timeout=60).json()["paths"]


def test_bytes_in_bytes_out_or_json(served: Served) -> None:
    data = encoded(levels(30, 40))
    answer = served.upscale(data)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/png"), answer.text
    # Other threads may add in another order, which can turn a rounding.
    assert np.abs(pixels(answer.content) - expected(data)).max() <= 1
    names = ("Model", "Version", "Scale", "Input-Size", "Output-Size")
    assert [answer.headers[f"X-SR-{name}"] for name in names] == ["page", "1", "2", "40x30", "80x60"]
    assert float(answer.headers["X-SR-Elapsed-S"]) > 0
    for as_json in (served.upscale(data, accept="application/json"), served.upscale(data, output="json")):
        body = as_json.json()
        assert base64.b64decode(body["image_base64"]) == answer.content
        assert (body["media_type"], body["width"], body["height"], body["version"]) == ("image/png", 80, 60, "1")


@pytest.mark.parametrize("file_format", ["jpeg", "webp", "png"])
def test_the_format_stays_or_is_what_was_asked_for(served: Served, file_format: str) -> None:
    data = encoded(levels(24, 24), file_format)
    assert served.upscale(data).headers["Content-Type"] == f"image/{file_format}"
    png = encoded(levels(24, 24))
    assert served.upscale(png, format=file_format).headers["Content-Type"] == f"image/{file_format}"
    assert served.upscale(png, accept=f"image/{file_format}").headers["Content-Type"] == f"image/{file_format}"


def test_tiles_and_self_ensemble(served: Served) -> None:
    data = encoded(levels(50, 70))
    assert np.abs(pixels(served.upscale(data, tile=16).content) - expected(data)).max() <= 1
    ensemble = pixels(served.upscale(data, self_ensemble=True).content)
    assert np.abs(ensemble - expected(data, self_ensemble=True)).max() <= 1


def test_grey_alpha_and_sixteen_bits_stay(served: Served) -> None:
    rgba = encoded(levels(20, 30, 4))
    assert pixels(served.upscale(rgba).content).shape == (40, 60, 4)
    refused = served.upscale(rgba, format="jpeg")
    assert refused.status_code == 422 and "transparency" in refused.json()["detail"]
    wide = served.upscale(encoded(levels(2, 9000)), format="webp")
    assert wide.status_code == 422 and "18000 x 4 px" in wide.json()["detail"]
    assert pixels(served.upscale(encoded(levels(20, 30, 1))).content).shape == (40, 60)
    deep = encoded(levels(20, 30, 1).astype(np.uint16) * 257)
    assert read_picture(served.upscale(deep).content, name="deep").colour_HWC.dtype == np.uint16


def test_requests_go_together_and_one_that_is_damaged_fails_alone(served: Served) -> None:
    images = [encoded(levels(32, 32, seed=seed)) for seed in range(5)]
    images += [encoded(levels(16, 48, seed=9)), encoded(levels(32, 32, 1, seed=8)), images[0][:-30]]
    wanted = [expected(data) for data in images[:-1]]
    together = set()
    with ThreadPoolExecutor(8) as clients:
        for _ in range(20):
            *answers, damaged = clients.map(served.upscale, images)
            assert damaged.status_code == 422 and damaged.json()["code"] == "unusable_image"
            for answer, image in zip(answers, wanted, strict=True):
                assert np.abs(pixels(answer.content) - image).max() <= 1
            together |= {int(answer.headers["X-SR-Together"]) for answer in answers}
            if max(together) > 1:
                break
    assert max(together) > 1


def test_who_comes_when_too_many_wait_gets_an_image_or_is_told_so(served: Served) -> None:
    data = encoded(levels(200, 200))
    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(lambda _: served.upscale(data, self_ensemble=True, tile=64), range(32)))
    assert 200 in {answer.status_code for answer in answers}
    for answer in answers:  # how many are turned away depends on how fast this machine is
        assert answer.status_code in (200, 503), answer.text
        if answer.status_code == 503:
            assert answer.json()["code"] == "busy" and int(answer.headers["Retry-After"]) > 0
    assert served.upscale(encoded(levels(8, 8))).status_code == 200


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(extra: bytes = b"", *, width: int = 40_000, height: int = 40_000) -> bytes:
    """A PNG of a few kilobytes with gigabytes of black in it."""
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return start + extra + chunk(b"IDAT", zlib.compress(b"\0" * 10_000_000)) + chunk(b"IEND", b"")


def endless() -> Iterator[bytes]:
    while True:
        yield b"x" * 65536


HUGE = zlib.compress(b"\0" * 50_000_000, 9)


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"\xff\xd8\xff" + b"x" * 1_000_000, 413, "too_large"),
        (endless, 413, "too_large"),
        (b"", 400, "empty"),
        (b"GIF89a" + b"x" * 100, 415, "not_an_image"),
        (b"#!/bin/sh\n", 415, "not_an_image"),
        (bomb(), 413, "too_many_pixels"),
        (bomb(chunk(b"iCCP", b"p\0\0" + HUGE), width=40, height=30), 422, "damaged"),
        (bomb(chunk(b"zTXt", b"k\0\0" + HUGE), width=40, height=30), 422, "damaged"),
        (encoded(levels(60, 60))[:-60], 422, "unusable_image"),
        (encoded(levels(60, 60), "JPEG")[:-300], 422, "unusable_image"),
        (encoded(levels(60, 60), "WEBP")[:-60], 422, "damaged"),
        (encoded(levels(9, 9), "PNG", save_all=True, append_images=[Image.new("RGB", (9, 9))]), 422, "animated"),
    ],
)
def test_a_hostile_upload_gets_a_message_and_the_next_one_an_image(
    served: Served, data: Any, status: int, code: str
) -> None:
    answer = served.upscale(data() if callable(data) else data)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert len(answer.json()["detail"]) > 20
    assert served.upscale(encoded(levels(8, 8))).status_code == 200


def test_clients_that_never_finish_stand_in_nobodys_way(served: Served) -> None:
    head = b"POST /api/upscale HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n\x89PNG"
    slow = [socket.create_connection(("127.0.0.1", served.port), timeout=30) for _ in range(20)]
    for connection in slow:
        connection.sendall(head)
    assert served.upscale(encoded(levels(8, 8))).status_code == 200
    for connection in slow:
        connection.close()
    whole = encoded(levels(200, 200))  # and one that leaves when the work has begun
    with suppress(requests.Timeout):
        requests.post(f"{served.url}api/upscale?tile=16&self_ensemble=true", data=whole, timeout=(60, 0.1))
    assert served.upscale(encoded(levels(8, 8))).status_code == 200


def test_pages_of_other_sites_may_not_use_it(served: Served) -> None:
    url = f"{served.url}api/upscale"
    for site in ("cross-site", "same-site"):  # the latter: another server's of this machine
        answer = requests.post(url, data=b"x", headers={"Sec-Fetch-Site": site}, timeout=60)
        assert (answer.status_code, answer.json()["code"]) == (403, "cross_site")
    for host in ("evil.example", f"evil.example:{served.port}", "127.0.0.1.evil.example", "localhost.:1"):
        answer = requests.get(f"{served.url}api/model", headers={"Host": host}, timeout=60)
        assert (answer.status_code, answer.json()["code"]) == (403, "other_host"), host
    for host in ("localhost", "LOCALHOST:9000", "[::1]", "[::1]:8000", "127.0.0.1"):
        assert requests.get(f"{served.url}api/model", headers={"Host": host}, timeout=60).status_code == 200, host


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """The page in a browser; a message on its console fails the test."""
    context = browser.new_context(viewport={"width": 1000, "height": 800}, accept_downloads=True)
    page = context.new_page()
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(served.url)
    page.wait_for_selector("#limits:has-text('0.3 MB')")
    yield page
    context.close()
    assert messages == []


def drop(page: Any, name: str, data: bytes) -> None:
    """What the browser does when a file is let go over the page."""
    page.evaluate(
        """([name, data]) => {
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], name));
            for (const type of ["dragenter", "dragover", "drop"])
                document.getElementById("drop").dispatchEvent(new DragEvent(type, {dataTransfer, bubbles: true}));
        }""",
        [name, base64.b64encode(data).decode()],
    )


def test_drop_compare_download(served: Served, page: Any, tmp_path: Path) -> None:
    data = encoded(levels(60, 90))
    drop(page, "holiday.photo.png", data)
    page.wait_for_selector("#stage:not([hidden])")
    assert "90 × 60 px → 180 × 120 px" in page.inner_text("#facts") and "page version 1" in page.inner_text("#facts")
    images = "[...document.querySelectorAll('#views img')].map(image => [image.naturalWidth, image.naturalHeight])"
    assert page.evaluate(images) == [[90, 60], [180, 120]]

    cut = """parseFloat(getComputedStyle(document.getElementById('after')).clipPath.split(' ').pop())
             / document.getElementById('after').clientWidth"""
    assert page.evaluate(cut) == pytest.approx(0.5, abs=0.01)
    page.keyboard.press("End")  # the slider has the focus
    assert page.evaluate(cut) == pytest.approx(1.0, abs=0.01)
    box = page.locator("#views").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.99, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 30, steps=3)
    page.mouse.up()
    assert page.evaluate(cut) == pytest.approx(0.25, abs=0.05)

    with page.expect_download() as waiting:
        page.click("#download")
    assert waiting.value.suggested_filename == "holiday.photo-x2.png"
    waiting.value.save_as(tmp_path / "result.png")
    assert (tmp_path / "result.png").read_bytes() == served.upscale(data).content


def test_an_image_can_be_chosen_and_saved_as_something_else_by_keyboard_alone(page: Any, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(encoded(levels(40, 40), "JPEG"))
    page.on("filechooser", lambda _: None)  # asks the browser to report choosers: a key would overtake that,
    page.keyboard.press("Tab")
    page.wait_for_selector("#file:focus", state="attached")  # but not this, which is answered in turn
    with page.expect_file_chooser() as waiting:
        page.keyboard.press("Enter")
    waiting.value.set_files(tmp_path / "photo.jpg")
    page.wait_for_selector("#facts:has-text('JPG')")
    page.select_option("#format", "webp")
    page.focus("#redo")
    page.keyboard.press("Enter")
    page.wait_for_selector("#facts:has-text('WEBP')")


def test_what_is_too_large_is_said_before_it_is_sent_and_the_result_stays(page: Any) -> None:
    drop(page, "photo.png", encoded(levels(40, 40)))
    page.wait_for_selector("#stage:not([hidden])")
    drop(page, "huge.jpg", b"x" * 400_000)
    assert page.inner_text("#problem") == "huge.jpg has 400 kB; up to 0.3 MB are taken. Save it smaller, or as a JPEG."
    assert page.is_visible("#stage") and page.is_hidden("#drop")


def test_an_image_that_is_dropped_while_another_is_being_shown_stays_in_sight(page: Any) -> None:
    # The first image's pictures are ready only when the test lets them be.
    page.evaluate(
        """() => {
            const decode = HTMLImageElement.prototype.decode, held = new Promise(go => { window.letGo = go; });
            HTMLImageElement.prototype.decode = () => { document.body.classList.add("held"); return held; };
            window.holdNoMore = () => { HTMLImageElement.prototype.decode = decode; };
        }"""
    )
    drop(page, "first.png", encoded(levels(20, 30)))
    page.wait_for_selector("body.held")
    page.evaluate("holdNoMore()")
    uploads: list[Any] = []
    page.route("**/api/upscale*", lambda route: uploads.append(route))  # Playwright marks what it is given
    drop(page, "second.png", encoded(levels(40, 50)))
    page.wait_for_selector("#doing:has-text('second.png')")
    page.evaluate("async () => { letGo(); await new Promise(requestAnimationFrame); }")
    assert page.is_visible("#busy") and page.is_hidden("#stage")
    while not uploads:
        page.wait_for_timeout(50)
    uploads[0].continue_()
    page.wait_for_selector("#facts:has-text('50 × 40 px')")
    page.wait_for_selector("#stage:not([hidden])")


def test_the_servers_words_are_shown_and_a_phone_shows_them_whole(served: Served, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 700}, is_mobile=True, has_touch=True)
    page = context.new_page()
    page.goto(served.url)
    drop(page, "a-file-name-without-any-place-to-break-it-that-goes-on-and-on-and-on.png", b"no image at all")
    page.wait_for_selector("#problem:has-text('not an image')")
    drop(page, "wide.png", encoded(levels(20, 600)))
    page.wait_for_selector("#stage:not([hidden])")
    assert page.is_hidden("#problem")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    context.close()


def test_the_documentation_needs_no_internet(served: Served, browser: Any) -> None:
    page = browser.new_page()
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto(f"{served.url}docs")
    page.wait_for_selector("section:has-text('POST /api/upscale')")
    assert all(url.startswith((served.url, "data:")) for url in requested), requested


def test_a_new_champion_is_picked_up_and_no_request_notices(served: Served) -> None:
    data = encoded(levels(30, 40))
    sizes = {"1": "80x60", "2": "120x90"}
    with ThreadPoolExecutor(1) as background:
        registered = background.submit(served.register, replace(CONFIG, scale=3))
        deadline = time.monotonic() + 120
        version = "1"
        while version != "2" and time.monotonic() < deadline:
            answer = served.upscale(data)
            assert answer.status_code == 200, answer.text
            version = answer.headers["X-SR-Version"]
            assert answer.headers["X-SR-Output-Size"] == sizes[version]
            assert pixels(answer.content).shape[1] == 40 * int(answer.headers["X-SR-Scale"])
        assert registered.result().version == "2"
    assert version == "2"
    assert requests.get(f"{served.url}api/model", timeout=60).json()["scale"] == 3


def test_it_listens_on_the_loopback_address_alone_and_ends_cleanly(served: Served) -> None:
    """The last test of this module: nothing is served after it."""
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"]
    assert [address for address in listening if address.endswith(f":{served.port:04X}")] == [
        f"0100007F:{served.port:04X}"
    ]
    assert served.child.process.poll() is None
    served.child.process.send_signal(signal.SIGTERM)
    assert served.child.process.wait(120) == 0
    said = served.child.log_path.read_text()
    assert said.rstrip().endswith("ended") and "page version 2 answers now" in said
    assert "Traceback" not in said, said
    assert not accepts_tcp(served.port)
