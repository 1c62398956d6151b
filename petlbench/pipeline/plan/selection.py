"""What of a suite is asked for: names and wildcards to methods, tasks and backbones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from petlbench.api.registries import BACKBONES, METHODS, TASKS
from petlbench.core.cell import BackboneSpec, MethodSpec, Suite
from petlbench.core.registry import Registry
from petlbench.pipeline.plan import variants

Pair = tuple[str, str]  # (task, data set)


def swept(suite: Suite, specs: Iterable[MethodSpec]) -> list[MethodSpec]:
    """With `sweep`, each method at every size it declares, once; one whose size is set already stays as it is."""
    if not suite.sweep:
        return list(specs)
    return list({sized.label: sized for spec in specs for sized in _sizes(spec)}.values())


def _sizes(spec: MethodSpec) -> list[MethodSpec]:
    size_option = METHODS.get(spec.name).size_option
    if size_option is None or size_option.field in spec.config:
        return [spec]
    return [
        spec.model_copy(
            update={
                "variant": f"{spec.variant} {size_option.field}={value:g}".strip(),
                "config": {**spec.config, size_option.field: value},
            }
        )
        for value in size_option.values
    ]


def select_methods(specs: Sequence[MethodSpec], patterns: Sequence[str] | None) -> list[MethodSpec]:
    """Those that the patterns name, in the patterns' order."""
    if patterns is None:
        return list(specs)
    pool = list(specs)
    chosen: dict[int, MethodSpec] = {}
    for pattern in patterns:
        pool += variants.beyond(pool, pattern, METHODS)
        chosen |= {i: spec for i, spec in enumerate(pool) if variants.matches(spec, pattern)}
    return list(chosen.values())


def select_backbones(specs: Sequence[BackboneSpec], pattern: str) -> list[BackboneSpec]:
    """Those of `specs` that the pattern names; if there are none, what is registered, with its defaults."""
    found = [spec for spec in specs if fnmatchcase(spec.name, pattern)]
    return found or [BackboneSpec(name=name) for name in BACKBONES.names(pattern) or [_known(BACKBONES, pattern)]]


def select_tasks(entries: Sequence[str], patterns: Sequence[str] | None) -> list[Pair]:
    """(task, data set) of the entries that the patterns name, like `_select`."""
    if patterns is None:
        return [_resolve(entry) for entry in entries]
    chosen: dict[str, Pair] = {}
    for pattern in patterns:
        task_pattern, _, dataset_pattern = pattern.partition(":")
        same_task = [(entry, _resolve(entry)) for entry in entries if fnmatchcase(entry.split(":")[0], task_pattern)]
        hits = {entry: pair for entry, pair in same_task if fnmatchcase(pair[1], dataset_pattern or "*")}
        if not hits:
            names = TASKS.names(task_pattern) or [_known(TASKS, task_pattern)]
            hits = {":".join(pair): pair for pair in (_resolve(f"{name}:{dataset_pattern}") for name in names)}
        chosen |= hits
    return list(chosen.values())


def _resolve(entry: str) -> Pair:
    task, _, dataset = entry.partition(":")
    return task, dataset or TASKS.get(task).default_dataset


def _known(registry: Registry[Any], name: str) -> str:
    """`name`, which is no wildcard for names but may be one with a size; the registry's UserError if it is unknown."""
    registry.origin(name)
    return name
