"""Tell every part of a running cell where it runs: the device, the clock, and who gets its reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from petlbench.measure.clock import PhaseClock

Report = Callable[[dict[str, Any]], None]


def silent(event: dict[str, Any]) -> None:
    """Ignore a report."""


@dataclass(frozen=True)
class RunContext:
    """Where a cell runs, what times it, and who gets its reports. Nothing here changes its scores.

    `workers`: threads that make batches during training steps (0: none). `data_root`: the folder of data sets (None:
    PETLBENCH_DATA).
    """

    device: torch.device
    clock: PhaseClock
    report: Report = silent
    workers: int = 0
    data_root: Path | None = None

    @classmethod
    def on(cls, device: torch.device | str = "cpu", **options: Any) -> Self:
        """Return a context with its own clock. `options`: the other fields."""
        chosen = torch.device(device)
        return cls(chosen, PhaseClock(chosen), **options)
