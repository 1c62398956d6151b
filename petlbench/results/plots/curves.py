"""Compute size curves, Pareto fronts and hypervolumes of the leaderboard: score against cost. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from petlbench.results.rows import SETTING, label

AXES = ("trainable_params", "accounted_bytes", "train_seconds", "step_flops")
COLUMNS = (*SETTING, "method", "variant", "size_name", "axis", "points", "hypervolume", "share_of_front")


class Corner(NamedTuple):
    """A corner of a box in the plane of costs and scores."""

    cost: float
    score: float


class Curve(NamedTuple):
    """The name that all sizes of a method share: `variant` lacks the size, `size_name` is empty for a lone point."""

    method: str
    variant: str
    size_name: str

    @property
    def label(self) -> str:
        return label(self) + (f" ({self.size_name})" if self.size_name else "")


def curve_of(row: Any) -> Curve:
    """Return the curve of a row of the leaderboard: its method's if its variant names its size (`rank=4`).

    A row whose variant does not name its size, such as a method's default, is a lone point, because it was not run
    for a curve and may have another recipe.
    """
    if isinstance(row.size_name, str) and row.size_name and pd.notna(row.size):
        size = rf"(?<![A-Za-z0-9]){re.escape(row.size_name)}=[^\s,;_]+"
        rest, count = re.subn(size, "", row.variant)
        if count:
            return Curve(row.method, re.sub(r"[\s,;_]{2,}", " ", rest).strip(" ,;_+-"), row.size_name)
    return Curve(row.method, row.variant, "")


def curves(rows: pd.DataFrame) -> dict[Curve, list[int]]:
    """Return the positions in `rows` of each curve's points, from the smallest size to the largest; curves by name."""
    members: dict[Curve, list[int]] = {}
    for position, row in enumerate(rows.itertuples()):
        members.setdefault(curve_of(row), []).append(position)
    sizes = rows["size"].to_numpy(float, na_value=np.nan)
    return {curve: sorted(members[curve], key=lambda position: sizes[position]) for curve in sorted(members)}


