"""Which options a sweep varies, and how a sample of them becomes a run's config.

Options are named as users name them: those of the model without a prefix ("num_blocks"), "schedule.kind",
"global_batch_size"; their flags are --space.num-blocks and so on.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from sr_models.errors import ModelError
from sr_train.config import ConfigT, TrainConfig
from sr_train.options import ConfigError, ScheduleConfig, require
from sr_train.search_space import Domain, Floats, Ints, Names, members
from sr_train.trial_record import Sample, Value

ModelSpaceT = TypeVar("ModelSpaceT")

KIND, LEARNING_RATE = "schedule.kind", "schedule.learning_rate"
WARMUP, DECAY = "schedule.warmup_fraction", "schedule.decay_every_fraction"
BATCH, PATCH = "global_batch_size", "patch_px_hr"

# All but the model's, in the order of a canonical sample.
_TRAINING_OPTIONS = (KIND, LEARNING_RATE, WARMUP, DECAY, BATCH, PATCH)

# Integer ranges of more values are checked at their ends only.
_MAX_PROBES = 1000
_MAX_PROBLEMS_PER_OPTION = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSpace:
    """The learning rate. Fractions are of a trial's budget in patches, so what is found with a small budget carries
    over to the full one.
    """

    kind: Names = field(default=Names.parse("step,cosine,one-cycle"))
    """Shapes of the learning rate: constant, step, cosine, one-cycle."""
    learning_rate: Floats = field(default=Floats.parse("3e-4..5e-3:log"))
    """Peak learning rate, above 0."""
    warmup_fraction: Floats = field(default=Floats.parse("0.1"))
    """Length of the warm-up, in [0, 1) of the budget; one-cycle needs one above 0."""
    decay_every_fraction: Floats = field(default=Floats.parse("0.25,0.5"))
    """step: budget between two decays, in (0, 1] of it; the other kinds don't depend on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSpace(Generic[ModelSpaceT]):
    """What a sweep varies. Each option is a list (A,B,C) or a range (LOW..HIGH, LOW..HIGH:log, LOW..HIGH:STEP)."""

    model: ModelSpaceT
    """A dataclass of domains whose fields are called like the model config's."""
    schedule: ScheduleSpace = field(default_factory=ScheduleSpace)
    global_batch_size: Ints = field(default=Ints.parse("16"))
    """Patches per optimiser step, over all workers and accumulation steps."""
    patch_px_hr: Ints = field(default=Ints.parse("48"))
    """Side of a training patch, in HR pixels; multiples of the scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EDSRSpace:
    """Sizes of EDSR (Lim et al. 2017); the paper's baseline has 16 blocks of 64 channels."""

    num_blocks: Ints = field(default=Ints.parse("4,8,16"))
    """Residual blocks, at least 1."""
    num_channels: Ints = field(default=Ints.parse("16,32"))
    """Feature channels, at least 1."""


def space_around(base: TrainConfig[Any], model: ModelSpaceT) -> TrainingSpace[ModelSpaceT]:
    """What to vary where nobody says: the schedule, with learning rates from a quarter to four times the base's; batch
    and patch are the base's.
    """
    rate = base.schedule.learning_rate
    return TrainingSpace(
        model=model,
        schedule=ScheduleSpace(
            learning_rate=Floats(values=(float(f"{rate / 4:.6g}"), float(f"{rate * 4:.6g}")), spread="log")
        ),
        global_batch_size=Ints(values=(base.optim.global_batch_size,)),
        patch_px_hr=Ints(values=(base.data.patch_px_hr,)),
    )


def domains_of(space: TrainingSpace[Any]) -> dict[str, Domain]:
    """The options and their domains: the model's in the order of its fields, then the schedule's, batch and patch."""
    model = {item.name: getattr(space.model, item.name) for item in fields(space.model)}
    schedule = {f"schedule.{item.name}": getattr(space.schedule, item.name) for item in fields(space.schedule)}
    return model | schedule | {BATCH: space.global_batch_size, PATCH: space.patch_px_hr}


def space_to_dict(space: TrainingSpace[Any]) -> dict[str, str]:
    """Option → the text of its domain, for JSON, MLflow and printing."""
    return {name: str(domain) for name, domain in domains_of(space).items()}


def space_from_dict(
    space_type: type[TrainingSpace[ModelSpaceT]], values: Mapping[str, str]
) -> TrainingSpace[ModelSpaceT]:
    """The space that `space_to_dict` wrote; `space_type` is TrainingSpace[EDSRSpace] or the like. ConfigError names the
    flags of unreadable texts, and options that are missing or unknown.
    """
    (model_type,) = get_args(space_type)
    types = _domain_types(model_type) | _domain_types(ScheduleSpace, "schedule.") | _domain_types(TrainingSpace)
    problems = [f"{flag_of(name)} is missing" for name in types if name not in values]
    problems += [f"{flag_of(name)} is unknown" for name in values if name not in types]
    domains: dict[str, Any] = {}
    for name in [name for name in types if name in values]:
        try:
            domains[name] = types[name].parse(values[name])
        except ConfigError as error:
            problems.append(f"{flag_of(name)}={error}")
    require(not problems, "; ".join(problems))
    return TrainingSpace(
        model=model_type(**{name: domains[name] for name in _domain_types(model_type)}),
        schedule=ScheduleSpace(**{name: domains[f"schedule.{name}"] for name in _domain_types(ScheduleSpace)}),
        **{name: domains[name] for name in _domain_types(TrainingSpace)},
    )


def _domain_types(part: type, prefix: str = "") -> dict[str, type[Domain]]:
    hints = get_type_hints(part)
    return {
        f"{prefix}{name}": hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Domain)
    }


