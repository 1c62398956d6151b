"""Is a record still what its cell would give? Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from petlbench.errors import UserError
from petlbench.fingerprint import changed, code_fingerprints
from petlbench.spec import Record


@dataclass(frozen=True)
class State:
    """How a cell stands: never run, stale (with the parts that changed), not well ended, or done."""

    name: Literal["pending", "stale", "failed", "done"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


def state_of(record: Record | None, now: Mapping[str, str]) -> State:
    """The state of the cell that `record` belongs to, `now` being the fingerprints it would get today."""
    if record is None:
        return State("pending")
    if parts := changed(record, now):
        return State("stale", ", ".join(parts))
    return State("done") if record.outcome == "ok" else State("failed", record.outcome)


def stale_parts(record: Record) -> tuple[str, ...]:
    """Parts of the code behind `record` that have changed since; all of it where it is not installed any more.

    Data and weights are looked at by `petlbench run` alone: a table must not need them.
    """
    try:
        return changed(record, code_fingerprints(record.cell))
    except UserError:
        return ("not installed",)
