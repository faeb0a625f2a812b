"""What a sweep's pictures hold, read from their figures; that the files decode."""

import io
import itertools
import random

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgba
from PIL import Image

from sr_models.cost import ModelCost
from sr_train.figures import low_end
from sr_train.parallel_axes import ABSENT_AT
from sr_train.sweep_pictures import (
    importance_bars,
    importance_figure,
    parallel_coordinates,
    parallel_figure,
    pareto_figure,
    pareto_plot,
)
from sr_train.trial_record import Point, TrialRecord

PROTOCOL = "psnr@y,crop=scale"


def trial(name, psnr_db, gflops=1.0, sample=None, *, status="finished", parameters=1000):
    """`psnr_db` after 100 patches, or a mapping from patches seen, or None."""
    scores = psnr_db if isinstance(psnr_db, dict) else {} if psnr_db is None else {100: psnr_db}
    return TrialRecord(
        name=name,
        sample=sample or {},
        status=status,
        history=tuple(Point(patches_seen=patches, psnr_db=db, ssim=0.9) for patches, db in scores.items()),
        cost=None if gflops is None else ModelCost(parameters=parameters, flops=1e9 * gflops),
    )


def sweep(num_trials):
    draw = random.Random(0)
    return [
        trial(
            f"trial-{index}",
            {100: 28 + draw.random(), 200: 29 + draw.random()},
            draw.uniform(1.0, 200.0),
            {"num_blocks": draw.randrange(1, 17), "num_channels": draw.choice([8, 64]), "kind": draw.choice("ab")},
        )
        for index in range(num_trials)
    ]


def line(axes, label):
    (found,) = [line for line in axes.lines if line.get_label().startswith(label)]
    return found


def dots(axes, label):
    (found,) = [dots for dots in axes.collections if dots.get_label().startswith(label)]
    return found.get_offsets().tolist()


def texts(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: pareto_plot(sweep(20), "gflops", protocol=PROTOCOL, bicubic_psnr_db=27.0),
        lambda: pareto_plot([], "latency_ms", protocol=PROTOCOL),
        lambda: parallel_coordinates(sweep(20), protocol=PROTOCOL),
        lambda: parallel_coordinates([], protocol=PROTOCOL),
        lambda: importance_bars({"num_blocks": 0.8, "kind": 0.004}),
        lambda: importance_bars({}),
    ],
    ids=["pareto", "no trial", "parallel", "no line", "importances", "no importance"],
)
def test_each_picture_is_a_png_1200_px_wide(draw):
    data = draw()
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.width) == ("PNG", 1200)
        assert np.asarray(image.convert("L")).std() > 0, "something is drawn"


def test_the_front_is_a_line_through_its_trials_by_rising_cost():
    records = [trial("c", 32.0, 9.0), trial("beaten", 29.0, 5.0), trial("a", 28.0, 2.0), trial("b", 30.0, 4.0)]
    (axes,) = pareto_figure(records, "gflops", protocol=PROTOCOL).axes
    front = line(axes, "Pareto front")
    assert front.get_xydata().tolist() == [[2.0, 28.0], [4.0, 30.0], [9.0, 32.0]]
    assert front.get_drawstyle() == "steps-post", "a cost in between buys no more than the cheaper trial"
    assert sorted(texts(axes)) == ["a", "b", "c"]


def test_trials_of_the_front_are_labelled_by_size_where_it_is_known():
    records = [trial("trial-0f", 28.0, 2.0), trial("trial-1e", 30.0, 4.0, {"num_blocks": 8, "num_channels": 32})]
    (axes,) = pareto_figure(records, "gflops", protocol=PROTOCOL).axes
    assert sorted(texts(axes)) == ["0f", "8×32"]


