"""(b) The training step alone, on synthetic data: patches a second, and FLOP/s against the hardware's ceilings.

    python benchmarks/training_step.py [--presets edsr-baseline-x4 edsr-x4] [--device cuda] [--json FILE]

One fixed batch of random pixels that lies on the device; the step is a worker's. Rows: a preset as it trains on this
device, then with single means of `--step.*` taken away or added, down to the reference of float32 and nothing else.
They are timed in turn. FLOPs are counted as measuring.py says, so what the optimiser and the loss take shows in the
shares.
"""

import statistics
from dataclasses import replace

import measuring
import torch
from machine import precisions
from measuring import Benchmark, Column
from training_setup import FixedBatch, Stepper, random_batch

from sr_train.options import StepConfig
from sr_train.presets import EDSR_PRESETS

PRESETS = {
    "tiny": ("edsr-small-x2",),
    "small": ("edsr-small-x2", "edsr-baseline-x4"),
    "full": ("edsr-baseline-x2", "edsr-baseline-x4", "edsr-x4"),
}
REFERENCE = StepConfig(
    precision="float32", channels_last=False, compile="off", cuda_graph="off", fused_optimizer=False, batch_ahead=False
)


def variants(device: torch.device) -> dict[str, StepConfig]:
    """Name of a row → how steps are computed."""
    auto = StepConfig()
    if device.type == "cuda":
        return {
            "auto": auto,
            "without CUDA graph": replace(auto, cuda_graph="off"),
            "without compile": replace(auto, compile="off"),
            "without either": replace(auto, compile="off", cuda_graph="off"),
            "float32": replace(auto, precision="float32"),
            "reference": REFERENCE,
        }
    bf16 = {"bf16": replace(auto, precision="bf16")} if "bf16" in precisions(device) else {}
    return {"auto": auto, **bf16, "reference": REFERENCE}


def measure(benchmark: Benchmark, preset: str) -> None:
    """The rows of one preset."""
    config = EDSR_PRESETS[preset]
    batch_size, patch_px_hr = config.optim.global_batch_size, config.data.patch_px_hr
    side_px_lr, channels = patch_px_hr // config.model.scale, config.model.num_channels
    for precision in precisions(benchmark.device):
        benchmark.measure_ceilings(precision, images=batch_size, side_px=side_px_lr, channels=channels)
    batch = FixedBatch(random_batch(config, benchmark.device))
    steppers, num_steps, peak_gib = {}, {}, {}
    for name, step in variants(benchmark.device).items():
        before_gib = _peak_gib(benchmark.device, restart=True)
        steppers[name] = Stepper(replace(config, step=step), benchmark)
        num_steps[name] = steppers[name].steps_per_round(steppers[name].feed(batch))
        peak_gib[name] = _peak_gib(benchmark.device) - before_gib
    rounds = [
        {name: stepper.run(stepper.feed(batch), num_steps[name]).step_s for name, stepper in steppers.items()}
        for _ in range(benchmark.rounds)
    ]
    benchmark.columns(
        Column(key="preset", heading="preset", width=16),
        Column(key="variant", heading="variant", width=18),
        Column(key="precision", heading="precision"),
        Column(key="step_ms", heading="ms/step", spec=",.2f"),
        Column(key="patches_per_s", heading="patches/s", spec=",.1f"),
        Column(key="slowest", heading="slowest", spec=",.1f"),
        Column(key="fastest", heading="fastest", spec=",.1f"),
        Column(key="peak_gib", heading="GiB", spec=".2f", width=6),
        *measuring.SHARES,
    )
    flops = measuring.training_step_flops(config.model, num_patches=batch_size, patch_px_hr=patch_px_hr)
    for name, stepper in steppers.items():
        step_s = statistics.median(one[name] for one in rounds)
        precision = "bf16" if stepper.mode.bf16 else "float32"
        benchmark.add(
            preset=preset,
            variant=name,
            mode=str(stepper.mode),
            precision=precision,
            step_ms=1000 * step_s,
            patches_per_s=batch_size / step_s,
            slowest=batch_size / max(one[name] for one in rounds),
            fastest=batch_size / min(one[name] for one in rounds),
            peak_gib=peak_gib[name] if benchmark.device.type == "cuda" else None,
            **benchmark.shares(flops / step_s, precision, training=True),
        )


def _peak_gib(device: torch.device, *, restart: bool = False) -> float:
    """The most that tensors took on the GPU since the last restart; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    if restart:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def main() -> None:
    """Each preset in turn."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--presets", nargs="+", choices=tuple(EDSR_PRESETS), help="whose network, batch and patch size")
    arguments = parser.parse_args()
    benchmark = Benchmark("training_step", arguments)
    for preset in arguments.presets or PRESETS[benchmark.size]:
        measure(benchmark, preset)
    benchmark.finish()


if __name__ == "__main__":
    main()
