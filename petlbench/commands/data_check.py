"""`petlbench data check`: count the rows of data sets and compare the counts with the published sizes."""

from __future__ import annotations

import argparse
import json

from petlbench.commands.options import add_data_options, whole_number
from petlbench.commands.output import json_object, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="TASK:DATASET", help="a task alone means its default data set")
    parser.add_argument(
        "--sample",
        type=whole_number,
        default=16,
        metavar="N",
        help="images opened of each part (default: %(default)s)",
    )
    parser.add_argument("--all", action="store_true", help="open every image")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    add_data_options(parser)


def command(args: argparse.Namespace) -> int:
    """Check data sets; return 1 if a needed part is missing or broken, or differs from its published size."""
    from petlbench.describe import dataset, dataset_table

    config = json_object(args.config, '{"layout": "hub"}')
    subjects = [dataset.opened_source(name, config, args.data_root) for name in dict.fromkeys(args.names)]
    reports = [dataset.report_dataset(*subject, sample=None if args.all else args.sample) for subject in subjects]
    if args.json:
        print(json.dumps([report.as_json() for report in reports], indent=1))
    else:
        for report in reports:
            print_table(dataset_table.dataset_table(report))
    return int(not all(report.ok for report in reports))