def test_labels_of_a_crowded_front_do_not_overlap():
    records = [trial(f"trial-{index:08x}", 30 + 0.001 * index, 100 + index) for index in range(40)]
    figure = pareto_figure(records, "gflops", protocol=PROTOCOL)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) > 5
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_each_status_has_its_own_dots():
    records = [
        trial("a", 30.0, 1.0),
        trial("b", 29.0, 2.0, status="stopped"),
        trial("c", 29.5, 3.0, status="failed"),
        trial("d", 28.0, 4.0, status="running"),
        trial("unknown cost", 40.0, None),
    ]
    (axes,) = pareto_figure(records, "gflops", protocol=PROTOCOL).axes
    assert dots(axes, "finished (1)") == [[1.0, 30.0]]
    assert dots(axes, "stopped (1)") == [[2.0, 29.0]]
    assert dots(axes, "failed (1)") == [[3.0, 29.5]]
    assert dots(axes, "running (1)") == [[4.0, 28.0]]
    drawn = axes.collections
    assert len({to_hex(each.get_edgecolor()[0]) + str(each.get_facecolor()) for each in drawn}) == len(drawn)
    assert len({each.get_paths()[0].vertices.tobytes() for each in drawn}) == len(drawn), "different markers"


def test_trials_without_a_score_or_far_below_the_others_are_in_the_lowest_row():
    records = [
        *(trial(str(index), 29.0 + 0.1 * index, 1.0 + index) for index in range(9)),
        trial("diverged", 6.0, 5.0, status="stopped"),
        trial("crashed", None, 2.0, status="failed"),
        trial("collapsed", 3.0, 3.0, status="failed"),
    ]
    (axes,) = pareto_figure(records, "gflops", protocol=PROTOCOL, bicubic_psnr_db=28.5).axes
    lowest_db = dots(axes, "stopped")[0][1]
    assert axes.get_ylim()[0] < lowest_db < 28.5
    assert dots(axes, "failed") == [[2.0, lowest_db], [3.0, lowest_db]]
    assert axes.get_ylim()[0] > 28.0, "the others keep their room"
    assert "lowest row" in axes.get_title(loc="right")


def test_bicubic_is_a_line_over_the_whole_width():
    (axes,) = pareto_figure([trial("a", 30.0)], "gflops", protocol=PROTOCOL, bicubic_psnr_db=27.25).axes
    bicubic = line(axes, "bicubic: 27.25 dB")
    assert set(bicubic.get_ydata()) == {27.25}
    assert axes.get_ylim()[0] < 27.25
    assert bicubic.get_linestyle() == "--"


@pytest.mark.parametrize(("largest", "scale"), [(9.9, "linear"), (10.1, "log")])
def test_the_cost_axis_is_logarithmic_beyond_a_factor_of_10(largest, scale):
    (axes,) = pareto_figure([trial("a", 30.0, 1.0), trial("b", 31.0, largest)], "gflops", protocol=PROTOCOL).axes
    assert axes.get_xscale() == scale


def test_axes_say_what_is_measured_and_in_which_unit():
    figures = {cost: pareto_figure([trial("a", 30.0)], cost, protocol=PROTOCOL) for cost in ("gflops", "parameters")}
    assert "GFLOPs" in figures["gflops"].axes[0].get_xlabel()
    assert "1280×720" in figures["gflops"].axes[0].get_xlabel()
    assert figures["parameters"].axes[0].get_xlabel() == "parameters"
    assert figures["gflops"].axes[0].get_ylabel() == f"PSNR in dB ({PROTOCOL})"


def test_one_line_per_trial_from_option_to_option():
    records = [
        trial("low", 28.0, sample={"blocks": 4, "rate": 1e-4, "fixed": 7}),
        trial("high", 30.0, sample={"blocks": 12, "rate": 1e-2, "fixed": 7}),
        trial("middle", 29.0, sample={"blocks": 6, "rate": 1e-3, "fixed": 7}),
        trial("failed", 29.0, sample={"blocks": 99, "rate": 1.0, "fixed": 7}, status="failed"),
    ]
    axes = parallel_figure(records, protocol=PROTOCOL).axes[0]
    assert line(axes, "low").get_xydata().tolist() == [[0, 0], [1, 0]]
    assert line(axes, "high").get_xydata().tolist() == [[0, 1], [1, 1]]
    assert line(axes, "middle").get_ydata() == pytest.approx([2 / 8, 1 / 2]), "linear; logarithmic"
    assert {each.get_label() for each in axes.lines if not each.get_label().startswith("_")} == {
        "low",
        "high",
        "middle",
    }


