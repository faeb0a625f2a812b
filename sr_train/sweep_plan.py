"""A sweep's options → its trials, where they run and what stands against them; nothing of it is trained yet."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sr_data.storage import Store, open_store
from sr_models.cost import ModelCost, model_cost
from sr_train.options import ConfigError, RunConfig
from sr_train.pareto import over_limit
from sr_train.placement import ClusterFacts, num_fitting
from sr_train.plan import Plan, make_plan
from sr_train.pool_size import choose_window
from sr_train.run_folder import DATASETS_KEY
from sr_train.search_space import draw_samples, grid, members
from sr_train.sweep_config import TRIAL_SHARE, SearchConfig, SweepConfig
from sr_train.training_space import canonical, check_space, configure, domains_of
from sr_train.trial_record import Sample, TrialRecord, record_from_json

SWEEP_KEY = "sweep.json"
"""The sweep's options; its presence says that the sweep exists."""
TRIAL_KEY = "trial.json"
"""A trial's record, in its run's folder."""

_DRAWS_PER_TRIAL = 20
"""Where limits forbid some of a space, so many points are drawn for a trial before the rest is left out."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep with nothing left open."""

    config: SweepConfig[Any, Any]
    """Resolved: names, storage, tracking, devices, budgets and concurrency are set."""
    asked: SweepConfig[Any, Any]
    """As its user gave it, named and placed: what is saved, and what `--resume` starts from."""
    base: Plan
    """Of a run with the common options; what it knows of data, tracking and assets holds for every trial."""
    samples: tuple[Sample, ...] | None
    """The trials in the order in which they begin; None where the search decides as it goes (TPE)."""
    num_left_out: int
    """Points that were drawn and cost more than the limits allow."""
    known: tuple[TrialRecord, ...]
    """Trials that an earlier attempt at this sweep began or finished."""

    @property
    def name(self) -> str:
        return self.base.config.run.name or ""

    @property
    def uri(self) -> str:
        return self.base.run_uri

    @property
    def num_trials(self) -> int:
        return len(self.samples) if self.samples is not None else self.config.search.num_trials

    @property
    def trial_patches(self) -> int:
        return self.config.search.trial_patches or 0

    @property
    def grace_patches(self) -> int:
        return self.config.search.grace_patches or 0

    @property
    def max_concurrent(self) -> int:
        return self.config.search.max_concurrent or 1


def make_sweep_plan(
    config: SweepConfig[Any, Any],
    cluster: ClusterFacts,
    *,
    resume: bool,
    progress: Callable[[int, int], None] | None = None,
) -> SweepPlan:
    """Checks what `make_plan` checks, the space, the limits and that a trial fits. Raises PlanError or ConfigError."""
    asked, search = config, with_budgets(config)
    for flag, is_given in (
        ("--run.wait-for-nodes", config.base.run.wait_for_nodes),
        ("--run.min-workers", config.base.run.min_workers is not None),
    ):
        if is_given:
            raise ConfigError(f"{flag}: a sweep is planned on the nodes that are there; start them first")
    if config.base.checkpoint.init_from is not None:
        raise ConfigError("--checkpoint.init-from: trials differ in their networks, so they begin from nothing")
    check_space(config.space, config.base, total_patches=search.trial_patches or 0)
    run, slots = place_trials(config.base.run, cluster)
    base = make_plan(
        # One dataset for all trials: images that are too small for the largest patch are in none.
        replace(
            config.base,
            data=replace(config.base.data, patch_px_hr=_largest_patch_px(config)),
            run=replace(config.base.run, cpus_per_worker=None),
        ),
        cluster,
        resume=False,  # a sweep's folder is no run's: one that is there already is refused
        progress=progress,
    )
    base = replace(base, config=replace(base.config, run=replace(base.config.run, **_placement(run))))
    _require_no_other(base, resume=resume)
    search = replace(search, max_concurrent=min(search.max_concurrent or slots, slots))
    config = replace(
        config, base=replace(base.config, data=replace(base.config.data, window_images=None)), search=search
    )
    asked_run = replace(asked.base.run, name=base.config.run.name, storage=base.config.run.storage)
    asked_tracking = replace(asked.base.tracking, uri=base.config.tracking.uri)
    asked = replace(asked, base=replace(asked.base, run=asked_run, tracking=asked_tracking))
    samples, num_left_out = _samples(config)
    known = known_trials(open_store(base.run_uri))
    return SweepPlan(config=config, asked=asked, base=base, samples=samples, num_left_out=num_left_out, known=known)


def place_trials(run: RunConfig, cluster: ClusterFacts) -> tuple[RunConfig, int]:
    """`run` with a trial's device, CPUs and threads, and how many trials the cluster holds at once. ConfigError if it
    can't hold one.

    Unlike a training run a trial leaves no CPU free for decoding: that is over when trials begin.
    """
    device = run.device
    if device == "auto":
        device = "cuda" if cluster.num_gpus >= run.num_workers * run.gpus_per_worker else "cpu"
    cpus, gpus = run.cpus_per_worker or 1.0, run.gpus_per_worker if device == "cuda" else None
    slots = sum(num_fitting(cluster, cpus, gpus)) // run.num_workers
    if slots == 0:
        each = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus is not None else "")
        nodes = " + ".join(
            f"{node_cpus:g} CPUs" + (f" and {node_gpus:g} GPUs" if gpus is not None else "")
            for node_cpus, node_gpus in zip(cluster.cpus_per_node, cluster.gpus_per_node, strict=True)
        )
        raise ConfigError(
            f"a trial of {run.num_workers} workers with {each} each can't run on the nodes that are there ({nodes}): "
            "lower --run.num-workers, --run.cpus-per-worker or --run.gpus-per-worker, or start more nodes first"
        )
    threads = run.threads_per_worker or max(1, int(cpus))
    return replace(run, device=device, cpus_per_worker=cpus, threads_per_worker=threads), slots


