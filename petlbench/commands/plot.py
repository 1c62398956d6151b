"""`petlbench plot`: draw the plots of one or several results folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from petlbench.api.registries import METHODS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("plots"), metavar="DIR", help="default: %(default)s")


def command(args: argparse.Namespace) -> int:
    """Draw the plots and print the paths of their files."""
    from petlbench.describe.variants import declaring
    from petlbench.pipeline.freshness import stale_parts
    from petlbench.results import leaderboard
    from petlbench.results.plots import figures
    from petlbench.results.store import find

    table = leaderboard.table(find(args.results), stale=stale_parts)
    for path in figures.draw_plots(table, args.out, declaring(METHODS, table["method"], "floor")):
        print(path)
    return 0