def test_trials_without_an_option_pass_below_its_values():
    records = [
        trial("a", 28.0, sample={"kind": "step", "every": 0.25}),
        trial("b", 29.0, sample={"kind": "step", "every": 0.5}),
        trial("c", 30.0, sample={"kind": "cosine"}),
    ]
    axes = parallel_figure(records, protocol=PROTOCOL).axes[0]
    assert line(axes, "c").get_ydata()[1] == ABSENT_AT < 0
    assert "–" in texts(axes)


def test_lines_are_coloured_by_what_the_trials_had_learnt_by_a_common_mark():
    """The one that was trained four times as long was the worst at the mark."""
    records = [trial(str(rank), {100: 28.0 + rank}, sample={"blocks": rank}) for rank in range(1, 5)]
    records.insert(2, trial("long", {100: 28.0, 400: 40.0}, sample={"blocks": 9}))
    records.append(trial("short", {20: 27.0}, sample={"blocks": 8}, status="stopped"))
    figure = parallel_figure(records, protocol=PROTOCOL)
    axes, bar = figure.axes
    assert "after 100 patches" in bar.get_ylabel()
    assert PROTOCOL in bar.get_ylabel()
    darkness = {name: -sum(to_rgba(line(axes, name).get_color())[:3]) for name in ("long", "1", "2", "3", "4")}
    assert list(darkness) == sorted(darkness, key=lambda name: darkness[name]), "the darker the better"
    red, green, blue, _ = to_rgba(line(axes, "short").get_color())
    assert red == green == blue, "grey: not trained that far"


def test_the_best_is_drawn_last_and_thickest():
    records = [trial(name, db, sample={"blocks": db}) for name, db in (("a", 28.0), ("best", 31.0), ("c", 29.0))]
    trials = [
        each for each in parallel_figure(records, protocol=PROTOCOL).axes[0].lines if each.get_label() in "abestc"
    ]
    assert trials[-1].get_label() == "best"
    assert trials[-1].get_linewidth() > max(each.get_linewidth() for each in trials[:-1])


def test_lines_through_one_value_are_told_apart_and_stay_near_it():
    records = [trial(str(index), 28.0 + index, sample={"blocks": index, "kind": "ab"[index % 2]}) for index in range(6)]
    axes = parallel_figure(records, protocol=PROTOCOL).axes[0]
    heights = [line(axes, str(index)).get_ydata()[1] for index in (0, 2, 4)]
    assert len(set(heights)) == 3
    assert heights == pytest.approx([0.25] * 3, abs=0.025), "the first of two names"
    assert [line(axes, str(index)).get_ydata()[0] for index in range(6)] == pytest.approx(np.linspace(0, 1, 6))


@pytest.mark.parametrize(
    ("records", "said"),
    [([trial("a", 30.0, sample={"blocks": 1})], "no option varies"), ([trial("a", None)], "no trial has a score")],
)
def test_a_picture_of_nothing_says_why(records, said):
    assert texts(parallel_figure(records, protocol=PROTOCOL).axes[0]) == [said]
    assert "score" in texts(pareto_figure([], "gflops", protocol=PROTOCOL).axes[0])[0]
    assert len(texts(importance_figure({}).axes[0])) == 1


def test_bars_are_as_long_as_the_shares_and_the_first_is_on_top():
    (axes,) = importance_figure({"num_channels": 0.75, "rate": 0.2, "kind": 0.004}).axes
    assert [bar.get_width() for bar in axes.patches] == [0.75, 0.2, 0.004]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["num_channels", "rate", "kind"]
    assert axes.yaxis_inverted()
    assert texts(axes) == ["75 %", "20 %", "< 1 %"]


def test_the_low_end_leaves_out_what_is_far_below_the_rest():
    """The quartiles of 1 to 5 are 2 and 4, so the fence is at 2 - 3 · 2."""
    assert low_end([1, 2, 3, 4, 5]) == 1
    assert low_end([1, 2, 3, 4, 5, -50]) == 1
    assert low_end([7.0]) == 7.0
    assert low_end([7.0, 7.0, 7.0]) == 7.0
