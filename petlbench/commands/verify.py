"""Published figures beside ours."""

from __future__ import annotations

import argparse
import json

from petlbench.commands.options import names
from petlbench.commands.output import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("figures", choices=["published"], help="published parameters, percentages, bytes and claims")
    parser.add_argument("--methods", type=names, metavar="A,B", help="only these: names, name:variant, wildcards")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def command(args: argparse.Namespace) -> int:
    """Published figures beside ours; 1 when a count, a percentage or a number of bytes differs."""
    from petlbench.describe import published

    findings = published.verify(published.read_figures(), args.methods)
    if args.json:
        print(json.dumps([finding.as_json() for finding in findings], indent=1))
    else:
        print_table(published.figure_table(findings))
    return int(published.failed(findings))
