"""`petlbench repair`: set aside damaged or misplaced records of a results folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from petlbench.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path)


def command(args: argparse.Namespace) -> int:
    """Repair a results folder and print each action."""
    from petlbench.pipeline.launch.claims import idle
    from petlbench.results.repair import repair
    from petlbench.results.store import Store

    store = Store.open(args.results, create=False)
    if not idle(store.claims):
        raise UserError(f"a run is active in {args.results}: wait until it ends, then repair the folder")
    print("\n".join(repair(store)) or f"{args.results}: nothing to repair")
    return 0
