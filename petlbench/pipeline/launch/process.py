"""A cell's process, seen from its parent; the server that forks it; the signals that end them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from petlbench.core.cell import Cell
from petlbench.core.errors import Unwritable
from petlbench.core.recipe import Outcome
from petlbench.core.record import Record
from petlbench.pipeline.launch.claims import Claim
from petlbench.pipeline.launch.progress import Event
from petlbench.pipeline.launch.watch import Limits, Watch, signal_group

# None of these may touch CUDA when imported: a process forked after that cannot use it. `transformers` itself imports
# next to nothing; its modeling_utils is what every model of it waits for.
PRELOAD = ("torch", "transformers.modeling_utils", "datasets", "sklearn.datasets", "petlbench.pipeline.cell")
GRACE_SECONDS = 0.5  # for a process to clean up; files are written atomically, so that a kill does no harm
KILL_SECONDS = 1.0  # for the kernel to carry out a kill
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """Raised when the launcher gets SIGTERM or SIGHUP; `status` is the exit status for that signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.strsignal(number))
        self.status = 128 + number


def preloaded_context() -> ForkServerContext:
    """Return the `forkserver` context and start its server, which does its imports once for all cells."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    with signals_ignored():  # the server inherits this: Ctrl-C concerns the launcher, also while the server imports
        forkserver.ensure_running()
    return context


def end_server() -> None:
    """Kill the server at once; the next run gets a new one.

    It has no public way to be ended. Its own `_stop` waits for it, which takes 10 seconds while it still imports; after
    the kill, 0.01.
    """
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        with suppress(ProcessLookupError):
            os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()


@contextmanager
def server_beside() -> Iterator[None]:
    """Let the server do its imports while the block does its own; end the server after the block."""
    preloaded_context()
    try:
        yield
    finally:
        end_server()


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep a process that starts in the block from running the caller's script again.

    Without this, every script that calls `petlbench.run` would need `if __name__ == "__main__"`.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _handling(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def signals_ignored() -> AbstractContextManager[None]:
    return _handling(dict.fromkeys(STOPPING, signal.SIG_IGN))


def stopped_by_signals() -> AbstractContextManager[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, unless the caller handles them or ignores them (nohup)."""

    def raise_stopped(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    return _handling({n: raise_stopped for n in STOPPING if signal.getsignal(n) is signal.SIG_DFL})


@dataclass
class Run:
    """A running cell, as its launcher sees it."""

    cell: Cell
    claim: Claim
    log: Path
    process: ForkServerProcess
    reader: Connection
    writer: Connection
    limits: Limits
    fingerprints: dict[str, str]
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    record: Record | None = None
    verdict: tuple[Outcome, str] | None = None  # why the launcher ended it
    error: str = ""
    open: bool = True

    def __post_init__(self) -> None:
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        self._made = time.monotonic()
        self._kill_at = 0.0

    def start(self) -> None:
        with _without_main():
            self.process.start()
        self.writer.close()  # only the child's copy is left, so that the pipe ends with the child
        assert self.process.pid is not None
        self.watch = Watch(self.process.pid, self.limits)

    def handles(self) -> list[Any]:
        """Return the handles to wait for: the end of the process, and its messages while the pipe is open."""
        return [self.process.sentinel, *([self.reader] if self.open else [])]

    def receive(self) -> Iterator[Event]:
        """Read all messages that have arrived and yield the events among them. Raises Unwritable if the cell did."""
        while self.open and self.reader.poll():
            try:
                kind, content = self.reader.recv()
            except (EOFError, OSError):
                self.open = False
                return
            if kind == "event":
                yield content
            elif kind == "begun":  # the time in which a first cell waits for the server's imports does not count
                self.watch.begun = time.monotonic()
            elif kind == "unwritable":
                raise Unwritable(content)
            elif kind == "record":
                self.record = content
            else:
                self.error = content

    def check(self) -> None:
        """End the process if it has passed a limit: at once for memory, for time with a request first."""
        if self.verdict is None:
            self.verdict = self.watch.passed()
            if self.verdict and self.verdict[0] == "timeout":
                signal_group(self.watch.pid, signal.SIGTERM)
                self._kill_at = time.monotonic() + GRACE_SECONDS
        if self.verdict and time.monotonic() >= self._kill_at:
            signal_group(self.watch.pid, signal.SIGKILL)

    def seconds(self) -> float:
        return time.monotonic() - (self.watch.begun or self._made)

    def close(self) -> None:
        self.reader.close()
        self.process.close()
        self.claim.release()


def failure(run: Run) -> Record:
    """Return the record of a cell that did not make one itself."""
    code = run.process.exitcode or 0
    outcome: Outcome = "failed"
    if run.verdict:
        outcome, reason = run.verdict
    elif run.error:
        reason = run.error
    elif code < 0:
        hint = "killed, perhaps for memory" if -code == signal.SIGKILL else signal.strsignal(-code)
        reason = f"process died with signal {-code} ({hint})"
    else:
        reason = f"process exited with code {code} and left no record"
    started = run.started.isoformat(timespec="seconds")
    return Record(cell=run.cell, outcome=outcome, reason=reason, started=started, fingerprints=run.fingerprints)


def stop(runs: Collection[Run]) -> None:
    """End the processes: first by request, by force after GRACE_SECONDS. A second Ctrl-C does not interrupt this."""
    with signals_ignored():
        started = {run.process.pid: run for run in runs if run.process.pid is not None}
        for pid in started:
            signal_group(pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for run in started.values():
            run.process.join(max(0.0, deadline - time.monotonic()))
        for pid in started:  # also those reported as ended: the report comes from the server, which may be dead
            signal_group(pid, signal.SIGKILL)
        for run in started.values():
            run.process.join(KILL_SECONDS)
        for run in runs:
            run.reader.close()  # a process that the server has yet to fork ends at its first message
            run.claim.release()
