"""Is a difference real? Seed statistics and the paired bootstrap over test samples. numpy; imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UserError
from .spec import Record

if TYPE_CHECKING:
    import pandas as pd

    from .records import Merged, Store

BLOCK_INDICES = 2**21  # indices drawn at once: with the values they pick, 32 MiB


@dataclass(frozen=True)
class Interval:
    """A mean paired difference and the ends of its confidence interval, in units of the score."""

    mean_difference: float
    low: float
    high: float


def mean_std(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (ddof 1); NaN for what too few values leave unknown."""
    array = np.asarray(list(values), dtype=float)
    mean = float(array.mean()) if array.size else float("nan")
    return mean, float(array.std(ddof=1)) if array.size > 1 else float("nan")


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """The percentile interval of mean(a - b) over resampled test samples (Efron and Tibshirani 1993, chapter 13).

    `a` and `b`, each [n], are the scores of two methods on the same n samples in the same order. The same seed gives
    the same interval. Raises ValueError for unequal, empty or non-finite scores, or arguments out of range.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"paired scores must be two non-empty vectors of one length, not {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("paired scores must be finite")
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"resamples must be positive and confidence in (0, 1), not {resamples} and {confidence}")
    difference = a - b
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, BLOCK_INDICES // difference.size)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        means[start : start + size] = difference[rng.integers(difference.size, size=(size, difference.size))].mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(difference.mean()), float(low), float(high))


def compare(
    store: Store | Merged, a: str, b: str, resamples: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> pd.DataFrame:
    """Two methods (`method` or `method:variant`) paired by test sample, a row per task, data set, backbone and seed.

    Columns: task, dataset, backbone, seed, metric, mean_a, mean_b, difference (a - b), low, high. Raises UserError for
    an unknown method, when no pair of `ok` records exists, or when a pair was not tested on the same samples.
    """
    import pandas as pd

    records = store.load()
    ours, theirs = (_by_setting(records, name) for name in (a, b))
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise UserError(f"{a} and {b} share no task, data set, backbone and seed that ended ok for both; run both")
    rows = []
    for key in shared:
        metric, left, right = _paired_scores(store, ours[key], theirs[key])
        interval = paired_bootstrap(left, right, resamples, seed, confidence)
        rows.append(
            {
                **dict(zip(("task", "dataset", "backbone", "seed"), key, strict=True)),
                "metric": metric,
                "mean_a": float(left.mean()),
                "mean_b": float(right.mean()),
                "difference": interval.mean_difference,
                "low": interval.low,
                "high": interval.high,
            }
        )
    return pd.DataFrame(rows)


def _by_setting(records: Sequence[Record], name: str) -> dict[tuple[str, str, str, int], Record]:
    labels = {record.cell.id: _label(record) for record in records}
    # A bare method name stands for its variant as long as there is only one.
    variants = {text for text in labels.values() if text.split(":")[0] == name}
    wanted = name if name in labels.values() or len(variants) != 1 else variants.pop()
    if wanted not in labels.values():
        known = sorted(set(labels.values()))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"no records of method {name}; {hint}recorded: {', '.join(known) or 'nothing'}")
    found: dict[tuple[str, str, str, int], Record] = {}
    for record in records:
        if labels[record.cell.id] != wanted or record.outcome != "ok":
            continue
        cell = record.cell
        key = (cell.task, cell.dataset, cell.backbone, cell.seed)
        if key in found:
            raise UserError(f"{cell.label} was run with several recipes or configurations; keep one per folder")
        found[key] = record
    return found


def _label(record: Record) -> str:
    cell = record.cell
    return f"{cell.method}:{cell.variant}" if cell.variant else cell.method


def _paired_scores(store: Store | Merged, a: Record, b: Record) -> tuple[str, np.ndarray, np.ndarray]:
    if a.main_metric != b.main_metric:
        raise UserError(
            f"{a.cell.label} is scored by {a.main_metric}, {b.cell.method} by {b.main_metric}; rerun one of them"
        )
    left, right = (_scores(store, record) for record in (a, b))
    if left.keys() != right.keys():
        raise UserError(
            f"{a.cell.label} and {b.cell.method} were tested on different samples "
            f"({len(left.keys() ^ right.keys())} without a partner); rerun both on the same data"
        )
    order = list(left)
    return a.main_metric, np.array([left[key] for key in order]), np.array([right[key] for key in order])


def _scores(store: Store | Merged, record: Record) -> dict[Any, float]:
    """The main metric of each sample id."""
    samples = store.samples(record)
    where = record.cell.label
    if samples is None:
        raise UserError(f"{where} has no per-sample scores; rerun it")
    ids, values = samples["sample_ids"], samples["scores"].get(record.main_metric)
    if values is None:
        raise UserError(f"{where} has no per-sample scores of {record.main_metric}; rerun it")
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise UserError(f"the per-sample scores of {where} are not numbers; rerun it") from error
    if len(set(ids)) != len(ids) or array.shape != (len(ids),) or not ids or not np.isfinite(array).all():
        raise UserError(f"{where} does not have one finite score for each of its distinct sample ids; rerun it")
    return dict(zip(ids, array.tolist(), strict=True))
