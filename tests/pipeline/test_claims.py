"""Claims: a cell's lock file, and runs that share a folder."""

from __future__ import annotations

import errno
import fcntl
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from petlbench.core.errors import UserError
from petlbench.core.record import Record
from petlbench.pipeline.launch.claims import claim_cell
from petlbench.pipeline.launch.progress import Progress
from petlbench.results.store import Store
from tests.pipeline.test_launch import Diary, await_gone, cells, launcher, run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path, create=True)


def test_a_claim_excludes_others_until_it_is_released_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "cell.lock"
    first = claim_cell(path)
    assert first is not None
    assert claim_cell(path) is None
    first.release()
    assert not path.exists()
    second = claim_cell(path)
    assert second is not None
    first.release()  # a second release must not harm the claim of the new holder
    assert claim_cell(path) is None
    second.release()


def test_a_file_left_by_a_killed_run_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "cell.lock").touch()
    claim = claim_cell(tmp_path / "cell.lock")
    assert claim is not None
    claim.release()


def test_a_lock_on_a_file_that_its_holder_removed_meanwhile_is_no_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cell.lock"
    flock = fcntl.flock
    replacements = iter([path.unlink, lambda: (path.unlink(), path.touch())])

    def after_the_holder_has_gone(file: object, how: int) -> None:
        next(replacements, lambda: None)()
        flock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", after_the_holder_has_gone)
    claim = claim_cell(path)
    monkeypatch.undo()
    assert claim is not None
    assert claim_cell(path) is None, "the claim is on the file that is there"
    claim.release()


def test_what_cannot_be_locked_or_written_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with pytest.raises(UserError, match=r"cannot write .*cell\.lock"):
        claim_cell(tmp_path / "nowhere" / "cell.lock")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"cannot lock .*cell\.lock: No locks available; choose"):
        claim_cell(tmp_path / "cell.lock")


def test_two_runs_on_one_folder_run_each_cell_once(store: Store) -> None:
    run("ok", 1, store)  # start the server
    (store.records / f"{cells(1)[0].id}.json").unlink()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, "once", 5, store, jobs=2, done=store.get, progress=Progress()) for _ in range(2)]
        results = [one.result() for one in runs]
    assert [[r.outcome for r in records] for records in results] == [["ok"] * 5] * 2
    assert len(list(store.root.glob("*.ran"))) == 5


@pytest.mark.parametrize("left", [True, False])
def test_a_cell_that_another_run_holds_is_put_back_and_run_only_if_that_leaves_no_record(
    store: Store, left: bool
) -> None:
    first = cells(2)[0]
    other = claim_cell(store.claims / f"{first.id}.lock")
    assert other is not None

    def let_go(count: int) -> None:
        if left:
            store.save(Record(cell=first, outcome="ok", reason="of the other run"))
        other.release()

    diary = Diary()
    diary.on_waiting = let_go
    records = run("ok", 2, store, done=store.get, progress=diary)
    assert [r.reason for r in records] == ["of the other run" if left else "", ""]
    end = [("recorded_elsewhere", 0)] if left else [("started", 0), ("finished", 0)]
    order = list(dict.fromkeys(diary.order))
    assert order == [("started", 1), ("finished", 1), ("waiting", 1), *end]


def test_what_a_killed_run_left_half_written_goes_unless_somebody_is_at_work(store: Store) -> None:
    half = store.checkpoints / ".0123.tmp"
    half.touch()
    claim = claim_cell(store.claims / "another.lock")
    assert claim is not None
    run("ok", 1, store)
    assert half.exists()
    claim.release()
    run("ok", 1, store)
    assert not half.exists()


def test_a_claim_outlives_its_launcher_while_the_cell_does(tmp_path: Path) -> None:
    program, cell_pid = launcher(tmp_path, "talkative")
    cell = psutil.Process(cell_pid)
    # A stopped process cannot notice that the launcher is gone. If the server ended, the kernel would hang up the cell.
    both = [cell, psutil.Process(cell.ppid())]
    for process in both:
        process.suspend()
    while {process.status() for process in both} != {psutil.STATUS_STOPPED}:  # a process stops thread by thread
        time.sleep(0.01)
    program.kill()
    program.wait(timeout=60)
    (path,) = (tmp_path / "store" / "claims").iterdir()
    taken = claim_cell(path)
    for process in both:
        process.resume()
    assert taken is None
    assert await_gone(cell_pid)
    program.communicate(timeout=60)
    claim = claim_cell(path)
    assert claim is not None
    claim.release()
