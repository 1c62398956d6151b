"""The pages of schemas: suites, recipes, records, and the options of backbones and data sets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_args

from pydantic import BaseModel

from petlbench.api.registries import BACKBONES, DATASETS
from petlbench.core.cell import BackboneSpec, MethodSpec, Suite
from petlbench.core.recipe import Recipe
from petlbench.core.record import Record
from petlbench.core.registry import Registry
from petlbench.pipeline.plan.suite import load_suite, suite_names
from site_pages.tables import field_table, table


def suites() -> str:
    """The packaged suites, with what each is for."""
    rows = [(f"`{name}`", load_suite(name).description) for name in suite_names("*")]
    return table(("suite", "what it runs"), rows)


def suite_fields() -> str:
    return _sections((Suite, MethodSpec, BackboneSpec))


def recipe_fields() -> str:
    return field_table(Recipe)


def record_fields() -> str:
    """A record, its cell, and every model inside; a recipe has a page of its own."""
    return _sections([model for model in models_in(Record) if model is not Recipe])


def models_in(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The model itself and the models of its fields, each once, in the order of the fields."""
    found: dict[type[BaseModel], None] = {model: None}
    for info in model.model_fields.values():
        for inner in _models_of(info.annotation):
            found.update(dict.fromkeys(models_in(inner)))
    return list(found)


def _models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_of(argument)


def _sections(models: list[type[BaseModel]] | tuple[type[BaseModel], ...]) -> str:
    return "\n".join(
        f"### {model.__name__}\n\n{inspect.cleandoc(model.__doc__ or '')}\n\n{field_table(model)}" for model in models
    )


def backbone_options() -> str:
    return _options(BACKBONES)


def dataset_options() -> str:
    return _options(DATASETS)


def _options(registry: Registry[Any]) -> str:
    """The options of each entry that is part of petlbench and has any."""
    sections = []
    for name in registry.names("*"):
        if registry.origin(name) == "petlbench" and (model := registry.get(name).Config).model_fields:
            sections.append(f"### {name}\n\n{field_table(model)}")
    return "\n".join(sections)


PAGES: dict[str, Callable[[], str]] = {
    "suites": suites,
    "suite fields": suite_fields,
    "recipe fields": recipe_fields,
    "record fields": record_fields,
    "backbone options": backbone_options,
    "dataset options": dataset_options,
}
