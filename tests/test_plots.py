"""The trade-off figures: every point named, nothing covered, the same bytes every time."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from petlbench.errors import UserError
from petlbench.leaderboard import table
from petlbench.plots import FILLS, MARKERS, draw, look, tradeoff_figure
from petlbench.spec import Record

from .record_factory import MIB, make_record

SETTING = ("rec", "digits", "tiny")
MACHINE = {"device_name": "Some GPU", "device": "cuda"}


def crowd(count: int = 5) -> list[Record]:
    """Methods whose scores, parameters, memory and time are nearly equal: every label wants the same place."""
    return [
        make_record(
            f"method_{index}",
            0.7 + 0.0004 * index + 0.01 * seed,
            variant="released" if index % 2 else "",
            seed=seed,
            trainable=10_000 + 20 * index,
            accounted=100 * MIB + 1000 * index,
            train_seconds=60 + 0.05 * index,
        )
        for index in range(count)
        for seed in range(3)
    ] + [make_record("full", 0.9, trainable=900_000, accounted=400 * MIB, train_seconds=300.0)]


def spread(count: int) -> list[Record]:
    rng = np.random.default_rng(0)
    return [
        make_record(
            f"method_{index}",
            float(rng.random()),
            trainable=int(10 ** rng.uniform(3.5, 6)),
            accounted=int(rng.integers(100, 400)) * MIB,
            train_seconds=float(10 ** rng.uniform(0, 3)),
        )
        for index in range(count)
    ]


def figure_of(results: list[Record] | pd.DataFrame) -> Figure:
    figure = tradeoff_figure(results if isinstance(results, pd.DataFrame) else table(results), SETTING)
    figure.canvas.draw()
    return figure


def labels(axes: Axes) -> list[Annotation]:
    return [text for text in axes.texts if isinstance(text, Annotation) and text.get_text()]


def text_box(text: Text) -> Bbox:
    # Annotation.get_window_extent would count the arrow in.
    return Text.get_window_extent(text)


def data(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_xydata())


def overlap(a: Bbox, b: Bbox) -> bool:
    return a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1


def marker_boxes(axes: Axes) -> list[Bbox]:
    lines = [line for line in axes.lines if line.get_markersize() == 7.0]
    half = 7.0 / 2 * axes.figure.dpi / 72
    points = [axes.transData.transform(data(line)[0]) for line in lines]
    return [Bbox([point - half, point + half]) for point in points]


def all_text(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


@pytest.mark.parametrize("records", [crowd(), crowd(9), spread(24), spread(1)], ids=["5 equal", "9 equal", "24", "1"])
def test_no_label_touches_another_a_marker_or_an_axis(records: list[Record]) -> None:
    figure = figure_of(records)
    methods = len({record.cell.method for record in records})
    for axes in figure.axes:
        boxes = [text_box(text) for text in labels(axes)]
        markers = marker_boxes(axes)
        assert len(boxes) == len(markers) == methods
        assert not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))
        assert not any(overlap(a, b) for a in boxes for b in markers)
        frame = axes.bbox
        assert all(frame.x0 < b.x0 and b.x1 < frame.x1 and frame.y0 < b.y0 and b.y1 < frame.y1 for b in boxes)


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
    shapes = {(look["marker"], look.get("fillstyle"), look["markerfacecolor"] == "white") for look in looks}
    assert len(shapes) == len(looks) == 60


def test_a_method_looks_the_same_in_every_figure() -> None:
    frame = table([*spread(5), make_record("method_3", task="vqa")])
    one, other = figure_of(frame), tradeoff_figure(frame, ("vqa", "digits", "tiny"))

    def shape(figure: Figure) -> tuple:
        axes = figure.axes[0]
        lines = [line for line in axes.lines if line.get_markersize() == 7.0]
        names = [text.get_text() for text in labels(axes)]
        line = lines[names.index("method_3")]
        return line.get_marker(), line.get_markerfacecolor()

    assert shape(one) == shape(other)


def test_the_front_of_each_panel_is_the_steps_of_the_undominated_points() -> None:
    points = [("a", 0.5, 10, 30), ("b", 0.7, 20, 10), ("c", 0.6, 30, 20), ("d", 0.9, 40, 40)]
    records = [make_record(n, s, trainable=1000 * p, accounted=m * MIB) for n, s, p, m in points]
    parameters, memory, _ = figure_of(records).axes
    steps = [next(line for line in axes.lines if line.get_drawstyle() == "steps-post") for axes in (parameters, memory)]
    assert data(steps[0])[:-1].tolist() == [[10_000, 0.5], [20_000, 0.7], [40_000, 0.9]]
    assert data(steps[1])[:-1].tolist() == [[10, 0.7], [40, 0.9]]
    assert data(steps[1])[-1].tolist() == [memory.get_xlim()[1], 0.9]


def test_error_bars_are_the_deviation_over_seeds_and_absent_for_one_seed() -> None:
    records = [make_record("a", 0.4), make_record("a", 0.6, seed=1), make_record("b", 0.8)]
    (bars,) = figure_of(records).axes[0].collections
    assert isinstance(bars, LineCollection)
    heights = {tuple(np.round(segment[:, 1], 4)) for segment in bars.get_segments() if len(segment)}
    deviation = np.sqrt(0.02)
    assert heights == {(round(0.5 - deviation, 4), round(0.5 + deviation, 4))}


def test_contended_timings_stay_out_of_the_time_panel_only_and_the_footnote_says_so() -> None:
    figure = figure_of([make_record("busy", 0.5, jobs=3), make_record("alone", 0.6)])
    shown = [sorted(text.get_text() for text in labels(axes)) for axes in figure.axes]
    assert shown == [["alone", "busy"], ["alone", "busy"], ["alone"]]
    assert "Not in the time panel, timed while other cells ran: busy." in all_text(figure)


def test_failed_rows_and_the_machine_are_named() -> None:
    failed = [make_record("full", outcome="oom", seed=seed, environment=MACHINE) for seed in range(2)]
    figure = figure_of(
        [make_record("lora", environment=MACHINE), make_record("full", 0.4, seed=2, environment=MACHINE), *failed]
    )
    text = all_text(figure)
    assert "rec · digits · tiny" in text and "Some GPU, cuda" in text
    assert "Failed: full: oom (2 of 3 seeds)." in text


def test_a_cost_that_spans_more_than_ten_times_gets_a_log_axis() -> None:
    wide = figure_of([make_record("a", train_seconds=1.0), make_record("b", train_seconds=11.0)])
    narrow = figure_of([make_record("a", train_seconds=1.0), make_record("b", train_seconds=9.0)])
    assert [axes.get_xscale() for axes in wide.axes] == ["log", "linear", "log"]
    assert [axes.get_xscale() for axes in narrow.axes] == ["log", "linear", "linear"]


def test_a_method_that_trains_nothing_is_drawn_too() -> None:
    axes = figure_of([make_record("zero", 0.2, trainable=0), make_record("lora", 0.5)]).axes[0]
    low, high = axes.get_xlim()
    assert low < 0 < 10_000 < high


def test_an_unmeasured_cost_leaves_a_panel_that_says_so() -> None:
    figure = figure_of([make_record().model_copy(update={"timing": None})])
    assert [text.get_text() for text in figure.axes[2].texts] == ["no data"]
    assert "Not in the time panel, not measured: lora." in all_text(figure)


def test_names_are_shown_verbatim_and_long_ones_are_cut_in_the_middle() -> None:
    records = [make_record("a", 0.3, variant="$r_8$"), make_record("b", 0.5, variant="x" * 40 + "end")]
    cut, verbatim = (text.get_text() for text in labels(figure_of(records).axes[0]))
    assert verbatim == "a:$r_8$"
    assert len(cut) == 32 and cut.startswith("b:xxx") and cut.endswith("xend")


def test_each_setting_with_a_score_gets_both_files_with_the_same_bytes_again(tmp_path: Path) -> None:
    records = [make_record("lora"), make_record("lora", task="vqa"), make_record("full", outcome="oom", task="nlvr")]
    paths = draw(records, tmp_path / "one")
    again = draw(table(records), tmp_path / "two")
    names = ["rec_digits_tiny.png", "rec_digits_tiny.svg", "vqa_digits_tiny.png", "vqa_digits_tiny.svg"]
    assert [path.name for path in paths] == names == sorted(path.name for path in (tmp_path / "one").iterdir())
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    assert paths[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in paths[1].read_bytes()


def test_drawing_leaves_the_user_s_matplotlib_settings_alone_and_ignores_them(tmp_path: Path) -> None:
    plain = draw([make_record()], tmp_path / "plain")
    with matplotlib.rc_context({"font.size": 30.0}):
        styled = draw([make_record()], tmp_path / "styled")
        assert matplotlib.rcParams["font.size"] == 30.0
    assert plain[1].read_bytes() == styled[1].read_bytes()


@pytest.mark.parametrize("records", [[], [make_record(outcome="failed")]], ids=["none", "failed"])
def test_nothing_to_draw_is_a_user_error_and_makes_no_folder(tmp_path: Path, records: list[Record]) -> None:
    with pytest.raises(UserError, match="nothing to draw"):
        draw(records, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_a_file_in_place_of_the_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("")
    with pytest.raises(UserError, match="cannot write to folder"):
        draw([make_record()], tmp_path / "plots")
