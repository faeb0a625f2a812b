"""Which trials of a sweep are worth their cost: ceilings on costs, Pareto fronts of PSNR against one cost, the best."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sr_models.cost import ModelCost
from sr_train.options import require
from sr_train.trial_record import TrialRecord

CostName = Literal["parameters", "gflops", "latency_ms"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Ceilings on what a network may cost; a trial above one is not trained."""

    max_parameters: int | None = None
    """Most trainable numbers; no ceiling when not given."""
    max_gflops: float | None = None
    """Most 10⁹ floating-point operations for an output of 1280×720, twice the papers' Multi-Adds; no ceiling when not
    given."""
    max_latency_ms: float | None = None
    """Most milliseconds for an output of 1280×720 on the device that trains; no ceiling when not given."""

    def __post_init__(self) -> None:
        for name, ceiling in self.ceilings().items():
            require(ceiling is None or ceiling > 0, f"{_flag(name)}={ceiling} must be greater than 0")

    def ceilings(self) -> dict[CostName, float | None]:
        """The ceiling of each cost, in its unit."""
        return {
            "parameters": self.max_parameters,
            "gflops": self.max_gflops,
            "latency_ms": self.max_latency_ms,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """One way to say what a network costs."""

    label: str
    """As the subject of a sentence and on an axis, without the unit."""
    unit: str
    """Empty for a plain number."""
    of: Callable[[ModelCost], float | None]
    """The cost in that unit; None where it was not measured."""


COSTS: Mapping[CostName, Cost] = {
    "parameters": Cost(label="parameters", unit="", of=lambda cost: cost.parameters),
    "gflops": Cost(label="arithmetic", unit="GFLOPs", of=lambda cost: cost.flops / 1e9),
    "latency_ms": Cost(
        label="latency", unit="ms", of=lambda cost: None if cost.latency_s is None else 1000 * cost.latency_s
    ),
}
"""GFLOPs and latency are of one output of 1280×720."""


def over_limit(cost: ModelCost, limits: Limits) -> str | None:
    """Why a network is too costly: the first ceiling that it is above, its cost and the flag; None if it is not.

    A cost that equals its ceiling is within it, and a latency that was not measured is within any.
    """
    for name, ceiling in limits.ceilings().items():
        value = COSTS[name].of(cost)
        if ceiling is not None and value is not None and value > ceiling:
            amount = f"{_plain(value)} {COSTS[name].unit}".rstrip()
            return f"{COSTS[name].label}: {amount} > {_flag(name)}={ceiling}"
    return None


def cost_of(record: TrialRecord, cost_name: CostName) -> float | None:
    """A trial's cost in the unit of `COSTS[cost_name]`; None if it is not known."""
    return None if record.cost is None else COSTS[cost_name].of(record.cost)


def pareto_front(records: Sequence[TrialRecord], cost_name: CostName) -> list[TrialRecord]:
    """The trials that no other one beats, by rising cost and so by rising PSNR.

    One trial beats another if its PSNR is at least as high and its cost at most as high, and one of them is better. Of
    several that are equal in both, the first by name stays. Trials without a PSNR or without this cost, failed ones and
    those over a limit take no part. Trials that were stopped early, or are still running, take part with the best PSNR
    that they reached: with their whole budget they might have gone further, so the front is a lower bound.
    """
    scored = [
        (cost, -record.psnr_db, record.name, record)
        for record in records
        if record.status not in ("failed", "over limit")
        and record.psnr_db is not None
        and (cost := cost_of(record, cost_name)) is not None
    ]
    front: list[TrialRecord] = []
    best_db = float("-inf")
    for _, negative_db, _, record in sorted(scored, key=lambda entry: entry[:3]):
        if -negative_db > best_db:
            best_db = -negative_db
            front.append(record)
    return front


def best_trial(records: Sequence[TrialRecord], limits: Limits) -> TrialRecord | None:
    """The trial with the highest PSNR; of equals the one with the fewest FLOPs, then the first by name.

    It has a checkpoint and is within the limits, which may be narrower than those that the sweep ran with; a trial of
    unknown cost is within them only if there are none. If any such trial saw its whole budget, only those that did are
    compared; otherwise all that have a PSNR and did not fail. None if there is none.
    """
    scored = [
        record
        for record in records
        if record.status not in ("failed", "over limit")
        and record.psnr_db is not None
        and record.checkpoint is not None
        and _is_within(record.cost, limits)
    ]
    finished = [record for record in scored if record.status == "finished"]
    return min(finished or scored, key=_rank, default=None)


def _is_within(cost: ModelCost | None, limits: Limits) -> bool:
    if cost is None:
        return limits == Limits()
    is_unknown = cost.latency_s is None and limits.max_latency_ms is not None
    return not is_unknown and over_limit(cost, limits) is None


def _rank(record: TrialRecord) -> tuple[float, float, str]:
    flops = record.cost.flops if record.cost is not None else float("inf")
    return (-record.psnr_db if record.psnr_db is not None else float("inf"), flops, record.name)


def _flag(cost_name: CostName) -> str:
    return f"--limits.max-{cost_name.replace('_', '-')}"


def _plain(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:,.6g}"
