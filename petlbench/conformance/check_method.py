"""Check a method, also a third party's, as `petlbench check` does.

`check` trains the method for ten steps on every task, twice, and tests the claims that the method makes.
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
from petlbench.conformance.observation import Observations, observe
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
    """Make every check on every task (None: all that the backbone can serve). Takes a few seconds a task.

    `method`: a name, `name:variant`, `module:Class` or a class. Raise UserError if a name or option does not exist, if
    the backbone cannot serve a task, or if the method does not fit the backbone.
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
    """Check several methods, all with the same options; see `check`. Their adapters share one new process."""
    served = _served(backbone, tasks)
    subjects = [_subject(method, config or {}) for method in methods]
    for subject in subjects:
        validated(subject.cls.Config, subject.config, f"method '{subject.label}': config")
    for subject in subjects:
        cells = [cell_of(subject.name, subject.cls, subject.config, task, backbone) for task in served]
        if reasons := incompatible_cells(cells, subject.cls):
            raise UserError(next(iter(reasons.values())))
    reports = [Report(subject.label, backbone) for subject in subjects]
    seen: list[tuple[Report, str, Path, Observations]] = []
    adapters: dict[Path, Cell] = {}
    with TemporaryDirectory() as folder:
        untouched: dict[str, tuple[Backbone, ModuleSnapshot]] = {}  # by the backbone options that a method needs
        for task in served:
            references: dict[str, Reference] = {}
            for report, subject in zip(reports, subjects, strict=True):
                cell = cell_of(subject.name, subject.cls, subject.config, task, backbone)
                bench, options = Bench(cell, device), repr(cell.backbone_config)
                if options not in untouched:
                    built = bench.backbone()
                    untouched[options] = built, ModuleSnapshot(built)
                if options not in references:
                    references[options] = Reference(bench, *untouched[options])
                file = Path(folder) / f"{len(seen)}.safetensors"
                seen.append((report, task, file, observe(bench, subject.cls, references[options], file)))
                if file.exists() and _importable(subject.cls):
                    adapters[file] = cell
        for file, reloaded in reload_adapters(adapters, device).items():
            next(s for _, _, path, s in seen if path == file).reloaded = reloaded
    for report in reports:
        own = {task: observed for owner, task, _, observed in seen if owner is report}
        together = judge_together(own, everything=set(served) == set(_served(backbone, None)))
        for task, observed in own.items():
            report.findings[task] = [*judge(observed), together]
    return reports


class _Subject(NamedTuple):
    label: str
    name: str  # a new process finds the class by it
    cls: type[Method]
    config: dict[str, Any]


def _subject(method: Subject, config: dict[str, Any]) -> _Subject:
    if not isinstance(method, str):
        name = f"{method.__module__}:{method.__qualname__}"
        return _Subject(name, name, method, config)
    if ":" in method and METHODS.names(method.partition(":")[0]):
        spec = resolve_variant(MethodSpec(name=method, config=config))
        return _Subject(method, spec.name, METHODS.get(spec.name), spec.config)
    return _Subject(method, method, method_class(method), config)


def _importable(cls: type[Method]) -> bool:
    return cls.__module__ != "__main__" and "<locals>" not in cls.__qualname__


def _served(backbone: str, tasks: Sequence[str] | None) -> list[str]:
    cls = BACKBONES.get(backbone)
    options = cls.configured(backbone, {})
    refusals = {name: TASKS.get(name)().refuses(cls, options) for name in tasks or TASKS.names()}
    for name, reason in refusals.items():
        if tasks and reason:
            raise UserError(f"backbone '{backbone}' cannot serve task '{name}': {reason}; choose another of the two")
    served = [name for name, reason in refusals.items() if not reason]
    if not served:
        raise UserError(f"backbone '{backbone}' serves no task: `petlbench list tasks` shows all")
    return served
