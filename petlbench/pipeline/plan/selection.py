"""Select methods, tasks and backbones from a suite, and beyond it, by names and wildcards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from petlbench.api.registries import BACKBONES, METHODS, TASKS
from petlbench.core.cell import BackboneSpec, MethodSpec, Suite
from petlbench.core.registry import Registry
from petlbench.pipeline.plan import variants

Pair = tuple[str, str]  # (task, data set)


def with_sizes(suite: Suite, specs: Iterable[MethodSpec]) -> list[MethodSpec]:
    """If the suite has `sweep`, put each method at every size it declares; a spec that sets the size stays as it is."""
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
    """Return the methods that the patterns name, in the patterns' order."""
    if patterns is None:
        return list(specs)
    pool = list(specs)
    chosen: dict[int, MethodSpec] = {}
    for pattern in patterns:
        pool += variants.specs_beyond(pool, pattern, METHODS)
        chosen |= {i: spec for i, spec in enumerate(pool) if variants.matches(spec, pattern)}
    return list(chosen.values())


def select_backbones(specs: Sequence[BackboneSpec], pattern: str) -> list[BackboneSpec]:
    """Return the specs that the pattern names; if there are none, the registered backbones, with their defaults."""
    selected = [spec for spec in specs if fnmatchcase(spec.name, pattern)]
    return selected or [
        BackboneSpec(name=name) for name in BACKBONES.names(pattern) or [_registered(BACKBONES, pattern)]
    ]


def select_tasks(entries: Sequence[str], patterns: Sequence[str] | None) -> list[Pair]:
    """Return (task, data set) of the entries that the patterns name; beyond them, of registered tasks."""
    if patterns is None:
        return [_resolve(entry) for entry in entries]
    chosen: dict[str, Pair] = {}
    for pattern in patterns:
        task_pattern, _, dataset_pattern = pattern.partition(":")
        same_task = [(entry, _resolve(entry)) for entry in entries if fnmatchcase(entry.split(":")[0], task_pattern)]
        hits = {entry: pair for entry, pair in same_task if fnmatchcase(pair[1], dataset_pattern or "*")}
        if not hits:
            names = TASKS.names(task_pattern) or [_registered(TASKS, task_pattern)]
            hits = {":".join(pair): pair for pair in (_resolve(f"{name}:{dataset_pattern}") for name in names)}
        chosen |= hits
    return list(chosen.values())


def _resolve(entry: str) -> Pair:
    task, _, dataset = entry.partition(":")
    return task, dataset or TASKS.get(task).default_dataset


def _registered(registry: Registry[Any], name: str) -> str:
    """Return `name`, which may end in a size (`clip:tiny`). Raise the registry's UserError if it is unknown."""
    registry.origin(name)
    return name
