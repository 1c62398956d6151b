"""`petlbench check`: test methods for conformance."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from petlbench.commands.options import names
from petlbench.commands.output import json_object, print_table
from petlbench.core.registry import is_wildcard


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", nargs="+", help="a name, name:variant or wildcard, or module:Class")
    parser.add_argument("--backbone", default="tiny", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--tasks", type=names, metavar="A,B", help="default: all tasks that the backbone serves")
    parser.add_argument("--config", metavar="JSON", help="the method's options")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def command(args: argparse.Namespace) -> int:
    """Check methods; return 1 if one fails a check."""
    from petlbench.conformance import check_method
    from petlbench.conformance.report import check_table

    config = json_object(args.config, '{"rank": 4}')
    reports = check_method.check_all(_subjects(args.method), backbone=args.backbone, tasks=args.tasks, config=config)
    if args.json:
        objects = [report.as_json() for report in reports]
        print(json.dumps(objects if len(objects) > 1 else objects[0], indent=1))
    else:
        for report in reports:
            print_table(check_table(report))
    return int(not all(report.ok for report in reports))


def _subjects(names: Sequence[str]) -> list[str]:
    """Replace each wildcard by the methods and variants that it matches."""
    from petlbench.pipeline.plan.variants import method_specs

    subjects: list[str] = []
    for name in names:
        subjects += [spec.label for spec in method_specs([name])] if is_wildcard(name) else [name]
    return subjects
