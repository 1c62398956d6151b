"""`petlbench verify`: compare published figures with ours."""

from __future__ import annotations

import argparse
import json

from petlbench.commands.options import names
from petlbench.commands.output import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("figures", choices=["published"], help="published parameters, percentages, bytes and claims")
    parser.add_argument("--methods", type=names, metavar="A,B", help="names, name:variant, wildcards (default: all)")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def command(args: argparse.Namespace) -> int:
    """Print published figures beside ours; return 1 if a count, a percentage or a number of bytes differs."""
    from petlbench.describe import published

    checks = published.verify(published.read_figures(), args.methods)
    if args.json:
        print(json.dumps([check.as_json() for check in checks], indent=1))
    else:
        print_table(published.figure_table(checks))
    return int(published.failed(checks))
