"""Size curves, Pareto fronts and hypervolumes of the leaderboard: what a method reaches at what cost. No torch."""

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
    """A corner of the plane of costs and scores."""

    cost: float
    score: float


class Curve(NamedTuple):
    """What the sizes of one method have in common; `variant` lacks the size, `size_name` is empty for a lone point."""

    method: str
    variant: str
    size_name: str

    @property
    def label(self) -> str:
        return label(self) + (f" ({self.size_name})" if self.size_name else "")


def curve_of(row: Any) -> Curve:
    """The curve that a row of the leaderboard lies on: that of its method if its variant names its size (`rank=4`).

    A row with a size that its variant does not name, such as a method's default, was not run for a curve: it stands
    alone, because its recipe may be another.
    """
    if isinstance(row.size_name, str) and row.size_name and pd.notna(row.size):
        size = rf"(?<![A-Za-z0-9]){re.escape(row.size_name)}=[^\s,;_]+"
        rest, found = re.subn(size, "", row.variant)
        if found:
            return Curve(row.method, re.sub(r"[\s,;_]{2,}", " ", rest).strip(" ,;_+-"), row.size_name)
    return Curve(row.method, row.variant, "")


def curves(rows: pd.DataFrame) -> dict[Curve, list[int]]:
    """Positions in `rows` of the points of each curve, from the smallest size to the largest, curves by name."""
    found: dict[Curve, list[int]] = {}
    for position, row in enumerate(rows.itertuples()):
        found.setdefault(curve_of(row), []).append(position)
    sizes = rows["size"].to_numpy(float, na_value=np.nan)
    return {curve: sorted(found[curve], key=lambda position: sizes[position]) for curve in sorted(found)}


def current(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of one setting's rows that have a score and are not stale; the stale ones where there are no others."""
    scored = rows[rows["score_mean"].notna()]
    stale = scored["stale"].to_numpy(bool)
    return scored if stale.all() else scored[~stale]


def measured(rows: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The rows whose cost is known; timings taken while other cells ran say nothing about a method."""
    known = rows[rows[axis].notna()]
    return known[~known["contended"].to_numpy(bool)] if axis == "train_seconds" else known


def front(costs: Sequence[float] | np.ndarray, scores: Sequence[float] | np.ndarray) -> list[int]:
    """Indices of the points that no other matches in score at as low a cost, from cheap to dear; one of equal points.

    Raises ValueError for vectors of unequal length, NaN, or a negative cost.
    """
    x, y = np.asarray(costs, dtype=float), np.asarray(scores, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or np.isnan(x).any() or np.isnan(y).any() or (x < 0).any():
        raise ValueError("costs and scores must be two vectors of one length without NaN, and no cost negative")
    best, found = -np.inf, []
    for index in np.lexsort((-y, x)):
        if y[index] > best:
            best = y[index]
            found.append(int(index))
    return found


def hypervolume(
    costs: Sequence[float] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    reference: tuple[float, float],
    ideal: tuple[float, float] | None = None,
) -> float:
    """Share, in [0, 1], of the box between `reference` and `ideal` that the points dominate; cost is in logarithm.

    `reference` is the (cost, score) of the box's dear and bad corner, `ideal` of its cheap and good one (default: the
    smallest positive cost and the best score). What lies beyond a side of the box counts as lying on it; so a cost of
    zero, which has no logarithm, counts as the ideal cost. NaN when the box has no area. After Zitzler and Thiele
    (1999), "Multiobjective evolutionary algorithms", IEEE TEC 3(4). Raises ValueError as `front` does.
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
    """The reference and the ideal corner that all hypervolumes of `rows` on `axis` are taken in.

    The reference is the largest cost of any row and the score of `floors`, methods whose score counts as no gain (the
    lowest score where none of them was run); the ideal is the smallest cost and the best score. So a curve is worth
    what it saves and gains together: the dearest row saves nothing, the floor gains nothing, and both count zero alone.
    Where a cost is zero, the ideal cost is a tenth of the smallest other one. NaN stands for a cost where all are zero,
    and for what no row gives.
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
    """Hypervolume of all of one setting's rows together; NaN where the rows span no area. `floors` as in `box`."""
    reference, ideal = box(rows, axis, floors)
    return hypervolume(rows[axis].to_numpy(float), rows["score_mean"].to_numpy(float), reference, ideal)


def has_curves(frame: pd.DataFrame) -> bool:
    """Is there a method with a score at two sizes or more?"""
    for _, rows in frame.groupby(SETTING, sort=False):
        if any(curve.size_name and len(points) > 1 for curve, points in curves(current(rows)).items()):
            return True
    return False


def curve_table(frame: pd.DataFrame, floors: Collection[str] = ()) -> pd.DataFrame:
    """The hypervolume of each curve, and of each lone point, in every setting and on every axis, best first.

    `frame` is a leaderboard. Only rows that ended `ok` count, and no stale one beside fresh ones. `points` is how many
    rows a curve has on the axis; `share_of_front` is its hypervolume over that of all rows together. Missing where the
    rows span no area. `box` says in what box: values compare within a setting and an axis only.
    """
    found: list[dict[str, Any]] = []
    for setting, rows in frame.groupby(SETTING, sort=False):
        ok = current(rows).query("outcome == 'ok'")
        for axis in AXES:
            lines = _lines(measured(ok, axis), axis, floors)
            found += [{**dict(zip(SETTING, setting, strict=True)), **line} for line in lines]
    return pd.DataFrame(found, columns=list(COLUMNS))


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
