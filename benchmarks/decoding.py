"""(d) Staging and decoding: images a second and core, against Pillow in one process.

    python benchmarks/decoding.py [--source URI] [--json FILE]

The images are made on the spot and served by an S3 server in a process of its own, or are one's own (`--source`, any
URI that training takes). An image is an HR image, with its LR partner where a row reads or makes one. "per core" is
images a second of CPU time, of this process and all of Ray's, without the server's; so a row that waits for the network
is not judged by it, and a machine that others use says the same as a quiet one. Pillow decodes from memory: nothing is
fetched, checked or paired.
"""

import io
import logging
import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path

import measuring
import ray
from machine import cpu_s, num_cpus
from measuring import Benchmark, Column
from PIL import Image
from synthetic_data import s3_server, write_photos

from sr_data.decode import decode_image
from sr_data.manifest import ImageRecord, Manifest, load_manifest
from sr_data.pairs import DecodedPair, load_pair
from sr_data.ray_source import stream_pairs
from sr_data.staging import StagingOptions, stage_dataset
from sr_data.storage import open_store
from sr_train.options import DataConfig

SCALE = 4
SIZES = {"tiny": (6, 96, 128), "small": (32, 340, 512), "full": (48, 1356, 2040)}
"""How many images of which height and width."""
_BLOCK_IMAGES = 16  # one task's work, as in sr_train/ray_cluster.py


class Measurement:
    """Rates of one way after the other, each against the first."""

    def __init__(self, benchmark: Benchmark, manifest: Manifest, server_pid: int | None) -> None:
        self._benchmark, self._server_pid = benchmark, server_pid
        self._mpx = statistics.mean(record.height * record.width for record in manifest.images) / 1e6
        self._reference: float | None = None

    def add(self, way: str, work: Callable[[int], object], *, images_per_call: int = 1) -> None:
        """One row: `work(call number)` handles `images_per_call` images."""
        timing = self._benchmark.time(work, cpu_clock=lambda: cpu_s(self._server_pid))
        per_core = images_per_call / timing.cpu_s if timing.cpu_s else None  # None: rounds shorter than a clock tick
        self._reference = self._reference or per_core
        self._benchmark.add(
            way=way,
            images_per_s=images_per_call / timing.median_s,
            slowest=images_per_call / timing.max_s,
            fastest=images_per_call / timing.min_s,
            images_per_core_s=per_core,
            hr_mpx_per_core_s=per_core and per_core * self._mpx,
            of_pillow=per_core and self._reference and per_core / self._reference,
        )


def measure(benchmark: Benchmark, source: str, split: str, target: str, server_pid: int | None) -> None:
    """All rows."""
    manifest = load_manifest(source, split=split, scale=SCALE)
    store, records = open_store(manifest.uri), manifest.images
    without_lr = [replace(record, lr_key=None, lr_sha256=None) for record in records]
    files = [store.read(record.hr_key) for record in records]
    mib = sum(map(len, files)) / len(files) / 2**20
    print(f"{len(files)} images of {records[0].width} x {records[0].height} px, {mib:.2f} MiB each, from {source}")
    benchmark.columns(
        Column(key="way", heading="way", width=34),
        Column(key="images_per_s", heading="images/s", spec=",.1f"),
        Column(key="slowest", heading="slowest", spec=",.1f"),
        Column(key="fastest", heading="fastest", spec=",.1f"),
        Column(key="images_per_core_s", heading="per core", spec=",.1f"),
        Column(key="hr_mpx_per_core_s", heading="Mpx/core s", spec=",.1f"),
        Column(key="of_pillow", heading="of Pillow", spec=".2f"),
    )
    rows = Measurement(benchmark, manifest, server_pid)
    num_images = len(records)

    def pillow(call: int) -> None:
        Image.open(io.BytesIO(files[call % num_images])).convert("RGB")

    rows.add("Pillow, from memory", pillow)
    rows.add("decode_image, from memory", lambda call: decode_image(files[call % num_images], name=""))
    if records[0].lr_key is not None:
        rows.add("load_pair, LR read", lambda call: load_pair(store, records[call % num_images], SCALE))
    rows.add("load_pair, LR made", lambda call: load_pair(store, without_lr[call % num_images], SCALE))
    by_ray = records if records[0].lr_key is not None else without_lr
    with closing(stream(manifest.uri, cycle(by_ray))) as pairs:
        num_taken = _BLOCK_IMAGES * (2 if benchmark.size == "tiny" else 8)  # blocks come in bursts
        take = partial(deque, maxlen=0)
        take(islice(pairs, 2 * _BLOCK_IMAGES))  # the first come from this process, while Ray Data starts
        rows.add("Ray Data, as in training", lambda _: take(islice(pairs, num_taken)), images_per_call=num_taken)
    target_numbers = count()

    def stage(make_lr: tuple[int, ...]) -> None:
        to = f"{target}/{next(target_numbers)}"
        stage_dataset(StagingOptions(source=source, target=to, split=split, make_lr=make_lr))

    staged_split = f"{num_images} images"
    rows.add(f"staging, {staged_split}", lambda _: stage(()), images_per_call=num_images)
    rows.add("staging, LR x3 made", lambda _: stage((3,)), images_per_call=num_images)


def stream(uri: str, records: Iterator[ImageRecord]) -> Iterator[DecodedPair]:
    """The trainer's stream, with all of this machine's CPUs for it."""
    return stream_pairs(
        uri,
        records,
        SCALE,
        num_threads=DataConfig().decode_threads,
        block_images=_BLOCK_IMAGES,
        reserved_cpus=0.0,
    )


def main() -> None:
    """Makes images and a server unless a source is given, and measures."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--source", metavar="URI", help="dataset to read instead of images made on the spot")
    parser.add_argument("--split", default="train", help="which part of --source")
    arguments = parser.parse_args()
    benchmark = Benchmark("decoding", arguments)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sr-benchmark-")))
        source, target, server_pid = arguments.source, str(folder / "staged"), None
        if source is None:
            num_images, height, width = SIZES[benchmark.size]
            write_photos(folder / "made", num_images=num_images, height=height, width=width, scales=(SCALE,))
            server = stack.enter_context(s3_server(folder))
            source, target, server_pid = f"{server.bucket_uri}/made", f"{server.bucket_uri}/staged", server.pid
            made, bucket = open_store(str(folder / "made")), open_store(source)
            for entry in made.list():
                bucket.write(entry.key, made.read(entry.key))
        ray.init(address="local", num_cpus=num_cpus(), include_dashboard=False, logging_level=logging.ERROR)
        stack.callback(ray.shutdown)
        measure(benchmark, source, arguments.split, target, server_pid)
    benchmark.finish()


if __name__ == "__main__":
    main()
