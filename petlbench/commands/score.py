"""`petlbench score`: score kept captions with METEOR and SPICE."""

from __future__ import annotations

import argparse
from pathlib import Path

from petlbench.commands.options import names
from petlbench.commands.output import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path)
    parser.add_argument(
        "--metrics", type=names, default=["meteor"], metavar="A,B", help="meteor, spice or both (default: meteor)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table as CSV")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of data sets (default: PETLBENCH_DATA)")


def command(args: argparse.Namespace) -> int:
    """Print the scores of kept captions; write them as CSV if asked."""
    from petlbench.describe import caption_scores
    from petlbench.results.leaderboard import write_csv
    from petlbench.results.store import Store

    frame = caption_scores.score(Store.open(args.results, create=False), args.metrics, args.data_root)
    if args.csv:
        write_csv(frame, args.csv)
    print_table(caption_scores.score_table(frame))
    return 0
