"""200 images upscaled from S3 to S3 by a job that is killed half way and run again: the second makes the rest."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ray.thirdparty_files import psutil

from sr_models.architectures import build_model
from sr_models.edsr import EDSRConfig
from sr_models.upscaling import upscale_file
from sr_models.weights import load_model, save_model
from tests.support.pipeline import REPO
from tests.support.process import PATIENCE_S
from tests.support.ray_head import Job, JobOutcome, RayHead
from tests.support.s3 import S3Server

pytestmark = pytest.mark.e2e

NUM_IMAGES, HALF = 200, 100
CONFIG = EDSRConfig(scale=2, num_blocks=1, num_channels=4)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the job runs, reads and writes."""

    s3: S3Server
    client: Any
    """boto3's; to make one takes longer than to use it."""
    bucket: str
    ray: RayHead
    photos: Mapping[str, bytes]
    """Key below the bucket's photos/ → file."""
    model: Path

    def start(self, *flags: object) -> Job:
        what = [f"{self.bucket}/model", f"{self.bucket}/photos", f"{self.bucket}/larger", *map(str, flags)]
        entrypoint = " ".join([sys.executable, "pipelines/upscale_images.py", *what])
        return self.ray.start_job(entrypoint, working_dir=REPO, env=self.s3.env)

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket.removeprefix("s3://"), Key=key, Body=data)

    def read(self, key: str) -> bytes:
        body = self.client.get_object(Bucket=self.bucket.removeprefix("s3://"), Key=f"larger/{key}")["Body"]
        data: bytes = body.read()
        return data

    def made(self) -> dict[str, object]:
        """Key → when it was written."""
        pages = self.client.get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=self.bucket.removeprefix("s3://"), Prefix="larger/")
        return {
            item["Key"].removeprefix("larger/"): item["LastModified"]
            for page in found
            for item in page.get("Contents", [])
        }

    def actors(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.ray.child.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
                if child.name().startswith("ray::MapWorker"):
                    found.append(child)
        return found


def wait_for(what: str, ready: object, *, timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@dataclass(frozen=True, kw_only=True)
class Killed:
    """What the first job left, and how the second ended."""

    place: Place
    before: Mapping[str, object]
    """Images that were there when nothing of the first job lived any more: key → when it was written."""
    outcome: JobOutcome


@pytest.fixture(scope="module")
def killed(
    moto_server: S3Server, ray_head: RayHead, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Killed:
    model = tmp_path_factory.mktemp("upscale") / "model"
    save_model(model, CONFIG, build_model(CONFIG, seed=0).state_dict())
    paths = sorted((shared_data / "BSDS500/test").glob("*.jpg"))[:NUM_IMAGES]
    photos = {f"{'even' if int(path.stem) % 2 == 0 else 'odd'}/{path.name}": path.read_bytes() for path in paths}
    assert len(photos) == NUM_IMAGES
    place = Place(
        s3=moto_server,
        client=moto_server.client(),
        bucket=moto_server.new_bucket(),
        ray=ray_head,
        photos=photos,
        model=model,
    )
    for path in model.iterdir():
        place.put(f"model/{path.name}", path.read_bytes())
    for key, data in photos.items():
        place.put(f"photos/{key}", data)

    job = place.start("--num-actors", 2)
    wait_for("half of the images", lambda: len(place.made()) > HALF)
    os.kill(job.driver_pid(), signal.SIGKILL)
    assert job.wait().exit_code != 0
    wait_for("the end of the actors", lambda: not place.actors())
    before = {key: written for key, written in place.made().items() if key.endswith(".jpg")}
    return Killed(place=place, before=before, outcome=place.start("--num-actors", 1).wait())


def test_the_second_run_makes_the_rest_and_only_that(killed: Killed) -> None:
    assert killed.outcome.exit_code == 0, killed.outcome.logs
    num_before = len(killed.before)
    assert HALF <= num_before < NUM_IMAGES
    made = killed.place.made()
    assert made.keys() == killed.place.photos.keys() | {"upscale_images.json"}
    assert {key: made[key] for key in killed.before} == killed.before
    for said in (
        f"upscaling {NUM_IMAGES - num_before} images x2: {killed.place.bucket}/photos → {killed.place.bucket}/larger",
        f"finished  {num_before} images",
        "1 actor with 1 CPU each",
        f"complete, {NUM_IMAGES} of {NUM_IMAGES} images",
    ):
        assert said in killed.outcome.logs


def test_all_are_whole_and_right(killed: Killed) -> None:
    place, network = killed.place, load_model(killed.place.model)
    for number, (key, photo) in enumerate(place.photos.items()):
        larger = place.read(key)
        with Image.open(io.BytesIO(photo)) as before, Image.open(io.BytesIO(larger)) as after:
            after.load()
            assert after.size == (2 * before.width, 2 * before.height)
        if number % 25 == 0:
            assert larger == upscale_file(network, photo, name=key)


def test_the_record_says_what_they_were_made_with(killed: Killed) -> None:
    record = json.loads(killed.place.read("upscale_images.json"))
    assert record["model"] == f"{killed.place.bucket}/model" and record["recipe"]["scale"] == 2
    assert record["sources"].keys() == killed.place.photos.keys()
