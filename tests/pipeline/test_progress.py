"""The progress of running cells, as printed lines and as bars."""

from __future__ import annotations

import io

from rich.console import Console

from petlbench.core.cell import Cell
from petlbench.core.record import Record
from petlbench.pipeline.launch.progress import ProgressLines, TerminalBars, progress_on

CELL = Cell(method="lora", task="rec", dataset="digits", backbone="tiny")
OK = Record(cell=CELL, outcome="ok", main_metric="acc_50", metrics={"acc_50": 0.6123, "iou": 0.5})
FAILED = Record(cell=CELL.model_copy(update={"seed": 1}), outcome="failed", reason="[Errno 2] no file\n  [/bold] here")


def test_without_a_terminal_there_is_one_line_at_start_and_one_at_end() -> None:
    out = io.StringIO()
    with progress_on(Console(file=out, width=30), 20) as shown:
        shown.started(2, OK.cell)
        shown.event(2, {"cell": OK.cell.id, "step": 1, "steps": 2})
        shown.finished(2, OK, 41.3)
        shown.finished(3, FAILED, 0.2)
        for count in (2, 2, 1):
            shown.waiting(count)
        shown.recorded_elsewhere(4, OK)
    assert type(shown) is ProgressLines
    assert out.getvalue().splitlines() == [
        "[3/20] lora on rec:digits (tiny, seed 0): started",
        "[3/20] lora on rec:digits (tiny, seed 0): ok acc_50 0.612 in 41 s",
        "[4/20] lora on rec:digits (tiny, seed 1): failed in 0 s: [Errno 2] no file [/bold] here",
        "waiting for 2 cells that another run works on",
        "waiting for 1 cell that another run works on",
        "[5/20] lora on rec:digits (tiny, seed 0): ok acc_50 0.612 by another run",
    ]


def test_on_a_terminal_there_are_bars_of_the_run_and_of_each_running_cell() -> None:
    out = io.StringIO()
    console = Console(file=out, width=160, force_terminal=True, color_system=None)
    with progress_on(console, 2) as shown:
        assert isinstance(shown, TerminalBars)
        shown.started(0, OK.cell)
        shown.event(0, {"phase": "train", "step": 10, "steps": 300, "score": 0.5, "loss": None})
        shown._bars.refresh()
        running = out.getvalue()
        shown.finished(0, OK, 41.3)
        shown._bars.refresh()
        shown.recorded_elsewhere(1, OK)
        shown._bars.refresh()
    assert "2/2" in out.getvalue()
    assert "0/2" in running
    assert "train 10/300, score 0.500" in running
    assert "1/2" in out.getvalue()[len(running) :]
    assert "[1/2] lora on rec:digits (tiny, seed 0): ok acc_50 0.612 in 41 s" in out.getvalue()
