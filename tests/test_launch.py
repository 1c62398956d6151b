"""Cells in processes of their own, and what a person sees of them."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from petlbench.errors import UserError
from petlbench.launch import local
from petlbench.launch.progress import Event, Lines, Progress, TerminalBars, progress_on
from petlbench.records import Store
from petlbench.spec import Cell, Record

TARGETS = "tests.launch_targets:"


def cells(count: int) -> list[Cell]:
    return [Cell(method="lora", task="rec", dataset="digits", backbone="tiny", seed=seed) for seed in range(count)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path, create=True)


class Diary(Progress):
    def __init__(self, on_event: Callable[[list[Event]], None] = lambda events: None) -> None:
        self.events: list[Event] = []
        self.order: list[tuple[str, int]] = []
        self.most = 0
        self.on_event = on_event

    def started(self, index: int, cell: Cell) -> None:
        self.order.append(("started", index))
        running = [i for what, i in self.order if what == "started"]
        self.most = max(self.most, len(running) - sum(what == "finished" for what, _ in self.order))

    def event(self, index: int, event: Event) -> None:
        self.events.append(event)
        self.on_event(self.events)

    def finished(self, index: int, record: Record, seconds: float) -> None:
        self.order.append(("finished", index))


def run(target: str, count: int, store: Store, jobs: int = 1, **options: object) -> list[Record]:
    return local.run_cells(cells(count), store, device="cpu", jobs=jobs, target=TARGETS + target, **options)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def await_gone(pid: int) -> bool:
    """Whether the process ends by itself; the server reaps it a moment after its end."""
    for _ in range(200):
        if gone(pid):
            return True
        time.sleep(0.05)
    return False


def test_records_come_back_in_the_order_of_the_cells_with_their_events(store: Store, tmp_path: Path) -> None:
    diary = Diary()
    records = run("ok", 3, store, jobs=2, threads=3, data_root=Path("data"), progress=diary)
    assert [r.cell for r in records] == cells(3)
    assert all(store.get(cell) for cell in cells(3))
    assert records[0].environment == {"device": "cpu", "threads": 3, "jobs": 2, "data_root": Path.cwd() / "data"}
    assert sorted(e["cell"] for e in diary.events) == sorted(c.id for c in cells(3))
    assert diary.events[0]["score"] == 0.25
    assert sorted(diary.order) == [(what, i) for what in ("finished", "started") for i in range(3)]
    assert diary.most == 2


def test_one_job_runs_one_cell_at_a_time(store: Store) -> None:
    diary = Diary()
    run("ok", 2, store, progress=diary)
    assert diary.order == [("started", 0), ("finished", 0), ("started", 1), ("finished", 1)]


def test_slow_imports_are_made_once_by_the_server_and_cuda_stays_untouched(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("ok", 1, store)  # the server runs by now, and a later change of the environment must reach the cells
    monkeypatch.setenv("PETLBENCH_TEST_VARIABLE", "set late")
    seen = [record.environment for record in run("probe", 5, store, threads=3)]
    assert len({s["process"] for s in seen}) == 5
    assert len({s["server"] for s in seen}) == 1
    for s in seen:
        assert set(local.PRELOAD) <= s["modules"]
        assert (s["cuda_initialized"], s["cuda_lost_by_fork"]) == (False, False)
        assert (s["torch_threads"], s["omp_threads"]) == (3, "3")
        assert s["variable"] == "set late"
        assert s["ignores_interrupts"]


def test_threads_default_to_an_equal_share_of_the_cores(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 7)
    assert {r.environment["threads"] for r in run("ok", 3, store, jobs=3)} == {2}
    assert {r.environment["threads"] for r in run("ok", 1, store, jobs=3)} == {7}, "one cell runs alone"


def test_a_cell_that_dies_or_raises_leaves_a_failed_record_and_the_others_run(store: Store) -> None:
    records = run("by_seed", 5, store, jobs=2)
    assert [r.outcome for r in records] == ["ok", "failed", "failed", "failed", "ok"]
    assert [r.reason for r in records[1:4]] == [
        "RuntimeError: no such thing",
        "process exited with code 7 and left no record",
        "process died with signal 9 (killed, perhaps for memory)",
    ]
    assert [store.get(r.cell) for r in records[1:4]] == records[1:4]
    assert all(r.started for r in records[1:4])


def test_a_process_that_crashes_after_its_record_has_still_left_it(store: Store) -> None:
    assert run("killed_after_its_record", 1, store)[0].outcome == "ok"


def test_a_target_that_cannot_be_imported_fails_its_cell(store: Store) -> None:
    assert run("no_such_function", 1, store)[0].reason.startswith("AttributeError: ")


def test_progress_goes_to_stdout_unless_told_otherwise(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run("ok", 1, store)
    assert [line.split(" in ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "[1/1] lora on rec:digits (tiny, seed 0): started",
        "[1/1] lora on rec:digits (tiny, seed 0): ok acc 0.500",
    ]
    run("ok", 1, store, progress=Progress())
    assert capsys.readouterr().out == ""


def test_no_jobs_are_refused(store: Store) -> None:
    with pytest.raises(UserError, match="at least 1"):
        run("ok", 1, store, jobs=0)


def test_no_cells_give_no_records(store: Store) -> None:
    assert run("ok", 0, store) == []


def test_an_interrupt_ends_polite_and_stubborn_processes_and_goes_on(store: Store, tmp_path: Path) -> None:
    def interrupt_when_both_run(events: list[Event]) -> None:
        if len(events) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    diary = Diary(interrupt_when_both_run)
    with pytest.raises(KeyboardInterrupt):
        run("endless", 3, store, jobs=2, progress=diary)
    assert [gone(e["step"]) for e in diary.events] == [True, True]
    assert [p.name for p in tmp_path.glob("*.tmp")] == ["1.tmp"], "the polite one cleans up"
    assert store.load() == []
    assert ("started", 2) not in diary.order
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_record_that_cannot_be_saved_ends_the_other_processes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(record: Record, samples: object) -> Record:
        raise UserError("the disk is full")

    monkeypatch.setattr(store, "save", full)
    diary = Diary(lambda events: os.kill(events[0]["step"], signal.SIGKILL) if len(events) == 2 else None)
    with pytest.raises(UserError, match="disk is full"):
        run("endless", 2, store, jobs=2, progress=diary)
    assert [gone(e["step"]) for e in diary.events] == [True, True]


SCRIPT = """
import pathlib, sys
from petlbench.launch import local, progress
from petlbench.records import Store
from petlbench.spec import Cell
class Tell(progress.Progress):
    told = False
    def event(self, index, event):
        if not self.told:
            print(event["step"], flush=True)
        self.told = True
