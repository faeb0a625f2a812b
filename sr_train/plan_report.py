"""A plan for a person to read, a line per fact."""

from sr_data.manifest import Manifest
from sr_models.architectures import architecture_name, macs_per_lr_pixel, num_parameters
from sr_train.plan import Plan
from sr_train.pool_size import largest_shard_bytes, largest_validation_bytes

_NOMINAL_PATCHES_PER_S = 1_000


def describe(plan: Plan) -> str:
    """What would happen, and every decision that was taken about the data."""
    rows = [*_what(plan), *_how(plan), *_notes(plan)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _what(plan: Plan) -> list[tuple[str, str]]:
    config, optim = plan.config, plan.config.optim
    patch_px_lr = config.data.patch_px_hr // config.model.scale
    # 2 operations per multiply-add, and backward costs twice what forward does.
    flops_per_patch = 2 * 3 * macs_per_lr_pixel(config.model) * patch_px_lr**2
    size = f"{config.data.patch_px_hr}² HR, {patch_px_lr}² LR px"
    total = optim.total_steps * optim.global_batch_size
    rounding = f" ({total:,}, as the last step is whole)" if total != optim.total_patches else ""
    budget = f"{optim.total_patches:,} patches{rounding} = {optim.total_steps:,} steps of {optim.global_batch_size}"
    return [
        ("run", f"{config.run.name} in {plan.run_uri}{_start(plan)}"),
        ("model", f"{_model_name(plan)}, {num_parameters(config.model):,} parameters"),
        ("training set", dataset_line(plan.train)),
        ("validation set", dataset_line(plan.validation)),
        ("budget", budget),
        ("patch", f"{size}; {_si(flops_per_patch)}FLOP each, {_si(flops_per_patch * total)}FLOP in all"),
    ]


def _how(plan: Plan) -> list[tuple[str, str]]:
    config, run, data = plan.config, plan.config.run, plan.config.data
    num_images, window = len(plan.train.images), plan.samples.window_images
    feed = f"all {_count(num_images, 'image')} at once"
    if window < num_images:
        feed = f"{window} of {num_images} images at once, one replaced every {data.window_reuse_patches} patches"
    # Weights, Adam's two moments and the moving average, twice while a checkpoint is written; gradients.
    copies = 2 * (4 if config.optim.ema_decay else 3) + 1
    weights = _bytes(num_parameters(config.model) * 4 * copies)
    unit = config.optim.accumulation_steps
    training = _bytes(largest_shard_bytes(plan.train, plan.samples, run.fewest_workers, unit=unit))
    validation = _bytes(largest_validation_bytes(plan.validation, run.fewest_workers))
    offline = "" if plan.tracking_reachable else "; NOT REACHABLE, training goes on without it"
    memory = f"{training} of training images, {validation} of validation images, {weights} of weights, gradients and"
    cpus = f"{_count(run.cpus_per_worker or 1, 'CPU')} and {_count(run.threads_per_worker or 1, 'thread')}"
    num_workers = f"{run.num_workers}" if run.min_workers is None else f"{run.min_workers} to {run.num_workers}"
    alias = "@challenger" if plan.assets.not_promotable is None else ""
    return [
        ("workers", f"{num_workers} on {run.device}, each with {cpus}"),
        ("step", str(plan.step_mode)),
        ("feed", feed),
        ("memory", f"{memory} optimiser, per worker; activations not counted"),
        *plan.assets.notes,
        ("tracking", f"{config.tracking.uri}, experiment {config.tracking.experiment!r}{offline}"),
        ("registers", f"{config.tracking.register_as}{alias}{_when(plan)}"),
    ]


def _notes(plan: Plan) -> list[tuple[str, str]]:
    rows = []
    if (price := plan.config.run.cost_per_hour) is not None:
        hours = plan.config.optim.total_patches / _NOMINAL_PATCHES_PER_S / 3600
        rows.append(
            ("cost", f"{price * hours:.2f} at {_NOMINAL_PATCHES_PER_S:,} patches/s ({hours:.2f} h at {price:g})")
        )
    rows += [("WARNING", warning) for warning in plan.warnings]
    # Training and validation images can be the same.
    left_out = list(dict.fromkeys([*plan.train.left_out, *plan.validation.left_out]))
    rows += [("left out", reason) for reason in left_out[:10]]
    if len(left_out) > 10:
        rows.append(("left out", f"and {len(left_out) - 10} more"))
    return rows


def _start(plan: Plan) -> str:
    """Where a run begins that does not begin at step 0 with weights of its own."""
    if plan.goes_on_from is not None:
        return f", goes on from {plan.goes_on_from}"
    return f", starts from {plan.initial_weights}" if plan.initial_weights is not None else ""


def _when(plan: Plan) -> str:
    return "" if plan.tracking_reachable else ", by --resume when MLflow is reachable"


def _model_name(plan: Plan) -> str:
    return f"{architecture_name(plan.config.model)} x{plan.config.model.scale}"


def dataset_line(manifest: Manifest) -> str:
    """What a dataset holds, and what was decided about it."""
    pixels = sum(record.width * record.height for record in manifest.images) / 1e6
    decisions = "".join(f"; {name}: {count}" for name, count in manifest.decisions.items())
    images = f"{_count(len(manifest.images), 'image')}, {pixels:.3g} Mpx"
    place = f"{manifest.uri} [{manifest.split}], {manifest.layout} layout"
    return f"{place}: {images}, fingerprint {manifest.fingerprint}{decisions}"


def _count(number: float, thing: str) -> str:
    return f"{number:g} {thing}{'s' * (number != 1)}"


def _bytes(number: float) -> str:
    """A number of bytes with three digits and its binary prefix: 1.52 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.3g} GiB"


def _si(value: float) -> str:
    """A number with three digits and its SI prefix: 1.52 G."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:,.3g} E"
