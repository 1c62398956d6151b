"""Trade-off figures: every point has a name, labels cover nothing, and the bytes are always the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from petlbench.api.registries import METHODS
from petlbench.core.errors import UserError
from petlbench.describe.variants import declaring
from petlbench.results.leaderboard import table
from petlbench.results.plots.figures import draw_plots, tradeoff_figure
from petlbench.results.plots.labels import Labels
from petlbench.results.plots.panels import CURVE_MARKER_POINTS, FILLS, MARKER_POINTS, MARKERS, look
from tests.frame_factory import make_frame, row, sweep
from tests.record_factory import make_record

SETTING = ("rec", "digits", "tiny")
MIB = 2**20


def crowd(count: int = 5) -> pd.DataFrame:
    """Methods with nearly equal scores and costs, so that all labels compete for one place."""
    rows = [
        row(
            method=f"method_{index}",
            variant="released" if index % 2 else "",
            score_mean=0.7 + 0.0004 * index,
            score_std=0.01,
            seeds=3,
            trainable_params=10_000 + 20 * index,
            accounted_bytes=100 * MIB + 1000 * index,
            train_seconds=60 + 0.05 * index,
            step_flops=5 * 10**9 + 10**6 * index,
        )
        for index in range(count)
    ]
    full = row(method="full", score_mean=0.9, trainable_params=900_000, accounted_bytes=400 * MIB, train_seconds=300.0)
    return make_frame(*rows, full)


def spread(count: int, **common: Any) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        row(
            method=f"method_{index}",
            score_mean=float(rng.random()),
            trainable_params=int(10 ** rng.uniform(3.5, 6)),
            accounted_bytes=int(rng.integers(100, 400)) * MIB,
            train_seconds=float(10 ** rng.uniform(0, 3)),
            step_flops=int(rng.integers(3, 9)) * 10**9,
            **common,
        )
        for index in range(count)
    ]
    return make_frame(*rows)


def swept() -> pd.DataFrame:
    """Two methods at six and three sizes, one of them also at its default, and one without sizes."""
    lora = {2.0**i: (40_000 * 1.4**i, 0.5 + 0.01 * i) for i in range(6)}
    adapter = {8.0: (5e4, 0.47), 4.0: (6e4, 0.56), 2.0: (8e4, 0.55)}
    default = row(method="lora", size_name="rank", size=8.0, score_mean=0.6, trainable_params=110_000)
    full = row(method="full", score_mean=0.7, trainable_params=1_000_000)
    return make_frame(*sweep("lora", "rank", lora), *sweep("adapter", "reduction", adapter), default, full)


def figure_of(frame: pd.DataFrame) -> Figure:
    figure = tradeoff_figure(frame, SETTING)
    figure.canvas.draw()
    return figure


def texts(axes: Axes, size: float) -> list[Annotation]:
    return [t for t in axes.texts if isinstance(t, Annotation) and t.get_text() and t.get_fontsize() == size]


def labels(axes: Axes) -> list[Annotation]:
    return texts(axes, 8.0)


def names(axes: Axes) -> list[str]:
    return sorted(text.get_text() for text in labels(axes))


def text_box(text: Text) -> Bbox:
    # Annotation.get_window_extent would include the arrow.
    return Text.get_window_extent(text)


def data(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_xydata())


def overlap(a: Bbox, b: Bbox) -> bool:
    return a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1


def marker_lines(axes: Axes) -> list[Line2D]:
    return [line for line in axes.lines if str(line.get_marker()) in MARKERS]


def marker_boxes(axes: Axes) -> list[Bbox]:
    boxes = []
    for line in marker_lines(axes):
        half = line.get_markersize() / 2 * axes.figure.dpi / 72
        boxes += [Bbox([point - half, point + half]) for point in axes.transData.transform(data(line))]
    return boxes


def all_text(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def bar_ends(axes: Axes) -> set[tuple[float, float]]:
    (bars,) = axes.collections
    assert isinstance(bars, LineCollection)
    return {tuple(np.round(segment[:, 1], 4).tolist()) for segment in bars.get_segments() if len(segment)}


@pytest.mark.parametrize(
    "frame, count",
    [(crowd(), 6), (crowd(9), 10), (spread(24), 24), (spread(1), 1), (swept(), 4)],
    ids=["6 equal", "10 equal", "24", "1", "curves"],
)
def test_no_label_touches_another_a_marker_or_an_axis(frame: pd.DataFrame, count: int) -> None:
    for axes in figure_of(frame).axes:
        named = [text_box(text) for text in labels(axes)]
        boxes = named + [text_box(text) for text in texts(axes, 6.0)]
        markers = marker_boxes(axes)
        assert len(named) == count and len(markers) == len(frame)
        assert not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))
        assert not any(overlap(a, b) for a in boxes for b in markers)
        edge = axes.bbox
        assert all(edge.x0 < b.x0 and b.x1 < edge.x1 and edge.y0 < b.y0 and b.y1 < edge.y1 for b in boxes)


@pytest.mark.parametrize("write, at", [(Labels.name, (0.6, 0.5)), (Labels.hint, (0.5, 0.45))], ids=["name", "hint"])
def test_a_text_keeps_clear_of_the_markers_of_other_points(
    write: Callable[[Labels, dict[int, str]], None], at: tuple[float, float]
) -> None:
    """`at` is the place of the text if nothing is in its way."""
    for other, covered in ((0.9, 0.9), True), (at, False):
        figure = Figure(figsize=(2.0, 2.0), dpi=150)
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        write(Labels(axes, np.array([(0.5, 0.5), other]), MARKER_POINTS, np.empty((0, 2, 2))), {0: "abc"})
        x, y = axes.transData.transform(at)
        half = MARKER_POINTS / 2 * 150 / 72
        box = text_box(next(text for text in axes.texts if text.get_text()))
        assert overlap(box, Bbox([(x - half, y - half), (x + half, y + half)])) == covered


def test_a_label_far_from_its_point_has_a_line_to_it_and_a_near_one_has_none() -> None:
    for axes in figure_of(crowd()).axes:
        leaders = {text.xy for text in axes.texts if isinstance(text, Annotation) and not text.get_text()}
        for text in labels(axes):
            anchor, box = axes.transData.transform(text.xy), text_box(text)
            gap = np.hypot(*(np.clip(anchor, (box.x0, box.y0), (box.x1, box.y1)) - anchor)) * 72 / 150
            if gap > 15 or gap < 9:
                assert (tuple(text.xy) in {tuple(xy) for xy in leaders}) == (gap > 15)


def test_no_two_methods_share_a_marker() -> None:
    looks = [look(style) for style in range(len(MARKERS) * len(FILLS))]
    shapes = {(look["marker"], look.get("fillstyle"), look.get("markerfacecolor") == "white") for look in looks}
    assert len(shapes) == len(looks) == 60


def test_a_method_looks_the_same_in_every_figure() -> None:
    frame = pd.concat([spread(5), make_frame(row(method="method_3", task="vqa"))], ignore_index=True)
    one, other = figure_of(frame), tradeoff_figure(frame, ("vqa", "digits", "tiny"))

    def shape(figure: Figure, position: int) -> tuple[Any, ...]:
        line = marker_lines(figure.axes[0])[position]
        return line.get_marker(), line.get_markerfacecolor()

    assert shape(one, 3) == shape(other, 0) != shape(one, 0)


def test_the_sizes_of_a_method_are_one_line_with_one_label_at_its_best_point() -> None:
    axes = figure_of(swept()).axes[0]
    sizes = {len(data(line)): line for line in marker_lines(axes) if len(data(line)) > 1}
    assert sorted(sizes) == [3, 6]
    assert all(line.get_linestyle() == "-" and line.get_markersize() == CURVE_MARKER_POINTS for line in sizes.values())
    assert data(sizes[3]).tolist() == [[80_000, 0.55], [60_000, 0.56], [50_000, 0.47]]  # by size, small to large
    assert names(axes) == ["adapter (reduction)", "full", "lora", "lora (rank)"]
    best = {text.get_text(): tuple(text.xy) for text in labels(axes)}
    assert best["adapter (reduction)"] == (60_000, 0.56)
    alone = [line for line in marker_lines(axes) if len(data(line)) == 1]
    assert [line.get_markersize() for line in alone] == [MARKER_POINTS] * 2
    assert len({line.get_marker() for line in marker_lines(axes)}) == 4


def test_sizes_stand_in_small_print_at_their_points() -> None:
    axes = figure_of(swept()).axes[0]
    lora = {tuple(point): 2**i for i, point in enumerate(data(max(marker_lines(axes), key=lambda li: len(data(li)))))}
    shown = {text.get_text() for text in texts(axes, 6.0) if lora.get(tuple(text.xy)) == float(text.get_text())}
    assert {"1", "32"} <= shown


def test_a_lone_size_keeps_its_variant_in_the_label() -> None:
    frame = make_frame(*sweep("lora", "rank", {4: (1000, 0.5)}), row(method="full", trainable_params=10**6))
    assert names(figure_of(frame).axes[0]) == ["full", "lora:rank=4"]


def test_the_front_of_each_panel_is_the_steps_of_the_undominated_points() -> None:
    points = [("a", 0.5, 10, 30), ("b", 0.7, 20, 10), ("c", 0.6, 30, 20), ("d", 0.9, 40, 40)]
    rows = [row(method=n, score_mean=s, trainable_params=1000 * p, accounted_bytes=m * MIB) for n, s, p, m in points]
    failed = row(method="e", score_mean=1.0, trainable_params=1000, outcome="oom")
    parameters, memory, *_ = figure_of(make_frame(*rows, failed)).axes
    steps = [next(line for line in axes.lines if line.get_drawstyle() == "steps-post") for axes in (parameters, memory)]
    assert data(steps[0])[:-1].tolist() == [[10_000, 0.5], [20_000, 0.7], [40_000, 0.9]]
    assert data(steps[1])[:-1].tolist() == [[10, 0.7], [40, 0.9]]
    assert data(steps[1])[-1].tolist() == [memory.get_xlim()[1], 0.9]


def test_each_panel_states_the_hypervolume_of_its_front_where_there_is_one() -> None:
    rows = [(1, 0.5), (10, 0.7), (100, 0.9)]
    figure = figure_of(make_frame(*(row(method=f"m{p}", trainable_params=p, score_mean=s) for p, s in rows)))
    assert [axes.get_title(loc="right") for axes in figure.axes] == ["hypervolume 0.250", "", "", ""]
    assert "Hypervolume: share of the box from the largest cost and the lowest score" in all_text(figure)
    assert "Hypervolume" not in all_text(figure_of(spread(1)))


def test_error_bars_are_the_interval_where_it_is_known_and_else_the_deviation() -> None:
    frame = make_frame(
        row(method="a", score_mean=0.5, score_std=0.1, score_low=0.45, score_high=0.6),
        row(method="b", score_mean=0.7, score_std=0.02, seeds=3),
        row(method="c", score_mean=0.8),
    )
    figure = figure_of(frame)
    assert bar_ends(figure.axes[0]) == {(0.45, 0.6), (0.68, 0.72)}
    text = (
        "Error bars: 95 % interval of the mean over seeds and test samples, else one sample standard deviation over 3"
    )
    assert text in all_text(figure)
    assert "Error bars" not in all_text(figure_of(frame[2:]))


def test_contended_timings_stay_out_of_the_time_panel_only_and_the_footnote_says_so() -> None:
    figure = figure_of(make_frame(row(method="busy", contended=True), row(method="alone", score_mean=0.6)))
    both = ["alone", "busy"]
    assert [names(axes) for axes in figure.axes] == [both, both, ["alone"], both]
    assert "Not in the time panel, timed while other cells ran: busy." in all_text(figure)


def test_stale_rows_are_named_but_not_drawn_beside_fresh_ones() -> None:
    figure = figure_of(make_frame(row(method="old", stale=True, score_mean=0.9), row(method="new")))
    assert [names(axes) for axes in figure.axes] == [["new"]] * 4
    assert "Stale, not drawn: old." in all_text(figure)


def test_where_every_row_is_stale_all_are_drawn_and_the_footnote_says_so() -> None:
    figure = figure_of(make_frame(row(method="old", stale=True), row(method="older", stale=True, score_mean=0.6)))
    assert [names(axes) for axes in figure.axes] == [["old", "older"]] * 4
    assert "All of these are stale" in all_text(figure) and "not drawn" not in all_text(figure)


def test_failed_rows_and_the_machine_are_named() -> None:
    frame = make_frame(row(method="lora"), row(method="full", score_mean=0.4, outcome="oom"))
    frame.attrs = {"machines": {SETTING: ["Some GPU, cuda"]}, "runs": {0: 1, 1: 3}}
    text = all_text(figure_of(frame))
    assert "rec · digits · tiny" in text and "Some GPU, cuda" in text
    assert "Failed: full: oom (2 of 3 seeds)." in text


def test_a_cost_that_spans_more_than_ten_times_gets_a_log_axis() -> None:
    scales = []
    for seconds in (9.0, 11.0):
        frame = make_frame(row(method="a", train_seconds=1.0), row(method="b", train_seconds=seconds))
        scales.append([axes.get_xscale() for axes in figure_of(frame).axes])
    assert scales == [["log", "linear", "linear", "linear"], ["log", "linear", "log", "linear"]]


def test_a_method_that_trains_nothing_is_drawn_too() -> None:
    axes = figure_of(make_frame(row(method="zero", trainable_params=0, score_mean=0.2), row(method="lora"))).axes[0]
    low, high = axes.get_xlim()
    assert low < 0 < 10_000 < high


def test_an_unmeasured_cost_leaves_a_panel_that_says_so() -> None:
    figure = figure_of(make_frame(row(train_seconds=float("nan"), step_flops=pd.NA)))
    assert [text.get_text() for axes in figure.axes[2:] for text in axes.texts] == ["no data"] * 2
    assert "Not in the time panel, not measured: lora." in all_text(figure)
    assert "Not in the compute panel, not measured: lora." in all_text(figure)


def test_names_are_shown_verbatim_and_long_ones_are_cut_in_the_middle() -> None:
    frame = make_frame(row(method="a", variant="$r_8$"), row(method="b", variant="x" * 40 + "end"))
    verbatim, cut = (text.get_text() for text in labels(figure_of(frame).axes[0]))
    assert verbatim == "a:$r_8$"
    assert len(cut) == 32 and cut.startswith("b:xxx") and cut.endswith("xend")


def test_each_setting_with_a_score_gets_both_files_with_the_same_bytes_again(tmp_path: Path) -> None:
    records = [make_record("lora"), make_record("lora", task="vqa"), make_record("full", outcome="oom", task="nlvr")]
    paths = draw_plots(records, tmp_path / "one")
    again = draw_plots(table(records), tmp_path / "two")
    files = ["rec_digits_tiny.png", "rec_digits_tiny.svg", "vqa_digits_tiny.png", "vqa_digits_tiny.svg"]
    assert [path.name for path in paths] == files == sorted(path.name for path in (tmp_path / "one").iterdir())
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    assert paths[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in paths[1].read_bytes()


def test_where_a_method_has_sizes_a_table_of_curves_comes_with_the_figures(tmp_path: Path) -> None:
    paths, again = draw_plots(swept(), tmp_path / "one"), draw_plots(swept(), tmp_path / "two")
    assert [path.name for path in paths] == ["rec_digits_tiny.png", "rec_digits_tiny.svg", "curves.csv"]
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    curves = pd.read_csv(paths[-1])
    lora = curves[(curves["method"] == "lora") & (curves["axis"] == "trainable_params")]
    assert sorted(lora["points"]) == [1, 6] and lora["hypervolume"].between(0, 1).all()


def test_drawing_leaves_the_user_s_matplotlib_settings_alone_and_ignores_them(tmp_path: Path) -> None:
    plain = draw_plots(spread(1), tmp_path / "plain")
    with matplotlib.rc_context({"font.size": 30.0}):
        styled = draw_plots(spread(1), tmp_path / "styled")
        assert matplotlib.rcParams["font.size"] == 30.0
    assert plain[1].read_bytes() == styled[1].read_bytes()


@pytest.mark.parametrize("frame", [make_frame(), spread(1, outcome="failed").assign(score_mean=np.nan)])
def test_nothing_to_draw_is_a_user_error_and_makes_no_folder(tmp_path: Path, frame: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="nothing to draw"):
        draw_plots(frame, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_a_file_in_place_of_the_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("")
    with pytest.raises(UserError, match="cannot write to folder"):
        draw_plots(spread(1), tmp_path / "plots")


def test_the_note_names_the_floor_that_the_methods_declare_and_that_was_run() -> None:
    frame = make_frame(row(method="lora", trainable_params=9, score_mean=0.7), row(method="bottom", score_mean=0.5))

    def note(*floors: str) -> str:
        said = [text.get_text() for text in tradeoff_figure(frame, SETTING, floors).texts]
        return next(text for text in said if "Hypervolume" in text)

    assert "and the score of bottom to" in note("bottom", "never_run")
    assert "and the lowest score to" in note() == note("never_run")


def test_what_counts_as_floor_and_baseline_is_declared_by_the_methods() -> None:
    names = METHODS.names()
    assert declaring(METHODS, [*names, "uninstalled"], "floor") == ["head_only"]
    assert declaring(METHODS, names, "baseline") == ["full"]