def trial_plan(sweep: SweepPlan, sample: Sample, name: str) -> Plan:
    """The plan of one trial: that of the sweep with the sample's options."""
    config = configure(sweep.base.config, sample, total_patches=sweep.trial_patches)
    config = replace(
        config,
        validation=replace(config.validation, interval_patches=sweep.grace_patches),
        checkpoint=replace(config.checkpoint, interval_patches=sweep.trial_patches, keep_last=_num_kept(sweep)),
        # A trial is over before a compiler has earned its time back.
        step=replace(config.step, compile="off" if config.step.compile == "auto" else config.step.compile),
        tracking=replace(config.tracking, sample_images=0),
        data=replace(config.data, window_images=None),
        run=replace(config.run, name=name, storage=trials_uri(sweep.uri)),
    )
    config, samples = choose_window(config, sweep.base.train)
    return replace(sweep.base, config=config, samples=samples, goes_on_from=None, resume_name=name, warnings=())


def _num_kept(sweep: SweepPlan) -> int:
    """Checkpoints of a trial; all of a population's, as others may be about to go on from any."""
    if sweep.config.search.scheduler == "pbt":
        return -(-sweep.trial_patches // sweep.grace_patches) + 1
    return sweep.base.config.checkpoint.keep_last


def trials_uri(sweep_uri: str) -> str:
    """Where a sweep's trials lie, each a run's folder."""
    return f"{sweep_uri}/trials"


def known_trials(store: Store) -> tuple[TrialRecord, ...]:
    """The records in a sweep's folder, by name; one that can't be read is a trial that begins anew."""
    found = []
    for entry in store.list("trials/"):
        if entry.key.endswith(f"/{TRIAL_KEY}"):
            try:
                found.append(record_from_json(store.read_text(entry.key)))
            except ValueError:
                continue
    return tuple(sorted(found, key=lambda record: record.name))


def cost_of(sweep: SweepPlan, sample: Sample) -> ModelCost:
    """Of the sample's network; its latency is measured where the trial runs."""
    return model_cost(configure(sweep.base.config, sample, total_patches=sweep.trial_patches).model)


def with_budgets(config: SweepConfig[Any, Any]) -> SearchConfig:
    """The search's options with the budgets that follow from the run's where they were left open."""
    search = config.search
    trial = search.trial_patches or max(1, config.base.optim.total_patches // TRIAL_SHARE)
    grace = search.grace_patches or max(1, trial // search.reduction_factor**2)
    return replace(search, trial_patches=trial, grace_patches=min(grace, trial))


def _largest_patch_px(config: SweepConfig[Any, Any]) -> int:
    return int(max(members(config.space.patch_px_hr) or ()))


def _placement(run: RunConfig) -> dict[str, Any]:
    names = ("device", "cpus_per_worker", "threads_per_worker")
    return {name: getattr(run, name) for name in names}


def _require_no_other(base: Plan, *, resume: bool) -> None:
    """ConfigError if there is such a sweep already and it is not to be gone on with, or had other images."""
    store = open_store(base.run_uri)
    if not store.exists(SWEEP_KEY):
        return
    if not resume:
        raise ConfigError(
            f"sweep {base.config.run.name!r} exists at {base.run_uri}: go on with it by --resume, or choose another "
            "--run.name"
        )
    before = json.loads(store.read_text(DATASETS_KEY)) if store.exists(DATASETS_KEY) else {}
    for flag, manifest, name in (
        ("--data.uri", base.train, "train"),
        ("--validation.uri", base.validation, "validation"),
    ):
        if before.get(name, manifest.fingerprint) != manifest.fingerprint:
            raise ConfigError(
                f"{manifest.uri} ({flag}) holds other images (fingerprint {manifest.fingerprint}) than sweep "
                f"{base.config.run.name!r} began with ({before[name]}): scores could not be compared"
            )


def _samples(config: SweepConfig[Any, Any]) -> tuple[tuple[Sample, ...] | None, int]:
    """The trials that are known before the sweep begins, and how many were left out for their cost."""
    search, domains = config.search, domains_of(config.space)
    limited = any(value is not None for value in dataclasses.astuple(config.limits))
    if search.search == "tpe" and not limited:
        return None, 0
    if search.search == "grid":
        drawn = grid(domains, canonical)
    else:
        num_draws = search.num_trials * (_DRAWS_PER_TRIAL if limited else 1)  # of TPE: is there any?
        drawn = draw_samples(domains, num_samples=num_draws, seed=search.search_seed, canonical=canonical)
    reasons: dict[str, str | None] = {}
    kept: list[Sample] = []
    num_left_out = 0
    for sample in drawn:
        if search.search != "grid" and len(kept) == search.num_trials:
            break
        model = configure(config.base, sample, total_patches=search.trial_patches or 0).model
        reason = reasons.setdefault(repr(model), over_limit(model_cost(model), config.limits) if limited else None)
        if reason is None:
            kept.append(sample)
        else:
            num_left_out += 1
    if not kept:
        raise ConfigError(f"no point of the space is within the limits; the last one: {reason}")
    return (None, 0) if search.search == "tpe" else (tuple(kept), num_left_out)
