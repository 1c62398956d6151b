"""Count what is there of data sets, and hold it against the published sizes."""

from __future__ import annotations

import argparse
import json

from petlbench.commands.options import add_data_options, whole_number
from petlbench.commands.output import json_object, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="TASK:DATASET", help="or a task alone, for its default data set")
    parser.add_argument(
        "--sample",
        type=whole_number,
        default=16,
        metavar="N",
        help="images to open of each part (default: %(default)s)",
    )
    parser.add_argument("--all", action="store_true", help="open every image")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    add_data_options(parser)


def command(args: argparse.Namespace) -> int:
    """What of data sets is there; 1 when a part that is needed is missing, broken or of another size than published."""
    from petlbench.describe import dataset, dataset_table

    config = json_object(args.config, '{"layout": "hub"}')
    asked = [dataset.opened_source(name, config, args.data_root) for name in dict.fromkeys(args.names)]
    found = [dataset.report_dataset(*subject, sample=None if args.all else args.sample) for subject in asked]
    if args.json:
        print(json.dumps([one.as_json() for one in found], indent=1))
    else:
        for one in found:
            print_table(dataset_table.dataset_table(one))
    return int(not all(one.ok for one in found))
