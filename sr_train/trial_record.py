"""What is known of a sweep's trial: plain values, saved as JSON beside its checkpoints."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from sr_models.cost import ModelCost

Value = int | float | str
Sample = Mapping[str, Value]
"""One point of a search space: option as the space names it ("num_blocks", "schedule.kind") → value."""

Status = Literal["running", "finished", "stopped", "failed", "over limit"]
"""finished: its whole budget; stopped: early, by the scheduler; failed: crashed or non-finite; over limit: costs more
than the sweep's ceilings allow, so it was not trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One validation."""

    patches_seen: int
    psnr_db: float
    ssim: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """A trial as far as it has come."""

    name: str
    """Of its run, below the sweep's folder: `trial-` and a hash of what it trains."""
    sample: Sample
    status: Status = "running"
    history: tuple[Point, ...] = ()
    """Its validations, by patches seen."""
    cost: ModelCost | None = None
    reason: str | None = None
    """Why it failed or is over a limit."""
    checkpoint: str | None = None
    """URI of its best checkpoint."""
    newest_checkpoint: str | None = None
    """URI of its last validation's checkpoint."""
    mlflow_run: str | None = None
    """Id of its MLflow run, where there is one."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What its time went into, by name."""

    @property
    def psnr_db(self) -> float | None:
        """Of its best validation; None before the first."""
        return max((point.psnr_db for point in self.history), default=None)

    @property
    def patches_seen(self) -> int:
        return self.history[-1].patches_seen if self.history else 0

    @property
    def is_over(self) -> bool:
        return self.status != "running"

    def with_point(self, point: Point) -> "TrialRecord":
        """After a validation; one that a resumed trial repeats replaces the earlier."""
        before = tuple(known for known in self.history if known.patches_seen < point.patches_seen)
        return replace(self, history=(*before, point))


def record_to_json(record: TrialRecord) -> str:
    """As it is saved."""
    return json.dumps(asdict(record), indent=2)


def record_from_json(text: str) -> TrialRecord:
    """What `record_to_json` wrote. ValueError if it is not."""
    try:
        values: dict[str, Any] = json.loads(text)
        cost = values.pop("cost")
        history = tuple(Point(**point) for point in values.pop("history"))
        return TrialRecord(**values, history=history, cost=ModelCost(**cost) if cost is not None else None)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"not a trial's record: {error}") from error
