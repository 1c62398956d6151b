"""Draw trade-off figures of the leaderboard: score against parameters, memory, time and compute. Imports no torch."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from petlbench.core.errors import UserError
from petlbench.core.files import make_folder, write_atomic
from petlbench.core.record import Record
from petlbench.results.leaderboard import table
from petlbench.results.plots.curves import (
    current,
    curve_of,
    curve_table,
    curves,
    front_hypervolume,
    has_curves,
    measured,
)
from petlbench.results.plots.labels import INK
from petlbench.results.plots.panels import GREY, PANELS, Panel, draw_panel, error_ends
from petlbench.results.rows import SETTING, label

DPI = 150
WIDTH = 16.0  # inches
NOTE_CHARACTERS = 280  # in a line of a footnote
STYLE: dict[Any, Any] = {
    "axes.formatter.useoffset": False,
    "font.size": 8.5,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,
    "svg.hashsalt": "petlbench",  # without it the ids of SVG elements are random
}


def draw_plots(results: Iterable[Record] | pd.DataFrame, out_dir: Path, floors: Collection[str] = ()) -> list[Path]:
    """Write a PNG and an SVG per task, data set and backbone that has a score; return the paths in table order.

    If a method was run at several sizes, `curves.csv` (see `curves.curve_table`) comes last. `results` are records
    or the frame that `leaderboard.table` made of them; `floors` are the methods whose score counts as no gain. The same
    results give the same bytes with the same matplotlib. Raise UserError if there is nothing to draw or the folder
    cannot be written.
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
        for suffix, data in _files(frame, setting, floors).items():
            write_atomic(out_dir / f"{stem}.{suffix}", data)
            paths.append(out_dir / f"{stem}.{suffix}")
    if has_curves(frame):
        paths.append(out_dir / "curves.csv")
        write_atomic(paths[-1], curve_table(frame, floors).to_csv(index=False, lineterminator="\n").encode())
    return paths


def _files(frame: pd.DataFrame, setting: tuple[str, ...], floors: Collection[str]) -> dict[str, bytes]:
    contents = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # so that the user's matplotlibrc does not change the figure
        matplotlib.rcParams.update(STYLE)
        figure = tradeoff_figure(frame, setting, floors)
        for suffix, metadata in (("png", None), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=DPI, metadata=metadata)
            contents[suffix] = buffer.getvalue()
    return contents


def tradeoff_figure(frame: pd.DataFrame, setting: tuple[str, ...], floors: Collection[str] = ()) -> Figure:
    """Draw the panels of one (task, dataset, backbone). A method looks the same in every setting of `frame`."""
    rows = frame[(frame[SETTING] == list(setting)).all(axis=1)]
    styles = {curve: style for style, curve in enumerate(sorted({curve_of(row) for row in frame.itertuples()}))}
    shown = current(rows)
    notes = _footnotes(rows, shown, frame.attrs, floors)
    machines = frame.attrs.get("machines", {}).get(tuple(setting), [])
    height = 4.5 + 0.12 * max(0, len(curves(shown)) - 10) + 0.16 * len(notes)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)
    top, bottom = 0.78 if machines else 0.58, 0.52 + 0.16 * len(notes)
    grid = {"left": 0.05, "right": 0.992, "top": 1 - top / height, "bottom": bottom / height, "wspace": 0.06}
    all_axes = figure.subplots(1, len(PANELS), sharey=True, gridspec_kw=grid)
    figure.text(0.01, 1 - 0.12 / height, " · ".join(setting), fontsize=11.5, fontweight="bold", va="top")
    if machines:
        figure.text(0.01, 1 - 0.36 / height, "measured on " + "; ".join(machines), color=GREY, va="top")
    for number, note in enumerate(reversed(notes)):
        figure.text(0.01, (0.06 + 0.16 * number) / height, note, fontsize=7.5, color=GREY, va="bottom")
    _scale_scores(all_axes[0], shown)
    for axes, panel in zip(all_axes, PANELS, strict=True):
        draw_panel(axes, panel, measured(shown, panel.column), styles, floors)
    return figure


