"""What every part of a running cell needs to know of the run around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from petlbench.measure.clock import PhaseClock

Report = Callable[[dict[str, Any]], None]


def silent(event: dict[str, Any]) -> None:
    """A report that nobody reads."""


@dataclass(frozen=True)
class RunContext:
    """Where a cell runs, what times it, and who hears of it. Nothing here changes its scores.

    `workers`: threads that make batches while others are computed on (0: none). `data_root`: where data sets lie (None:
    PETLBENCH_DATA).
    """

    device: torch.device
    clock: PhaseClock
    report: Report = silent
    workers: int = 0
    data_root: Path | None = None

    @classmethod
    def on(cls, device: torch.device | str = "cpu", **options: Any) -> Self:
        """A context with a clock of its own. `options`: the other fields."""
        chosen = torch.device(device)
        return cls(chosen, PhaseClock(chosen), **options)