def flag_of(name: str) -> str:
    """The flag of an option's domain: "schedule.kind" is --space.schedule.kind."""
    return f"--space.{name.replace('_', '-')}"


def canonical(sample: Sample) -> Sample:
    """Without what has no influence (the decay, unless the kind is step), in a fixed order: the model's options by
    name, then the others.
    """
    model = sorted(name for name in sample if name not in _TRAINING_OPTIONS)
    kept = [name for name in _TRAINING_OPTIONS if name in sample and (name != DECAY or sample.get(KIND) == "step")]
    return {name: sample[name] for name in [*model, *kept]}


def trial_name(sample: Sample) -> str:
    """`trial-` and 8 hexadecimal digits that depend on the canonical sample only; 1 and 1.0 are the same."""
    values = {name: _plain(value) for name, value in canonical(sample).items()}
    return f"trial-{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]}"


def configure(base: ConfigT, sample: Sample, *, total_patches: int) -> ConfigT:
    """The config of a run with this sample and budget; what the sample does not name is as in `base`, and the base's
    warm-up and decay keep their fraction of the budget.

    ConfigError or ModelError if there is no such run.
    """
    sample = canonical({KIND: base.schedule.kind, **sample})
    known = [item.name for item in fields(base.model)]
    model = {name: value for name, value in sample.items() if name not in _TRAINING_OPTIONS}
    for name in model:
        require(name in known, f"{type(base.model).__name__} has no {name}; it has: {', '.join(known)}")
    return replace(
        base,
        model=replace(base.model, **{name: _like(getattr(base.model, name), value) for name, value in model.items()}),
        data=replace(base.data, patch_px_hr=int(sample.get(PATCH, base.data.patch_px_hr))),
        optim=replace(
            base.optim,
            total_patches=total_patches,
            global_batch_size=int(sample.get(BATCH, base.optim.global_batch_size)),
        ),
        schedule=_schedule(base, sample, total_patches),
    )


def _like(old: object, value: Value) -> Value:
    """A number as int or float, as the option is: samples that were saved or drawn elsewhere may have 8.0 for 8."""
    return float(value) if isinstance(old, float) and not isinstance(value, str) else _plain(value)


def _plain(value: Value) -> Value:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _schedule(base: TrainConfig[Any], sample: Sample, total_patches: int) -> ScheduleConfig:
    before, kinds = base.schedule, get_args(get_type_hints(ScheduleConfig)["kind"])
    kind: Any = sample[KIND]
    require(kind in kinds, f"{KIND}={kind} is unknown; there are: {', '.join(kinds)}")
    warmup = float(sample.get(WARMUP, before.warmup_patches / base.optim.total_patches))
    decay = float(sample.get(DECAY, before.decay_every_patches / base.optim.total_patches))
    require(WARMUP not in sample or 0 <= warmup < 1, f"{WARMUP}={warmup} must lie in [0, 1)")
    require(DECAY not in sample or 0 < decay <= 1, f"{DECAY}={decay} must lie in (0, 1]")
    return replace(
        before,
        kind=kind,
        learning_rate=float(sample.get(LEARNING_RATE, before.learning_rate)),
        warmup_patches=round(warmup * total_patches),
        decay_every_patches=max(1, round(decay * total_patches)),
        final_fraction=before.final_fraction if kind in ("cosine", "one-cycle") else 0.0,
    )


def check_space(space: TrainingSpace[Any], base: TrainConfig[Any], *, total_patches: int) -> None:
    """ConfigError, with the flags, values and reasons, unless every value of every domain gives a config: each alone
    in `base`, and each kind of schedule with each warm-up.

    Of ranges the ends are tried, and of Ints every value if there are up to 1000.
    """
    # A schedule that all kinds can have, so that each value is refused for itself.
    harmless: Sample = {KIND: "constant", WARMUP: 1 / max(2, total_patches)}
    configure(base, harmless, total_patches=total_patches)
    problems: list[str] = []
    good: dict[str, list[Value]] = {}
    for name, domain in domains_of(space).items():
        around = {**harmless, KIND: "step"} if name == DECAY else harmless
        refused = {value: _refusal(base, {**around, name: value}, total_patches) for value in _probes(domain)}
        problems += _shown(flag_of(name), refused)
        good[name] = [value for value, reason in refused.items() if reason is None]
    for kind in good[KIND]:
        refused = {value: _refusal(base, {KIND: kind, WARMUP: value}, total_patches) for value in good[WARMUP]}
        problems += _shown(f"{flag_of(KIND)}={kind} in a budget of {total_patches} patches, {flag_of(WARMUP)}", refused)
    require(not problems, problems[0] if len(problems) == 1 else "\n- ".join(["", *problems]))


def _probes(domain: Domain) -> Sequence[Value]:
    every = members(domain)
    return every if every is not None and len(every) <= _MAX_PROBES else domain.values


def _refusal(base: TrainConfig[Any], sample: Sample, total_patches: int) -> str | None:
    try:
        configure(base, sample, total_patches=total_patches)
    except (ConfigError, ModelError) as error:
        return str(error)
    return None


def _shown(flag: str, refused: Mapping[Value, str | None]) -> list[str]:
    """The first few refusals; values with one reason together."""
    values: dict[str, list[Value]] = {}
    for value, reason in refused.items():
        if reason is not None:
            values.setdefault(reason, []).append(value)
    lines = [f"{flag}={','.join(map(str, given))}: {reason}" for reason, given in values.items()]
    more = len(lines) - _MAX_PROBLEMS_PER_OPTION
    return lines if more <= 0 else [*lines[:_MAX_PROBLEMS_PER_OPTION], f"{flag}: {more} more values are refused"]
