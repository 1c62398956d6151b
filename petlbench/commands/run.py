"""`petlbench run`: run a suite."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from petlbench.api.registries import METHODS
from petlbench.commands.options import byte_count, names, positive_number, seconds, seconds_or_zero, seeds, whole_number
from petlbench.commands.output import print_table

if TYPE_CHECKING:
    from petlbench.core.record import Record
    from petlbench.pipeline.run import RunPlan
    from petlbench.results.store import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", nargs="?", default="quick", help="packaged suite or YAML file (default: quick)")
    parser.add_argument("--methods", type=names, metavar="A,B", help="names, name:variant, wildcards (default: all)")
    parser.add_argument("--tasks", type=names, metavar="A,B", help="names, task:dataset, wildcards (default: all)")
    parser.add_argument("--backbone", metavar="NAME", help="only this one; it need not be in the suite")
    parser.add_argument("--seeds", type=seeds, metavar="0,1", help="replace the suite's seeds")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results folder (default: runs/<suite>)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    parser.add_argument(
        "--jobs", type=positive_number, default=1, metavar="N", help="cells that run at a time (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive_number, metavar="N", help="threads of each cell")
    parser.add_argument(
        "--workers",
        type=whole_number,
        metavar="N",
        help="threads that prepare batches ahead (default: 4 on CUDA, else 0)",
    )
    parser.add_argument("--limit", type=positive_number, metavar="N", help="rows used of each split")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of data sets (default: PETLBENCH_DATA)")
    parser.add_argument(
        "--timeout", type=seconds, metavar="SECONDS", help="time limit of each cell (default: the suite's, or none)"
    )
    parser.add_argument(
        "--memory-limit",
        type=byte_count,
        metavar="SIZE",
        help="limit on the resident memory of each cell, such as 4GiB",
    )
    parser.add_argument(
        "--checkpoint-seconds",
        type=seconds_or_zero,
        default=60.0,
        metavar="N",
        help="least time between two checkpoints of a cell (default: %(default)g)",
    )
    parser.add_argument(
        "--keep-stale", action="store_true", help="do not rerun cells whose code, data or weights changed"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    parser.add_argument("--retry-failed", action="store_true", help="also run cells that failed before")


def command(args: argparse.Namespace) -> int:
    """Run the cells of a suite that need it, then show the whole folder; return 1 if a cell failed."""
    from petlbench.pipeline.launch.process import server_beside
    from petlbench.pipeline.options import RunOptions
    from petlbench.pipeline.run import Selection, execute, plan_run

    options = RunOptions(**{name: getattr(args, name) for name in RunOptions.__dataclass_fields__})
    selection = Selection(args.methods, args.tasks, args.backbone, args.seeds, args.limit)
    with nullcontext() if args.dry_run else server_beside():
        plan = plan_run(
            args.suite,
            selection,
            out=args.out,
            data_root=args.data_root,
            keep_stale=args.keep_stale,
            retry_failed=args.retry_failed,
        )
        for reason in plan.left_out:
            print(f"left out: {reason}", file=sys.stderr)
        print(plan.summary())
        if args.dry_run:
            return _show_states(plan)
        records = execute(plan, options)
    _show_folder(plan.store)
    return _report_failures(records)


def _show_states(plan: RunPlan) -> int:
    width = max(len(str(state)) for state in plan.states.values()) + 2
    for cell in plan.cells:
        print(f"{plan.states[cell.id]!s:{width}}{cell.label}")
    return 0


def _show_folder(store: Store) -> None:
    """Print the table of the whole results folder and draw its plots."""
    from petlbench.describe.variants import declaring
    from petlbench.pipeline.freshness import stale_parts
    from petlbench.results import leaderboard
    from petlbench.results.leaderboard_table import leaderboard_table
    from petlbench.results.plots import figures

    table = leaderboard.table(store, stale=stale_parts)
    leaderboard.write_csv(table, store.root / "leaderboard.csv")
    if table["score_mean"].notna().any():  # without a score there is nothing to draw
        figures.draw_plots(table, store.root / "plots", declaring(METHODS, table["method"], "floor"))
    print_table(leaderboard_table(table))


def _report_failures(records: Sequence[Record]) -> int:
    failed = [record for record in records if record.outcome != "ok"]
    for record in failed:
        print(f"{record.outcome}: {record.cell.label}: {record.reason}", file=sys.stderr)
    if failed:
        count = f"{len(failed)} of {len(records)} cells"
        print(f"{count} did not end well: --retry-failed runs them again", file=sys.stderr)
    return int(bool(failed))
