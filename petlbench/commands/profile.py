"""`petlbench profile`: measure what methods cost, without training them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from petlbench.api.registries import METHODS
from petlbench.commands.options import names, positive_number
from petlbench.commands.output import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", type=names, required=True, metavar="A,B", help="names or wildcards")
    parser.add_argument("--backbone", default="tiny", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--task", default="vqa", metavar="TASK", help="task, or task:dataset (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive_number, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--steps", type=positive_number, default=6, metavar="N", help="timed steps (default: %(default)s)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    parser.add_argument("--threads", type=positive_number, metavar="N", help="default: all cores")
    parser.add_argument("--meta", action="store_true", help="only counts and planned bytes, which need no memory")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of data sets (default: PETLBENCH_DATA)")


def command(args: argparse.Namespace) -> int:
    """Print the costs of methods."""
    from petlbench.describe import profile
    from petlbench.describe.cost_table import cost_table
    from petlbench.describe.variants import declaring
    from petlbench.pipeline.options import need_device

    need_device(args.device)
    cells = profile.profile_cells(
        args.methods, task=args.task, backbone=args.backbone, batch_size=args.batch_size, data_root=args.data_root
    )
    costs = profile.profile(
        cells, device=args.device, threads=args.threads, steps=args.steps, meta=args.meta, data_root=args.data_root
    )
    if args.json:
        print(json.dumps([cost.model_dump(mode="json") for cost in costs], indent=1))
    else:
        print_table(cost_table(costs, declaring(METHODS, [cost.cell.method for cost in costs], "baseline")))
    return 0
