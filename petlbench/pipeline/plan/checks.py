"""Check a suite's names, configurations and data before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from petlbench.api.registries import BACKBONES, DATASETS, METHODS, TASKS
from petlbench.core.cell import BackboneSpec, Cell, MethodSpec, Suite
from petlbench.core.errors import UserError
from petlbench.core.registry import Registry
from petlbench.core.validation import validated
from petlbench.pipeline.plan.selection import Pair

if TYPE_CHECKING:
    from petlbench.api.method import Method


def configured(body: BackboneSpec, where: str) -> BaseModel:
    """Return the backbone's configuration, validated."""
    cls = BACKBONES.get(body.name)
    options = {**cls.options_of(body.name.partition(":")[2]), **body.config}
    return validated(cls.Config, options, f"{where}: backbone {body.name}: config")


def configured_method(spec: MethodSpec, *tasks: str) -> Method:
    from petlbench.api.method import make_method  # imports torch, which listing suites does not need

    return make_method(METHODS.get(spec.name), spec.config, tasks)


def host_of(body: BackboneSpec, spec: MethodSpec, where: str) -> BackboneSpec:
    """Add the options that the method needs to the backbone. Raise UserError if the suite sets one otherwise."""
    needed = configured_method(spec).host_options(body.name.partition(":")[0])
    for name, value in needed.items():
        if body.config.get(name, value) != value:
            raise UserError(
                f"{where}: method {spec.label} needs backbone {body.name} with {name}: {value}, "
                f"not {body.config[name]}: leave the option out, or configure the method otherwise"
            )
    host = body.model_copy(update={"config": {**body.config, **needed}})
    configured(host, where)
    return host


def check_names(suite: Suite, where: str) -> None:
    """Check that keys which are names exist; an override of an unknown name would silently have no effect."""
    keyed: list[tuple[str, Registry[Any], Iterable[str]]] = [
        ("task_recipes", TASKS, suite.task_recipes),
        ("dataset_configs", DATASETS, suite.dataset_configs),
    ]
    for key, registry, names in keyed:
        for name in names:
            try:
                registry.origin(name)
            except UserError as error:
                raise UserError(f"{where}: {key}: {error}") from None


def check_sources(suite: Suite, pairs: Sequence[Pair], root: Path | None, where: str) -> None:
    """Check that each task exists, that its data set serves it, and that each data set is usable."""
    for task, dataset in pairs:
        TASKS.get(task)
        served = DATASETS.get(dataset).tasks
        if task not in served:
            raise UserError(
                f"{where}: data set '{dataset}' does not serve task '{task}', only {', '.join(sorted(served))}"
            )
    for dataset in dict.fromkeys(dataset for _, dataset in pairs):
        source = DATASETS.get(dataset)
        config = validated(source.Config, suite.dataset_configs.get(dataset, {}), f"{where}: dataset_configs.{dataset}")
        source(config, root).check()


def check_abilities(pairs: Sequence[Pair], bodies: Sequence[BackboneSpec], where: str) -> None:
    """Check that each backbone can serve each task."""
    for (task, _), body in product(pairs, bodies):
        reason = TASKS.get(task)().refuses(BACKBONES.get(body.name), configured(body, where))
        if reason:
            raise UserError(f"{where}: backbone '{body.name}' cannot serve task '{task}': {reason}")


def check_cached(cells: Iterable[Cell], where: str) -> None:
    """Refuse augmentation of images whose features are cached: the cache would ignore it."""
    for cell in cells:
        if cell.recipe.augment != "none" and cell.backbone_config.get("features") == "cached":
            raise UserError(f"{where}: {cell.label} augments images whose features are cached: take `features: live`")


def check_distinct(cells: Iterable[Cell], where: str) -> None:
    """Refuse cells with equal labels: no table could tell them apart, even if their configurations differ."""
    seen: set[str] = set()
    for cell in cells:
        key = f"{cell.label} {cell.backbone_config}"
        if key in seen:
            raise UserError(f"{where}: {cell.label} occurs twice: give each a `variant` of its own, or remove one")
        seen.add(key)
