"""What the data cost a training step: fed by the patch pool, against the same steps on one fixed batch.

    python benchmarks/pipeline_overhead.py [--preset edsr-small-x2] [--device cuda] [--json FILE]

Steps are those of a worker on this device, without Ray. Both feeds are timed in turn in one process; the median ratio
counts. The images are the built-in photos, decoded before the clock starts, as they are in a run once its shard is in.
"""

import statistics

import measuring
from measuring import Benchmark, Column
from training_setup import FixedBatch, Stepper, filled_pool

from sr_data.manifest import load_manifest
from sr_train.presets import EDSR_PRESETS

PRESETS = {"tiny": "edsr-small-x2", "small": "edsr-small-x2", "full": "edsr-baseline-x4"}
"""Where a step of the paper's takes seconds, a small network is measured: it needs its data the soonest."""


def measure(benchmark: Benchmark, preset: str) -> None:
    """A row for either feed."""
    config = EDSR_PRESETS[preset]
    batch_size, patch_px_hr = config.optim.global_batch_size, config.data.patch_px_hr
    stepper = Stepper(config, benchmark)
    print(f"{preset}: {batch_size} patches of {patch_px_hr} px; {stepper.mode}")
    precision = "bf16" if stepper.mode.bf16 else "float32"
    benchmark.measure_ceilings(
        precision, images=batch_size, side_px=patch_px_hr // config.model.scale, channels=config.model.num_channels
    )
    manifest = load_manifest("builtin://photos", split="train", scale=config.model.scale, min_side_px_hr=patch_px_hr)
    pool = filled_pool(manifest, config, benchmark.device)
    feeds = {"one fixed batch": stepper.feed(FixedBatch(pool.batch(0))), "patch pool": stepper.feed(pool)}
    num_steps = stepper.steps_per_round(feeds["one fixed batch"])
    stepper.run(feeds["patch pool"], num_steps)
    rounds = [{name: stepper.run(feed, num_steps) for name, feed in feeds.items()} for _ in range(benchmark.rounds)]
    pool.close()

    benchmark.columns(
        Column(key="feed", heading="feed", width=16),
        Column(key="patches_per_s", heading="patches/s", spec=",.1f"),
        Column(key="wait_share", heading="waits", spec=".1%"),
        Column(key="of_fixed_batch", heading="of fixed", spec=".3f"),
        Column(key="of_fixed_batch_min", heading="min", spec=".3f", width=6),
        Column(key="of_fixed_batch_max", heading="max", spec=".3f", width=6),
        *measuring.SHARES,
    )
    flops = measuring.training_step_flops(config.model, num_patches=batch_size, patch_px_hr=patch_px_hr)
    for name in feeds:
        ratios = [steps["one fixed batch"].step_s / steps[name].step_s for steps in rounds]
        step_s = statistics.median(steps[name].step_s for steps in rounds)
        benchmark.add(
            preset=preset,
            feed=name,
            mode=str(stepper.mode),
            patches_per_s=batch_size / step_s,
            wait_share=statistics.median(steps[name].wait_share for steps in rounds),
            of_fixed_batch=statistics.median(ratios),
            of_fixed_batch_min=min(ratios),
            of_fixed_batch_max=max(ratios),
            **benchmark.shares(flops / step_s, precision, training=True),
        )


def main() -> None:
    """One preset."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--preset", choices=tuple(EDSR_PRESETS), help="whose network, batch and patch size")
    arguments = parser.parse_args()
    benchmark = Benchmark("pipeline_overhead", arguments)
    measure(benchmark, arguments.preset or PRESETS[benchmark.size])
    benchmark.finish()


if __name__ == "__main__":
    main()
