"""`petlbench leaderboard`: print the table of one or several results folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from petlbench.commands.output import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table as CSV")


def command(args: argparse.Namespace) -> int:
    """Print the leaderboard; write it as CSV if asked."""
    from petlbench.pipeline.freshness import stale_parts
    from petlbench.results import leaderboard
    from petlbench.results.leaderboard_table import leaderboard_table
    from petlbench.results.store import find

    table = leaderboard.table(find(args.results), stale=stale_parts)
    if args.csv:
        leaderboard.write_csv(table, args.csv)
    print_table(leaderboard_table(table))
    return 0
