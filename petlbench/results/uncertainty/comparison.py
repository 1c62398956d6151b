"""Compare two methods sample by sample. Imports no torch."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from petlbench.core.errors import UserError
from petlbench.core.record import OLDER, Record
from petlbench.results.rows import SETTING, label
from petlbench.results.store import Merged, Store
from petlbench.results.uncertainty.bootstrap import covariances
from petlbench.results.uncertainty.sample_scores import score_matrix
from petlbench.results.uncertainty.significance import p_values, quantiles

if TYPE_CHECKING:
    import pandas as pd

BySeed = dict[int, Record]
Row = dict[str, str | float]


def compare(store: Store | Merged, a: str, b: str, confidence: float = 0.95) -> pd.DataFrame:
    """Compare two methods (`method` or `method:variant`), paired by seed and test sample, in a row per setting.

    Columns: task, dataset, backbone, seeds (number on which both ended ok), metric, mean_a, mean_b, difference (a - b),
    its interval low to high, and p. Interval and p come from Student's t over seeds and test samples (over samples
    alone if there is one seed; see bootstrap.covariances). p answers this one question; `pairs` corrects for many.
    Records of an earlier schema version count only if a method has no others: such a row has the reported means, its
    metric is marked as OLDER, and it has neither interval nor p. Raise UserError if a method is unknown, if no pair of
    `ok` records exists, or if a pair differs in its samples, or in code or data other than the method's own.
    """
    import pandas as pd

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), not {confidence}")
    records = store.load()
    ours, theirs = (_by_setting(records, name) for name in (a, b))
    common = {key: sorted(ours[key].keys() & theirs[key].keys()) for key in sorted(ours.keys() & theirs.keys())}
    common = {key: seeds for key, seeds in common.items() if seeds}
    if not common:
        raise UserError(f"{a} and {b} share no task, data set, backbone and seed that ended ok for both; run both")
    rows = []
    for key, seeds in common.items():
        left, right = ([side[key][number] for number in seeds] for side in (ours, theirs))
        older = any(record.older for record in (*left, *right))
        paired = _reported(left, right) if older else _paired(store, left, right, confidence)
        rows.append({**dict(zip(SETTING, key, strict=True)), "seeds": len(seeds), **paired})
    return pd.DataFrame(rows)


def _paired(store: Store | Merged, left: Sequence[Record], right: Sequence[Record], confidence: float) -> Row:
    """Compare two methods with the same seeds by their scores, sample by sample."""
    _check_fingerprints(left, right)
    seeds = [record.cell.seed for record in left]
    # One matrix for both, so that their samples are checked against each other and put in one order.
    _, scores = score_matrix(store, [*left, *right])
    halves = [scores[: len(seeds)], scores[len(seeds) :]]
    error, freedom = (values[0, 1] for values in covariances(halves, [seeds, seeds]).of_differences)
    margin = float(error * quantiles(freedom, confidence))
    mean_a, mean_b = (float(half.mean()) for half in halves)
    difference = mean_a - mean_b
    return {
        "metric": left[0].main_metric,
        "mean_a": mean_a,
        "mean_b": mean_b,
        "difference": difference,
        "low": difference - margin,
        "high": difference + margin,
        "p": float(p_values(np.array(difference), error, freedom)),
    }


def _reported(left: Sequence[Record], right: Sequence[Record]) -> Row:
    """Return the same columns if a record is older: its samples and code cannot be compared with another's."""
    mean_a, mean_b = (
        float(np.mean([record.metrics.get(record.main_metric, np.nan) for record in side])) for side in (left, right)
    )
    metrics = dict.fromkeys(record.main_metric for record in (*left, *right))
    means = {"mean_a": mean_a, "mean_b": mean_b, "difference": mean_a - mean_b}
    return {"metric": f"{' / '.join(metrics)} ({OLDER})", **means, **dict.fromkeys(("low", "high", "p"), float("nan"))}


def _by_setting(records: Sequence[Record], name: str) -> dict[tuple[str, str, str], BySeed]:
    labels = {record.cell.id: label(record.cell) for record in records}
    # A method name alone means its variant if there is only one.
    variants = {text for text in labels.values() if text.split(":")[0] == name}
    wanted = name if name in labels.values() or len(variants) != 1 else variants.pop()
    if wanted not in labels.values():
        recorded = sorted(set(labels.values()))
        close = difflib.get_close_matches(name, recorded, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"no records of method {name}; {hint}recorded: {', '.join(recorded) or 'nothing'}")
    by_setting: dict[tuple[str, str, str], BySeed] = defaultdict(dict)
    recipes: dict[tuple[str, str, str], str] = {}
    for record in sorted(records, key=lambda record: record.older):
        cell = record.cell
        if label(record.cell) != wanted or record.outcome != "ok":
            continue
        key = (cell.task, cell.dataset, cell.backbone)
        if record.older and not all(kept.older for kept in by_setting[key].values()):
            continue
        digest = cell.model_copy(update={"seed": 0}).digest
        if recipes.setdefault(key, digest) != digest:
            raise UserError(f"{cell.label} was run with several recipes or configurations; keep one per folder")
        by_setting[key][cell.seed] = record
    return by_setting


def _check_fingerprints(left: Sequence[Record], right: Sequence[Record]) -> None:
    """Raise UserError if two methods differ in more than their own code, or the seeds of one method in anything."""
    for side, other, same_method in ((left, left, True), (right, right, True), (left, right, False)):
        reference = side[0].fingerprints
        for record in other:
            names = sorted(reference.keys() | record.fingerprints.keys())
            changed = [name for name in names if reference.get(name) != record.fingerprints.get(name)]
            parts = [name for name in changed if same_method or name != "method"]
            if parts:
                raise UserError(
                    f"{side[0].cell.label} and {record.cell.label} were run with different code or data "
                    f"({', '.join(parts)}); rerun the older one"
                )
