"""Is a record still what its cell would give? Imports no torch but where it says so."""

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
    """How a cell stands: never run, stale (with the parts that changed), not well ended, or done."""

    name: Literal["pending", "stale", "failed", "done"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


def state_of(cell: Cell, record: Record | None, now: Mapping[str, str]) -> CellState:
    """The state of `cell`, given the record that is kept of it and `now`, the fingerprints that it would get today.

    A record of an earlier schema version is stale, and so is one that holds another cell, as a default has changed.
    """
    if record is None:
        return CellState("pending")
    if record.older:
        return CellState("stale", OLDER)
    if parts := (*cell.differences(record.cell), *changed(record, now)):
        return CellState("stale", ", ".join(parts))
    return CellState("done") if record.outcome == "ok" else CellState("failed", record.outcome)


def fingerprints_of(cells: Iterable[Cell], data_root: Path | None) -> dict[str, dict[str, str]]:
    """By cell id, the fingerprints that each would get today; every data source is opened once. Imports torch."""
    from petlbench.pipeline.data import load_source

    sources: dict[str, Source] = {}
    found = {}
    for cell in cells:
        key = cell.model_dump_json(include={"dataset", "dataset_config"})
        if key not in sources:
            sources[key] = load_source(cell, data_root)
        found[cell.id] = fingerprints(cell, data_root, sources[key])
    return found


def stale_parts(record: Record) -> tuple[str, ...]:
    """Parts of the code behind `record` that have changed since; all of it where it is not installed any more.

    Data and weights are looked at by `petlbench run` alone: a table must not need them. Of a record of an earlier
    schema version nothing can be said but that it is one.
    """
    if record.older:
        return (OLDER,)
    try:
        return changed(record, code_fingerprints(record.cell))
    except UserError:
        return ("not installed",)
