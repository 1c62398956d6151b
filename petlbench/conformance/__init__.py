"""What every method must pass, also a third party's: `petlbench check`.

`check` trains the method for ten steps on every task, twice, and holds it to what it claims of itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from petlbench.backbones.base import Backbone
from petlbench.conformance.bench import Bench, Reference, cell_of, method_class
from petlbench.conformance.checks import CHECKS, judge
from petlbench.conformance.observation import Seen, observe
from petlbench.conformance.process import reload
from petlbench.conformance.report import Finding, Report, render
from petlbench.conformance.state import Inventory
from petlbench.errors import UserError
from petlbench.method import Method
from petlbench.registry import BACKBONES, TASKS
from petlbench.spec import Cell
from petlbench.suite import validated

__all__ = ["CHECKS", "Finding", "Report", "check", "check_all", "render"]

Subject = str | type[Method]  # a registered name, `module:Class`, or the class itself


def check(
    method: Subject,
    *,
    backbone: str = "tiny",
    tasks: Sequence[str] | None = None,
    config: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Report:
    """Every check on every task (None: all that the backbone can serve). Takes a few seconds a task.

    Raises UserError for names and options that do not exist, and for tasks that the backbone cannot serve.
    """
    return check_all([method], backbone=backbone, tasks=tasks, config=config, device=device)[0]


def check_all(
    methods: Sequence[Subject],
    *,
    backbone: str = "tiny",
    tasks: Sequence[str] | None = None,
    config: dict[str, Any] | None = None,
    device: str = "cpu",
) -> list[Report]:
    """As `check`, for several methods, all with the same options; their adapters share one new process."""
    served = _served(backbone, tasks)
    subjects = [(_name(method), method_class(method) if isinstance(method, str) else method) for method in methods]
    for name, kind in subjects:
        validated(kind.Config, config or {}, f"method '{name}': config")
    reports = [Report(name, backbone) for name, _ in subjects]
    seen: list[tuple[Report, str, Path, Seen]] = []
    adapters: dict[Path, Cell] = {}
    with TemporaryDirectory() as folder:
        untouched: dict[str, tuple[Backbone, Inventory]] = {}  # by the options that a method needs of it
        for task in served:
            references: dict[str, Reference] = {}
            for report, (name, kind) in zip(reports, subjects, strict=True):
                cell = cell_of(name, kind, config or {}, task, backbone)
                bench, options = Bench(cell, device), repr(cell.backbone_config)
                if options not in untouched:
                    built = bench.backbone()
                    untouched[options] = built, Inventory(built)
                if options not in references:
                    references[options] = Reference(bench, *untouched[options])
                file = Path(folder) / f"{len(seen)}.safetensors"
                seen.append((report, task, file, observe(bench, kind, references[options], file)))
                if file.exists() and _importable(kind):
                    adapters[file] = cell
        for file, found in reload(adapters, device).items():
            next(s for _, _, path, s in seen if path == file).reloaded = found
    for report, task, _, one in seen:
        report.findings[task] = judge(one)
    return reports


def _name(method: Subject) -> str:
    return method if isinstance(method, str) else f"{method.__module__}:{method.__qualname__}"


def _importable(kind: type[Method]) -> bool:
    return kind.__module__ != "__main__" and "<locals>" not in kind.__qualname__


def _served(backbone: str, tasks: Sequence[str] | None) -> list[str]:
    kind = BACKBONES.get(backbone)
    options = kind.configured(backbone, {})
    refusals = {name: TASKS.get(name)().refuses(kind, options) for name in tasks or TASKS.names()}
    for name, reason in refusals.items():
        if tasks and reason:
            raise UserError(f"backbone '{backbone}' cannot serve task '{name}': {reason}; choose another of the two")
    served = [name for name, reason in refusals.items() if not reason]
    if not served:
        raise UserError(f"backbone '{backbone}' serves no task: `petlbench list tasks` shows all")
    return served
