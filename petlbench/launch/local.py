"""Cells on this machine: a process each, forked from a server that has the slow imports behind it."""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from rich.console import Console

from petlbench.errors import UserError
from petlbench.launch.progress import Event, Progress, progress_on
from petlbench.measure.environment import cores
from petlbench.records import Store
from petlbench.spec import Cell, Record

TARGET = "petlbench.runner:run_cell"
# None of these may touch CUDA when imported: a process forked after that can not use it. transformers alone is lazy and
# imports next to nothing; its modeling_utils is what every model of it waits for.
PRELOAD = ("torch", "transformers.modeling_utils", "datasets", "sklearn.datasets", "petlbench.runner")
GRACE_SECONDS = 1.0


def run_cells(
    cells: list[Cell],
    store: Store,
    *,
    device: str,
    jobs: int,
    threads: int | None = None,
    data_root: Path | None = None,
    progress: Progress | None = None,
    target: str = TARGET,
) -> list[Record]:
    """Run `cells`, at most `jobs` at a time, and return their records in the same order.

    `target` (`module:function`) runs one cell in its own process and saves its record:
    `(cell, store_root, *, device, threads, jobs, data_root, report) -> Record`. A process that dies or raises leaves
    a record too: `failed`, with the reason. `threads` per cell defaults to an equal share of the cores; `progress` to
    bars or lines on stdout. On KeyboardInterrupt, or when a record cannot be saved, all processes are ended before the
    exception goes on.
    """
    if jobs < 1:
        raise UserError(f"the number of jobs must be at least 1, not {jobs}")
    jobs = max(1, min(jobs, len(cells)))
    options = {
        "device": device,
        "threads": threads or max(1, cores() // jobs),
        "jobs": jobs,
        "data_root": data_root.absolute() if data_root else None,
    }
    if not cells:
        return []
    context = preloaded_context()
    runs = (_prepare(context, cell, target, store.root.absolute(), options) for cell in cells)
    with progress or progress_on(Console(), len(cells)) as shown:
        return _run_all(runs, store, jobs, shown)


def _run_all(runs: Iterator[_Run], store: Store, jobs: int, progress: Progress) -> list[Record]:
    waiting = enumerate(runs)
    running: dict[int, _Run] = {}
    records: dict[int, Record] = {}
    try:
        while True:
            for index, run in islice(waiting, jobs - len(running)):
                progress.started(index, run.cell)
                running[index] = run
                run.start()  # only now, that an interrupt finds it among the running
            if not running:
                return [records[index] for index in sorted(records)]
            wait([handle for run in running.values() for handle in run.handles()])
            for index, run in list(running.items()):
                ended = not run.process.is_alive()  # asked first: what it sent before it ended is then in the pipe
                for event in run.receive():
                    progress.event(index, event)
                if ended:
                    records[index] = run.record or store.save(_failure(run), None)
                    del running[index]
                    progress.finished(index, records[index], run.seconds())
                    run.close()
    finally:
        _stop(running.values())


def preloaded_context() -> ForkServerContext:
    """The `forkserver` context, its server on its way; the imports cost once in the life of the calling process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    with _interrupts_ignored():  # inherited by the server: Ctrl-C is the launcher's affair, also while it imports
        forkserver.ensure_running()
    return context


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets and handles signals
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)


@dataclass
class _Run:
    """A cell that runs, as its launcher sees it."""

    cell: Cell
    process: ForkServerProcess
    reader: Connection
    writer: Connection
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    begun: float = field(default_factory=time.monotonic)
    record: Record | None = None
    error: str = ""
    open: bool = True

    def start(self) -> None:
        self.process.start()
        self.writer.close()  # the child's copy is then the only one, and its end ends the pipe

    def handles(self) -> list[Any]:
        """What to wait for: the process's end, and its messages while there can be any."""
        return [self.process.sentinel, *([self.reader] if self.open else [])]

    def receive(self) -> Iterator[Event]:
        """Take all messages that have arrived; yield the events among them."""
        while self.open and self.reader.poll():
            try:
                kind, content = self.reader.recv()
            except (EOFError, OSError):
                self.open = False
                return
            if kind == "event":
                yield content
            elif kind == "begun":  # imports of the server, which the first cell waits for, are not the cell's time
                self.begun = time.monotonic()
            elif kind == "record":
                self.record = content
            else:
                self.error = content

    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def close(self) -> None:
        self.reader.close()
        self.process.close()


def _prepare(context: ForkServerContext, cell: Cell, target: str, root: Path, options: Mapping[str, Any]) -> _Run:
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(writer, target, cell, root, dict(os.environ), options))
    return _Run(cell, process, reader, writer)


def _child(
    writer: Connection, target: str, cell: Cell, root: Path, environ: dict[str, str], options: Mapping[str, Any]
) -> None:
    """The whole life of a cell's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwinds: temporary files go
    os.environ.clear()  # the server's environment is as old as the server; the caller's is meant
    os.environ.update(environ, OMP_NUM_THREADS=str(options["threads"]))
    if torch := sys.modules.get("torch"):  # imported already, it does not read the variable any more
        torch.set_num_threads(options["threads"])

    def send(kind: str, content: Any) -> None:
        try:
            writer.send((kind, content))
        except OSError:
            os._exit(1)  # the launcher is gone: nobody wants this cell any more

    send("begun", None)
    try:
        run_cell = pkgutil.resolve_name(target)
        send("record", run_cell(cell, root, **options, report=lambda event: send("event", event)))
    except Exception as error:
        send("error", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")


def _failure(run: _Run) -> Record:
    """The record of a cell that did not leave one itself."""
    code = run.process.exitcode or 0
    if run.error:
        reason = run.error
    elif code < 0:
        hint = "killed, perhaps for memory" if -code == signal.SIGKILL else signal.strsignal(-code)
        reason = f"process died with signal {-code} ({hint})"
    else:
        reason = f"process exited with code {code} and left no record"
    return Record(cell=run.cell, outcome="failed", reason=reason, started=run.started.isoformat(timespec="seconds"))


def _stop(runs: Iterable[_Run]) -> None:
    """End the processes: a request first, force after GRACE_SECONDS. A second Ctrl-C does not cut this short."""
    with _interrupts_ignored():
        runs = list(runs)
        started = [run.process for run in runs if run.process.pid is not None]
        for process in started:
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in started:
            if process.is_alive():
                process.kill()
            process.join()
        for run in runs:
            run.reader.close()  # one that the server has yet to fork ends at its first message
