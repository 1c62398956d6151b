"""Find out whether a record still is what its cell would give. Only `fingerprints_of` imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from petlbench.core.cell import Cell
from petlbench.core.errors import UserError
from petlbench.core.record import OLDER, Record
from petlbench.pipeline.fingerprint import changed, code_fingerprints, fingerprints

if TYPE_CHECKING:
    from petlbench.api.source import Source


@dataclass(frozen=True)
class CellState:
    """The state of a cell: never run, stale (`detail` names the changed parts), failed, or done."""

    name: Literal["pending", "stale", "failed", "done"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


def state_of(cell: Cell, record: Record | None, now: Mapping[str, str]) -> CellState:
    """Return the state of `cell`, given its record and `now`, the fingerprints that it would get today.

    A record of an earlier schema version is stale. So is one whose cell differs, because a default has changed.
    """
    if record is None:
        return CellState("pending")
    if record.older:
        return CellState("stale", OLDER)
    if parts := (*cell.differences(record.cell), *changed(record, now)):
        return CellState("stale", ", ".join(parts))
    return CellState("done") if record.outcome == "ok" else CellState("failed", record.outcome)


def fingerprints_of(cells: Iterable[Cell], data_root: Path | None) -> dict[str, dict[str, str]]:
    """Return today's fingerprints of each cell, by cell id; open each data source once. Imports torch."""
    from petlbench.pipeline.data import load_source

    sources: dict[str, Source] = {}
    by_id = {}
    for cell in cells:
        key = cell.model_dump_json(include={"dataset", "dataset_config"})
        if key not in sources:
            sources[key] = load_source(cell, data_root)
        by_id[cell.id] = fingerprints(cell, data_root, sources[key])
    return by_id


def stale_parts(record: Record) -> tuple[str, ...]:
    """Return the parts of the code behind `record` that have changed since, or that it is no longer installed.

    Only `petlbench run` checks data and weights: a table must not need them. A record of an earlier schema version
    cannot be compared, so its only part is that it is older.
    """
    if record.older:
        return (OLDER,)
    try:
        return changed(record, code_fingerprints(record.cell))
    except UserError:
        return ("not installed",)
