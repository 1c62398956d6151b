"""Records to the leaderboard: one row per method, variant, task, data set and backbone. Imports no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from petlbench.core.files import write_atomic
from petlbench.core.record import Inference, Memory, Record, Timing
from petlbench.results.rows import SETTING, Group, Stale, fresh, groups, older_notes, pools
from petlbench.results.store import Merged, Store
from petlbench.results.uncertainty.analysis import analyse
from petlbench.results.uncertainty.pairs import mean_std

# fmt: off
COLUMNS = (
    "method", "variant", "size_name", "size", "task", "dataset", "backbone", "seeds", "outcome", "stale", "metric",
    "score_mean", "score_std", "score_low", "score_high", "rank", "trainable_params", "trainable_percent",
    "effective_params", "head_params", "stored_params", "inference_extra_params", "stored_bytes", "accounted_bytes",
    "peak_bytes",
    "train_seconds", "step_seconds", "step_flops", "latency_seconds", "merged_latency_seconds", "throughput",
    "step_joules", "contended", "pareto",
)
TEXTS = ("method", "variant", "size_name", "task", "dataset", "backbone", "outcome", "metric")
FLAGS = ("stale", "contended", "pareto")
COUNTS = ("seeds", "rank", "trainable_params", "effective_params", "head_params", "stored_params",
          "inference_extra_params", "stored_bytes", "accounted_bytes", "peak_bytes", "step_flops")
# fmt: on
TIMING = ("train_seconds", "step_seconds")
INFERENCE = ("latency_seconds", "merged_latency_seconds", "throughput")
# From bad luck to bad code: among equally frequent failures the last one names the row.
SEVERITY = ("timeout", "oom", "diverged", "failed")
Notes = dict[tuple[str, str, str], list[str]]


def table(results: Store | Merged | Iterable[Record], *, stale: Stale = fresh) -> pd.DataFrame:
    """The leaderboard, with exactly COLUMNS; what is unknown is missing (NaN or NA).

    Scores, seconds and joules are means over the seeds that ended `ok`, `score_std` is the sample standard deviation
    (missing for one seed), counts and bytes are the largest of any seed. `seeds` counts the ones that ended `ok`;
    `outcome` is `ok` only if all did. Cells that differ in recipe, configuration, code or data are never averaged: each
    such group is a row, its `variant` ending in `#` and a digest when that is all that tells two rows apart.

    `stale` names the parts of the code and data that have changed since a record was made; such rows are marked. `rank`
    (1 + the rows that are significantly better) and `pareto` look only at rows of the setting that differ in nothing
    but the method and are equally fresh or stale. `score_low` and `score_high` are the 95 % interval over seeds and
    test samples. Interval and rank need `results` to be a Store or Merged, and are missing for bare records.

    Records of an earlier schema version are rows too, marked as stale and, in the notes, as OLDER; they have no
    interval and no rank, count in nobody else's, and are on no front.

    `attrs` holds, by row index, `runs` (seeds run), `stale` (parts changed), `tied` (a set: rows that share their rank)
    and, by setting, `machines` and `notes` (what a reader must know).
    """
    store, records = (results, results.load()) if isinstance(results, (Store, Merged)) else (None, results)
    rows = groups(records, stale)
    columns = [_row(row) for row in rows]
    notes, tied = _add_statistics(columns, store, rows) if store else ({}, set())
    for index in _pareto(columns, pools(rows)):
        columns[index]["pareto"] = True
    types = dict.fromkeys(COLUMNS, "float64")
    for names, kind in ((TEXTS, "str"), (FLAGS, "bool"), (COUNTS, "Int64")):
        types.update(dict.fromkeys(names, kind))
    frame = pd.DataFrame(columns, columns=list(COLUMNS)).astype(types)
    frame.attrs.update(
        runs={index: len(row.records) for index, row in enumerate(rows)},
        stale={index: row.stale for index, row in enumerate(rows) if row.stale},
        tied=tied,
        machines=_machines(rows),
        notes=_notes(rows, notes),
    )
    return frame


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write the leaderboard atomically; missing values are empty fields. Raises UserError when that fails."""
    write_atomic(path, frame.to_csv(index=False, lineterminator="\n").encode())