local.PRELOAD = ()
if __name__ == "__main__":
    store = Store.open(sys.argv[1], create=True)
    cell = Cell(method="lora", task="rec", dataset="digits", backbone="tiny")
    try:
        local.run_cells([cell], store, device="cpu", jobs=1, target=sys.argv[2], progress=Tell())
    except KeyboardInterrupt:
        sys.exit(130)
"""


def launcher(tmp_path: Path, target: str) -> tuple[subprocess.Popen[str], int]:
    """A program of its own that runs one cell, as a shell starts it; and the process id of the cell."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[1]
    program = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "store"), TARGETS + target],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout is not None
    return program, int(program.stdout.readline())


def test_ctrl_c_in_a_terminal_reaches_everybody_and_prints_no_traceback(tmp_path: Path) -> None:
    program, cell_pid = launcher(tmp_path, "endless")
    os.killpg(program.pid, signal.SIGINT)
    _, errors = program.communicate(timeout=60)
    assert (program.returncode, errors) == (130, "")
    assert gone(cell_pid)
    assert not list((tmp_path / "store").rglob("*.tmp"))


def test_a_cell_whose_launcher_was_killed_ends_by_itself(tmp_path: Path) -> None:
    program, cell_pid = launcher(tmp_path, "talkative")
    program.kill()
    assert await_gone(cell_pid)
    program.communicate(timeout=60)


def test_launching_imports_no_torch() -> None:
    code = "import sys, petlbench.launch.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


OK = Record(cell=cells(1)[0], outcome="ok", main_metric="acc_50", metrics={"acc_50": 0.6123, "iou": 0.5})
FAILED = Record(cell=cells(2)[1], outcome="failed", reason="[Errno 2] no file\n  [/bold] here")


def test_without_a_terminal_there_is_one_line_at_start_and_one_at_end() -> None:
    out = io.StringIO()
    with progress_on(Console(file=out, width=30), 20) as shown:
        shown.started(2, OK.cell)
        shown.event(2, {"cell": OK.cell.id, "step": 1, "steps": 2})
        shown.finished(2, OK, 41.3)
        shown.finished(3, FAILED, 0.2)
    assert type(shown) is Lines
    assert out.getvalue().splitlines() == [
        "[3/20] lora on rec:digits (tiny, seed 0): started",
        "[3/20] lora on rec:digits (tiny, seed 0): ok acc_50 0.612 in 41 s",
        "[4/20] lora on rec:digits (tiny, seed 1): failed in 0 s: [Errno 2] no file [/bold] here",
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
    assert "0/2" in running
    assert "train 10/300, score 0.500" in running
    assert "1/2" in out.getvalue()[len(running) :]
    assert "[1/2] lora on rec:digits (tiny, seed 0): ok acc_50 0.612 in 41 s" in out.getvalue()
