"""Show the progress of running cells: bars on a terminal, one line per start and end elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any, TypedDict

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from petlbench.core.cell import Cell
from petlbench.core.record import Record


class Event(TypedDict, total=False):
    """A report of a running cell; every key but `cell` may be missing."""

    cell: str  # its id
    phase: str  # such as `train` or `test`
    step: int
    steps: int
    score: float | None  # the last validation score
    loss: float | None


class Progress:
    """The listener of a run. This one shows nothing."""

    def started(self, index: int, cell: Cell) -> None:
        """The cell at `index` (from 0) of the run has begun."""

    def event(self, index: int, event: Event) -> None:
        """A running cell has sent a report."""

    def finished(self, index: int, record: Record, seconds: float) -> None:
        """A cell has ended after `seconds`, with this record."""

    def recorded_elsewhere(self, index: int, record: Record) -> None:
        """Another run has recorded the cell meanwhile, so it is not run."""

    def waiting(self, count: int) -> None:
        """Only `count` cells that another run works on are left; wait for them."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""


def outcome_line(index: int, total: int, record: Record, seconds: float) -> str:
    """Return `[3/20] lora on rec:digits (tiny, seed 0): ok acc_50 0.612 in 41 s`, or the outcome and its reason."""
    return _line(index, total, record, f" in {seconds:.0f} s")


def _line(index: int, total: int, record: Record, how: str) -> str:
    score = record.metrics.get(record.main_metric)
    shown = f" {record.main_metric} {score:.3f}" if score is not None else ""
    reason = f": {' '.join(record.reason.split())}" if record.reason else ""
    return f"[{index + 1}/{total}] {record.cell.label}: {record.outcome}{shown}{how}{reason}"


class ProgressLines(Progress):
    """Print one line when a cell starts and one when it ends; lines are never wrapped."""

    def __init__(self, total: int, console: Console) -> None:
        self.total = total
        self.console = console
        self._waiting = 0

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def started(self, index: int, cell: Cell) -> None:
        self._print(f"[{index + 1}/{self.total}] {cell.label}: started")

    def finished(self, index: int, record: Record, seconds: float) -> None:
        self._print(outcome_line(index, self.total, record, seconds))

    def recorded_elsewhere(self, index: int, record: Record) -> None:
        self._print(_line(index, self.total, record, " by another run"))

    def waiting(self, count: int) -> None:
        if count != self._waiting:  # called again and again; print it once
            self._waiting = count
            self._print(f"waiting for {count} {'cell' if count == 1 else 'cells'} that another run works on")


class TerminalBars(ProgressLines):
    """Show a bar for the whole run and one per running cell; above them, a line for every cell that has ended."""

    def __init__(self, total: int, console: Console) -> None:
        super().__init__(total, console)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeRemainingColumn(),
        )
        # Cells take minutes, so estimate the time left from the whole run; the default is the last half minute.
        self._bars = Bars(*columns, console=console, transient=True, speed_estimate_period=86400)
        self._overall = self._bars.add_task("cells", total=total, detail=f"0/{total}")
        self._running: dict[int, TaskID] = {}
        self._done = 0

    def started(self, index: int, cell: Cell) -> None:
        self._running[index] = self._bars.add_task(cell.label, total=None, detail="")

    def event(self, index: int, event: Event) -> None:
        numbers: dict[str, Any] = {"completed": event.get("step"), "total": event.get("steps")}
        self._bars.update(self._running[index], detail=_detail(event), **numbers)

    def finished(self, index: int, record: Record, seconds: float) -> None:
        self._bars.remove_task(self._running.pop(index))
        self._count()
        super().finished(index, record, seconds)

    def recorded_elsewhere(self, index: int, record: Record) -> None:
        self._count()
        super().recorded_elsewhere(index, record)

    def _count(self) -> None:
        self._done += 1
        self._bars.update(self._overall, completed=self._done, detail=f"{self._done}/{self.total}")

    def __enter__(self) -> TerminalBars:
        self._bars.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


def _detail(event: Event) -> str:
    """Return `train 10/300, score 0.500, loss 1.234`, without the parts that the event lacks."""
    phase, step, steps = event.get("phase", ""), event.get("step"), event.get("steps")
    where = phase if step is None else f"{phase} {step}/{steps}" if steps else f"{phase} {step}"
    score, loss = event.get("score"), event.get("loss")
    parts = (where, f"score {score:.3f}" if score is not None else "", f"loss {loss:.3f}" if loss is not None else "")
    return ", ".join(part for part in parts if part)


def progress_on(console: Console, total: int) -> Progress:
    """Return bars if `console` is a terminal, plain lines otherwise."""
    return TerminalBars(total, console) if console.is_terminal else ProgressLines(total, console)
