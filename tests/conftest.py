"""Fixtures of all tests: real servers on loopback, images, and an environment without the developer's settings."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from xdist.scheduler import LoadFileScheduling

from tests.support.machines import start_network, why_no_machines
from tests.support.mlflow_server import MlflowServer, start_mlflow
from tests.support.node_runs import FinishedRun, run_unharmed, stage_photos
from tests.support.nodes import Site, start_nodes
from tests.support.perceptual import save_random_features
from tests.support.ray_head import RayHead, start_ray_head
from tests.support.s3 import S3Server, missing_ceph_programs, start_moto, start_rgw

if TYPE_CHECKING:
    from playwright.sync_api import Browser

REPO = Path(__file__).resolve().parent.parent
END_TO_END_TIMEOUT_S = 900
FOREIGN_SETTINGS = ("AWS_", "MLFLOW_", "RAY_", "S3_ENDPOINT")
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Tests start clusters in this process and end them. A request that is on its way to one as it ends is tried again
    # by a thread of Ray's; where nobody has answered for a minute it ends the process, with status 1 and no word.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "3600",
    "RAY_AUTH_MODE": "disabled",  # right for loopback only: the clusters of the tests live there
    # Ray makes its workers wait behind every other process of the machine (niceness 15), and the tests are some.
    "RAY_worker_niceness": "0",
    "RAY_agent_register_timeout_ms": "120000",  # where other tests run too, a node's agent takes more than Ray's 30 s
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "OMP_WAIT_POLICY": "PASSIVE",  # as in workers: threads that spin while they wait take the others' CPU
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
    "AWS_EC2_METADATA_DISABLED": "true",  # absent credentials are said at once, not after a timeout
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent/credentials",
    "AWS_CONFIG_FILE": "/nonexistent/config",
}


def pytest_configure() -> None:
    """Before anything is imported: MLflow and Ray read some of these once."""
    for name in list(os.environ):
        if name.startswith(FOREIGN_SETTINGS):
            del os.environ[name]
    os.environ.update(SETTINGS)
    os.environ.setdefault("OMP_NUM_THREADS", "2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The time of an end-to-end test's clusters, servers and jobs counts as that of the first test that needs them."""
    for item in items:
        if item.get_closest_marker("e2e") is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(END_TO_END_TIMEOUT_S))


