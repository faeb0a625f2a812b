"""Pictures of a sweep, as PNG files 1200 px wide: PSNR against cost, options against PSNR, importance of options.

Each function that returns bytes saves the figure that the function named `…_figure` draws.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

from sr_models.cost import OUTPUT_PX
from sr_train.figures import DARK, GREY, PALE, is_log, log_locator, low_end, png, say_instead, titled_figure
from sr_train.parallel_axes import Column
from sr_train.pareto import COSTS, CostName, cost_of, pareto_front
from sr_train.sweep_study import comparable_scores
from sr_train.sweep_table import varied_options
from sr_train.trial_record import Status, TrialRecord

# Marker, colour (of Okabe and Ito's, which colour-blind people can tell apart), and whether it is filled.
_STYLES: dict[Status, tuple[str, str, bool]] = {
    "finished": ("o", "#0072b2", True),
    "stopped": ("^", "#e69f00", True),
    "running": ("D", "#009e73", False),
    "failed": ("X", "#d55e00", True),
    "over limit": ("s", GREY, False),
}
# Lines through one value are spread over so much of an axis.
_BUNDLE = 0.04


def pareto_plot(
    records: Sequence[TrialRecord], cost_name: CostName, *, protocol: str, bicubic_psnr_db: float | None = None
) -> bytes:
    """PNG of each trial's best PSNR (dB) against one cost, with the Pareto front; `protocol` says how PSNR is measured.

    Trials whose cost is not known are left out. Those that have no PSNR, or one far below the others', are in a row at
    the bottom.
    """
    return png(pareto_figure(records, cost_name, protocol=protocol, bicubic_psnr_db=bicubic_psnr_db))


def parallel_coordinates(records: Sequence[TrialRecord], *, protocol: str) -> bytes:
    """PNG with an axis for each option that varies, and a line for each trial, coloured by its comparable PSNR (dB).

    Trials that failed or are over a limit are left out. Lines of trials that share a value are spread a little around
    it, by PSNR.
    """
    return png(parallel_figure(records, protocol=protocol))


def importance_bars(importances: Mapping[str, float]) -> bytes:
    """PNG of what `sr_train.sweep_study.importances` gives, the first on top."""
    return png(importance_figure(importances))


def pareto_figure(
    records: Sequence[TrialRecord], cost_name: CostName, *, protocol: str, bicubic_psnr_db: float | None = None
) -> Figure:
    """See `pareto_plot`."""
    shown = {record.name: (record, cost) for record in records if (cost := cost_of(record, cost_name)) is not None}
    figure, axes = titled_figure(f"PSNR against {COSTS[cost_name].label}")
    levels_db = [one.psnr_db for one, _ in shown.values() if one.psnr_db is not None and one.status != "failed"]
    if not levels_db:
        say_instead(axes, "no trial with a known cost has a score")
        return figure
    axes.set_ylabel(f"PSNR in dB ({protocol})", fontsize=12)
    _set_cost_axis(axes, cost_name, [cost for _, cost in shown.values()])
    low_db, high_db = low_end(levels_db), max(levels_db)
    if bicubic_psnr_db is not None:
        low_db, high_db = min(low_db, bicubic_psnr_db), max(high_db, bicubic_psnr_db)
        axes.axhline(bicubic_psnr_db, color=DARK, linestyle="--", label=f"bicubic: {bicubic_psnr_db:.2f} dB")
    margin_db = max(0.1 * (high_db - low_db), 0.02)
    bottom_db = low_db - 0.7 * margin_db
    axes.set_ylim(low_db - margin_db, high_db + margin_db)
    places = {
        name: (cost, bottom_db if record.psnr_db is None or record.psnr_db < low_db else record.psnr_db)
        for name, (record, cost) in shown.items()
    }
    front = {record.name: _size(record) for record in pareto_front(records, cost_name)}
    unit = " (blocks×channels)" if any("×" in size for size in front.values()) else ""
    line = [places[name] for name in front]
    axes.plot(*zip(*line, strict=True), drawstyle="steps-post", color=DARK, label=f"Pareto front{unit}", zorder=2)
    for status in _STYLES:
        _draw_dots(axes, status, [places[name] for name, (record, _) in shown.items() if record.status == status])
    if any(height_db == bottom_db for _, height_db in places.values()):
        axes.set_title("lowest row: no score, or far below the others", loc="right", fontsize=10.5, color=GREY)
    figure.legend(loc="outside lower left", ncols=7, frameon=False, columnspacing=1.4, handletextpad=0.4, fontsize=11)
    _write_labels(figure, axes, [(places[name], size) for name, size in front.items()])
    return figure


def parallel_figure(records: Sequence[TrialRecord], *, protocol: str) -> Figure:
    """See `parallel_coordinates`. A line's label is its trial's name; the best is drawn last."""
    mark, scores = comparable_scores(records, min_trials=1)
    drawn = [record for record in records if record.status not in ("failed", "over limit")]
    drawn.sort(key=lambda record: scores.get(record.name, -math.inf))
    options = varied_options(drawn)
    figure, axes = titled_figure("Options and PSNR of the trials")
    if not scores or not options:
        say_instead(axes, "no option varies" if scores else "no trial has a score")
        return figure
    axes.set_axis_off()
    low_db, high_db = low_end(scores.values()), max(scores.values())
    colours = ScalarMappable(Normalize(low_db, max(high_db, low_db + 0.01)), matplotlib.colormaps["viridis_r"])
    shades = dict(zip(scores, colours.to_rgba(np.array(list(scores.values()))), strict=True))
    columns = [Column.of([record.sample.get(option) for record in drawn]) for option in options]
    for rank, record in enumerate(drawn):
        spread = _BUNDLE * ((rank + 0.5) / len(drawn) - 0.5)
        is_best = rank == len(drawn) - 1
        axes.plot(
            range(len(options)),
            [column.height(record.sample.get(name), spread) for name, column in zip(options, columns, strict=True)],
            color=shades.get(record.name, PALE),
            linewidth=4 if is_best else 1.5,
            marker="o",
            markersize=8 if is_best else 3.5,
            label=record.name,
        )
    for x, (option, column) in enumerate(zip(options, columns, strict=True)):
        column.draw(axes, x, option)
    axes.set_xlim(-0.4, len(options) - 0.9)
    is_cut = min(scores.values()) < low_db
    bar = figure.colorbar(colours, ax=axes, extend="min" if is_cut else "neither", pad=0.01)
    bar.set_label(f"PSNR in dB ({protocol}) after {mark:,} patches", fontsize=11)
    grey = "; grey: not trained that far" if len(scores) < len(drawn) else ""
    figure.supxlabel(f"thick: the highest PSNR after {mark:,} patches{grey}", fontsize=11, color=GREY)
    return figure


def importance_figure(importances: Mapping[str, float]) -> Figure:
    """See `importance_bars`."""
    figure, axes = titled_figure("Importance of the options", height_px=170 + 45 * max(4, len(importances)))
    if not importances:
        say_instead(axes, "too few trials, or all alike")
        return figure
    bars = axes.barh(list(importances), list(importances.values()), color="#0072b2", height=0.6)
    texts = [f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %" for share in importances.values()]
    axes.bar_label(bars, texts, padding=5, fontsize=11)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(*importances.values(), 0.05))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.set_xlabel("share of the variance of PSNR that the option explains by itself (fANOVA)", fontsize=12)
    axes.grid(visible=False, axis="y")
    return figure


def _set_cost_axis(axes: Axes, cost_name: CostName, costs: Collection[float]) -> None:
    height_px, width_px = OUTPUT_PX
    cost = COSTS[cost_name]
    label = f"{cost.label} in {cost.unit} for an output of {width_px}×{height_px}" if cost.unit else cost.label
    axes.set_xlabel(label, fontsize=12)
    if is_log(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(log_locator(costs))
        axes.xaxis.set_minor_locator(NullLocator())
    plain = FuncFormatter(lambda value, _: f"{value:,.12g}")
    axes.xaxis.set_major_formatter(EngFormatter() if cost_name == "parameters" else plain)
    axes.margins(x=0.07)


def _draw_dots(axes: Axes, status: Status, places: Sequence[tuple[float, float]]) -> None:
    if places:
        marker, colour, filled = _STYLES[status]
        axes.scatter(
            [cost for cost, _ in places],
            [height_db for _, height_db in places],
            s=80,
            marker=marker,
            facecolors=colour if filled else "none",
            edgecolors="white" if filled else colour,
            label=f"{status} ({len(places)})",
            zorder=3,
        )


def _size(record: TrialRecord) -> str:
    """Blocks×channels, or of other networks the trial's name without what all names begin with."""
    if {"num_blocks", "num_channels"} <= record.sample.keys():
        return f"{record.sample['num_blocks']}×{record.sample['num_channels']}"
    return record.name.removeprefix("trial-")


def _write_labels(figure: Figure, axes: Axes, labels: Sequence[tuple[tuple[float, float], str]]) -> None:
    """Above and left of the front's dots, where by its definition no other dot is; from the best down, as far as there
    is room beside those that are written.
    """
    figure.draw_without_rendering()  # where a text lies is known only after the layout
    taken: list[Bbox] = []
    for place, text in reversed(labels):
        label = axes.annotate(text, place, (-5, 6), textcoords="offset points", ha="right", fontsize=10.5, color=DARK)
        box = label.get_window_extent().padded(2)
        if any(box.overlaps(other) for other in taken):
            label.remove()
        else:
            taken.append(box)
