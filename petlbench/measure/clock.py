"""Time a cell: exclusive phases, an independent total, and the medians of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from petlbench.core.record import Peak, Timing
from petlbench.measure.memory import cuda_peaks, reset_cuda_peaks

PHASES = (
    "load",
    "build",
    "data",
    "forward",
    "backward",
    "optimizer",
    "validation",
    "test",
    "checkpoint",
    "save",
    "measure",
)
TRAINING = ("data", "forward", "backward", "optimizer")
IN_STEP = ("forward", "backward", "optimizer")  # the parts of a step that get medians of their own
OTHER = "other"
WARMUP = 3  # steps that warm caches and choose kernels


def synchronize(device: torch.device | str) -> None:
    """Wait for queued CUDA work, which would otherwise be charged to whoever waits next; without effect elsewhere."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _higher(one: Peak, other: Peak | None) -> Peak:
    if other is None:
        return one
    return Peak(
        allocated_bytes=max(one.allocated_bytes, other.allocated_bytes),
        reserved_bytes=max(one.reserved_bytes, other.reserved_bytes),
    )


class PhaseClock:
    """Charges every second since its creation to exactly one phase: the innermost open one, else `other`.

    On CUDA the host waits for the device at every phase change and at both ends of a step: simple and exact, at the
    price of the overlap between phases. There the peaks of memory are read and reset at each phase change too; that
    costs host time, which goes to `measure` and into no step. A peak over the whole run is the highest in `peaks()`.
    """

    def __init__(self, device: torch.device | str = "cpu", now: Callable[[], float] = time.perf_counter) -> None:
        self._device = torch.device(device)
        self._now = now
        self._open = [OTHER]
        self._seconds = {OTHER: 0.0}
        self._peaks: dict[str, Peak] = {}
        self._steps: dict[str, list[float]] = {name: [] for name in ("step", *IN_STEP)}
        self._in_step: dict[str, float] = {}  # seconds by phase since the present step began
        self._cold = WARMUP
        self._resumed = 0
        self._carried = 0.0  # total seconds of the runs that this one continues
        reset_cuda_peaks(self._device)
        self._birth = self._mark = now()

    def _charge(self) -> None:
        """Charge the time up to now to the open phase."""
        synchronize(self._device)
        self._add(self._open[-1])
        if self._device.type == "cuda":
            self._read_peaks(self._open[-1])
            self._add("measure")

    def _add(self, phase: str) -> None:
        now = self._now()
        for seconds in (self._seconds, self._in_step):
            seconds[phase] = seconds.get(phase, 0.0) + now - self._mark
        self._mark = now

    def _read_peaks(self, phase: str) -> None:
        allocated, reserved = cuda_peaks(self._device)
        assert allocated is not None and reserved is not None
        self._peaks[phase] = _higher(Peak(allocated_bytes=allocated, reserved_bytes=reserved), self._peaks.get(phase))
        reset_cuda_peaks(self._device)

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

    def warm_up(self, steps: int = WARMUP) -> None:
        """Leave the next `steps` out of the medians; call it at the start of a trial and after a resume."""
        self._cold = steps

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time the block as one training step, beside the phases; a step that raises does not count."""
        self._charge()
        self._in_step = {}
        yield
        self._charge()
        if self._cold:
            self._cold -= 1
            return
        self._steps["step"].append(sum(s for name, s in self._in_step.items() if name != "measure"))
        for name in IN_STEP:
            if name in self._in_step:
                self._steps[name].append(self._in_step[name])

    def timing(self, jobs: int = 1, threads: int = 1, workers: int = 0) -> Timing:
        """Seconds up to now. The total is read off the clock; that the phases add up to it is a check on them.

        After a resume, the time between the last checkpoint and the kill is in neither.
        """
        self._charge()
        phases = {name: self._seconds[name] for name in (*PHASES, OTHER) if name in self._seconds}
        medians = {f"{name}_seconds": median(values) for name, values in self._steps.items() if values}
        return Timing(
            phases=phases,
            total_seconds=self._total(),
            train_seconds=sum(phases.get(name, 0.0) for name in TRAINING),
            **medians,
            jobs=jobs,
            threads=threads,
            workers=workers,
            resumed=self._resumed,
        )

    def peaks(self) -> dict[str, Peak]:
        """Highest CUDA memory up to now by phase, what was resident before it included; {} off CUDA."""
        self._charge()
        return {name: self._peaks[name] for name in (*PHASES, OTHER) if name in self._peaks}

    def _total(self) -> float:
        return self._carried + self._mark - self._birth

    def state(self) -> dict[str, Any]:
        """Return all measurements up to now, as JSON values."""
        self._charge()
        return {
            "phases": dict(self._seconds),
            "total_seconds": self._total(),
            "steps": {name: list(values) for name, values in self._steps.items()},
            "peaks": {name: peak.model_dump() for name, peak in self._peaks.items()},
            "resumed": self._resumed,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue the clock that saved `state`; time charged so far is added to it."""
        for name, seconds in state["phases"].items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        for name, values in state["steps"].items():
            self._steps[name] = [*values, *self._steps[name]]
        for name, peak in state["peaks"].items():
            self._peaks[name] = _higher(Peak(**peak), self._peaks.get(name))
        self._carried += state["total_seconds"]
        self._resumed += state["resumed"] + 1