class _FilesAndEndToEnd(LoadFileScheduling):
    """A file's tests share its clusters and servers, so they stay together; all end-to-end tests run one after
    another, because two at once would wait for each other's workers until their patience ends, and Ray's own: a node
    that is not up within 30 s gives up.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "tests/e2e" if nodeid.startswith("tests/e2e/") else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _FilesAndEndToEnd:
    """How `make test` shares the tests out over two processes."""
    return _FilesAndEndToEnd(config, log)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in a folder of its own: defaults like sqlite:///mlflow.db never land in the project."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The project's root."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with BSDS500, Set5, T91 and DIV2K; SR_EXPECT_SHARED_DATA=1 makes its absence a failure."""
    folder = Path(os.environ.get("SR_SHARED_DATA", REPO.parent / "shared" / "data"))
    missing = [name for name in ("BSDS500", "DIV2K", "Set5", "T91") if not (folder / name).is_dir()]
    if missing:
        absent(f"{', '.join(missing)} not found in {folder} (SR_SHARED_DATA)", "SR_EXPECT_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One moto server for the whole run; tests take `s3`."""
    server = start_moto(tmp_path_factory.mktemp("moto"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def rgw_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One Ceph RGW for the whole run; tests take `s3_rgw`."""
    if missing := missing_ceph_programs():
        absent(f"{', '.join(missing)} not installed (Debian: ceph-mon ceph-osd ceph-common radosgw)", "SR_EXPECT_RGW")
    server = start_rgw(tmp_path_factory.mktemp("rgw"))
    yield server
    server.stop()


@pytest.fixture
def s3(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """moto's S3 server with authentication on, its credentials in the environment."""
    yield from _in_environment(moto_server, monkeypatch)


@pytest.fixture
def s3_rgw(rgw_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Ceph RGW, its credentials in the environment."""
    yield from _in_environment(rgw_server, monkeypatch)


@pytest.fixture(params=["moto", "rgw"])
def any_s3(request: pytest.FixtureRequest) -> S3Server:
    """The test runs once on each S3 server."""
    server: S3Server = request.getfixturevalue({"moto": "s3", "rgw": "s3_rgw"}[request.param])
    return server


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A tracking server and registry on SQLite; `.uri`. Shared by all tests: use experiment names of your own."""
    server = start_mlflow(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.child.stop()


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """A head node with 3 CPUs, started with `ray start --head`; `.address`, `.jobs_url`, `.submit_job(…)`."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        head = start_ray_head(Path(folder))
        yield head
        head.child.stop()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A Ray cluster of a head and two nodes with addresses of their own, and S3 and MLflow servers that they reach.

    A test that changes the nodes leaves two that work. SR_EXPECT_NAMESPACES=1 makes it a failure if there can be none.
    """
    if reason := why_no_machines():
        absent(reason, "SR_EXPECT_NAMESPACES")
    network = start_network(tmp_path_factory.mktemp("network"))
    with ExitStack() as stack:
        stack.callback(network.close)
        s3 = start_moto(tmp_path_factory.mktemp("moto"), host=network.host_ip)
        stack.callback(s3.stop)
        mlflow = start_mlflow(tmp_path_factory.mktemp("mlflow"), host=network.host_ip)
        stack.callback(mlflow.child.stop)
        yield Site(start_nodes(network, num_nodes=2, cpus_per_node=2), s3, mlflow)


@pytest.fixture(scope="session")
def unharmed_run(site: Site, _photos: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run over the site's two nodes, with which others are compared."""
    return run_unharmed(site, stage_photos(site, _photos, tmp_path_factory.mktemp("photos")))


@pytest.fixture
def browser() -> Iterator[Browser]:
    """A headless Chromium of this test's own; SR_EXPECT_BROWSER=1 makes its absence a failure.

    Not shared between tests, though starting it takes a second: as long as Playwright's synchronous interface is open,
    its event loop counts as running in this thread, and asyncio, Ray Serve and Playwright refuse to start another.
    """
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        absent("no Chromium on the PATH (Debian: chromium)", "SR_EXPECT_BROWSER")
    from playwright.sync_api import sync_playwright  # here, because most tests need no browser

    with sync_playwright() as playwright:
        # Without a sandbox: containers do not let Chromium make one, and what it opens here is our own.
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()


@pytest.fixture(scope="session")
def _photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate([(96, 72), (120, 96), (97, 75), (128, 80), (80, 112), (104, 104)]):
        Image.fromarray(_photo(rng, width, height)).save(folder / f"photo-{index}.png")
    return folder


@pytest.fixture
def tiny_photos(_photos: Path, tmp_path: Path) -> Path:
    """A folder of six generated 8-bit RGB PNGs (80 to 128 px, one of odd size), the test's own copy."""
    return Path(shutil.copytree(_photos, tmp_path / "tiny_photos"))


def _photo(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Smooth shading, edges and a little texture: something that bicubic blurs and a network can sharpen."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    image = 128 + 60 * np.sin(x[..., None] / rng.uniform(9, 30, 3) + y[..., None] / rng.uniform(9, 30, 3))
    for _ in range(8):
        centre_x, centre_y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(4, 20)
        image[(x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2] = rng.uniform(0, 255, 3)
    image += rng.normal(0, 4, (height, width, 1))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _in_environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    import s3fs  # here, because most tests need no object storage

    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    # fsspec keeps filesystems by their arguments: one made for another server or key would be handed out again.
    s3fs.S3FileSystem.clear_instance_cache()
    yield server
    s3fs.S3FileSystem.clear_instance_cache()


def absent(reason: str, expect_variable: str) -> None:
    if os.environ.get(expect_variable) == "1":
        pytest.fail(f"{reason}, and {expect_variable}=1 says that it is there")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def alexnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet's convolutions with random weights, for LPIPS."""
    return save_random_features("alexnet", tmp_path_factory.mktemp("alexnet"))


@pytest.fixture(scope="session")
def vgg19_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG19's convolutions with random weights, 80 MB."""
    return save_random_features("vgg19", tmp_path_factory.mktemp("vgg19"))
