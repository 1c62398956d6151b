"""The command line. Each command imports what it needs itself, so that listing and help are instant."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from petlbench import __version__
from petlbench.errors import UserError
from petlbench.registry import BACKBONES, DATASETS, METHODS, TASKS, Registry, did_you_mean

if TYPE_CHECKING:
    from petlbench.records import Store
    from petlbench.spec import Cell, Record

KINDS: dict[str, Registry[Any]] = {
    "methods": METHODS,
    "tasks": TASKS,
    "datasets": DATASETS,
    "backbones": BACKBONES,
}
COMMANDS = ("list", "run", "leaderboard", "plot", "show", "compare")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 1 something failed, 2 a mistake of the user's, 130 interrupted."""
    try:
        try:
            args = _parser().parse_args(_checked(sys.argv[1:] if argv is None else argv))
            status: int = args.command(args)
        finally:
            sys.stdout.flush()  # so that a closed pipe shows here and not at exit
    except UserError as error:
        print(f"petlbench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("petlbench: interrupted; finished cells are kept: run the same command again", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _checked(argv: Sequence[str]) -> Sequence[str]:
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], COMMANDS) or ":"
        raise UserError(f"unknown command '{argv[0]}'{hint} the commands are {', '.join(COMMANDS)}")
    return argv


