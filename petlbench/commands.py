"""What each command does. Each imports what it needs itself, so that listing and help are instant."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petlbench.errors import UserError
from petlbench.registry import BACKBONES, DATASETS, METHODS, TASKS, Registry

if TYPE_CHECKING:
    from petlbench.records import Store
    from petlbench.spec import Cell, Record
    from petlbench.states import State

KINDS: dict[str, Registry[Any]] = {
    "methods": METHODS,
    "tasks": TASKS,
    "datasets": DATASETS,
    "backbones": BACKBONES,
}


def list_things(args: argparse.Namespace) -> int:
    """What there is of a kind, by name."""
    if args.markdown and args.kind != "methods":
        raise UserError("--markdown is of methods: `petlbench list methods --markdown`")
    if args.markdown:
        return _table_of_methods(args)
    if args.kind == "backbones":
        return _list_backbones(args)
    if args.matrix:
        raise UserError("--matrix is of backbones: `petlbench list backbones --matrix`")
    if args.kind == "records":
        rows = _records(args.results, args.pattern)
    elif args.kind == "methods" and ":" in args.pattern:
        rows = _variants(args.pattern, plain=args.json)
    else:
        rows = _suites(args.pattern) if args.kind == "suites" else _entries(KINDS[args.kind], args.pattern)
        if args.check:
            for row in rows:
                row["error"] = _failure(args.kind, row["name"])
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        widths = {key: max(len(row[key]) for row in rows) for key in rows[0] if key != "error"} if rows else {}
        for row in rows:
            print("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip())
            if row.get("error"):
                print(f"  FAILS: {row['error']}")
    return int(any(row.get("error") for row in rows))


def _table_of_methods(args: argparse.Namespace) -> int:
    """What each method says of itself and is seen to do, as the table of README.md."""
    from petlbench import methods_table

    found = methods_table.rows(args.pattern)
    if args.json:
        print(json.dumps([row.as_json() for row in found], indent=1))
    else:
        print(methods_table.markdown(found), end="")
    return int(args.check and any(row.error for row in found))


def _variants(pattern: str, *, plain: bool) -> list[dict[str, Any]]:
    """The variants that `method:variant` names, those that cannot be with the reason; texts unless `plain`."""
    from petlbench.declarations import listed

    return [one.as_json() if plain else one.as_row() for one in listed(pattern)]


def _list_backbones(args: argparse.Namespace) -> int:
    """Families of backbones with what can be said of them, or the tasks that each serves."""
    from petlbench import catalogue

    found = catalogue.matrix(args.pattern) if args.matrix else catalogue.entries(args.pattern)
    if args.json:
        print(json.dumps([entry.as_json() for entry in found], indent=1))
    else:
        _print(catalogue.render_matrix(found) if args.matrix else catalogue.render(found))
    return int(args.check and any(entry.error for entry in found))


def _records(results: Path, pattern: str) -> list[dict[str, Any]]:
    """The records of a results folder, and whether the code that made them has changed since."""
    from petlbench.records import Store
    from petlbench.states import stale_parts, state_of

    rows = []
    for record in Store.open(results, create=False).load():
        if fnmatchcase(record.cell.method, pattern) or fnmatchcase(record.cell.label, pattern):
            parts = stale_parts(record)
            state = f"stale ({', '.join(parts)})" if parts else str(state_of(record.cell, record, {}))
            score = record.metrics.get(record.main_metric)
            shown = f"{record.main_metric} {score:.3f}" if score is not None else record.outcome
            rows.append({"name": record.cell.label, "score": shown, "state": state})
    return rows


def _suites(pattern: str) -> list[dict[str, Any]]:
    from petlbench.suite import load_suite, suite_names

    return [{"name": name, "description": load_suite(name).description} for name in suite_names(pattern)]


def _entries(registry: Registry[Any], pattern: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "distribution": registry.origin(name), "target": registry.target(name)}
        for name in registry.names(pattern)
    ]


def _failure(kind: str, name: str) -> str | None:
    """Why an entry cannot be used, or None."""
    try:
        if kind == "suites":
            from petlbench.suite import expand, load_suite

            expand(load_suite(name))
        else:
            KINDS[kind].get(name)
    except UserError as error:
        return str(error)
    return None


def run(args: argparse.Namespace) -> int:
    """Run the cells of a suite that need it, then show the whole folder."""
    from petlbench.launch import process

    with nullcontext() if args.dry_run else process.server_beside():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from petlbench.launch.local import refuse_offered
    from petlbench.records import Store
    from petlbench.states import fingerprints_of, state_of
    from petlbench.suite import expand, load_suite

    suite = load_suite(args.suite)
    cells = expand(
        suite,
        methods=args.methods,
        tasks=args.tasks,
        backbone=args.backbone,
        seeds=args.seeds,
        limit=args.limit,
        data_root=args.data_root,
    )
    cells = _fitting(cells, args.methods or ())
    refuse_offered(cells)
    out = args.out or Path("runs") / suite.name
    store = Store(out)
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    now = fingerprints_of(cells, args.data_root)
    settled = {"done"} | (set() if args.retry_failed else {"failed"}) | ({"stale"} if args.keep_stale else set())

    def done(cell: Cell) -> Record | None:
        """The record that spares the cell, also when another run on this folder has left it meanwhile."""
        record = store.get(cell)
        state = state_of(cell, record, now[cell.id]).name
        fresh = record is not None and record.started > begun and state == "failed"
        return record if state in settled or fresh else None

    states = {cell.id: state_of(cell, store.get(cell), now[cell.id]) for cell in cells}
    pending = [cell for cell in cells if states[cell.id].name not in settled]
    _announce(suite.name, len(pending), states.values(), out)
    if args.dry_run:
        width = max(len(str(state)) for state in states.values()) + 2
        for cell in cells:
            print(f"{states[cell.id]!s:{width}}{cell.label}")
        return 0
    if args.device == "cuda":
        _need_cuda()
    Store.open(out, create=True)
    if pending:
        from petlbench.launch.local import run_cells

        run_cells(
            pending,
            store,
            device=args.device,
            jobs=args.jobs,
            threads=args.threads,
            workers=args.workers,
            data_root=args.data_root,
            timeout=args.timeout or suite.timeout,
            memory_limit=args.memory_limit or suite.memory_limit,
            checkpoint_seconds=args.checkpoint_seconds,
            done=done,
            fingerprints=lambda cell: now[cell.id],
        )
    return _conclude(store, cells)


def _fitting(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Those whose method fits the backbone. One that a wildcard alone asks for is left out, and said to be."""
    from petlbench.assembly import misfits
    from petlbench.spec import MethodSpec
    from petlbench.variants import is_wildcard, matches

    exact = [pattern for pattern in patterns if not is_wildcard(pattern)]
    found = misfits(cells)
    for cell in cells:
        spec = MethodSpec(name=cell.method, variant=cell.variant)
        if cell.id in found and (not patterns or any(matches(spec, pattern) for pattern in exact)):
            raise UserError(found[cell.id])
    for reason in dict.fromkeys(found.values()):
        print(f"left out: {reason}", file=sys.stderr)
    return [cell for cell in cells if cell.id not in found]


