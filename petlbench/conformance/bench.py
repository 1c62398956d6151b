"""Set up the small bench on which a method is checked: a few rows, ten steps, real backbones and tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import import_module
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from torch import Tensor, nn

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method, make_method
from petlbench.api.registries import DATASETS, METHODS, TASKS
from petlbench.api.sites import Layer, Parallel, Projection
from petlbench.api.snapshot import Snapshot
from petlbench.api.task import Batch, Row
from petlbench.conformance.module_snapshot import ModuleSnapshot
from petlbench.core.cell import Cell
from petlbench.core.errors import UserError
from petlbench.core.recipe import Recipe
from petlbench.pipeline.assembly import attach_head, build_backbone, build_setup
from petlbench.pipeline.data import Data, load_data, load_source
from petlbench.pipeline.plan.recipes import authors_recipe
from petlbench.training.context import RunContext
from petlbench.training.setup import TrainingSetup

ProjectionKey = tuple[str, str, str, int]  # layer, sub-layer, projection, and which of a pair
ROWS = 4
RECIPE: dict[str, Any] = {
    "steps": 10,
    "batch_size": ROWS,
    "eval_batch_size": ROWS,
    "weight_decay": 0.1,  # shows whether frozen parameters decay by mistake
    "warmup": 0.0,
    "validations": 1,
    "lr_factors": (1.0,),
    "beams": 1,
}
LIMITS: dict[str, Any] = {"train_limit": 2 * ROWS, "eval_limit": ROWS}
SCENES = dict.fromkeys(("train_scenes", "validation_scenes", "test_scenes"), 2 * ROWS)  # for generated data sets


def method_class(name: str) -> type[Method]:
    """Return a registered method, or any class by `module:Class`. Raise UserError if `name` is neither."""
    if ":" not in name:
        return METHODS.get(name)
    module, _, path = name.partition(":")
    try:
        cls: Any = import_module(module)
        for part in path.split("."):
            cls = getattr(cls, part)
    except (ImportError, AttributeError) as error:
        raise UserError(f"method '{name}' cannot be imported ({error}): give a name or module:Class") from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise UserError(f"'{name}' is not a subclass of petlbench.api.method.Method: give a name or module:Class")
    return cls


def cell_of(name: str, cls: type[Method], config: dict[str, Any], task: str, backbone: str) -> Cell:
    """Return the cell on which `cls` is checked: the method's own recipe, but few rows and steps."""
    dataset = TASKS.get(task).default_dataset
    fields = DATASETS.get(dataset).Config.model_fields
    method, family = make_method(cls, config, [task]), backbone.partition(":")[0]
    return Cell(
        method=name,
        method_config=config,
        task=task,
        dataset=dataset,
        dataset_config={key: value for key, value in SCENES.items() if key in fields},
        backbone=backbone,
        backbone_config=method.host_options(family),
        recipe=Recipe(**{**authors_recipe(method, backbone, task), **RECIPE, **LIMITS}),
    )


@dataclass(frozen=True)
class Outputs:
    """A loss and predictions, in evaluation mode and as plain data."""

    loss: float
    predictions: Any

    @property
    def bits(self) -> str:
        """Text that is equal if and only if every number is equal to the bit."""
        return json.dumps([self.loss, self.predictions])

    def distance(self, other: Outputs) -> float:
        """Return the largest difference, relative for values above one; infinite if anything but numbers differs."""
        return distance([self.loss, self.predictions], [other.loss, other.predictions])

    @property
    def finite(self) -> bool:
        return "NaN" not in self.bits and "Infinity" not in self.bits


def distance(a: Any, b: Any) -> float:
    """Return the largest difference between nested lists; see `Outputs.distance`."""
    if isinstance(a, list) and isinstance(b, list):
        return max(map(distance, a, b), default=0.0) if len(a) == len(b) else math.inf
    if isinstance(a, float) and isinstance(b, float):
        gap = abs(a - b) / max(1.0, abs(a), abs(b))
        return math.inf if math.isnan(gap) else gap
    return 0.0 if a == b else math.inf


def plain(value: Any) -> Any:
    """Turn predictions into nested lists, numbers and text."""
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return [[str(key), plain(item)] for key, item in value.items()]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


@cache
def _data(cell: str) -> Data:
    """Load the rows of a cell, given as JSON without its method, so that all methods share the cache."""
    parsed = Cell.model_validate_json(cell)
    return load_data(parsed, load_source(parsed, None), TASKS.get(parsed.task)())


