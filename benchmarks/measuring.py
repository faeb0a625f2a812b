"""What all benchmarks share: options, timing, the hardware's ceilings, the table and the JSON record.

Timing. A timing is several rounds of calls, the device's queue empty before and after each; the median round counts,
and benchmarks that compare two things time them in turn, so that a machine whose speed drifts slows both.

FLOPs. A multiply-add is two, only convolutions count. A training step is three forward passes' worth: forward, and
backward with respect to inputs and to weights; so 3 × 2 × `macs_per_lr_pixel` × LR pixels. A share of a ceiling is
such FLOPs a second over those of one large kernel, measured in the same run: `ceilings`.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

# As in the trainer's processes, and read when torch is loaded: benchmarks import this module before it. PyTorch's idle
# threads otherwise spin, and on a machine that others use too, a thread that waits for one without a CPU waits for
# whole time slices (the patch pool then did 125 patches/s instead of 15,000).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from machine import hardware, num_cpus

from sr_models.architectures import macs_per_lr_pixel
from sr_models.network import ModelConfig
from sr_train.run_facts import run_facts

Size = Literal["tiny", "small", "full"]
_ROUNDS_AND_SECONDS: dict[Size, tuple[int, float]] = {"tiny": (2, 0.01), "small": (5, 1.0), "full": (7, 1.0)}
_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "CUDA_VISIBLE_DEVICES")
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--size", choices=tuple(_ROUNDS_AND_SECONDS),
                      help="full on CUDA, small on CPU when not given; tiny only shows that it runs")  # fmt: skip
    made.add_argument("--rounds", type=int, help="timings of each thing; their median counts")
    made.add_argument("--seconds", type=float, help="shortest time of one round")
    made.add_argument("--num-threads", type=int, default=num_cpus(), help="PyTorch's threads on the CPU")
    made.add_argument("--json", type=Path, metavar="FILE", help="where to write the record")
    return made


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call."""

    median_s: float
    min_s: float
    max_s: float
    cpu_s: float
    """CPU time, median of the rounds: says the same on a machine that others use too."""


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The FLOPs a second that one kernel reaches, the best of all rounds."""

    operation: str
    precision: str
    shape: str
    flops_per_s: float


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table."""

    key: str
    heading: str
    spec: str = ""
    """Format of the values, as in an f-string."""
    width: int = 10