def _announce(suite: str, pending: int, states: Iterable[State], out: Path) -> None:
    counts = Counter(state.name for state in states)
    told = [f"{counts[name]} {name}" for name in ("done", "stale", "failed") if counts[name] or name == "done"]
    print(f"{suite}: {counts.total()} cells, {', '.join(told)}, {pending} to run; results in {out}")


def _need_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device: use --device cpu, or install a CUDA build of torch")


def _conclude(store: Store, cells: Sequence[Cell]) -> int:
    """Table and plots of the whole folder; 1 if one of `cells` did not end well."""
    from petlbench import leaderboard, plots
    from petlbench.declarations import declaring
    from petlbench.states import stale_parts

    table = leaderboard.table(store, stale=stale_parts)
    leaderboard.write_csv(table, store.root / "leaderboard.csv")
    if table["score_mean"].notna().any():  # without a score there is nothing to draw
        plots.draw(table, store.root / "plots", declaring(METHODS, table["method"], "floor"))
    _print(leaderboard.render(table))
    failed = [record for cell in cells if (record := store.get(cell)) is None or record.outcome != "ok"]
    for record in filter(None, failed):
        print(f"{record.outcome}: {record.cell.label}: {record.reason}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(cells)} cells did not end well: --retry-failed runs them again", file=sys.stderr)
    return int(bool(failed))


def leaderboard(args: argparse.Namespace) -> int:
    """The table of results folders."""
    from petlbench import leaderboard
    from petlbench.records import find
    from petlbench.states import stale_parts

    table = leaderboard.table(find(args.results), stale=stale_parts)
    if args.csv:
        leaderboard.write_csv(table, args.csv)
    _print(leaderboard.render(table))
    return 0


def plot(args: argparse.Namespace) -> int:
    """The plots of results folders."""
    from petlbench import leaderboard, plots
    from petlbench.declarations import declaring
    from petlbench.records import find
    from petlbench.states import stale_parts

    table = leaderboard.table(find(args.results), stale=stale_parts)
    for path in plots.draw(table, args.out, declaring(METHODS, table["method"], "floor")):
        print(path)
    return 0


def show(args: argparse.Namespace) -> int:
    """Contact sheets of predictions."""
    from petlbench import gallery
    from petlbench.records import Store

    store = Store.open(args.results, create=False)
    for path in gallery.show(store, args.out, count=args.count, data_root=args.data_root):
        print(path)
    return 0


