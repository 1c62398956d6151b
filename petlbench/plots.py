"""Trade-off figures from the leaderboard: score against parameters, memory and time. Imports no torch."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .errors import UserError
from .leaderboard import SETTING, label, table
from .placement import nearest, place
from .records import make_folder, write_atomic
from .spec import Record

DPI = 150
WIDTH = 13.0  # inches
# Okabe and Ito's colours, told apart with any colour vision; without their yellow, which is faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
MARKERS = "os^DvPX*<>phd8H"
FILLS = ("full", "hollow", "left", "top")
MARKER_POINTS = 7.0
LEADER_POINTS = 10.0  # a label farther than this from its point gets a line to it
INK, FAINT = "#222222", "#8A8A8A"
STYLE: dict[Any, Any] = {
    "axes.formatter.useoffset": False,
    "font.size": 8.5,
    "axes.edgecolor": "#555555",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,
    "svg.hashsalt": "petlbench",  # ids of SVG elements are random without it
}


@dataclass(frozen=True)
class Panel:
    """One horizontal axis: a column of the leaderboard, shown in units of `unit`."""

    column: str
    title: str
    name: str
    unit: float = 1.0
    always_log: bool = False


PANELS = (
    Panel("trainable_params", "trainable parameters", "parameter", always_log=True),
    Panel("accounted_bytes", "accounted training memory (MiB)", "memory", unit=2.0**20),
    Panel("train_seconds", "training time (s)", "time"),
)


def draw(results: Iterable[Record] | pd.DataFrame, out_dir: Path) -> list[Path]:
    """Write a PNG and an SVG per task, data set and backbone that has a score; the paths, in table order.

    `results` is records or the frame `leaderboard.table` made of them. The same results give the same bytes with the
    same matplotlib. Raises UserError when there is nothing to draw or the folder cannot be written.
    """
    frame = results if isinstance(results, pd.DataFrame) else table(results)
    scored = frame[frame["score_mean"].notna()]
    drawable = list(dict.fromkeys(scored[SETTING].itertuples(index=False, name=None)))
    if not drawable:
        raise UserError("nothing to draw: no cell has a score; run a suite whose cells end ok first")
    make_folder(out_dir)
    paths = []
    for setting in drawable:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(setting))
        for suffix, data in _files(frame, setting).items():
            write_atomic(out_dir / f"{stem}.{suffix}", data)
            paths.append(out_dir / f"{stem}.{suffix}")
    return paths


def _files(frame: pd.DataFrame, setting: tuple[str, ...]) -> dict[str, bytes]:
    contents = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says, the same figure
        matplotlib.rcParams.update(STYLE)
        figure = tradeoff_figure(frame, setting)
        for suffix, metadata in (("png", None), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=DPI, metadata=metadata)
            contents[suffix] = buffer.getvalue()
    return contents


def tradeoff_figure(frame: pd.DataFrame, setting: tuple[str, ...]) -> Figure:
    """The three panels of one (task, dataset, backbone). A method looks the same in every setting of `frame`."""
    rows = frame[(frame[SETTING] == list(setting)).all(axis=1)]
    styles = {name: style for style, name in enumerate(sorted({label(row) for row in frame.itertuples()}))}
    scored = rows[rows["score_mean"].notna()]
    notes = _footnotes(rows, frame.attrs)
    machines = frame.attrs.get("machines", {}).get(tuple(setting), [])
    height = 4.3 + 0.12 * max(0, len(scored) - 10) + 0.16 * len(notes)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)
    top, bottom = 0.62 if machines else 0.42, 0.52 + 0.16 * len(notes)
    grid = {"left": 0.062, "right": 0.99, "top": 1 - top / height, "bottom": bottom / height, "wspace": 0.07}
    all_axes = figure.subplots(1, len(PANELS), sharey=True, gridspec_kw=grid)
    figure.text(0.012, 1 - 0.12 / height, " · ".join(setting), fontsize=11.5, fontweight="bold", va="top")
    if machines:
        figure.text(0.012, 1 - 0.36 / height, "measured on " + "; ".join(machines), color="#555555", va="top")
    for number, note in enumerate(reversed(notes)):
        figure.text(0.012, (0.06 + 0.16 * number) / height, note, fontsize=7.5, color="#555555", va="bottom")
    _scale_scores(all_axes[0], scored)
    for axes, panel in zip(all_axes, PANELS, strict=True):
        _draw_panel(axes, panel, _visible(scored, panel, frame.attrs), styles)
    return figure


def _visible(scored: pd.DataFrame, panel: Panel, attrs: Mapping[Any, Any]) -> pd.DataFrame:
    """The rows a panel can show; timings taken while other cells ran say nothing about a method."""
    shown = scored[scored[panel.column].notna()]
    return shown.drop(index=shown.index.intersection(list(_hidden(panel, attrs))))


def _hidden(panel: Panel, attrs: Mapping[Any, Any]) -> set[int]:
    return attrs.get("contended", set()) if panel.column == "train_seconds" else set()


def _footnotes(rows: pd.DataFrame, attrs: Mapping[Any, Any]) -> list[str]:
    scored = rows[rows["score_mean"].notna()]
    notes = ["Grey steps: Pareto front (no other point scores as well at as low a cost)."]
    repeated = scored.loc[scored["score_std"].notna(), "seeds"]
    if len(repeated):
        seeds = "–".join(str(count) for count in sorted({repeated.min(), repeated.max()}))
        notes[0] += f" Error bars: one sample standard deviation over {seeds} seeds."
    failed = []
    for row in rows[rows["outcome"] != "ok"].itertuples():
        runs = attrs.get("runs", {}).get(row.Index)
        failed.append(f"{label(row)}: {row.outcome}" + (f" ({runs - row.seeds} of {runs} seeds)" if runs else ""))
    if failed:
        notes.append(f"Failed: {', '.join(failed)}.")
    for panel in PANELS:
        hidden = _hidden(panel, attrs)
        contended = [label(row) for row in scored.itertuples() if row.Index in hidden]
        unknown = [label(row) for row in scored[scored[panel.column].isna()].itertuples()]
        if contended:
            notes.append(f"Not in the {panel.name} panel, timed while other cells ran: {', '.join(contended)}.")
        if unknown:
            notes.append(f"Not in the {panel.name} panel, not measured: {', '.join(unknown)}.")
    notes += [f"{text}." for text in attrs.get("notes", {}).get(tuple(rows[SETTING].iloc[0]), [])]
    return [line for note in notes for line in textwrap.wrap(note, 185)]


def _scale_scores(axes: Axes, scored: pd.DataFrame) -> None:
    spread = scored["score_std"].fillna(0.0)
    low, high = (scored["score_mean"] - spread).min(), (scored["score_mean"] + spread).max()
    pad = 0.14 * (high - low) or 0.05 * abs(high) or 0.5
    axes.set_ylim(low - pad, high + pad)
    axes.set_ylabel(next((name for name in scored["metric"] if name), "score"))


def _draw_panel(axes: Axes, panel: Panel, rows: pd.DataFrame, styles: Mapping[str, int]) -> None:
    axes.set_xlabel(panel.title)
    axes.tick_params(axis="y", length=3.0 if panel is PANELS[0] else 0.0)
    if rows.empty:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color=FAINT)
        return
    x, y = rows[panel.column].to_numpy(float) / panel.unit, rows["score_mean"].to_numpy(float)
    error = rows["score_std"].fillna(0.0).to_numpy(float)
    _scale_costs(axes, x, panel)
    front = _front(x, y, (rows["outcome"] == "ok").to_numpy())
    steps = np.array([[x[front], y[front]]]).reshape(2, -1).T
    if len(steps):
        steps = np.vstack([steps, [axes.get_xlim()[1], steps[-1, 1]]])
        axes.step(*steps.T, where="post", color=FAINT, linewidth=1.1, zorder=1)
    axes.errorbar(
        x, y, np.where(error > 0, error, np.nan), fmt="none", ecolor=FAINT, elinewidth=0.9, capsize=2.0, zorder=2
    )
    names = [label(row) for row in rows.itertuples()]
    for index, name in enumerate(names):
        axes.plot(x[index], y[index], linestyle="", markersize=MARKER_POINTS, zorder=4, **look(styles[name]))
    _draw_labels(axes, np.stack([x, y], axis=1), error, steps, names)


def look(style: int) -> dict[str, Any]:
    """Look number `style`: no two of the first sixty share shape and filling, so that colour is never needed."""
    shape, filling = MARKERS[style % len(MARKERS)], FILLS[style // len(MARKERS) % len(FILLS)]
    color = PALETTE[style % len(PALETTE)]
    if filling == "full":
        return {"marker": shape, "markerfacecolor": color, "markeredgecolor": INK, "markeredgewidth": 0.5}
    ring = {"marker": shape, "markeredgecolor": color, "markeredgewidth": 1.2}
    if filling == "hollow":
        return {**ring, "markerfacecolor": "white"}
    return {**ring, "markerfacecolor": color, "markerfacecoloralt": "white", "fillstyle": filling}


def _scale_costs(axes: Axes, x: np.ndarray, panel: Panel) -> None:
    low, high = float(x.min()), float(x.max())
    # Engineering notation (k, M) would write milliseconds as `m`, so only counts get it.
    form: Formatter = EngFormatter(sep="") if panel.always_log else FuncFormatter(lambda value, _: f"{value:g}")
    if (panel.always_log or high > 10 * low) and low > 0:
        pad = (high / low) ** 0.14 if high > low else 2.0
        axes.set_xscale("log")
        axes.set_xlim(low / pad, high * pad)
        decades = LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0))
        axes.xaxis.set_major_locator(decades if high > 4 * low else MaxNLocator(5))
    elif panel.always_log and high > 0:  # a method may train nothing at all
        smallest = float(x[x > 0].min())
        axes.set_xscale("symlog", linthresh=smallest, linscale=0.4)
        axes.set_xlim(-0.5 * smallest, 3 * high)
    else:
        pad = 0.14 * (high - low) or 0.2 * abs(high) or 0.5
        axes.set_xlim(low - pad, high + pad)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(form)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _front(x: np.ndarray, y: np.ndarray, eligible: np.ndarray) -> list[int]:
    """Points that no eligible point matches in score at as low a cost, from cheap to dear."""
    best, front = -np.inf, []
    for index in np.lexsort((-y, x)):
        if eligible[index] and y[index] > best:
            best = y[index]
            front.append(int(index))
    return front


def _draw_labels(axes: Axes, points: np.ndarray, error: np.ndarray, steps: np.ndarray, names: Sequence[str]) -> None:
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    axes.apply_aspect()
    unit = DPI / 72
    anchors = axes.transData.transform(points)
    style: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}
    texts = [
        axes.annotate(_short(name), point, (0, 0), ha="center", va="center", fontsize=8, zorder=6, **style)
        for name, point in zip(names, points, strict=True)
    ]
    margin = 1.5 * unit
    extents = np.array([text.get_window_extent(renderer).size for text in texts]) + 2 * margin
    reach = MARKER_POINTS / 2 * unit
    solid = np.hstack([anchors - reach, anchors + reach])
    ends = [axes.transData.transform(points + np.outer(sign * error, [0, 1])) for sign in (-1, 1)]
    corners = axes.transData.transform(steps) if len(steps) else np.empty((0, 2))
    knees = np.stack([corners[1:, 0], corners[:-1, 1]], axis=1)
    thin = np.vstack([_flat(*ends), _flat(corners[:-1], knees), _flat(knees, corners[1:])])
    frame = axes.bbox.extents + 2 * unit * np.array([1, 1, -1, -1])
    boxes = place(anchors, extents, frame, solid, thin, unit)
    for index, (text, box, anchor) in enumerate(zip(texts, boxes, anchors, strict=True)):
        text.set_position((box.reshape(2, 2).mean(0) - anchor) / unit)
        text.set_gid(f"label-{axes.get_subplotspec().colspan.start}-{index}")  # type: ignore[union-attr]
        start = (nearest(anchor, box) - anchor) / unit
        if np.hypot(*start) > LEADER_POINTS:
            line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": MARKER_POINTS / 2}
            axes.annotate("", points[index], tuple(start), arrowprops=line, zorder=3, **style)


def _flat(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Axis-parallel lines as boxes one pixel wide."""
    return np.hstack([np.minimum(start, end) - 0.5, np.maximum(start, end) + 0.5])


def _short(name: str) -> str:
    """At most 32 characters: the beginning and the end tell most."""
    return name if len(name) <= 32 else f"{name[:18]}…{name[-13:]}"
