"""`petlbench list`: list what is installed and what has been run."""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from petlbench.api.registries import BACKBONES, DATASETS, METHODS, TASKS
from petlbench.commands.output import print_table
from petlbench.core.errors import UserError
from petlbench.core.registry import Registry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=[*KINDS, "suites", "records"])
    parser.add_argument("pattern", nargs="?", default="*", help="shell wildcard; also 'family:size', 'method:variant'")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--check", action="store_true", help="import each entry; exit with 1 if one fails")
    parser.add_argument(
        "--matrix", action="store_true", help="with `backbones`: the tasks that each serves, and why not the others"
    )
    parser.add_argument("--markdown", action="store_true", help="with `methods`: the table in docs/methods.md")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("runs/quick"),
        metavar="DIR",
        help="with `records`: the results folder (default: %(default)s)",
    )


KINDS: dict[str, Registry[Any]] = {
    "methods": METHODS,
    "tasks": TASKS,
    "datasets": DATASETS,
    "backbones": BACKBONES,
}


def command(args: argparse.Namespace) -> int:
    """List the entries of a kind by name; with --check return 1 if one fails."""
    if args.markdown and args.kind != "methods":
        raise UserError("--markdown works with methods only: `petlbench list methods --markdown`")
    if args.markdown:
        return _table_of_methods(args)
    if args.kind == "backbones":
        return _list_backbones(args)
    if args.matrix:
        raise UserError("--matrix works with backbones only: `petlbench list backbones --matrix`")
    if args.kind == "records":
        rows = _records(args.results, args.pattern)
    elif args.kind == "methods" and ":" in args.pattern:
        rows = _variants(args.pattern, plain=args.json)
    else:
        rows = _suites(args.pattern) if args.kind == "suites" else _entries(KINDS[args.kind], args.pattern)
        if args.check:
            for row in rows:
                row["error"] = _failure(args.kind, row["name"])
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        widths = {key: max(len(row[key]) for row in rows) for key in rows[0] if key != "error"} if rows else {}
        for row in rows:
            print("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip())
            if row.get("error"):
                print(f"  FAILS: {row['error']}")
    return int(any(row.get("error") for row in rows))


def _table_of_methods(args: argparse.Namespace) -> int:
    """Print the table of docs/methods.md: what each method states about itself and what it does."""
    from petlbench.describe import methods

    rows = methods.rows(args.pattern)
    if args.json:
        print(json.dumps([row.as_json() for row in rows], indent=1))
    else:
        print(methods.markdown(rows), end="")
    return int(args.check and any(row.error for row in rows))


def _variants(pattern: str, *, plain: bool) -> list[dict[str, Any]]:
    """List the variants that `method:variant` matches, with the reason for one that fails; texts unless `plain`."""
    from petlbench.describe.variants import list_variants

    return [item.as_json() if plain else item.as_row() for item in list_variants(pattern)]


def _list_backbones(args: argparse.Namespace) -> int:
    """Print the families of backbones with their sizes, or with --matrix the tasks that each serves."""
    from petlbench.describe import backbones

    families = backbones.matrix(args.pattern) if args.matrix else backbones.entries(args.pattern)
    if args.json:
        print(json.dumps([entry.as_json() for entry in families], indent=1))
    else:
        print_table(backbones.task_matrix(families) if args.matrix else backbones.family_table(families))
    return int(args.check and any(entry.error for entry in families))


def _records(results: Path, pattern: str) -> list[dict[str, Any]]:
    """List the records of a results folder and whether the code that made them has changed since."""
    from petlbench.pipeline.freshness import stale_parts, state_of
    from petlbench.results.store import Store

    rows = []
    for record in Store.open(results, create=False).load():
        if fnmatchcase(record.cell.method, pattern) or fnmatchcase(record.cell.label, pattern):
            parts = stale_parts(record)
            state = f"stale ({', '.join(parts)})" if parts else str(state_of(record.cell, record, {}))
            score = record.metrics.get(record.main_metric)
            shown = f"{record.main_metric} {score:.3f}" if score is not None else record.outcome
            rows.append({"name": record.cell.label, "score": shown, "state": state})
    return rows


def _suites(pattern: str) -> list[dict[str, Any]]:
    from petlbench.pipeline.plan.suite import load_suite, suite_names

    return [{"name": name, "description": load_suite(name).description} for name in suite_names(pattern)]


def _entries(registry: Registry[Any], pattern: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "distribution": registry.origin(name), "target": registry.target(name)}
        for name in registry.names(pattern)
    ]


def _failure(kind: str, name: str) -> str | None:
    """Return why an entry cannot be used; None if it can."""
    try:
        if kind == "suites":
            from petlbench.pipeline.plan.suite import expand, load_suite

            expand(load_suite(name))
        else:
            KINDS[kind].get(name)
    except UserError as error:
        return str(error)
    return None