def _row(group: Group) -> dict[str, Any]:
    ok = group.ok
    parameters = [record.parameters for record in group.records if record.parameters]
    memories = [record.memory for record in group.records if record.memory]
    score_mean, score_std = mean_std(group.scores)
    size = next((record.size for record in group.records if record.size), None)
    return {
        **dict(zip(SETTING, group.setting, strict=True)),
        "method": group.method,
        "variant": group.variant,
        "size_name": size.name if size else "",
        "size": size.value if size else None,
        "seeds": len(ok),
        "outcome": _outcome(group.records),
        "stale": bool(group.stale),
        "metric": group.metric,
        "score_mean": score_mean,
        "score_std": score_std,
        "trainable_params": _largest(p.trainable for p in parameters),
        "trainable_percent": _largest(p.percent for p in parameters),
        "effective_params": _largest(p.effective for p in parameters),
        "head_params": _largest(p.head for p in parameters),
        "stored_params": _largest(p.stored for p in parameters),
        "inference_extra_params": _largest(p.inference_extra for p in parameters),
        "stored_bytes": _largest(p.stored_bytes for p in parameters),
        "accounted_bytes": _largest(m.accounted_bytes for m in memories),
        "peak_bytes": _largest(_peak(record.memory) for record in ok),
        "step_flops": _largest(record.flops.step for record in group.records if record.flops),
        **_timed(ok),
        "pareto": False,
    }


def _timed(ok: Sequence[Record]) -> dict[str, Any]:
    """What depends on the machine being otherwise idle: from the cells that ran alone, if there are any."""
    timed = [record for record in ok if record.timing]
    alone = [record for record in timed if record.timing and record.timing.jobs == 1]
    chosen = alone or timed
    parts: list[tuple[Sequence[str], list[Timing | Inference | Record | None]]] = [
        (TIMING, [record.timing for record in chosen]),
        (INFERENCE, [record.inference for record in chosen]),
        (("step_joules",), [*chosen]),
    ]
    row: dict[str, Any] = {"contended": bool(timed) and not alone}
    for names, sources in parts:
        for name in names:
            values = [getattr(source, name) for source in sources if source is not None]
            row[name] = mean_std([value for value in values if value is not None])[0]
    return row


def _outcome(records: Sequence[Record]) -> str:
    failures = Counter(record.outcome for record in records if record.outcome != "ok")
    return max(failures, key=lambda name: (failures[name], SEVERITY.index(name))) if failures else "ok"


def _peak(memory: Memory | None) -> int | None:
    if memory is None:
        return None
    return memory.peak_rss_bytes if memory.peak_allocated_bytes is None else memory.peak_allocated_bytes


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _add_statistics(
    columns: Sequence[dict[str, Any]], results: Store | Merged, rows: Sequence[Group]
) -> tuple[Notes, set[int]]:
    """Fill in intervals and ranks; the notes of the analysis by setting, and the rows that share their rank."""
    notes: Notes = defaultdict(list)
    tied: set[int] = set()
    for indices, found in analyse(results, rows):
        notes[rows[indices[0]].setting] += found.notes
        ranks = found.ranks
        shared = Counter(ranks[~np.isnan(ranks)].tolist())
        for index, low, high, rank in zip(indices, found.low, found.high, ranks.tolist(), strict=True):
            # The reported score can differ a little from the mean of the samples': the interval is laid around it.
            mean = columns[index]["score_mean"]
            columns[index].update(score_low=mean + low, score_high=mean + high)
            if rank == rank:
                columns[index]["rank"] = int(rank)
            if shared[rank] > 1:
                tied.add(index)
    return notes, tied


def _pareto(columns: Sequence[Mapping[str, Any]], comparable: Sequence[Sequence[int]]) -> list[int]:
    """No other ok row of the pool scores at least as well with at most as many parameters, one of them strictly."""
    best: list[int] = []
    for pool in comparable:
        rows = [i for i in pool if columns[i]["outcome"] == "ok" and columns[i]["trainable_params"] is not None]
        rows = [i for i in rows if columns[i]["score_mean"] == columns[i]["score_mean"]]
        score, size = (np.array([columns[i][name] for i in rows]) for name in ("score_mean", "trainable_params"))
        better, smaller = score >= score[:, None], size <= size[:, None]
        beaten = better & smaller & ((score > score[:, None]) | (size < size[:, None]))
        best += np.array(rows, dtype=int)[~beaten.any(axis=1)].tolist()
    return best


def _machines(rows: Sequence[Group]) -> Notes:
    found: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for row in rows:
        for record in row.records:
            parts = [record.environment.get(name) for name in ("device_name", "device")]
            found[row.setting].add(", ".join(str(part) for part in parts if part))
    return {setting: sorted(names - {""}) for setting, names in found.items()}


def _notes(rows: Sequence[Group], more: Notes) -> Notes:
    found: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for row in rows:
        found[row.setting].update(more.get(row.setting, ()))
        for record in row.records:
            found[row.setting].update(record.notes)
    for setting, note in older_notes(rows).items():
        found[setting].add(note)
    return {setting: sorted(notes) for setting, notes in found.items()}