class _Parser(argparse.ArgumentParser):
    """Complains in one line, and takes options by their whole names only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: `{self.prog} --help` shows the usage")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="petlbench", description="Parameter-efficient transfer learning, measured fairly.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="|".join(COMMANDS), required=True)

    listing = commands.add_parser("list", help="what is installed, built-in or plugged in")
    listing.set_defaults(command=_list)
    listing.add_argument("kind", choices=[*KINDS, "suites"])
    listing.add_argument("pattern", nargs="?", default="*", help="shell wildcard")
    listing.add_argument("--json", action="store_true", help="machine-readable")
    listing.add_argument("--check", action="store_true", help="import each; exit with 1 if any fails")

    _add_run(commands.add_parser("run", help="run a suite; cells that are done are not run again"))

    board = commands.add_parser("leaderboard", help="the table of one or several results folders")
    board.set_defaults(command=_leaderboard)
    board.add_argument("results", nargs="+", type=Path)
    board.add_argument("--csv", type=Path, metavar="FILE", help="also write it as CSV")

    plot = commands.add_parser("plot", help="plots of one or several results folders")
    plot.set_defaults(command=_plot)
    plot.add_argument("results", nargs="+", type=Path)
    plot.add_argument("--out", type=Path, default=Path("plots"), metavar="DIR", help="default: %(default)s")

    show = commands.add_parser("show", help="contact sheets of predictions: boxes, answers, captions")
    show.set_defaults(command=_gallery)
    show.add_argument("results", type=Path)
    show.add_argument("--out", type=Path, default=Path("pictures"), metavar="DIR", help="default: %(default)s")
    show.add_argument("--count", type=_positive, default=16, metavar="N", help="samples a sheet (default: %(default)s)")
    show.add_argument("--data-root", type=Path, metavar="DIR", help="where data sets lie (default: PETLBENCH_DATA)")

    compare = commands.add_parser("compare", help="two methods, sample by sample")
    compare.set_defaults(command=_compare)
    compare.add_argument("results", type=Path)
    compare.add_argument("a", help="method, or method:variant")
    compare.add_argument("b", help="method, or method:variant")
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    run.set_defaults(command=_run)
    run.add_argument("suite", nargs="?", default="quick", help="packaged suite or YAML file (default: %(default)s)")
    run.add_argument("--methods", type=_names, metavar="A,B", help="only these: names, name:variant, wildcards")
    run.add_argument("--tasks", type=_names, metavar="A,B", help="only these: names, task:dataset, wildcards")
    run.add_argument("--backbone", metavar="NAME", help="only this one, or one that the suite lacks")
    run.add_argument("--seeds", type=_seeds, metavar="0,1", help="instead of the suite's")
    run.add_argument("--out", type=Path, metavar="DIR", help="results folder (default: runs/<suite>)")
    run.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    run.add_argument("--jobs", type=_positive, default=1, metavar="N", help="cells at a time (default: %(default)s)")
    run.add_argument("--threads", type=_positive, metavar="N", help="threads of each cell")
    run.add_argument("--limit", type=_positive, metavar="N", help="rows used of each split")
    run.add_argument("--data-root", type=Path, metavar="DIR", help="where data sets lie (default: PETLBENCH_DATA)")
    run.add_argument("--dry-run", action="store_true", help="say what would run")
    run.add_argument("--retry-failed", action="store_true", help="run cells again that did not end well")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("a comma-separated list of names is needed")
    return names


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"comma-separated whole numbers are needed, not '{text}'") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a positive whole number is needed, not '{text}'")
    return int(text)


def _list(args: argparse.Namespace) -> int:
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


def _run(args: argparse.Namespace) -> int:
    from petlbench.records import Store
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
    out = args.out or Path("runs") / suite.name
    store = Store(out)
    pending = [cell for cell in cells if not _done(store.get(cell), args.retry_failed)]
    print(
        f"{suite.name}: {len(cells)} cells, {len(cells) - len(pending)} done, {len(pending)} to run; results in {out}"
    )
    if args.dry_run:
        for cell in cells:
            print(f"{'pending' if cell in pending else 'done':8}{cell.label}")
        return 0
    if args.device == "cuda":
        _need_cuda()
    Store.open(out, create=True)
    if pending:
        from petlbench.launch.local import run_cells

        run_cells(pending, store, device=args.device, jobs=args.jobs, threads=args.threads, data_root=args.data_root)
    return _conclude(store, cells)


def _done(record: Record | None, retry_failed: bool) -> bool:
    return record is not None and (record.outcome == "ok" or not retry_failed)


def _need_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device: use --device cpu, or install a CUDA build of torch")


def _conclude(store: Store, cells: Sequence[Cell]) -> int:
    """Table and plots of the whole folder; 1 if one of `cells` did not end well."""
    from petlbench import leaderboard, plots

    records = store.load()
    table = leaderboard.table(records)
    leaderboard.write_csv(table, store.root / "leaderboard.csv")
    if any(record.outcome == "ok" for record in records):  # without a score there is nothing to draw
        plots.draw(records, store.root / "plots")
    _show(leaderboard.render(table))
    failed = [record for cell in cells if (record := store.get(cell)) is None or record.outcome != "ok"]
    for record in filter(None, failed):
        print(f"{record.outcome}: {record.cell.label}: {record.reason}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(cells)} cells did not end well: --retry-failed runs them again", file=sys.stderr)
    return int(bool(failed))


def _leaderboard(args: argparse.Namespace) -> int:
    from petlbench import leaderboard
    from petlbench.records import find

    table = leaderboard.table(find(args.results).load())
    if args.csv:
        leaderboard.write_csv(table, args.csv)
    _show(leaderboard.render(table))
    return 0


def _plot(args: argparse.Namespace) -> int:
    from petlbench import plots
    from petlbench.records import find

    for path in plots.draw(find(args.results).load(), args.out):
        print(path)
    return 0


def _gallery(args: argparse.Namespace) -> int:
    from petlbench.gallery import show
    from petlbench.records import Store

    for path in show(Store.open(args.results, create=False), args.out, count=args.count, data_root=args.data_root):
        print(path)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from petlbench import statistics
    from petlbench.records import Store

    print(statistics.compare(Store.open(args.results, create=False), args.a, args.b).to_string(index=False))
    return 0


def _show(table: Any) -> None:
    """A rich table, at its full width where no terminal limits it."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else Console(width=10_000).measure(table).maximum
    Console(width=width).print(table)
