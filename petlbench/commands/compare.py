"""`petlbench compare`: compare two methods, or all pairs."""

from __future__ import annotations

import argparse
from pathlib import Path

from petlbench.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path)
    parser.add_argument("a", nargs="?", help="method or method:variant; without it, all pairs are compared")
    parser.add_argument("b", nargs="?", help="method, or method:variant")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write CSV to FILE and print nothing")


def command(args: argparse.Namespace) -> int:
    """Print the comparison of two methods, or of all pairs."""
    from petlbench.pipeline.freshness import stale_parts
    from petlbench.results.leaderboard import write_csv
    from petlbench.results.store import Store
    from petlbench.results.uncertainty.comparison import compare
    from petlbench.results.uncertainty.pairs import pairs

    if args.a and not args.b:
        raise UserError(f"compare needs two methods, or none for all pairs: add one beside {args.a}")
    store = Store.open(args.results, create=False)
    frame = compare(store, args.a, args.b) if args.a else pairs(store, stale=stale_parts)
    if args.csv:
        write_csv(frame, args.csv)
    else:
        print(frame.to_string(index=False))
        for (task, dataset, backbone), notes in frame.attrs.get("notes", {}).items():
            print("\n".join(f"{task}:{dataset} on {backbone}: {note}" for note in notes))
    return 0
