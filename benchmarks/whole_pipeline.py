"""(c) A whole run through Ray from S3, as a ratio to the training step alone (b).

    python benchmarks/whole_pipeline.py [--preset edsr-baseline-x4] [--device cuda] [--json FILE]

Runs are `pipelines/train_edsr.py` with images made on the spot, data and run folder on an S3 server in a process of its
own, and SQLite for MLflow: with half of the images in a window that moves on by one image every 1,024 patches, while
Ray Data decodes, then with all of them in the patch pool. Before and after each, the step alone is timed on one fixed
batch in this process, with the same threads; the mean of the two is what the run is compared with. The run's patches/s
are its own measure: from the second step on, all that the loop does between validations.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import measuring
from measuring import Benchmark, Column
from synthetic_data import s3_server, write_photos
from training_setup import FixedBatch, Stepper, random_batch

from sr_data.storage import open_store
from sr_train.presets import EDSR_PRESETS

PRESETS = {"tiny": "edsr-small-x2", "small": "edsr-small-x2", "full": "edsr-baseline-x4"}
SIZES = {"tiny": (4, 96, 120), "small": (32, 336, 480), "full": (64, 1356, 2040)}
"""How many images of which height and width."""
SECONDS = {"tiny": 0.5, "small": 20.0, "full": 30.0}
"""About how long a run trains."""
_NUM_VALIDATION_IMAGES = 2
_TRAIN = Path(__file__).resolve().parent.parent / "pipelines" / "train_edsr.py"


def measure(benchmark: Benchmark, preset: str, bucket_uri: str, folder: Path) -> None:
    """A row for each run."""
    config = EDSR_PRESETS[preset]
    num_images, height, width = SIZES[benchmark.size]
    for name, number in (("train", num_images), ("valid", _NUM_VALIDATION_IMAGES)):
        write_photos(folder / name, num_images=number, height=height, width=width, scales=(config.model.scale,))
        made, bucket = open_store(str(folder / name)), open_store(f"{bucket_uri}/{name}")
        for entry in made.list():
            bucket.write(entry.key, made.read(entry.key))
    stepper = Stepper(config, benchmark)
    print(f"{preset}: {stepper.mode}; {num_images} images of {width} x {height} px")
    fixed = stepper.feed(FixedBatch(random_batch(config, benchmark.device)))
    num_steps = stepper.steps_per_round(fixed)
    batch_size = config.optim.global_batch_size

    def alone() -> float:
        steps_s = [stepper.run(fixed, num_steps).step_s for _ in range(benchmark.rounds)]
        return batch_size / statistics.median(steps_s)

    benchmark.columns(
        Column(key="data", heading="data", width=14),
        Column(key="patches_per_s", heading="patches/s", spec=",.1f"),
        Column(key="step_alone_patches_per_s", heading="step alone", spec=",.1f"),
        Column(key="of_step_alone", heading="ratio", spec=".3f", width=6),
        Column(key="data_wait_share", heading="waits", spec=".1%", width=6),
        Column(key="seconds_to_first_step", heading="first step s", spec=".1f", width=12),
        Column(key="elapsed_s", heading="whole run s", spec=".1f", width=11),
    )
    before = alone()
    total_patches = max(10, round(before * SECONDS[benchmark.size] / batch_size)) * batch_size
    runs = {"moving window": num_images // 2, "whole dataset": num_images}
    for data, window_images in list(runs.items())[: 1 if benchmark.size == "tiny" else 2]:
        flags = {
            "--preset": preset,
            "--data.uri": f"{bucket_uri}/train",
            "--validation.uri": f"{bucket_uri}/valid",
            "--data.window-images": window_images,
            "--optim.total-patches": total_patches,
            "--schedule.warmup-patches": total_patches // 10,
            "--validation.interval-patches": total_patches,
            "--checkpoint.interval-patches": total_patches // 2,
            "--run.storage": f"{bucket_uri}/runs",
            "--run.name": f"window-{window_images}",
            "--run.device": benchmark.device.type,
            "--run.threads-per-worker": benchmark.record["options"]["num_threads"],
            "--tracking.uri": f"sqlite:///{folder / 'mlflow.db'}",
        }
        started_s = time.monotonic()
        command = [sys.executable, str(_TRAIN), *(str(part) for flag in flags.items() for part in flag)]
        # A cluster of its own: another one's nodes would not reach this machine's loopback.
        environment = os.environ | {"RAY_ADDRESS": "local"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
        if done.returncode != 0:
            raise SystemExit(f"the run failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        elapsed_s = time.monotonic() - started_s
        after = alone()
        result = json.loads(open_store(f"{bucket_uri}/runs/window-{window_images}").read_text("result.json"))
        measures, step_alone = result["measures"], (before + after) / 2
        benchmark.add(
            preset=preset,
            data=data,
            mode=str(stepper.mode),
            step_alone_patches_per_s=step_alone,
            step_alone_before=before,
            step_alone_after=after,
            of_step_alone=measures["patches_per_s"] / step_alone,
            total_patches=total_patches,
            elapsed_s=elapsed_s,
            **measures,
        )
        before = after


def main() -> None:
    """One preset."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--preset", choices=tuple(EDSR_PRESETS), help="whose network, batch and patch size")
    arguments = parser.parse_args()
    benchmark = Benchmark("whole_pipeline", arguments)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sr-benchmark-")))
        server = stack.enter_context(s3_server(folder))
        measure(benchmark, arguments.preset or PRESETS[benchmark.size], server.bucket_uri, folder)
    benchmark.finish()


if __name__ == "__main__":
    main()
