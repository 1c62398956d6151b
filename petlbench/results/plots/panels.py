"""Draw one panel of a trade-off figure: points, size curves, front and labels over one cost. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from petlbench.results.plots.curves import Curve, curves, front, front_hypervolume
from petlbench.results.plots.labels import FAINT, INK, Labels
from petlbench.results.rows import label

# Okabe and Ito's colours, distinct with any colour vision; without their yellow, which is faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
MARKERS = "os^DvPX*<>phd8H"
FILLS = ("full", "hollow", "left", "top")
MARKER_POINTS = 7.0
CURVE_MARKER_POINTS = 5.0
GREY, BAR = "#555555", "#BDBDBD"


@dataclass(frozen=True)
class Panel:
    """One horizontal axis: a column of the leaderboard, shown in units of `unit`."""

    column: str
    title: str
    name: str
    unit: float = 1.0
    count: bool = False  # from one to billions, so always on a logarithmic axis


PANELS = (
    Panel("trainable_params", "trainable parameters", "parameter", count=True),
    Panel("accounted_bytes", "accounted training memory (MiB)", "memory", unit=2.0**20),
    Panel("train_seconds", "training time (s)", "time"),
    Panel("step_flops", "compute of a training step (GFLOP)", "compute", unit=1e9),
)


def draw_panel(
    axes: Axes, panel: Panel, rows: pd.DataFrame, styles: Mapping[Curve, int], floors: Collection[str] = ()
) -> None:
    """Draw `rows` of one setting, all with a score and this panel's cost; `styles` gives each curve its look number.

    `floors` are the methods whose score counts as no gain.
    """
    axes.set_xlabel(panel.title)
    axes.tick_params(axis="y", length=3.0 if panel is PANELS[0] else 0.0)
    if rows.empty:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color=FAINT)
        return
    points = np.stack([rows[panel.column].to_numpy(float) / panel.unit, rows["score_mean"].to_numpy(float)], axis=1)
    _scale_costs(axes, points[:, 0], panel)
    ok = (rows["outcome"] == "ok").to_numpy(bool)
    steps = _draw_front(axes, points[ok])
    volume = front_hypervolume(rows[ok], panel.column, floors)
    if not np.isnan(volume):
        axes.set_title(f"hypervolume {volume:.3f}", loc="right", fontsize=7.5, color=GREY, pad=3.0)
    bars = _draw_bars(axes, points, *error_ends(rows))
    members = curves(rows)
    for curve, indices in members.items():
        size = MARKER_POINTS if len(indices) == 1 else CURVE_MARKER_POINTS
        style = {"linestyle": "-", "linewidth": 1.1, "markersize": size, "zorder": 4, **look(styles[curve])}
        axes.plot(*points[indices].T, **style)
    labels = Labels(axes, points, MARKER_POINTS, _lines(members.values(), points, bars, steps))
    best = {curve: max(indices, key=lambda index: points[index, 1]) for curve, indices in members.items()}
    labels.name({i: curve.label if members[curve][1:] else label(rows.iloc[i]) for curve, i in best.items()})
    sizes = rows["size"].to_numpy(float, na_value=np.nan)
    labels.hint({i: f"{sizes[i]:g}" for indices in members.values() if indices[1:] for i in indices})


def error_ends(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return lower and upper ends [n] of the error bars: the 95 % interval, else ± one deviation, else the score."""
    names = ("score_mean", "score_std", "score_low", "score_high")
    mean, std, low, high = (rows[name].to_numpy(float, na_value=np.nan) for name in names)
    interval = ~(np.isnan(low) | np.isnan(high))
    std = np.nan_to_num(std)
    # A percentile interval may miss the mean; a bar must contain it.
    return np.minimum(np.where(interval, low, mean - std), mean), np.maximum(np.where(interval, high, mean + std), mean)


def look(style: int) -> dict[str, Any]:
    """Return look number `style`; the first sixty differ in shape or filling, so that nobody depends on colour."""
    shape, filling = MARKERS[style % len(MARKERS)], FILLS[style // len(MARKERS) % len(FILLS)]
    color = PALETTE[style % len(PALETTE)]
    if filling == "full":
        return {"marker": shape, "color": color, "markeredgecolor": INK, "markeredgewidth": 0.5}
    ring = {"marker": shape, "color": color, "markeredgewidth": 1.2}
    if filling == "hollow":
        return {**ring, "markerfacecolor": "white"}
    return {**ring, "markerfacecoloralt": "white", "fillstyle": filling}


def _scale_costs(axes: Axes, x: np.ndarray, panel: Panel) -> None:
    low, high = float(x.min()), float(x.max())
    # Engineering notation (k, M) would write milliseconds as `m`, so only counts get it.
    form: Formatter = EngFormatter(sep="") if panel.count else FuncFormatter(lambda value, _: f"{value:g}")
    if (panel.count or high > 10 * low) and low > 0:
        pad = (high / low) ** 0.14 if high > low else 1.8
        axes.set_xscale("log")
        axes.set_xlim(low / pad, high * pad)
        decades = LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0))
        axes.xaxis.set_major_locator(decades if high > 4 * low else MaxNLocator(4))
    elif panel.count and high > 0:  # a method may train nothing, and zero has no logarithm
        smallest = float(x[x > 0].min())
        axes.set_xscale("symlog", linthresh=smallest, linscale=0.4)
        axes.set_xlim(-0.5 * smallest, 3 * high)
    else:
        pad = 0.14 * (high - low) or 0.17 * abs(high) or 0.5
        axes.set_xlim(low - pad, high + pad)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(form)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_front(axes: Axes, points: np.ndarray) -> np.ndarray:
    """Draw the steps of the Pareto front of `points` [n, 2]; return their upper left corners [k, 2]."""
    chosen = front(*points.T)
    if not chosen:
        return np.empty((0, 2))
    steps = np.vstack([points[chosen], [axes.get_xlim()[1], points[chosen[-1], 1]]])
    axes.step(*steps.T, where="post", color=FAINT, linewidth=1.1, zorder=1)
    return steps


def _draw_bars(axes: Axes, points: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Draw the error bars that have a length; return the ends [n, 2, 2] of the bars of all points [n, 2]."""
    some = high > low
    reach = np.stack([points[:, 1] - low, high - points[:, 1]])[:, some]
    style: dict[str, Any] = {"fmt": "none", "ecolor": BAR, "elinewidth": 0.9, "capsize": 2.0, "zorder": 2}
    axes.errorbar(points[some, 0], points[some, 1], reach, **style)
    return np.stack([np.stack([points[:, 0], end], axis=1) for end in (low, high)], axis=1)


def _lines(members: Iterable[list[int]], points: np.ndarray, bars: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return all lines [k, 2, 2] of a panel, from point to point: error bars, steps of the front, curves."""
    knees = np.stack([steps[1:, 0], steps[:-1, 1]], axis=1)
    front_lines = [np.stack([steps[:-1], knees], axis=1), np.stack([knees, steps[1:]], axis=1)]
    return np.concatenate(
        [bars, *front_lines, *(points[list(pairwise(indices))] for indices in members if indices[1:])]
    )
