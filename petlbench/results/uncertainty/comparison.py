"""Two methods, sample by sample. Imports no torch."""

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
    """Two methods (`method` or `method:variant`) paired by seed and test sample, a row per task, data set, backbone.

    Columns: task, dataset, backbone, seeds (how many both ended ok on), metric, mean_a, mean_b, difference (a - b),
    its interval low to high and p, both by Student's t, over seeds and test samples (over samples alone where there is
    one seed; see bootstrap.covariances). p is for this one question: `pairs` corrects for many. Records of an earlier
    schema version count only where a method has no others: such a row's means are those that were reported, its metric
    is marked as OLDER, and it has neither interval nor p. Raises UserError for an unknown method, when no pair of `ok`
    records exists, or when a pair differs in its samples, or in its code or data beyond the method's own.
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
    """What is said of two methods with the same seeds, from their scores sample by sample."""
    _check_fingerprints(left, right)
    seeds = [record.cell.seed for record in left]
    # One matrix for both, so that their samples are checked against each other and brought into one order.
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
    """The same columns where a record is older: its samples and code cannot be held against another's."""
    mean_a, mean_b = (
        float(np.mean([record.metrics.get(record.main_metric, np.nan) for record in side])) for side in (left, right)
    )
    metrics = dict.fromkeys(record.main_metric for record in (*left, *right))
    means = {"mean_a": mean_a, "mean_b": mean_b, "difference": mean_a - mean_b}
    return {"metric": f"{' / '.join(metrics)} ({OLDER})", **means, **dict.fromkeys(("low", "high", "p"), float("nan"))}


def _by_setting(records: Sequence[Record], name: str) -> dict[tuple[str, str, str], BySeed]:
    labels = {record.cell.id: label(record.cell) for record in records}
    # A bare method name stands for its variant as long as there is only one.
    variants = {text for text in labels.values() if text.split(":")[0] == name}
    wanted = name if name in labels.values() or len(variants) != 1 else variants.pop()
    if wanted not in labels.values():
        known = sorted(set(labels.values()))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"no records of method {name}; {hint}recorded: {', '.join(known) or 'nothing'}")
    found: dict[tuple[str, str, str], BySeed] = defaultdict(dict)
    recipes: dict[tuple[str, str, str], str] = {}
    for record in sorted(records, key=lambda record: record.older):
        cell = record.cell
        if label(record.cell) != wanted or record.outcome != "ok":
            continue
        key = (cell.task, cell.dataset, cell.backbone)
        if record.older and not all(known.older for known in found[key].values()):
            continue
        digest = cell.model_copy(update={"seed": 0}).digest
        if recipes.setdefault(key, digest) != digest:
            raise UserError(f"{cell.label} was run with several recipes or configurations; keep one per folder")
        found[key][cell.seed] = record
    return found


def _check_fingerprints(left: Sequence[Record], right: Sequence[Record]) -> None:
    """A method may differ from another in its own code only, and its seeds not even in that."""
    for side, other, own in ((left, left, True), (right, right, True), (left, right, False)):
        reference = side[0].fingerprints
        for record in other:
            names = sorted(reference.keys() | record.fingerprints.keys())
            parts = [n for n in names if reference.get(n) != record.fingerprints.get(n) and (own or n != "method")]
            if parts:
                raise UserError(
                    f"{side[0].cell.label} and {record.cell.label} were run with different code or data "
                    f"({', '.join(parts)}); rerun the older one"
                )
