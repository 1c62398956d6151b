"""Cells run in their own processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from petlbench.core.cell import Cell
from petlbench.core.errors import Unwritable, UserError
from petlbench.core.record import Record
from petlbench.core.units import human_bytes
from petlbench.pipeline import options
from petlbench.pipeline.launch import local, process
from petlbench.pipeline.launch.progress import Event, Progress
from petlbench.pipeline.options import RunOptions
from petlbench.results.store import Store

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
        self.on_waiting: Callable[[int], object] = lambda count: None
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

    def recorded_elsewhere(self, index: int, record: Record) -> None:
        self.order.append(("recorded_elsewhere", index))

    def waiting(self, count: int) -> None:
        self.order.append(("waiting", count))
        self.on_waiting(count)


def run(target: str, count: int, store: Store, jobs: int = 1, **options: Any) -> list[Record]:
    """Run cells. `options`: fields of `RunOptions`, or parameters of `run_cells`."""
    ours = {field: options.pop(field) for field in RunOptions.__dataclass_fields__ if field in options}
    running = RunOptions(device="cpu", jobs=jobs, **ours)
    return local.run_cells(cells(count), store, running, target=TARGETS + target, **options)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def await_gone(pid: int) -> bool:
    """Wait until the process has ended; the server reaps it a moment later. Return whether it did."""
    for _ in range(200):
        if gone(pid):
            return True
        time.sleep(0.05)
    return False


def test_records_come_back_in_the_order_of_the_cells_with_their_events(store: Store, tmp_path: Path) -> None:
    diary = Diary()
    records = run("ok", 3, store, jobs=2, threads=3, data_root=Path("data"), checkpoint_seconds=5.0, progress=diary)
    assert [r.cell for r in records] == cells(3)
    assert all(store.get(cell) for cell in cells(3))
    assert records[0].environment == {
        "device": "cpu",
        "threads": 3,
        "jobs": 2,
        "data_root": Path.cwd() / "data",
        "checkpoint_seconds": 5.0,
        "workers": None,
        "timeout": None,
        "memory_limit": None,
        "fingerprints": None,
    }
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
    run("ok", 1, store)  # start the server; a later change of the environment must reach the cells
    monkeypatch.setenv("PETLBENCH_TEST_VARIABLE", "set late")
    seen = [record.environment for record in run("probe", 5, store, threads=3)]
    assert len({s["process"] for s in seen}) == 5
    assert len({s["server"] for s in seen}) == 1
    for s in seen:
        assert set(process.PRELOAD) <= s["modules"]
        assert (s["cuda_initialized"], s["cuda_lost_by_fork"]) == (False, False)
        assert (s["torch_threads"], s["omp_threads"]) == (3, "3")
        assert s["variable"] == "set late"
        assert s["ignores_interrupts"]


def test_threads_default_to_an_equal_share_of_the_cores(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "cores", lambda: 7)
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


def test_each_misfortune_leaves_its_row_beside_the_good_ones(store: Store) -> None:
    limit = run("probe", 1, store)[0].environment["resident_bytes"] + 200 * 2**20
    fingerprints = {"method": "0123456789abcdef"}
    ids = [cell.id for cell in cells(6)]
    records = run(
        "misfortunes", 6, store, jobs=2, timeout=5.0, memory_limit=limit, fingerprints=dict.fromkeys(ids, fingerprints)
    )
    assert [r.outcome for r in records] == ["ok", "failed", "diverged", "timeout", "oom", "ok"]
    assert records[1].reason == "RuntimeError: no such thing"
    assert records[2].reason == "loss nan at step 3"
    assert records[3].reason == "took longer than the timeout of 5 s"
    assert re.fullmatch(
        rf"resident memory [\d.]+ .iB passed the memory_limit of {human_bytes(limit)}", records[4].reason
    )
    assert records[1].log[0] == "Traceback (most recent call last):"
    assert records[1].log[-1] == "RuntimeError: no such thing"
    assert [r.log for r in (records[0], records[2], records[3])] == [(), ("the loss is nan",), ("now to sleep",)]
    assert [store.get(r.cell) for r in records[1:5]] == records[1:5]
    assert [r.fingerprints for r in records if r.outcome in ("timeout", "oom", "failed")] == [fingerprints] * 3


def test_a_full_disk_ends_the_run_and_is_no_cells_fault(store: Store) -> None:
    with pytest.raises(Unwritable, match="No space left on device"):
        run("unwritable", 3, store)
    assert store.load() == []


def test_the_memory_of_what_a_cell_has_started_counts_and_all_of_it_is_ended(store: Store) -> None:
    limit = run("probe", 1, store)[0].environment["resident_bytes"] + 200 * 2**20
    diary = Diary()
    assert run("delegates", 1, store, memory_limit=limit, progress=diary)[0].outcome == "oom"
    assert await_gone(diary.events[0]["step"])


def test_a_process_that_does_not_listen_is_timed_out_too(store: Store) -> None:
    stubborn = Cell(method="lora", task="rec", dataset="digits", backbone="tiny", seed=1)
    diary = Diary()
    records = local.run_cells(
        [stubborn], store, RunOptions(device="cpu", jobs=1, timeout=0.2), progress=diary, target=TARGETS + "endless"
    )
    assert records[0].outcome == "timeout"
    assert gone(diary.events[0]["step"])


def test_the_record_of_a_bad_end_holds_what_this_attempt_printed(store: Store) -> None:
    lines = ("from Python", "from a program", "100 %", "an unfinished line")
    for _ in range(2):
        records = run("prints", 2, store)
        assert [r.log for r in records] == [(), lines]
    for record in records:  # the log has both attempts, also that of the cell that succeeds
        assert (store.logs / f"{record.cell.id}.log").read_text().count("from a program") == 2


def test_a_crash_in_native_code_shows_where(store: Store) -> None:
    record = run("crashes", 1, store)[0]
    assert record.reason == "process died with signal 11 (Segmentation fault)"
    assert any("in crashes" in line for line in record.log)


def test_a_cell_that_ends_well_and_silently_leaves_no_log_and_no_claim(store: Store) -> None:
    run("ok", 1, store)
    assert [*store.logs.iterdir(), *store.claims.iterdir()] == []


def test_a_process_that_crashes_after_its_record_has_still_left_it(store: Store) -> None:
    assert run("killed_after_its_record", 1, store)[0].outcome == "ok"


def test_a_target_that_cannot_be_imported_fails_its_cell(store: Store) -> None:
    assert run("no_such_function", 1, store)[0].reason.startswith("AttributeError: ")


def test_progress_goes_to_stdout_by_default(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_record_that_cannot_be_saved_ends_the_other_processes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(record: Record, samples: object) -> Record:
        raise UserError("the disk is full")

    monkeypatch.setattr(store, "save", full)
    diary = Diary(lambda events: os.kill(events[0]["step"], signal.SIGKILL) if len(events) == 2 else None)
    with pytest.raises(UserError, match="disk is full"):
        run("endless", 2, store, jobs=2, progress=diary)
    assert [gone(e["step"]) for e in diary.events] == [True, True]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell's background job ignores interrupts, and so do the processes that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
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
    assert list(store.claims.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


SCRIPT = """
import pathlib, sys
from petlbench.pipeline.launch import local, process, progress
from petlbench.results.store import Store
from petlbench.core.cell import Cell
from petlbench.pipeline.options import RunOptions
class Tell(progress.Progress):
    interrupted = False
    def event(self, index, event):
        if not self.interrupted:
            print(event["step"], flush=True)
        self.interrupted = True
