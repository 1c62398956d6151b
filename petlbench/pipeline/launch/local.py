"""Run cells on this machine, each in a process forked from a server that has made the slow imports."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import wait
from types import MappingProxyType

from rich.console import Console

from petlbench.api.registries import BACKBONES, DATASETS, METHODS, TASKS
from petlbench.core.cell import Cell
from petlbench.core.record import Record
from petlbench.pipeline.launch.child import Job, live
from petlbench.pipeline.launch.claims import Claim, claim_cell, idle
from petlbench.pipeline.launch.process import Run, end_server, failure, preloaded_context, stop, stopped_by_signals
from petlbench.pipeline.launch.progress import Progress, progress_on
from petlbench.pipeline.launch.watch import Limits, fair_share, last_lines, signal_group
from petlbench.pipeline.options import RunOptions
from petlbench.results.repair import remove_leftovers
from petlbench.results.store import Store

TARGET = "petlbench.pipeline.cell:run_cell"
POLL_SECONDS = 0.1  # between two checks of the running cells
CLAIM_SECONDS = 0.5  # between two tries to claim cells that another run works on


def run_cells(
    cells: list[Cell],
    store: Store,
    options: RunOptions = RunOptions(),  # noqa: B008 -- frozen
    *,
    done: Callable[[Cell], Record | None] = lambda cell: None,
    fingerprints: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    progress: Progress | None = None,
    target: str = TARGET,
) -> list[Record]:
    """Run `cells`, at most `options.jobs` at a time, and return their records in the same order.

    `target` (`module:function`) runs one cell in its own process and saves its record: `(cell, store_root, options, *,
    fingerprints, report)` returns a Record. A process that dies or raises leaves a record too, `failed` with the
    reason; so does one that exceeds the time limit (`timeout`) or, with its descendants, the memory limit (`oom`). The
    output of a cell goes to its log, whose last lines go into the record if the cell does not end well. `progress`
    defaults to bars or lines on stdout.

    Another run may work on the same store: then each cell is run by one of them. After claiming a cell, the run calls
    `done`; if it returns a record, the cell is not run again. `fingerprints`, by cell id, describe the code when the
    run starts: if it is edited meanwhile, the records are stale.

    On KeyboardInterrupt (also SIGTERM and SIGHUP: Stopped), or if results cannot be saved (Unwritable), end all
    processes and let the exception pass.
    """
    options = options.resolved(len(cells))
    if not cells:
        return []
    refuse_offered(cells)
    if idle(store.claims):  # no cell is running, so half-written files are leftovers
        remove_leftovers(store, (store.records, store.sample_scores, store.adapters, store.checkpoints), 0.0)
    with stopped_by_signals():
        try:
            launch = _Launch(store, options, done, fingerprints, target)
            launch.waiting.extend(enumerate(cells))
            with progress or progress_on(Console(), len(cells)) as shown:
                return launch.run(shown)
        except KeyboardInterrupt:
            end_server()
            raise


def refuse_offered(cells: Iterable[Cell]) -> None:
    """Raise UserError if a cell names a class that its process would not find."""
    for cell in cells:
        METHODS.refuse_offered(cell.method)
        TASKS.refuse_offered(cell.task)
        DATASETS.refuse_offered(cell.dataset)
        BACKBONES.refuse_offered(cell.backbone)


class _Launch:
    """The cells of one call of `run_cells`, by index: waiting, held by another run, running, or recorded."""

    def __init__(
        self,
        store: Store,
        options: RunOptions,
        done: Callable[[Cell], Record | None],
        fingerprints: Mapping[str, Mapping[str, str]],
        target: str,
    ) -> None:
        self.store, self.options, self.done = store, options, done
        self.fingerprints, self.target = fingerprints, target
        self.limits = Limits(options.timeout, options.memory_limit or fair_share(options.jobs))
        self.context = preloaded_context()
        self.waiting: deque[tuple[int, Cell]] = deque()
        self.held: list[tuple[int, Cell]] = []
        self.running: dict[int, Run] = {}
        self.records: dict[int, Record] = {}

    def run(self, progress: Progress) -> list[Record]:
        retry_at = 0.0
        try:
            while self.waiting or self.held or self.running:
                if time.monotonic() >= retry_at:
                    self.waiting.extend(self.held)
                    self.held.clear()
                    retry_at = time.monotonic() + CLAIM_SECONDS
                self._start_some(progress)
                if self.running:
                    wait([handle for run in self.running.values() for handle in run.handles()], POLL_SECONDS)
                elif self.held:
                    progress.waiting(len(self.held))
                    time.sleep(POLL_SECONDS)
                self._listen(progress)
            return [self.records[index] for index in sorted(self.records)]
        finally:
            stop(self.running.values())

    def _start_some(self, progress: Progress) -> None:
        while self.waiting and len(self.running) < self.options.jobs:
            index, cell = self.waiting.popleft()
            claim = claim_cell(self.store.claims / f"{cell.id}.lock")
            if claim is None:
                self.held.append((index, cell))
            elif record := self.done(cell):
                claim.release()
                self.records[index] = record
                progress.recorded_elsewhere(index, record)
            else:
                progress.started(index, cell)
                run = self.running[index] = self._prepare(cell, claim)
                run.start()  # only after it is in `running`, where an interrupt finds it

    def _prepare(self, cell: Cell, claim: Claim) -> Run:
        log = self.store.logs / f"{cell.id}.log"
        reader, writer = self.context.Pipe(duplex=False)
        fingerprints = dict(self.fingerprints.get(cell.id, {}))
        root = self.store.root.absolute()
        job = Job(cell, root, log.absolute(), self.target, self.options, fingerprints, dict(os.environ))
        process = self.context.Process(target=live, args=(writer, claim, job))
        return Run(cell, claim, log, process, reader, writer, self.limits, fingerprints)

    def _listen(self, progress: Progress) -> None:
        for index, run in list(self.running.items()):
            ended = not run.process.is_alive()  # checked first, so that the pipe holds all that it sent
            for event in run.receive():
                progress.event(index, event)
            if ended:
                self.records[index] = self._conclude(run)
                del self.running[index]
                progress.finished(index, self.records[index], run.seconds())
                run.close()
            else:
                run.check()

    def _conclude(self, run: Run) -> Record:
        """Return the record of a cell whose process has ended; save it with the end of the log if the cell failed."""
        if run.process.exitcode:  # it was killed or crashed: programs that it started may still run
            signal_group(run.watch.pid, signal.SIGKILL)
        record = run.record or failure(run)
        if record.outcome != "ok":
            record = record.model_copy(update={"log": last_lines(run.log, run.log_start)})
            if record != run.record:
                record = self.store.save(record, None)
        elif run.log.exists() and not run.log.stat().st_size:
            run.log.unlink()
        return record