def current(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of one setting that have a score and are not stale; the stale ones if there are no others."""
    scored = rows[rows["score_mean"].notna()]
    stale = scored["stale"].to_numpy(bool)
    return scored if stale.all() else scored[~stale]


def measured(rows: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Return the rows whose cost is known, without times taken while other cells ran, which say nothing of a method."""
    with_cost = rows[rows[axis].notna()]
    return with_cost[~with_cost["contended"].to_numpy(bool)] if axis == "train_seconds" else with_cost


def front(costs: Sequence[float] | np.ndarray, scores: Sequence[float] | np.ndarray) -> list[int]:
    """Return the Pareto front: points that no other equals in score at as low a cost, as indices from cheap to dear.

    Of equal points it holds one. Raise ValueError for vectors of unequal length, for NaN and for a negative cost.
    """
    x, y = np.asarray(costs, dtype=float), np.asarray(scores, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or np.isnan(x).any() or np.isnan(y).any() or (x < 0).any():
        raise ValueError("costs and scores must be two vectors of one length without NaN, and no cost negative")
    best: float = -np.inf
    chosen: list[int] = []
    for index in np.lexsort((-y, x)):
        if y[index] > best:
            best = y[index]
            chosen.append(int(index))
    return chosen


def hypervolume(
    costs: Sequence[float] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    reference: tuple[float, float],
    ideal: tuple[float, float] | None = None,
) -> float:
    """Return the share, in [0, 1], of the box between `reference` and `ideal` that the points dominate, in log cost.

    `reference` is the (cost, score) of the box's dear and bad corner, `ideal` of its cheap and good one (default: the
    smallest positive cost and the best score). A point beyond a side of the box counts as on it; so a cost of zero,
    which has no logarithm, counts as the ideal cost. The result is NaN if the box has no area. After Zitzler and
    Thiele (1999), "Multiobjective evolutionary algorithms", IEEE TEC 3(4). Raise ValueError as `front` does.
    """
    chosen = front(costs, scores)
    x, y = np.asarray(costs, dtype=float), np.asarray(scores, dtype=float)
    if ideal is None:
        ideal = (x[x > 0].min(initial=np.inf), y.max(initial=-np.inf))
    if not (0 < ideal[0] < reference[0] < np.inf and reference[1] < ideal[1]):
        return float("nan")
    saved = np.log(reference[0] / np.clip(x[chosen], *(ideal[0], reference[0]))) / np.log(reference[0] / ideal[0])
    gained = np.clip((y[chosen] - reference[1]) / (ideal[1] - reference[1]), 0.0, 1.0)
    return float((np.diff(gained, prepend=0.0) * saved).sum())


def box(rows: pd.DataFrame, axis: str, floors: Collection[str] = ()) -> tuple[Corner, Corner]:
    """Return the reference and the ideal corner of the box for all hypervolumes of `rows` on `axis`.

    The reference is the largest cost of any row and the score of `floors`, methods whose score counts as no gain (the
    lowest score if none of them was run); the ideal is the smallest cost and the best score. So a curve must both save
    and gain: the dearest row saves nothing, the floor gains nothing, and each alone has volume zero. If a cost is zero,
    the ideal cost is a tenth of the smallest other one. Both corners are NaN if no row has a positive cost.
    """
    costs, scores = rows[axis].to_numpy(float), rows["score_mean"].to_numpy(float)
    positive = costs[costs > 0]
    if not positive.size:
        return Corner(np.nan, np.nan), Corner(np.nan, np.nan)
    floor = rows.loc[rows["method"].isin(floors), "score_mean"]
    cheapest = positive.min() / (1.0 if positive.size == costs.size else 10.0)
    reference = Corner(float(positive.max()), float(scores.min() if floor.empty else floor.max()))
    return reference, Corner(float(cheapest), float(scores.max()))


def front_hypervolume(rows: pd.DataFrame, axis: str, floors: Collection[str] = ()) -> float:
    """Return the hypervolume of all rows of one setting; NaN if the rows span no area. `floors` is as in `box`."""
    reference, ideal = box(rows, axis, floors)
    return hypervolume(rows[axis].to_numpy(float), rows["score_mean"].to_numpy(float), reference, ideal)


def has_curves(frame: pd.DataFrame) -> bool:
    """Return whether a method has a score at two sizes or more."""
    for _, rows in frame.groupby(SETTING, sort=False):
        if any(curve.size_name and len(points) > 1 for curve, points in curves(current(rows)).items()):
            return True
    return False


def curve_table(frame: pd.DataFrame, floors: Collection[str] = ()) -> pd.DataFrame:
    """Return the hypervolume of each curve and lone point, in every setting and on every axis, best first.

    `frame` is a leaderboard. Only rows that ended `ok` count, and stale ones only if there are no fresh ones. `points`
    is the number of rows of a curve on the axis; `share_of_front` is its hypervolume over that of all rows together,
    NaN if the rows span no area. `box` gives the box, so compare values within one setting and axis only.
    """
    table: list[dict[str, Any]] = []
    for setting, rows in frame.groupby(SETTING, sort=False):
        ok = current(rows).query("outcome == 'ok'")
        for axis in AXES:
            lines = _lines(measured(ok, axis), axis, floors)
            table += [{**dict(zip(SETTING, setting, strict=True)), **line} for line in lines]
    return pd.DataFrame(table, columns=list(COLUMNS))


def _lines(rows: pd.DataFrame, axis: str, floors: Collection[str]) -> list[dict[str, Any]]:
    if rows.empty:
        return []
    corners, whole = box(rows, axis, floors), front_hypervolume(rows, axis, floors)
    lines = []
    for curve, points in curves(rows).items():
        costs, scores = (rows[name].to_numpy(float)[points] for name in (axis, "score_mean"))
        volume = hypervolume(costs, scores, *corners)
        share = volume / whole if whole > 0 else float("nan")
        lines.append(
            {**curve._asdict(), "axis": axis, "points": len(points), "hypervolume": volume, "share_of_front": share}
        )
    return sorted(lines, key=lambda line: -line["hypervolume"])
