"""The leaderboard, made from records: one row per method, variant, task, data set and backbone. Imports no torch."""

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

# The meaning of each column, in the order of the CSV; the documentation's table is made from it.
COLUMNS = {
    "method": "name of the method, as in `petlbench list methods`",
    "variant": "name of its configuration; `#` and a digest where nothing else tells rows apart",
    "size_name": "the option that sets the method's size; empty where it has none, or where the backbone decides",
    "size": "value of that option",
    "task": "name of the task",
    "dataset": "name of the data set",
    "backbone": "name of the backbone",
    "seeds": "seeds that ended well",
    "outcome": "`ok` if all did, else the most frequent of `oom`, `diverged`, `failed`, `timeout`",
    "stale": "True if the code or data that made it have changed since, or its schema version is an earlier one",
    "metric": "main metric of the task: `acc_50`, `vqa_accuracy`, `cider_d` or `mean_r1`",
    "score_mean": "mean of `metric` on test: from 0 to 1, `cider_d` from 0 to 10 (papers print it times 100)",
    "score_std": "sample standard deviation over seeds; empty for one seed",
    "score_low": "lower end of the 95 % interval of the mean, over seeds and test samples",
    "score_high": "upper end of that interval",
    "rank": "1 + the number of rows that are significantly better; ties share a rank",
    "trainable_params": "parameters that train: the method's, the head's and the host's",
    "trainable_percent": "share of all parameters of the adapted backbone and the head, in percent",
    "effective_params": "parameters that train and get a gradient in this cell: none in modules of other tasks",
    "head_params": "parameters that train in the task's head",
    "stored_params": "parameters in the adapter file",
    "inference_extra_params": "parameters beyond the untouched backbone and the head; after merging if possible",
    "stored_bytes": "size of the adapter file, in bytes",
    "accounted_bytes": "weights, gradients, optimizer state and tensors saved for backward, in bytes; canonical",
    "peak_bytes": "peak allocated on CUDA, else peak resident memory of the process, in bytes",
    "train_seconds": "training, evaluation not included",
    "step_seconds": "median training step",
    "step_flops": "floating-point operations of one training step, forward and backward",
    "latency_seconds": "median prediction of one sample",
    "merged_latency_seconds": "median prediction of one sample after merging; empty where the method cannot merge",
    "throughput": "samples per second that are predicted in batches, nothing merged",
    "step_joules": "energy of a training step in joules, where NVML gives it",
    "contended": "True if it was timed while other cells ran",
    "pareto": "True if no row of the setting scores as well with fewer parameters, or better with as many",
}
# fmt: off
TEXTS = ("method", "variant", "size_name", "task", "dataset", "backbone", "outcome", "metric")
FLAGS = ("stale", "contended", "pareto")
COUNTS = ("seeds", "rank", "trainable_params", "effective_params", "head_params", "stored_params",
          "inference_extra_params", "stored_bytes", "accounted_bytes", "peak_bytes", "step_flops")
# fmt: on
TIMING = ("train_seconds", "step_seconds")
INFERENCE = ("latency_seconds", "merged_latency_seconds", "throughput")
# Ordered from bad luck to bad code: of equally frequent failures, the last one names the row.
SEVERITY = ("timeout", "oom", "diverged", "failed")
Notes = dict[tuple[str, str, str], list[str]]


def table(results: Store | Merged | Iterable[Record], *, stale: Stale = fresh) -> pd.DataFrame:
    """Return the leaderboard, with exactly the columns of COLUMNS; unknown values are missing (NaN or NA).

    Scores, seconds and joules are means over the seeds that ended `ok`, `score_std` is the sample standard deviation
    (missing for one seed), counts and bytes are the largest of any seed. `seeds` counts the seeds that ended `ok`;
    `outcome` is `ok` only if all did. Cells that differ in recipe, configuration, code or data are never averaged: each
    such group is a row. Where nothing else tells two rows apart, `variant` ends in `#` and a digest.

    `stale` returns the parts of code and data that have changed since a record was made; such rows are marked. `rank`
    (1 + the rows that are significantly better) and `pareto` compare only rows of the setting that differ in nothing
    but the method and are equally fresh or stale. `score_low` and `score_high` are the 95 % interval over seeds and
    test samples. Interval and rank need a Store or Merged as `results`, and are missing for plain records.

    Records of an earlier schema version are rows too, marked as stale and, in the notes, as OLDER. They have no
    interval and no rank, do not count in the ranks of other rows, and are on no front.

    `attrs` holds, by row index, `runs` (seeds run), `stale` (parts changed), `tied` (a set: rows that share their rank)
    and, by setting, `machines` and `notes` (facts that a reader must know).
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
    """Write the leaderboard atomically; missing values become empty fields. Raises UserError when that fails."""
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
    """Return the columns that other load on the machine changes: from the cells that ran alone, if there are any."""
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
    """Fill in intervals and ranks; return the analysis's notes by setting, and the rows that share their rank."""
    notes: Notes = defaultdict(list)
    tied: set[int] = set()
    for indices, found in analyse(results, rows):
        notes[rows[indices[0]].setting] += found.notes
        ranks = found.ranks
        shared = Counter(ranks[~np.isnan(ranks)].tolist())
        for index, low, high, rank in zip(indices, found.low, found.high, ranks.tolist(), strict=True):
            # The reported score can differ a little from the mean over samples; the interval goes around the former.
            mean = columns[index]["score_mean"]
            columns[index].update(score_low=mean + low, score_high=mean + high)
            if rank == rank:
                columns[index]["rank"] = int(rank)
            if shared[rank] > 1:
                tied.add(index)
    return notes, tied


def _pareto(columns: Sequence[Mapping[str, Any]], comparable: Sequence[Sequence[int]]) -> list[int]:
    """Return the ok rows that no other ok row of their pool beats.

    A row beats another if it scores at least as well with at most as many parameters, and one of both strictly.
    """
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
