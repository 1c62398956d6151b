"""Build the recipe of a cell, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from petlbench.api.registries import TASKS
from petlbench.core.cell import MethodSpec, Suite
from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean
from petlbench.core.recipe import Recipe
from petlbench.core.validation import validated
from petlbench.pipeline.plan.checks import configured_method

if TYPE_CHECKING:
    from petlbench.api.method import Method


def recipe_of(suite: Suite, spec: MethodSpec, task: str, backbone: str, limit: int | None, where: str) -> Recipe:
    """Merge the layers of a cell's recipe, weakest first. Each is checked alone, so that an error names its place."""
    names = augmentations(task)
    layers: dict[str, Mapping[str, Any]] = {
        f"recipe of task {task}": TASKS.get(task).recipe,
        f"recipe of method {spec.name}": authors_recipe(configured_method(spec, task), backbone, task),
        "recipe": suite.recipe,
        f"task_recipes.{task}": suite.task_recipes.get(task, {}),
        f"methods.{spec.label}.recipe": spec.recipe,
        "--limit": {} if limit is None else {"train_limit": limit, "eval_limit": limit},
    }
    merged: dict[str, Any] = {}
    for place, layer in layers.items():
        validated(Recipe, layer, f"{where}: {place}")
        merged |= layer
    recipe = Recipe.model_validate(merged)
    if recipe.augment not in names:
        hint = did_you_mean(recipe.augment, names) or f": it has {', '.join(names)}"
        raise UserError(f"{where}: task {task} has no augmentation '{recipe.augment}'{hint}")
    return recipe


def augmentations(task: str) -> tuple[str, ...]:
    return "none", *TASKS.get(task).augmentations


def authors_recipe(method: Method, backbone: str, task: str) -> dict[str, Any]:
    """Return the method's own recipe on a backbone, without an augmentation that the task lacks."""
    recipe = dict(method.default_recipe(backbone.partition(":")[0]))
    if recipe.get("augment") not in augmentations(task):
        recipe.pop("augment", None)
    return recipe
