"""Read the per-sample scores of records as matrices whose columns are the same samples. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from petlbench.core.errors import UserError
from petlbench.core.record import Record
from petlbench.results.store import Merged, Store

Ids = list[Any]


def score_matrix(results: Store | Merged, records: Sequence[Record]) -> tuple[Ids, np.ndarray]:
    """Return the sample ids and the per-sample main metric of `records`, [records, samples].

    Raise UserError if scores are missing, are not finite, or belong to other samples than the first record's.
    """
    ids, first = _scores(results, records[0])
    rows = [first]
    for record in records[1:]:
        if record.main_metric != records[0].main_metric:
            raise UserError(
                f"{records[0].cell.label} is scored by {records[0].main_metric}, {record.cell.label} by "
                f"{record.main_metric}; rerun one of them"
            )
        other, values = _scores(results, record)
        if set(other) != set(ids):
            raise UserError(
                f"{records[0].cell.label} and {record.cell.label} were tested on different samples "
                f"({len(set(ids) ^ set(other))} without a partner); rerun both on the same data"
            )
        rows.append(aligned(other, values, ids))
    return ids, np.stack(rows)


def aligned(ids: Ids, values: np.ndarray, wanted: Ids) -> np.ndarray:
    """Reorder the last axis of `values` from the order of `ids` to the order of `wanted`."""
    if ids == wanted:
        return values
    position = {name: index for index, name in enumerate(ids)}
    return values[..., [position[name] for name in wanted]]


def _scores(results: Store | Merged, record: Record) -> tuple[Ids, np.ndarray]:
    samples = results.samples(record)
    where = record.cell.label
    if samples is None:
        raise UserError(f"{where} has no per-sample scores; rerun it")
    ids, values = samples["sample_ids"], samples["scores"].get(record.main_metric)
    if values is None:
        raise UserError(f"{where} has no per-sample scores of {record.main_metric}; rerun it")
    try:
        array = np.asarray(values, dtype=float)
        distinct = len(set(ids))
    except (TypeError, ValueError) as error:
        raise UserError(f"the per-sample scores of {where} are not numbers, or its ids not names; rerun it") from error
    if distinct != len(ids) or array.shape != (len(ids),) or not ids or not np.isfinite(array).all():
        raise UserError(f"{where} does not have one finite score for each of its distinct sample ids; rerun it")
    return ids, array
