"""`petlbench data show`: draw a contact sheet of samples of a data set."""

from __future__ import annotations

import argparse
from pathlib import Path

from petlbench.commands.options import add_data_options, positive_number, whole_number
from petlbench.commands.output import json_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="TASK:DATASET", help="a task alone means its default data set")
    parser.add_argument(
        "--split", default="train", metavar="NAME", help="split or official part (default: %(default)s)"
    )
    parser.add_argument("--count", type=positive_number, default=16, metavar="N", help="samples (default: %(default)s)")
    parser.add_argument(
        "--seed", type=whole_number, default=0, metavar="N", help="seed of the draw (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: pictures/<task>_<dataset>_<split>.png")
    add_data_options(parser)


def command(args: argparse.Namespace) -> int:
    """Write the contact sheet and print its path."""
    from petlbench.describe import dataset, samples

    subject = dataset.opened_source(args.name, json_object(args.config, '{"layout": "hub"}'), args.data_root)
    print(samples.show_samples(*subject, split=args.split, count=args.count, seed=args.seed, out=args.out))
    return 0
