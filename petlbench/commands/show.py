"""`petlbench show`: draw contact sheets of predictions."""

from __future__ import annotations

import argparse
from pathlib import Path

from petlbench.commands.options import positive_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("pictures"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--count", type=positive_number, default=16, metavar="N", help="samples on a sheet (default: %(default)s)"
    )
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of data sets (default: PETLBENCH_DATA)")


def command(args: argparse.Namespace) -> int:
    """Draw a sheet for each record with predictions and print its path."""
    from petlbench.describe import predictions
    from petlbench.results.store import Store

    store = Store.open(args.results, create=False)
    for path in predictions.show_predictions(store, args.out, count=args.count, data_root=args.data_root):
        print(path)
    return 0
