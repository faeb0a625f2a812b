"""One axis of a picture with parallel coordinates: where an option's values lie on it, and how it is drawn."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.markers import TICKLEFT
from matplotlib.ticker import MaxNLocator

from sr_train.figures import DARK, is_log, log_locator
from sr_train.sweep_table import ABSENT, value_text
from sr_train.trial_record import Value

ABSENT_AT = -0.12
"""Height of the tick for trials that lack the option; its values go from 0 to 1."""
MAX_VALUES_AS_TICKS = 7
"""Up to so many numbers have a tick each, more have ticks at round numbers."""
_MIN_DISTANCE = 0.04
_NAME_CHARS = 14


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """Where an option's values lie on its axis."""

    heights: Mapping[Value | None, float]
    """Of each value, from 0 to 1, and of None, which stands for a trial without the option."""
    ticks: Mapping[str, float]
    """Text → height."""
    shared: Collection[Value | None]
    """Values of more than one trial."""

    @classmethod
    def of(cls, values: Sequence[Value | None]) -> "Column":
        """The column of an option that has at least two different values; None for each trial that lacks it.

        Numbers lie as on a ruler, or on a log scale where they are positive and span more than `LOG_SPAN` times; names
        are spaced evenly.
        """
        present = {value for value in values if value is not None}
        numbers = sorted(value for value in present if not isinstance(value, str))
        heights, ticks = _ruler(numbers) if len(numbers) == len(present) else _list(sorted(present, key=str))
        absent = {ABSENT: ABSENT_AT} if None in values else {}
        return cls(
            heights={None: ABSENT_AT} | heights,
            ticks={value_text(value): height for value, height in ticks.items()} | absent,
            shared={value for value in set(values) if values.count(value) > 1},
        )

    def height(self, value: Value | None, spread: float) -> float:
        """Where a trial's line crosses the axis: moved by `spread` if others have the same value."""
        return self.heights[value] + (spread if value in self.shared else 0.0)

    def draw(self, axes: Axes, x: float, option: str) -> None:
        """The axis at x with its ticks, as far as there is room for their texts, and the option's name above it."""
        axes.plot([x, x], [0, 1], color=DARK, linewidth=1, zorder=3, label="_axis")
        taken: list[float] = []
        # The ends first: they say what the range is.
        for text, height in sorted(self.ticks.items(), key=lambda tick: -abs(tick[1] - 0.5)):
            if any(abs(height - other) < _MIN_DISTANCE for other in taken):
                continue
            taken.append(height)
            if text == ABSENT:
                axes.plot([x, x], [height, 0], color=DARK, linewidth=1, linestyle=":", zorder=3, label="_axis")
            else:
                axes.plot([x], [height], color=DARK, marker=TICKLEFT, markersize=5, zorder=3, label="_tick")
            axes.annotate(
                text,
                (x, height),
                xytext=(-6, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=15 if text == ABSENT else 10.5,
                bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.0},
                zorder=4,
            )
        axes.text(x, 1.05, _folded(option), ha="center", va="bottom", fontsize=11, weight="bold", color=DARK)


def _list(names: Sequence[Value]) -> tuple[dict[Value | None, float], dict[Value, float]]:
    places = [(name, (index + 0.5) / len(names)) for index, name in enumerate(names)]
    return dict(places), dict(places)


def _ruler(numbers: Sequence[float]) -> tuple[dict[Value | None, float], dict[Value, float]]:
    in_log = is_log(numbers)
    low, high = numbers[0], numbers[-1]

    def height(number: float) -> float:
        if in_log:
            return math.log(number / low) / math.log(high / low)
        return (number - low) / (high - low)

    ticks = list(numbers)
    if len(numbers) > MAX_VALUES_AS_TICKS:
        locator = log_locator(numbers) if in_log else MaxNLocator(6)
        # Without the last digits that 3 × 10⁻⁵ has too many.
        ticks = [float(f"{tick:.12g}") for tick in locator.tick_values(low, high) if low <= tick <= high]
    return {number: height(number) for number in numbers}, {tick: height(tick) for tick in ticks}


def _folded(name: str) -> str:
    """In lines, broken after '.' and '_'."""
    lines = [""]
    for part in re.findall(r"[^._]*[._]?", name):
        if lines[-1] and len(lines[-1] + part) > _NAME_CHARS:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
