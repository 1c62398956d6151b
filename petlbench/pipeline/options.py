"""Hold the options of a run that do not change its scores: device, jobs, threads and limits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from petlbench.core.errors import UserError
from petlbench.measure.environment import cores

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class RunOptions:
    """How cells are run on this machine. Nothing here changes their scores.

    `jobs`: cells at a time. `threads`: of each cell (None: an equal share of the cores). `workers`: threads of each
    cell that make batches (None: some on CUDA, none on a CPU, where they slow training). `data_root`: the folder of
    data sets (None: PETLBENCH_DATA). `timeout`: seconds for each cell (None: no limit). `memory_limit`: bytes of
    resident memory of a cell and its descendants (None: an equal share of 90 % of the machine's memory).
    `checkpoint_seconds`: the least time between two checkpoints of a cell.
    """

    device: Device = "auto"
    jobs: int = 1
    threads: int | None = None
    workers: int | None = None
    data_root: Path | None = None
    timeout: float | None = None
    memory_limit: int | None = None
    checkpoint_seconds: float = 60.0

    def resolved(self, cells: int) -> RunOptions:
        """Return these options with jobs and threads set for `cells` cells. Raise UserError if there is no job."""
        if self.jobs < 1:
            raise UserError(f"the number of jobs must be at least 1, not {self.jobs}")
        jobs = max(1, min(self.jobs, cells))
        root = self.data_root.absolute() if self.data_root else None
        return replace(self, jobs=jobs, threads=self.threads or max(1, cores() // jobs), data_root=root)

    def within(self, timeout: float | None, memory_limit: int | None) -> RunOptions:
        """Return these options; a limit that they lack is set to the given one."""
        return replace(self, timeout=self.timeout or timeout, memory_limit=self.memory_limit or memory_limit)


def need_device(device: str) -> None:
    """Raise UserError if `device` is `cuda` and torch sees no CUDA device."""
    if device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device: use --device cpu, or install a CUDA build of torch")
