"""Where a cell's seconds go: exclusive phases that add up, and the median training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

from petlbench.spec import Timing

PHASES = ("load", "build", "data", "forward", "backward", "optimizer", "validation", "test", "save")
TRAINING = ("data", "forward", "backward", "optimizer")
OTHER = "other"


def synchronize(device: torch.device | str) -> None:
    """Wait for queued CUDA work, which would otherwise be charged to whoever waits next; without effect elsewhere."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class PhaseClock:
    """Charges every second since its creation to exactly one phase: the innermost open one, else `other`."""

    def __init__(self, device: torch.device | str = "cpu", now: Callable[[], float] = time.perf_counter) -> None:
        self._device = device
        self._now = now
        self._open = [OTHER]
        self._seconds = {OTHER: 0.0}
        self._steps: list[float] = []
        self._mark = now()

    def _charge(self) -> None:
        synchronize(self._device)
        now = self._now()
        self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the block to `name`, one of PHASES; an inner phase takes its time out of the outer one."""
        if name not in PHASES:
            raise ValueError(f"unknown phase {name!r}; phases are {', '.join(PHASES)}")
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time the block as one training step, beside the phases; a step that raises does not count."""
        synchronize(self._device)
        start = self._now()
        yield
        synchronize(self._device)
        self._steps.append(self._now() - start)

    def step_median(self, skip: int = 3) -> float | None:
        """Median seconds of a step, without the first `skip`, which warm caches; None when none is left."""
        return median(self._steps[skip:]) if len(self._steps) > skip else None

    def timing(self, jobs: int = 1, threads: int = 1, latency_seconds: float | None = None) -> Timing:
        """Seconds up to now. The total is the sum of the phases in their order, so they add up exactly."""
        self._charge()
        phases = {name: self._seconds[name] for name in (*PHASES, OTHER) if name in self._seconds}
        return Timing(
            phases=phases,
            total_seconds=sum(phases.values()),
            train_seconds=sum(phases.get(name, 0.0) for name in TRAINING),
            step_seconds=self.step_median(),
            latency_seconds=latency_seconds,
            jobs=jobs,
            threads=threads,
        )
