"""Plan and execute a run: take the cells of a suite, run those that need it, and return the records of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from petlbench.core.cell import Cell, MethodSpec, Suite
from petlbench.core.errors import UserError
from petlbench.core.record import Record
from petlbench.core.registry import is_wildcard
from petlbench.pipeline.compatibility import incompatible_cells
from petlbench.pipeline.freshness import CellState, fingerprints_of, state_of
from petlbench.pipeline.launch.local import refuse_offered, run_cells
from petlbench.pipeline.launch.process import server_beside
from petlbench.pipeline.launch.progress import Progress
from petlbench.pipeline.options import Device, RunOptions, need_device
from petlbench.pipeline.plan.suite import expand, load_suite
from petlbench.pipeline.plan.variants import matches
from petlbench.results.store import Store


@dataclass(frozen=True)
class Selection:
    """The part of a suite to run, by names or wildcards; see `expand`. None: all that the suite names."""

    methods: Sequence[str] | None = None
    tasks: Sequence[str] | None = None
    backbone: str | None = None
    seeds: Sequence[int] | None = None
    limit: int | None = None  # rows used of each split


@dataclass(frozen=True)
class RunPlan:
    """The cells of a run, and the state of each when the run was planned. Nothing is written before `execute`."""

    suite: Suite
    store: Store
    cells: tuple[Cell, ...]
    left_out: tuple[str, ...]  # the reasons why cells of a wildcard are missing
    fingerprints: Mapping[str, Mapping[str, str]]  # of the code, data and weights as they are now, by cell id
    states: Mapping[str, CellState]  # by cell id
    settled: frozenset[str]  # names of the states in which a cell is not run again
    begun: str  # UTC, ISO 8601

    @property
    def pending(self) -> list[Cell]:
        """The cells to run."""
        return [cell for cell in self.cells if self.states[cell.id].name not in self.settled]

    def done(self, cell: Cell) -> Record | None:
        """Return the record for which the cell need not run; another run may have saved it meanwhile."""
        record = self.store.get(cell)
        state = state_of(cell, record, self.fingerprints[cell.id]).name
        failed_meanwhile = record is not None and record.started > self.begun and state == "failed"
        return record if state in self.settled or failed_meanwhile else None

    def records(self) -> list[Record]:
        """Return the records that the folder holds of these cells, in their order."""
        return [record for cell in self.cells if (record := self.store.get(cell))]

    def summary(self) -> str:
        """Count the cells by state, in one line."""
        counts = Counter(self.states[cell.id].name for cell in self.cells)
        by_state = [f"{counts[name]} {name}" for name in ("done", "stale", "failed") if counts[name] or name == "done"]
        where = f"{len(self.pending)} to run; results in {self.store.root}"
        return f"{self.suite.name}: {counts.total()} cells, {', '.join(by_state)}, {where}"


def run(
    suite: str | Path = "quick",
    *,
    methods: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    backbone: str | None = None,
    seeds: Sequence[int] | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    data_root: str | Path | None = None,
    device: Device = "auto",
    jobs: int = 1,
    threads: int | None = None,
    workers: int | None = None,
    timeout: float | None = None,
    memory_limit: int | None = None,
    checkpoint_seconds: float = 60.0,
    keep_stale: bool = False,
    retry_failed: bool = False,
) -> list[Record]:
    """Run the cells of a suite that need it, and return the records of all of them, in the suite's order.

    `suite`: the name of a packaged suite, or the path of a YAML file. `methods`, `tasks`, `backbone`: names or
    wildcards, from the suite or beyond it. `seeds`: replace the suite's. `limit`: rows used of each split. `out`: the
    results folder (default: `runs/<suite>`); cells that it holds already are not run again, so the same call continues
    after an interruption. `keep_stale`: do not rerun cells whose code, data or weights have changed. `retry_failed`:
    rerun cells that did not end well. `RunOptions` explains the other parameters.

    Each cell runs in its own process; a cell that fails leaves a record with its outcome and reason. Raise UserError,
    in one line, if something cannot be run as asked; then nothing has been written.
    """
    root = Path(data_root) if data_root else None
    options = RunOptions(device, jobs, threads, workers, root, timeout, memory_limit, checkpoint_seconds)
    selection = Selection(methods, tasks, backbone, seeds, limit)
    with server_beside():
        plan = plan_run(suite, selection, out=out, data_root=root, keep_stale=keep_stale, retry_failed=retry_failed)
        return execute(plan, options)


def plan_run(
    suite: str | Path,
    selection: Selection,
    *,
    out: str | Path | None = None,
    data_root: Path | None = None,
    keep_stale: bool = False,
    retry_failed: bool = False,
) -> RunPlan:
    """Check everything that can be checked before a run, and return the plan; see `run`. Imports torch."""
    loaded = load_suite(suite)
    asked = expand(loaded, **asdict(selection), data_root=data_root)
    cells, left_out = _fitting(asked, selection.methods or ())
    refuse_offered(cells)
    store = Store(Path(out) if out else Path("runs") / loaded.name)
    now = fingerprints_of(cells, data_root)
    settled = {"done"} | (set() if retry_failed else {"failed"}) | ({"stale"} if keep_stale else set())
    return RunPlan(
        suite=loaded,
        store=store,
        cells=tuple(cells),
        left_out=tuple(left_out),
        fingerprints=now,
        states={cell.id: state_of(cell, store.get(cell), now[cell.id]) for cell in cells},
        settled=frozenset(settled),
        begun=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def execute(plan: RunPlan, options: RunOptions, progress: Progress | None = None) -> list[Record]:
    """Run the pending cells of a plan and return the records of all its cells. Limits default to the suite's."""
    need_device(options.device)
    Store.open(plan.store.root, create=True)
    if plan.pending:
        run_cells(
            plan.pending,
            plan.store,
            options.within(plan.suite.timeout, plan.suite.memory_limit),
            done=plan.done,
            fingerprints=plan.fingerprints,
            progress=progress,
        )
    return plan.records()


def _fitting(cells: Sequence[Cell], patterns: Sequence[str]) -> tuple[list[Cell], list[str]]:
    """Return the cells whose method fits the backbone, and the reasons why others do not.

    A method that only a wildcard names is left out. Raise UserError if it is named exactly.
    """
    exact = [pattern for pattern in patterns if not is_wildcard(pattern)]
    reasons = incompatible_cells(cells)
    for cell in cells:
        spec = MethodSpec(name=cell.method, variant=cell.variant)
        if cell.id in reasons and (not patterns or any(matches(spec, pattern) for pattern in exact)):
            raise UserError(reasons[cell.id])
    return [cell for cell in cells if cell.id not in reasons], list(dict.fromkeys(reasons.values()))