def data_check(args: argparse.Namespace) -> int:
    """What of data sets is there; 1 when a part that is needed is missing, broken or of another size than published."""
    from petlbench import inventory, inventory_table

    config = _json_object(args.config, '{"layout": "hub"}')
    asked = [inventory.opened_source(name, config, args.data_root) for name in dict.fromkeys(args.names)]
    found = [inventory.take(*subject, sample=None if args.all else args.sample) for subject in asked]
    if args.json:
        print(json.dumps([one.as_json() for one in found], indent=1))
    else:
        for one in found:
            _print(inventory_table.render(one))
    return int(not all(one.ok for one in found))


def data_show(args: argparse.Namespace) -> int:
    """A contact sheet of samples."""
    from petlbench import contact, inventory

    subject = inventory.opened_source(args.name, _json_object(args.config, '{"layout": "hub"}'), args.data_root)
    print(contact.show(*subject, split=args.split, count=args.count, seed=args.seed, out=args.out))
    return 0


def score(args: argparse.Namespace) -> int:
    """METEOR and SPICE of kept captions."""
    from petlbench import rescoring
    from petlbench.leaderboard import write_csv
    from petlbench.records import Store

    frame = rescoring.score(Store.open(args.results, create=False), args.metrics, args.data_root)
    if args.csv:
        write_csv(frame, args.csv)
    _print(rescoring.render(frame))
    return 0


def compare(args: argparse.Namespace) -> int:
    """Two methods, or all pairs."""
    from petlbench import statistics
    from petlbench.leaderboard import write_csv
    from petlbench.records import Store
    from petlbench.states import stale_parts

    if args.a and not args.b:
        raise UserError(f"compare needs two methods, or none for all pairs: add one beside {args.a}")
    store = Store.open(args.results, create=False)
    frame = statistics.compare(store, args.a, args.b) if args.a else statistics.pairs(store, stale=stale_parts)
    if args.csv:
        write_csv(frame, args.csv)
    else:
        print(frame.to_string(index=False))
        for (task, dataset, backbone), notes in frame.attrs.get("notes", {}).items():
            print("\n".join(f"{task}:{dataset} on {backbone}: {note}" for note in notes))
    return 0


def profile(args: argparse.Namespace) -> int:
    """Costs without training."""
    from petlbench import profile
    from petlbench.declarations import declaring

    if args.device == "cuda":
        _need_cuda()
    cells = profile.profile_cells(
        args.methods, task=args.task, backbone=args.backbone, batch_size=args.batch_size, data_root=args.data_root
    )
    costs = profile.profile(
        cells, device=args.device, threads=args.threads, steps=args.steps, meta=args.meta, data_root=args.data_root
    )
    if args.json:
        print(json.dumps([cost.model_dump(mode="json") for cost in costs], indent=1))
    else:
        _print(profile.render(costs, declaring(METHODS, [cost.cell.method for cost in costs], "baseline")))
    return 0


def check(args: argparse.Namespace) -> int:
    """Conformance; 1 when the method fails a check."""
    from petlbench import conformance

    config = _json_object(args.config, '{"rank": 4}')
    reports = conformance.check_all(_subjects(args.method), backbone=args.backbone, tasks=args.tasks, config=config)
    if args.json:
        found = [report.as_json() for report in reports]
        print(json.dumps(found if len(found) > 1 else found[0], indent=1))
    else:
        for report in reports:
            _print(conformance.render(report))
    return int(not all(report.ok for report in reports))


def _json_object(text: str | None, example: str) -> dict[str, Any]:
    """What --config says, or nothing where it is not given."""
    try:
        config = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config is not JSON ({error}): give an object such as '{example}'") from error
    if not isinstance(config, dict):
        raise UserError(f"--config must be a JSON object such as '{example}'")
    return config


def _subjects(names: Sequence[str]) -> list[str]:
    """The names, wildcards among them replaced by the methods and variants that they stand for."""
    from petlbench.variants import is_wildcard, method_specs

    return [one for name in names for one in ([s.label for s in method_specs([name])] if is_wildcard(name) else [name])]


def verify(args: argparse.Namespace) -> int:
    """Published figures beside ours; 1 when a count, a percentage or a number of bytes differs."""
    from petlbench import published

    findings = published.verify(published.read(), args.methods)
    if args.json:
        print(json.dumps([finding.as_json() for finding in findings], indent=1))
    else:
        _print(published.render(findings))
    return int(published.failed(findings))


def repair(args: argparse.Namespace) -> int:
    """Set aside what does not belong."""
    from petlbench.launch.claims import idle
    from petlbench.records import Store
    from petlbench.repair import repair

    store = Store.open(args.results, create=False)
    if not idle(store.claims):
        raise UserError(f"a run is at work in {args.results}: repair it once that has ended")
    print("\n".join(repair(store)) or f"{args.results}: nothing to repair")
    return 0


def _print(table: Any) -> None:
    """A rich table, at its full width where no terminal limits it."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else Console(width=10_000).measure(table).maximum
    Console(width=width).print(table)