process.PRELOAD = ()
if __name__ == "__main__":
    store = Store.open(sys.argv[1], create=True)
    cell = Cell(method="lora", task="rec", dataset="digits", backbone="tiny")
    try:
        local.run_cells([cell], store, RunOptions("cpu"), target=sys.argv[2], progress=Tell())
    except KeyboardInterrupt as error:
        sys.exit(getattr(error, "status", 130))
"""


def _heed_signals() -> None:
    """Ignore signals, as a shell's background job and `nohup` do; children inherit that."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def launcher(tmp_path: Path, target: str) -> tuple[subprocess.Popen[str], int]:
    """Start a program that runs one cell, as a shell would; yield it with the process id of the cell."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    program = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "store"), TARGETS + target],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_signals,
    )
    assert program.stdout is not None
    return program, int(program.stdout.readline())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_all_ends_all_and_prints_no_traceback(tmp_path: Path, number: int, status: int) -> None:
    program, cell_pid = launcher(tmp_path, "endless")
    os.killpg(program.pid, number)
    _, errors = program.communicate(timeout=60)  # ends only if the server too has closed its end of the pipe
    assert (program.returncode, errors) == (status, "")
    assert gone(cell_pid)
    assert not list((tmp_path / "store").rglob("*.tmp"))


@pytest.mark.parametrize("target", ["talkative", "endless"])
def test_a_cell_whose_launcher_was_killed_ends_by_itself(tmp_path: Path, target: str) -> None:
    program, cell_pid = launcher(tmp_path, target)
    program.kill()
    assert await_gone(cell_pid)
    program.communicate(timeout=60)


def test_launching_imports_no_torch() -> None:
    code = "import sys, petlbench.pipeline.launch.local; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
