"""What every method must pass, also a third party's: `petlbench check`.

`check` trains the method for ten steps on every task, twice, and holds it to what it claims of itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method
from petlbench.api.registries import BACKBONES, METHODS, TASKS
from petlbench.conformance.bench import Bench, Reference, cell_of, method_class
from petlbench.conformance.checks import judge, judge_together
from petlbench.conformance.module_snapshot import ModuleSnapshot
from petlbench.conformance.observation import Seen, observe
from petlbench.conformance.process import reload_adapters
from petlbench.conformance.report import Report
from petlbench.core.cell import Cell, MethodSpec
from petlbench.core.errors import UserError
from petlbench.core.validation import validated
from petlbench.pipeline.compatibility import incompatible_cells
from petlbench.pipeline.plan.variants import resolve_variant

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

    `method`: a name, `name:variant`, `module:Class` or a class. Raises UserError for names and options that do not
    exist, for tasks that the backbone cannot serve, and for a method that does not fit the backbone.
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
    subjects = [_subject(method, config or {}) for method in methods]
    for one in subjects:
        validated(one.kind.Config, one.config, f"method '{one.label}': config")
    for one in subjects:
        cells = [cell_of(one.name, one.kind, one.config, task, backbone) for task in served]
        if reasons := incompatible_cells(cells, one.kind):
            raise UserError(next(iter(reasons.values())))
    reports = [Report(one.label, backbone) for one in subjects]
    seen: list[tuple[Report, str, Path, Seen]] = []
    adapters: dict[Path, Cell] = {}
    with TemporaryDirectory() as folder:
        untouched: dict[str, tuple[Backbone, ModuleSnapshot]] = {}  # by the options that a method needs of it
        for task in served:
            references: dict[str, Reference] = {}
            for report, one in zip(reports, subjects, strict=True):
                cell = cell_of(one.name, one.kind, one.config, task, backbone)
                bench, options = Bench(cell, device), repr(cell.backbone_config)
                if options not in untouched:
                    built = bench.backbone()
                    untouched[options] = built, ModuleSnapshot(built)
                if options not in references:
                    references[options] = Reference(bench, *untouched[options])
                file = Path(folder) / f"{len(seen)}.safetensors"
                seen.append((report, task, file, observe(bench, one.kind, references[options], file)))
                if file.exists() and _importable(one.kind):
                    adapters[file] = cell
        for file, found in reload_adapters(adapters, device).items():
            next(s for _, _, path, s in seen if path == file).reloaded = found
    for report in reports:
        own = {task: observed for owner, task, _, observed in seen if owner is report}
        together = judge_together(own, everything=set(served) == set(_served(backbone, None)))
        for task, observed in own.items():
            report.findings[task] = [*judge(observed), together]
    return reports


class _Subject(NamedTuple):
    label: str
    name: str  # by which a new process finds the class
    kind: type[Method]
    config: dict[str, Any]


def _subject(method: Subject, config: dict[str, Any]) -> _Subject:
    if not isinstance(method, str):
        name = f"{method.__module__}:{method.__qualname__}"
        return _Subject(name, name, method, config)
    if ":" in method and METHODS.names(method.partition(":")[0]):
        spec = resolve_variant(MethodSpec(name=method, config=config))
        return _Subject(method, spec.name, METHODS.get(spec.name), spec.config)
    return _Subject(method, method, method_class(method), config)


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