def _scale_scores(axes: Axes, shown: pd.DataFrame) -> None:
    ends = error_ends(shown)
    low, high = float(ends[0].min()), float(ends[1].max())
    pad = 0.14 * (high - low) or 0.05 * abs(high) or 0.5
    axes.set_ylim(low - pad, high + pad)
    axes.set_ylabel(next((name for name in shown["metric"] if name), "score"))


def _footnotes(rows: pd.DataFrame, shown: pd.DataFrame, attrs: Mapping[Any, Any], floors: Collection[str]) -> list[str]:
    """Return the notes that explain the figure; `rows` are the setting's, `shown` those that are drawn."""
    notes = [
        "Grey steps: Pareto front (no other point scores as well at as low a cost).",
        _about_hypervolume(shown, floors),
        _about_bars(shown),
        _about_curves(shown),
    ]
    failed = []
    for row in rows[rows["outcome"] != "ok"].itertuples():
        runs = attrs.get("runs", {}).get(row.Index)
        failed.append(f"{label(row)}: {row.outcome}" + (f" ({runs - row.seeds} of {runs} seeds)" if runs else ""))
    lines = [
        " ".join(filter(None, notes)),
        _about_stale(rows, shown),
        f"Failed: {', '.join(failed)}." if failed else "",
        *(note for panel in PANELS for note in _about_missing(shown, panel)),
        *(f"{text}." for text in attrs.get("notes", {}).get(tuple(rows[SETTING].iloc[0]), [])),
    ]
    return [line for text in lines for line in textwrap.wrap(text, NOTE_CHARACTERS)]


def _about_hypervolume(shown: pd.DataFrame, floors: Collection[str]) -> str:
    ok = shown[shown["outcome"] == "ok"]
    if not any(front_hypervolume(measured(ok, panel.column), panel.column) >= 0 for panel in PANELS):
        return ""
    shown_floors = sorted(set(floors) & set(shown["method"]))
    floor = f"the score of {' or '.join(shown_floors)}" if shown_floors else "the lowest score"
    return (
        f"Hypervolume: share of the box from the largest cost and {floor} to the smallest cost and the best score that "
        "the front dominates, costs in logarithm."
    )


def _about_bars(shown: pd.DataFrame) -> str:
    interval = shown["score_low"].notna() & shown["score_high"].notna()
    repeated = shown.loc[shown["score_std"].notna() & ~interval, "seeds"]
    notes = ["95 % interval of the mean over seeds and test samples"] if interval.any() else []
    if len(repeated):
        seeds = "–".join(str(count) for count in sorted({repeated.min(), repeated.max()}))
        notes.append(f"one sample standard deviation over {seeds} seeds")
    return f"Error bars: {', else '.join(notes)}." if notes else ""


def _about_curves(shown: pd.DataFrame) -> str:
    drawn = any(len(points) > 1 for points in curves(shown).values())
    return "Lines: one method at its sizes (small print)." if drawn else ""


def _about_stale(rows: pd.DataFrame, shown: pd.DataFrame) -> str:
    stale = rows[rows["stale"].to_numpy(bool) & rows["score_mean"].notna().to_numpy(bool)]
    if stale.empty:
        return ""
    if shown["stale"].all():
        return "All of these are stale: measured before code, data or weights changed."
    return f"Stale, not drawn: {', '.join(label(row) for row in stale.itertuples())}."


def _about_missing(shown: pd.DataFrame, panel: Panel) -> list[str]:
    with_cost = shown[shown[panel.column].notna()]
    missing = {
        "timed while other cells ran": with_cost.drop(index=measured(shown, panel.column).index),
        "not measured": shown.drop(index=with_cost.index),
    }
    return [
        f"Not in the {panel.name} panel, {why}: {', '.join(label(row) for row in rows.itertuples())}."
        for why, rows in missing.items()
        if len(rows)
    ]