class Benchmark:
    """One run of one benchmark: where and how it measures, and what it has found."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        """Sets PyTorch's threads and says what runs on what. SystemExit if there is no CUDA where it is asked for."""
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("--device cuda: PyTorch finds no CUDA GPU here")
        torch.set_num_threads(arguments.num_threads)
        self.name = name
        self.device = torch.device(arguments.device)
        self.size: Size = arguments.size or ("full" if self.device.type == "cuda" else "small")
        rounds, seconds = _ROUNDS_AND_SECONDS[self.size]
        self.rounds: int = arguments.rounds or rounds
        self.seconds: float = arguments.seconds or seconds
        self.rows: list[dict[str, Any]] = []
        self.ceilings: dict[tuple[str, str], Ceiling] = {}
        """By (operation, precision), those measured last."""
        self._all_ceilings: list[Ceiling] = []
        self._json: Path | None = arguments.json
        self._columns: Sequence[Column] = ()
        options = {key: value for key, value in vars(arguments).items() if key != "json"}
        facts = run_facts()
        self.record: dict[str, Any] = {
            "benchmark": name,
            "size": self.size,
            "hardware": hardware(self.device),
            "versions": {key: facts[key] for key in ("python", "torch", "ray", "numpy", "pillow")},
            "git": {"sha": facts["git_sha"], "dirty": facts["git_dirty"]},
            "options": options | {"rounds": self.rounds, "seconds": self.seconds},
            "environment": {key: os.environ[key] for key in _VARIABLES if key in os.environ},
        }
        commit = facts["git_sha"][:10] + (" with changes" if facts["git_dirty"] == "true" else "")
        print(f"{name}: {self.size}, on {self.device.type}; PyTorch {facts['torch']}, commit {commit}")
        print(", ".join(f"{key}: {value}" for key, value in self.record["hardware"].items()), flush=True)

    def synchronize(self) -> None:
        """Waits for what is queued on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(
        self,
        work: Callable[[int], object],
        *,
        divided: int = 1,
        cpu_clock: Callable[[], float] = time.process_time,
        before_round: Callable[[], object] = lambda: None,
    ) -> Timing:
        """Times `work(call number)`; the calls that find out how many make a round are the warm-up.

        `divided`: so many times as many rounds, of a part of the time each. `cpu_clock`: what counts as CPU time.
        `before_round` is called before each, untimed.
        """

        def timed(first: int, num_calls: int) -> tuple[float, float]:
            before_round()
            self.synchronize()
            started_s, cpu_started_s = time.perf_counter(), cpu_clock()
            for call in range(first, first + num_calls):
                work(call)
            self.synchronize()
            return time.perf_counter() - started_s, cpu_clock() - cpu_started_s

        num_calls, first, round_s = 1, 0, self.seconds / divided
        while True:
            elapsed_s, _ = timed(first, num_calls)
            first += num_calls
            if elapsed_s >= round_s:
                break
            num_calls = max(num_calls + 1, min(8 * num_calls, int(1.1 * num_calls * round_s / elapsed_s)))
        rounds = []
        for _ in range(self.rounds * divided):
            rounds.append(timed(first, num_calls))
            first += num_calls
        walls_s = [wall_s / num_calls for wall_s, _ in rounds]
        return Timing(
            median_s=statistics.median(walls_s),
            min_s=min(walls_s),
            max_s=max(walls_s),
            cpu_s=statistics.median(cpu_s for _, cpu_s in rounds) / num_calls,
        )

    def columns(self, *columns: Column) -> None:
        """Begins a table."""
        self._columns = columns
        print(" ".join(f"{column.heading:>{column.width}}" for column in columns), flush=True)

    def add(self, **values: Any) -> None:
        """Prints a row and keeps it; values that no column shows are in the record only."""
        self.rows.append(values)
        cells = [
            f"{'' if values.get(column.key) is None else format(values[column.key], column.spec):>{column.width}}"
            for column in self._columns
        ]
        print(" ".join(cells), flush=True)

    def finish(self) -> None:
        """Writes the record where asked."""
        self.record |= {"ceilings": [asdict(ceiling) for ceiling in self._all_ceilings], "rows": self.rows}
        if self._json is not None:
            self._json.parent.mkdir(parents=True, exist_ok=True)
            self._json.write_text(json.dumps(self.record, indent=1) + "\n")

    def measure_ceilings(self, precision: str, *, images: int, side_px: int, channels: int) -> None:
        """Measures a matrix product and a 3×3 convolution, prints them, and keeps them in `ceilings` by (operation,
        precision).

        The convolution is the one that the network consists of, at the size it has in training: N = `images`, H = W =
        `side_px`, `channels` in and out, channels_last; "conv" with its backward pass, "conv forward" without.
        """
        dtype = _DTYPES[precision]
        matrix_px = {"tiny": 128, "small": 2048, "full": 8192}[self.size]
        a, b = (torch.randn(matrix_px, matrix_px, device=self.device, dtype=dtype) for _ in range(2))
        tensor = {"device": self.device, "dtype": dtype, "memory_format": torch.channels_last}
        x, gradient = (torch.empty(images, channels, side_px, side_px, **tensor).normal_() for _ in range(2))
        weight = torch.empty(channels, channels, 3, 3, **tensor).normal_(std=0.05)
        shape = f"{images}×{channels}×{side_px}×{side_px}"
        settings = ([0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # no bias, stride, padding, dilation, …, one group

        def forward() -> None:
            torch.ops.aten.convolution(x, weight, None, *settings[1:])

        def both() -> None:
            forward()
            torch.ops.aten.convolution_backward(gradient, x, weight, *settings, [True, True, False])

        flops = 2 * 9 * channels**2 * images * side_px**2
        benchmarked, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            with torch.no_grad():
                for operation, what, work, work_flops in (
                    ("matmul", f"{matrix_px}²", lambda: torch.mm(a, b), 2 * matrix_px**3),
                    ("conv", shape, both, 3 * flops),
                    ("conv forward", shape, forward, flops),
                ):
                    rate = work_flops / self._best_seconds(work)
                    ceiling = Ceiling(operation=operation, precision=precision, shape=what, flops_per_s=rate)
                    self.ceilings[operation, precision] = ceiling
                    self._all_ceilings.append(ceiling)
                    print(f"ceiling: {operation:12} {precision:8} {what:14} {rate / 1e9:12,.0f} GFLOP/s", flush=True)
        finally:
            torch.backends.cudnn.benchmark = benchmarked

    def _best_seconds(self, work: Callable[[], object]) -> float:
        """Of one call, in the fastest of many short rounds: a ceiling is what is left when nothing disturbs.

        On CUDA the calls are recorded in a graph: started one by one, small kernels would wait for the CPU, which is no
        property of the GPU.
        """
        if self.device.type != "cuda":
            return self.time(lambda _: work(), divided=4).min_s
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # as PyTorch's notes on CUDA graphs have it: warmed up beside the main stream
            for _ in range(3):
                work()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph, num_calls = torch.cuda.CUDAGraph(), 20
        with torch.cuda.graph(graph):
            for _ in range(num_calls):
                work()
        return self.time(lambda _: graph.replay(), divided=4).min_s / num_calls

    def shares(self, flops_per_s: float, precision: str, *, training: bool) -> dict[str, float]:
        """`flops_per_s` and its shares of the ceilings, as values of a row."""
        convolution = self.ceilings["conv" if training else "conv forward", precision].flops_per_s
        return {
            "gflops_per_s": flops_per_s / 1e9,
            "share_of_conv": flops_per_s / convolution,
            "share_of_matmul": flops_per_s / self.ceilings["matmul", precision].flops_per_s,
        }


SHARES = (
    Column(key="gflops_per_s", heading="GFLOP/s", spec=",.1f"),
    Column(key="share_of_conv", heading="of conv", spec=".1%", width=8),
    Column(key="share_of_matmul", heading="of matmul", spec=".1%", width=9),
)
"""Columns of `Benchmark.shares`."""


def training_step_flops(model: ModelConfig, *, num_patches: int, patch_px_hr: int) -> int:
    """FLOPs of one optimiser step, see the module's rule."""
    return 3 * 2 * macs_per_lr_pixel(model) * num_patches * (patch_px_hr // model.scale) ** 2