class Bench:
    """A cell with its task and rows; its methods build everything else afresh at each call."""

    def __init__(self, cell: Cell, device: str) -> None:
        disable_progress_bars()
        self.cell, self.device = cell, torch.device(device)
        self.task = TASKS.get(cell.task)()

        self.data = _data(self.cell.model_copy(update={"method": "", "method_config": {}}).model_dump_json())

    @cached_property
    def rows(self) -> list[Row]:
        """The rows on which outputs are compared."""
        return [self.data.validation[i] for i in range(len(self.data.validation))]

    def backbone(self) -> Backbone:
        return build_backbone(self.cell, self.device)

    def setup(self, backbone: Backbone, method: Method) -> tuple[TrainingSetup, Snapshot]:
        return build_setup(self.cell, backbone, self.task, RunContext.on(self.device), method=method)

    def batch(self, backbone: Backbone, rows: list[Row], *, training: bool, dtype: torch.dtype | None = None) -> Batch:
        """Return a batch of `rows`, the same at every call, whatever random numbers were drawn before."""
        batch = self.task.collate(rows, backbone, np.random.default_rng(0) if training else None).to(self.device)
        if dtype is None:
            return batch
        images = batch.images.to_dtype(dtype)
        extras = {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.extras.items()}
        return replace(batch, images=images, extras=extras)

    @torch.no_grad()
    def predictions(
        self, backbone: Backbone, head: nn.Module, rows: list[Row], dtype: torch.dtype | None = None
    ) -> list[Any]:
        backbone.eval(), head.eval()
        batch = self.batch(backbone, rows, training=False, dtype=dtype)
        predictions: list[Any] = plain(self.task.predict(backbone, head, batch, beams=1))
        return predictions

    @torch.no_grad()
    def outputs(self, backbone: Backbone, head: nn.Module, dtype: torch.dtype | None = None) -> Outputs:
        backbone.eval(), head.eval()
        loss = self.task.loss(backbone, head, self.batch(backbone, self.rows, training=True, dtype=dtype))
        return Outputs(float(loss), self.predictions(backbone, head, self.rows, dtype))


@dataclass(frozen=True)
class Idle:
    """The parts of a backbone that a task does not use when everything trains, by names of the untouched backbone."""

    layers: frozenset[str]  # layers that do not run
    parameters: frozenset[str]  # parameters without a gradient
    # Projections none of whose rows gets a gradient, such as a multiway layer's text queries.
    projections: frozenset[ProjectionKey]
    supplied: frozenset[str]  # supplied parameters without a gradient, by their names in the extended backbone


class Reference:
    """The untouched backbone with the parts supplied for one task: its outputs, and the parts left idle."""

    def __init__(self, bench: Bench, backbone: Backbone, fresh: ModuleSnapshot) -> None:
        """`fresh`: the snapshot taken when the backbone was built."""
        self.backbone = backbone
        torch.manual_seed(0)
        self.extended, self.head = attach_head(backbone, bench.task, bench.device)
        self.outputs = bench.outputs(self.extended, self.head)
        self._idle = self._find_idle(bench)
        self.habits = set(fresh.changes())  # changes that the host itself makes when it runs, such as a cached table

    def _find_idle(self, bench: Bench) -> Idle:
        handle, used = Snapshot(self.extended), set[str]()
        layers = {name: m for name, m in self.backbone.named_modules() if isinstance(m, Layer)}
        hooks = [m.register_forward_pre_hook(lambda *_, name=name: used.add(name)) for name, m in layers.items()]
        try:
            self.extended.requires_grad_(True)
            batch = bench.batch(self.extended, bench.rows, training=True)
            bench.task.loss(self.extended, self.head, batch).backward()
            return Idle(
                layers=frozenset(layers.keys() - used),
                parameters=_without_gradient(self.backbone),
                projections=frozenset(place for place, single in _projections(layers) if not _reached(single)),
                supplied=_without_gradient(self.extended) & self.extended.head_parameters(),
            )
        finally:
            for hook in hooks:
                hook.remove()
            handle.restore()

    def idle(self, modules: dict[str, nn.Module], parameters: dict[str, nn.Parameter], adapted: Backbone) -> set[int]:
        """Return the ids of all parameters, inserted and supplied ones too, that this task cannot reach.

        `modules` and `parameters`: of the adapted backbone, by their names before it was adapted.
        """
        layers = {name: m for name, m in modules.items() if isinstance(m, Layer)}
        inside: list[nn.Module] = [layers[name] for name in self._idle.layers]
        for place, projection in _projections(layers):
            inside += _paths(projection) if place in self._idle.projections else ()
        single = [parameters[name] for name in self._idle.parameters]
        supplied = [adapted.get_parameter(name) for name in self._idle.supplied]
        return {id(p) for p in [*chain.from_iterable(m.parameters() for m in inside), *single, *supplied]}


def _without_gradient(module: nn.Module) -> frozenset[str]:
    return frozenset(name for name, p in module.named_parameters() if p.grad is None or not p.grad.any())


def _projections(layers: Mapping[str, Layer]) -> Iterator[tuple[ProjectionKey, Projection]]:
    """Yield every projection of these layers with its key; the two of a pair come one after the other."""
    for name, layer in layers.items():
        for part, sublayer in layer.items():
            for role, projection in sublayer.projections.items():
                for index, single in enumerate(projection.singles()):
                    yield (name, part, role, index), single


def _reached(projection: Projection) -> bool:
    gradient = projection.linear.weight.grad
    if gradient is not None and projection.rows is not None:
        gradient = gradient[projection.rows]
    return gradient is not None and bool(gradient.any())


def _paths(projection: Projection) -> Iterator[nn.Module]:
    """Yield the modules that were inserted in parallel to the projection."""
    module = getattr(projection.owner, projection.name)
    while isinstance(module, Parallel):
        if module.rows == projection.rows:
            yield module.path
        module = module.base
