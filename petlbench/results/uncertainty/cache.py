"""Statistics kept with the results, so that a table is computed once. Imports no torch.

A table of 20 methods with three seeds of 2000 samples takes 0.7 seconds, and 0.02 from the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from petlbench.core.errors import UserError
from petlbench.core.files import write_atomic
from petlbench.results.rows import Group, label
from petlbench.results.store import Merged, Store

FILE = "statistics.json"
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]


def key(stores: Sequence[Store], pool: Sequence[Group], constants: Sequence[float]) -> str:
    """Return a digest of all that the statistics of `pool` depend on, without reading per-sample scores.

    Cell and start identify a run; size and time of change identify its file of scores.
    """
    parts: list[Any] = [list(constants)]
    for row in pool:
        parts.append((row.setting, label(row), row.digest, row.metric))
        for record in row.records:
            files = [_stamp(store, record.samples) for store in stores] if record.samples else []
            parts.append((record.cell.seed, record.outcome, record.started, record.main_metric, files))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _stamp(store: Store, name: str) -> tuple[int, int] | None:
    try:
        found = os.stat(os.path.join(store.sample_scores, os.path.basename(name)))
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


class Cache:
    """The statistics of the last table, in `cache/statistics.json` of the first of the stores behind `results`."""

    def __init__(self, results: Store | Merged) -> None:
        self.stores = [results] if isinstance(results, Store) else results.stores
        self._path = self.stores[0].cache / FILE if self.stores else None
        self._stored = self._read()
        self._used: dict[str, Any] = {}
        self._hits: set[str] = set()

    def get(self, name: str, rows: int) -> Arrays | None:
        """Return what was put under `name` for this number of rows; None if there is nothing, or it is damaged."""
        try:
            entry = self._stored[name]
            means, low, high = (np.array(entry[part], dtype=float) for part in ("means", "low", "high"))
            paired = np.array(entry["paired"], dtype=int)
            margins, p = np.full((2, rows, rows), np.nan)
            left, right = np.triu_indices(len(paired), 1)
            for matrix, part, same in ((margins, "margins", 0.0), (p, "p", 1.0)):
                matrix[paired, paired] = same
                matrix[paired[left], paired[right]] = matrix[paired[right], paired[left]] = entry[part]
            notes = tuple(map(str, entry["notes"]))
            if {means.shape, low.shape, high.shape} != {(rows,)}:
                return None
        except (KeyError, TypeError, ValueError, IndexError):
            return None
        self._hits.add(name)
        return means, low, high, margins, p, notes

    def put(
        self,
        name: str,
        means: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        margins: np.ndarray,
        p: np.ndarray,
        notes: Sequence[str],
    ) -> None:
        """Keep three arrays [rows], symmetric margins and p values [rows, rows], and the notes of one pool."""
        paired = np.flatnonzero(~np.isnan(np.diag(margins)))
        left, right = np.triu_indices(len(paired), 1)
        self._used[name] = {
            "means": means.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "paired": paired.tolist(),
            "margins": margins[paired[left], paired[right]].tolist(),
            "p": p[paired[left], paired[right]].tolist(),
            "notes": list(notes),
        }

    def save(self) -> None:
        """Replace the file by what was put since, if any of it is new; do nothing if the folder cannot be written."""
        if self._path is None or self._hits == self._used.keys() == self._stored.keys():
            return
        with suppress(OSError, UserError):
            self._path.parent.mkdir(exist_ok=True)
            write_atomic(self._path, json.dumps(self._used).encode())

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_bytes()) if self._path else {}
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}
