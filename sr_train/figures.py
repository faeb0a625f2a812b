"""What matplotlib figures of this package have in common. Drawn without pyplot, so no window and no global state."""

import io
from collections.abc import Collection
from statistics import quantiles

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

WIDTH_PX = 1200
DARK, GREY, PALE = "#222222", "#666666", "#cccccc"
LOG_SPAN = 10
"""Positive numbers whose largest is more than so many times the smallest have a log axis."""


def titled_figure(title: str, *, height_px: int = 700) -> tuple[Figure, Axes]:
    """A white figure of 1200 px × `height_px` with one pair of axes."""
    dpi = 100
    figure = Figure(figsize=(WIDTH_PX / dpi, height_px / dpi), dpi=dpi, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    figure.suptitle(title, x=0.01, ha="left", fontsize=15, weight="bold", color=DARK)
    axes = figure.add_subplot()
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=11)
    return figure, axes


def say_instead(axes: Axes, reason: str) -> None:
    """Write why there is nothing to draw."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", fontsize=14, color=GREY)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def low_end(levels: Collection[float]) -> float:
    """The lowest level, at least one given, that is not far below the rest: not more than three interquartile ranges
    below the first quartile (Tukey, "Exploratory Data Analysis", 1977, section 2D). One that is would leave the others
    no room.
    """
    if len(levels) < 2:
        return min(levels)
    first, _, third = quantiles(levels, n=4, method="inclusive")
    return min(level for level in levels if level >= first - 3 * (third - first))


def is_log(numbers: Collection[float]) -> bool:
    """Whether these numbers, at least one, are drawn on a log axis."""
    return min(numbers) > 0 and max(numbers) > LOG_SPAN * min(numbers)


def log_locator(numbers: Collection[float]) -> LogLocator:
    """Ticks for positive numbers on a log axis: 1, 2, 5, 10 …, and of three decades and more only powers of 10."""
    return LogLocator(subs=(1.0, 2.0, 5.0) if max(numbers) < 1000 * min(numbers) else (1.0,))
