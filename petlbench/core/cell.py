"""Cells, the units of work, and the suites that list them."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from petlbench.core.recipe import Bytes, Frozen, Recipe


class MethodSpec(Frozen):
    """A method by registry name, the name of its variant (free text, shown in tables) and its configuration."""

    name: str
    variant: str = ""
    config: dict[str, Any] = {}
    recipe: dict[str, Any] = {}

    @property
    def label(self) -> str:
        return f"{self.name}:{self.variant}" if self.variant else self.name


class BackboneSpec(Frozen):
    """A backbone by registry name and its configuration."""

    name: str
    config: dict[str, Any] = {}


class Cell(Frozen):
    """One (method, task, dataset, backbone, seed, recipe): the unit of work, failure, resumption and caching."""

    method: str
    variant: str = ""
    method_config: dict[str, Any] = {}
    task: str
    dataset: str
    dataset_config: dict[str, Any] = {}
    backbone: str
    backbone_config: dict[str, Any] = {}
    seed: int = 0
    recipe: Recipe = Recipe()

    @property
    def digest(self) -> str:
        """Eight hex digits of SHA-256 over the cell's canonical JSON, which leaves out fields at their default.

        This holds for the fields of the cell and of its recipe, so a new field with a default changes no digest. A
        changed default keeps the digest too, although the cell differs: `differences` then shows it, because a
        record holds its whole cell.
        """
        text = json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def stem(self) -> str:
        """The readable part of `id`, safe in a file name; cells may share it if only options differ."""
        parts = [self.task, self.dataset, self.method, *([self.variant] if self.variant else []), self.backbone]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join([*parts, f"s{self.seed}"]))

    @property
    def id(self) -> str:
        """A unique, readable name that is safe as a file name."""
        return f"{self.stem}_{self.digest}"

    def differences(self, other: Cell) -> tuple[str, ...]:
        """Return the parts that differ from `other` when both are written as JSON: `cell`, `recipe`, both or none."""
        ours, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        recipes = ours.pop("recipe"), theirs.pop("recipe")
        parts = {"cell": ours != theirs, "recipe": recipes[0] != recipes[1]}
        return tuple(name for name, differs in parts.items() if differs)

    @property
    def label(self) -> str:
        """The name that progress lines print."""
        variant = f":{self.variant}" if self.variant else ""
        return f"{self.method}{variant} on {self.task}:{self.dataset} ({self.backbone}, seed {self.seed})"


class Suite(Frozen):
    """The content of a suite's YAML file: methods x tasks x backbones x seeds, and one recipe with overrides."""

    name: str
    description: str = ""
    methods: tuple[MethodSpec, ...] = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=1, description="`task` or `task:dataset`")
    backbones: tuple[BackboneSpec, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    recipe: dict[str, Any] = Field({}, description="fields of Recipe for every cell")
    task_recipes: dict[str, dict[str, Any]] = Field({}, description="fields of Recipe by task name")
    dataset_configs: dict[str, dict[str, Any]] = Field({}, description="options by data set name")
    sweep: bool = Field(False, description="every method at each of the sizes it declares")
    timeout: float | None = Field(None, gt=0, description="seconds that one cell may take")
    memory_limit: Bytes | None = Field(None, description="resident memory of one cell: bytes, or text such as 4 GiB")

    @field_validator("seeds")
    @classmethod
    def _no_seed_twice(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"a seed is given more than once: {', '.join(map(str, seeds))}")
        return seeds

    @model_validator(mode="before")
    @classmethod
    def _names_stand_for_specs(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data

        def spec(item: Any) -> Any:
            return {"name": item} if isinstance(item, str) else item

        lists = {k: [spec(i) for i in data[k]] for k in ("methods", "backbones") if isinstance(data.get(k), list)}
        return {**data, **lists}
