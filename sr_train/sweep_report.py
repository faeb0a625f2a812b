"""What a sweep is going to do, and what came of it: as text, and as files for its folder and MLflow."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from sr_models.architectures import architecture_name
from sr_train.plan_report import dataset_line
from sr_train.progress import format_duration
from sr_train.sweep_pictures import importance_bars, parallel_coordinates, pareto_plot
from sr_train.sweep_plan import SweepPlan
from sr_train.sweep_study import importances
from sr_train.sweep_table import sweep_csv, sweep_table
from sr_train.training_space import flag_of, space_to_dict
from sr_train.trial_record import TrialRecord

_BYTES_PER_GIB: float = 1024**3


@dataclass(frozen=True, kw_only=True)
class SweepTimes:
    """What the time of one attempt at a sweep went into, in seconds."""

    before_trials: float
    """From the script's start: imports, cluster, plan, decoding."""
    trials: float
    """From the first trial's start to the last one's end."""


def describe_sweep(plan: SweepPlan) -> str:
    """Every decision about the sweep, a line each."""
    search, base = plan.config.search, plan.base.config
    run = base.run
    gpus = f" and {run.gpus_per_worker:g} GPU" if run.device == "cuda" else ""
    scale = base.model.scale
    rows = [
        ("sweep", f"{plan.name} in {plan.uri}{_known(plan)}"),
        ("model", f"{architecture_name(base.model)} x{scale}"),
        *((f"  {flag_of(name)}", text) for name, text in space_to_dict(plan.config.space).items()),
        ("trials", f"{plan.num_trials} by {search.search} search (seed {search.search_seed}){_left_out(plan)}"),
        ("budget", f"{plan.trial_patches:,} patches each, validated every {plan.grace_patches:,}; {_scheduler(plan)}"),
        ("limits", _limits(plan)),
        ("training set", dataset_line(plan.base.train)),
        ("validation set", dataset_line(plan.base.validation)),
        ("memory", f"{_decoded_gib(plan):.2g} GiB of decoded images, once on each node, and a copy in each worker"),
        (
            "workers",
            f"{plan.max_concurrent} trials at once, {run.num_workers} on {run.device} each, with "
            f"{run.cpus_per_worker:g} CPU{gpus} and {run.threads_per_worker} threads",
        ),
        ("tracking", f"{base.tracking.uri}, experiment {base.tracking.experiment!r}{_offline(plan)}"),
        ("registers", f"the best trial's model as {base.tracking.register_as}@challenger"),
        *(("WARNING", warning) for warning in plan.base.warnings),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def outcome_report(plan: SweepPlan, records: Sequence[TrialRecord], times: SweepTimes) -> str:
    """The table, what decided, and where the time went."""
    cost_name = plan.config.search.cost
    lines = [sweep_table(records, cost_name=cost_name)]
    shares = importances(records)
    if shares:
        ordered = sorted(shares.items(), key=lambda item: -item[1])
        lines.append("importance  " + ", ".join(f"{name} {share:.0%}" for name, share in ordered))
    lines.append(f"time        {time_line(plan, records, times)}")
    return "\n".join(lines)


def time_line(plan: SweepPlan, records: Sequence[TrialRecord], times: SweepTimes) -> str:
    """How much of the wall time was training, and how much start-up."""
    known = {record.name: record for record in plan.known}
    spent = [(_seconds(record, "training"), _seconds(record, "start_up"), known.get(record.name)) for record in records]
    training = sum(now - (_seconds(before, "training") if before else 0.0) for now, _, before in spent)
    start_ups = [now - (_seconds(before, "start_up") if before else 0.0) for _, now, before in spent]
    start_ups = sorted(value for value in start_ups if value > 0)
    if not start_ups:
        return "no trial was run"
    slots = min(plan.max_concurrent, len(start_ups))
    share = training / max(1e-9, slots * times.trials)
    middle = start_ups[len(start_ups) // 2]
    before, trials = format_duration(times.before_trials), format_duration(times.trials)
    return (
        f"{before} until the first trial began, {trials} for {len(start_ups)} trials, {slots} at a time: {share:.0%} "
        f"of that was training and validation; start-up to a trial's first step: {middle:.1f} s (median), "
        f"{start_ups[-1]:.1f} s (longest, with its workers)"
    )


def outcome_files(plan: SweepPlan, records: Sequence[TrialRecord]) -> dict[str, bytes]:
    """Table and pictures, by file name."""
    protocol, cost_name = plan.base.config.validation.protocol, plan.config.search.cost
    return {
        "trials.csv": sweep_csv(records).encode(),
        "trials.txt": sweep_table(records, cost_name=cost_name).encode(),
        "pareto.png": pareto_plot(records, cost_name, protocol=protocol),
        "parallel_coordinates.png": parallel_coordinates(records, protocol=protocol),
        "importance.png": importance_bars(importances(records)),
    }


def outcome_metrics(records: Sequence[TrialRecord], best: TrialRecord | None) -> Mapping[str, float]:
    """Numbers for the sweep's MLflow run."""
    counts = {f"trials/{status}": 0.0 for status in ("finished", "stopped", "failed", "over limit")}
    for record in records:
        counts[f"trials/{record.status}"] = counts.get(f"trials/{record.status}", 0.0) + 1
    shares = {f"importance/{name}": share for name, share in importances(records).items()}
    score = {"best_psnr_db": best.psnr_db} if best is not None and best.psnr_db is not None else {}
    return {name.replace(" ", "_"): value for name, value in (counts | shares | score).items()}


def _seconds(record: TrialRecord, name: str) -> float:
    return record.seconds.get(name, 0.0)


def _decoded_gib(plan: SweepPlan) -> float:
    scale: int = plan.base.config.model.scale
    records = {*plan.base.train.images, *plan.base.validation.images}
    return sum(3 * one.width * one.height for one in records) * (1 + scale**-2) / _BYTES_PER_GIB


def _known(plan: SweepPlan) -> str:
    if not plan.known:
        return ""
    over = sum(record.is_over for record in plan.known)
    return f", going on: {over} trials are over, {len(plan.known) - over} were begun"


def _left_out(plan: SweepPlan) -> str:
    is_random, is_whole = plan.config.search.search == "random", plan.num_left_out == 0
    few = "; the space holds no more" if is_random and is_whole and _is_short(plan) else ""
    return (f"; {plan.num_left_out} points left out, above the limits" if plan.num_left_out else "") + few


def _is_short(plan: SweepPlan) -> bool:
    return plan.num_trials < plan.config.search.num_trials


def _scheduler(plan: SweepPlan) -> str:
    search = plan.config.search
    if search.scheduler == "asha":
        return f"ASHA lets one in {search.reduction_factor} go on to the next rung"
    if search.scheduler == "pbt":
        return "PBT lets the worst go on from the best, with another learning rate"
    return "none is stopped early"


def _limits(plan: SweepPlan) -> str:
    given = [f"{name} {value:,}" for name, value in asdict(plan.config.limits).items() if value is not None]
    return ", ".join(given) or "none"


def _offline(plan: SweepPlan) -> str:
    return "" if plan.base.tracking_reachable else "; NOT REACHABLE, the sweep goes on without it"
