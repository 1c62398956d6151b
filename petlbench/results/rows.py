"""Group records into rows: one row averages over seeds; rows of one pool may be compared. Imports no torch."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from petlbench.core.record import OLDER, Record

SETTING = ["task", "dataset", "backbone"]
Stale = Callable[[Record], Sequence[str]]
Fingerprints = tuple[tuple[str, str], ...]


def label(row: Any) -> str:
    """Return the name of a row's method: `method` or `method:variant`."""
    return f"{row.method}:{row.variant}" if row.variant else str(row.method)


@dataclass(frozen=True, eq=False)
class Group:
    """The records of one row, by seed: they share the code, the data and all of the cell but the seed."""

    setting: tuple[str, str, str]
    method: str
    variant: str
    digest: str  # of the cell at seed 0
    stale: tuple[str, ...]
    fingerprints: Fingerprints
    records: tuple[Record, ...]

    @property
    def ok(self) -> list[Record]:
        return [record for record in self.records if record.outcome == "ok"]

    @property
    def older(self) -> bool:
        """Return whether the records are of an earlier schema version: shown as stale, never compared."""
        return self.stale == (OLDER,)

    @property
    def metric(self) -> str:
        return next((record.main_metric for record in [*self.ok, *self.records] if record.main_metric), "")

    @property
    def scores(self) -> list[float]:
        """Return the reported scores of the seeds that ended ok."""
        return [record.metrics[record.main_metric] for record in self.ok if record.main_metric in record.metrics]

    @property
    def pool(self) -> tuple[Hashable, ...]:
        """Return a key that is equal for rows that can be compared: only the method differs; all are stale or none."""
        shared = tuple((name, value) for name, value in self.fingerprints if name != "method")
        return (self.setting, bool(self.stale), self.metric, shared)


def fresh(record: Record) -> Sequence[str]:
    """Return no changed parts: for results whose code and data are not checked."""
    return ()


def groups(records: Iterable[Record], stale: Stale = fresh) -> list[Group]:
    """Return one group per row of the leaderboard, in its order: by setting, fresh before stale, best score first.

    Of two records of one cell the one that started later counts. Groups of one setting that share method and variant
    get distinct names: a `#` and a digest after the variant, except for the only fresh one. `stale` returns the parts
    of code and data that have changed since a record was made; it is not called for records of an earlier schema
    version, which are always stale as OLDER.
    """
    members: dict[tuple[Any, ...], dict[int, Record]] = {}
    for (cell_key, seed), (record, digest) in _newest(records).items():
        fingerprints = tuple(sorted(record.fingerprints.items()))
        parts = (OLDER,) if record.older else tuple(stale(record))
        members.setdefault((cell_key, digest, parts, fingerprints), {})[seed] = record
    named: dict[tuple[Any, ...], list[Group]] = defaultdict(list)
    for (_, digest, parts, fingerprints), by_seed in members.items():
        in_order = tuple(record for _, record in sorted(by_seed.items()))
        cell = in_order[0].cell
        setting = (cell.task, cell.dataset, cell.backbone)
        group = Group(setting, cell.method, cell.variant, digest, parts, fingerprints, in_order)
        named[*setting, cell.method, cell.variant].append(group)
    return sorted((group for rivals in named.values() for group in _distinct_names(rivals)), key=_order)


def pools(rows: Sequence[Group]) -> list[list[int]]:
    """Return the indices of the rows that can be compared with each other, by pool; older rows are in none."""
    indices: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        if not row.older:
            indices[row.pool].append(index)
    return list(indices.values())


def older_notes(rows: Iterable[Group]) -> dict[tuple[str, str, str], str]:
    """Return by setting a note on the rows of an earlier schema version, which are shown but not in the statistics."""
    older: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.older:
            older[row.setting].append(label(row))
    return {setting: f"{OLDER}, so not ranked: {', '.join(sorted(names))}" for setting, names in older.items()}


def _newest(records: Iterable[Record]) -> dict[tuple[str, int], tuple[Record, str]]:
    newest: dict[tuple[str, int], tuple[Record, str]] = {}
    digests: dict[str, str] = {}
    for record in records:
        cell = record.cell
        # This text takes a tenth of the time of Cell.digest, and all seeds share it, so the digest is computed once.
        text = cell.model_dump_json(exclude={"seed"})
        if text not in digests:
            digests[text] = cell.model_copy(update={"seed": 0}).digest
        readable = "\n".join((cell.task, cell.dataset, cell.backbone, cell.method, cell.variant, digests[text]))
        earlier = newest.get((readable, cell.seed))
        if earlier is None or record.started > earlier[0].started:
            newest[readable, cell.seed] = (record, digests[text])
    return newest


def _distinct_names(rivals: Sequence[Group]) -> list[Group]:
    plain = [group for group in rivals if not group.stale] if len(rivals) > 1 else list(rivals)
    digests = [group.digest for group in rivals]
    named = []
    for group in rivals:
        if len(plain) == 1 and group is plain[0]:
            named.append(group)
            continue
        mark = group.digest
        if digests.count(mark) > 1:
            text = repr((group.digest, group.stale, group.fingerprints))
            mark = hashlib.sha256(text.encode()).hexdigest()[:8]
        named.append(replace(group, variant=f"{group.variant} #{mark}".lstrip()))
    return named


def _order(group: Group) -> tuple[Any, ...]:
    scores = group.scores
    score = sum(scores) / len(scores) if scores else float("nan")
    missing = score != score
    return (*group.setting, bool(group.stale), missing, 0.0 if missing else -score, group.method, group.variant)
