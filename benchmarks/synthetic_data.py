"""Images made on the spot, and an S3 server of one's own, so that benchmarks need no dataset and no network."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sr_data.resize import downscale_bicubic

_START_TIMEOUT_S = 60.0


def photo(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """uint8 HWC RGB: smooth noise of all sizes, and grain, so that a PNG of it costs about what a photo's does.

    As 480 px PNGs Pillow decodes it in 4.0 ms each, where OpenCV (BasicSR's decoder) takes 4.1 ms for tiles of
    DIV2K's 0004.png; it has 1.2 bytes per pixel as a PNG, that photo 1.1 (both on one core of an AMD EPYC).
    """
    image_HWC = np.full((height, width, 3), 120, np.float32)
    image_HWC += rng.normal(0, 1.5, (height, width, 1))
    cell_px, amplitude = max(height, width), 70.0
    while cell_px >= 2:
        grid_HWC = rng.standard_normal((height // cell_px + 2, width // cell_px + 2, 3), np.float32)
        for channel in range(3):
            layer = Image.fromarray(grid_HWC[:, :, channel]).resize((width, height), Image.Resampling.BICUBIC)
            image_HWC[:, :, channel] += amplitude * np.asarray(layer)
        cell_px, amplitude = cell_px // 2, 0.65 * amplitude
    return np.clip(np.rint(image_HWC), 0, 255).astype(np.uint8)


def write_photos(
    folder: Path, *, num_images: int, height: int, width: int, scales: tuple[int, ...], compress_level: int = 6
) -> None:
    """Writes HR/NAME.png and LR_bicubic/Xs/NAMExs.png, of sides that all `scales` divide (layout "benchmark")."""
    hr_folder = folder / "HR"
    lr_folders = {scale: folder / "LR_bicubic" / f"X{scale}" for scale in scales}
    for path in (hr_folder, *lr_folders.values()):
        path.mkdir(parents=True)

    def write(number: int) -> None:
        hr_HWC = photo(np.random.default_rng(number), height, width)
        Image.fromarray(hr_HWC).save(hr_folder / f"{number:04}.png", compress_level=compress_level)
        for scale, lr_folder in lr_folders.items():
            lr = Image.fromarray(downscale_bicubic(hr_HWC, scale))
            lr.save(lr_folder / f"{number:04}x{scale}.png", compress_level=compress_level)

    with ThreadPoolExecutor() as threads:
        list(threads.map(write, range(num_images)))


@dataclass(frozen=True)
class S3Server:
    """A running server; its address and credentials are in this process's environment."""

    pid: int
    bucket_uri: str


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """moto's S3 server in a process of its own on a free port, with an empty bucket; ended with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    before = {name: os.environ.get(name) for name in settings}
    guard = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
    command = [*guard, sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    log_path = folder / "moto.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        os.environ.update(settings)
        _wait_until_it_answers(url, process, log_path)
        boto3.client("s3").create_bucket(Bucket="benchmark")
        yield S3Server(process.pid, "s3://benchmark")
    finally:
        process.terminate()
        process.wait()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"moto's S3 server did not start:\n{log_path.read_text()[-2000:]}") from None
            time.sleep(0.1)
