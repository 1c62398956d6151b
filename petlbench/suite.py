"""Suites to cells: read a YAML file, apply the command line's filters, and check everything before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from petlbench import variants
from petlbench.datasets import base as sources
from petlbench.errors import UserError
from petlbench.registry import BACKBONES, DATASETS, METHODS, TASKS, Registry, did_you_mean, one_line
from petlbench.spec import BackboneSpec, Cell, MethodSpec, Recipe, Suite

if TYPE_CHECKING:
    from petlbench.method import Method

PACKAGED = Path(__file__).with_name("suites")

M = TypeVar("M", bound=BaseModel)
Pair = tuple[str, str]  # (task, data set)


def suite_names(pattern: str = "*") -> list[str]:
    """Sorted names of the packaged suites that match a shell wildcard."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml") if fnmatchcase(path.stem, pattern))


def load_suite(name_or_path: str | Path) -> Suite:
    """A packaged suite by name, or a user's YAML file by path; UserError in one line for whatever is wrong with it."""
    text = str(name_or_path)
    path = Path(name_or_path)
    if text in suite_names():
        path = PACKAGED / f"{text}.yaml"
    elif path.suffix not in (".yaml", ".yml") and not path.is_file():
        hint = did_you_mean(text, suite_names()) or ":"
        raise UserError(f"unknown suite '{text}'{hint} `petlbench list suites` shows all, or give a .yaml file")
    try:
        data = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"suite {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise UserError(f"suite {path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"suite {path} must be a mapping with the keys {', '.join(Suite.model_fields)}")
    return validated(Suite, {"name": path.stem, **data}, str(path))


def expand(
    suite: Suite,
    *,
    methods: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    backbone: str | None = None,
    seeds: Sequence[int] | None = None,
    limit: int | None = None,
    data_root: Path | None = None,
) -> list[Cell]:
    """The suite's cells, seed by seed, so that the first seed's table is complete first.

    `methods`, `tasks` and `backbone` select by name or wildcard (methods also by `name:variant`, tasks also by
    `task:dataset`); what the suite lacks is taken with its default configuration, and a wildcard of methods stands for
    all that are installed, with their variants. `limit` caps the training, validation and test rows. `data_root` is
    where data sets lie (default: PETLBENCH_DATA).

    Every name, configuration, recipe and data set is checked here; UserError says in one line what is wrong.
    """
    where = f"suite '{suite.name}'"
    own = _swept(suite, [variants.resolved(spec, METHODS) for spec in suite.methods])
    specs = _swept(suite, _methods(own, methods))  # again, for those that the suite lacks
    bodies = list(suite.backbones) if backbone is None else _bodies(suite.backbones, backbone)
    pairs = _select_tasks(suite.tasks, tasks)
    _check_names(suite, where)
    for spec in specs:
        validated(METHODS.get(spec.name).Config, spec.config, f"{where}: method {spec.label}: config")
    for body in bodies:
        _configured(body, where)
    _check_sources(suite, pairs, data_root or sources.data_root(), where)
    hosts = [(_host(body, spec, where), spec) for body, spec in product(bodies, specs)]
    _check_abilities(pairs, [body for body, _ in hosts], where)

    recipes = {
        (body.name, spec.label, task): _recipe(suite, spec, task, body.name, limit, where)
        for (body, spec), (task, _) in product(hosts, pairs)
    }
    cells = [
        Cell(
            method=spec.name,
            variant=spec.variant,
            method_config=spec.config,
            task=task,
            dataset=dataset,
            dataset_config=suite.dataset_configs.get(dataset, {}),
            backbone=body.name,
            backbone_config=body.config,
            seed=seed,
            recipe=recipes[body.name, spec.label, task],
        )
        for seed, (task, dataset), (body, spec) in product(seeds or suite.seeds, pairs, hosts)
    ]
    _check_distinct(cells, where)
    _check_cached(cells, where)
    return cells


def validated(model: type[M], data: Mapping[str, Any], where: str) -> M:
    """`model` from `data`; UserError with `where`, the first offending key's path and what is wrong, in one line."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
    keys = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, keys[:-1])
        what = "unknown key" + (did_you_mean(keys[-1], known) or f": known keys are {', '.join(known) or '(none)'}")
    else:
        what = " ".join(first["msg"].split())
        if isinstance(first["input"], str | int | float):
            what += f", got {first['input']!r:.60}"
    more = f" (and {len(others)} more)" if others else ""
    raise UserError(": ".join(filter(None, [where, ".".join(keys), what])) + more)


def _configured(body: BackboneSpec, where: str) -> BaseModel:
    """The backbone's configuration, checked."""
    kind = BACKBONES.get(body.name)
    options = {**kind.options_of(body.name.partition(":")[2]), **body.config}
    return validated(kind.Config, options, f"{where}: backbone {body.name}: config")


def _method(spec: MethodSpec, *tasks: str) -> Method:
    from petlbench.method import make_method  # with torch, which listing suites does without

    return make_method(METHODS.get(spec.name), spec.config, tasks)


def _host(body: BackboneSpec, spec: MethodSpec, where: str) -> BackboneSpec:
    """The backbone with the options that the method needs; UserError where another value is given for one."""
    needed = _method(spec).host_options(body.name.partition(":")[0])
    for name, value in needed.items():
        if body.config.get(name, value) != value:
            raise UserError(
                f"{where}: method {spec.label} needs backbone {body.name} with {name}: {value}, "
                f"not {body.config[name]}: leave the option out, or configure the method otherwise"
            )
    host = body.model_copy(update={"config": {**body.config, **needed}})
    _configured(host, where)
    return host


def _fields_at(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    """The keys of the model that `path` leads to, through sequences and optional fields."""
    for part in path:
        if part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _model_in(argument))), None)


def _swept(suite: Suite, specs: Iterable[MethodSpec]) -> list[MethodSpec]:
    """With `sweep`, each method at every size it declares, once; one whose size is set already stays as it is."""
    if not suite.sweep:
        return list(specs)
    return list({sized.label: sized for spec in specs for sized in _sizes(spec)}.values())


def _sizes(spec: MethodSpec) -> list[MethodSpec]:
    knob = METHODS.get(spec.name).knob
    if knob is None or knob.field in spec.config:
        return [spec]
    return [
        spec.model_copy(
            update={
                "variant": f"{spec.variant} {knob.field}={value:g}".strip(),
                "config": {**spec.config, knob.field: value},
            }
        )
        for value in knob.values
    ]


def _methods(specs: Sequence[MethodSpec], patterns: Sequence[str] | None) -> list[MethodSpec]:
    """Those that the patterns name, in the patterns' order."""
    if patterns is None:
        return list(specs)
    pool = list(specs)
    chosen: dict[int, MethodSpec] = {}
    for pattern in patterns:
        pool += variants.beyond(pool, pattern, METHODS)
        chosen |= {i: spec for i, spec in enumerate(pool) if variants.matches(spec, pattern)}
    return list(chosen.values())


def _bodies(specs: Sequence[BackboneSpec], pattern: str) -> list[BackboneSpec]:
    """Those of `specs` that the pattern names; if there are none, what is registered, with its defaults."""
    found = [spec for spec in specs if fnmatchcase(spec.name, pattern)]
    return found or [BackboneSpec(name=name) for name in BACKBONES.names(pattern) or [_known(BACKBONES, pattern)]]


def _select_tasks(entries: Sequence[str], patterns: Sequence[str] | None) -> list[Pair]:
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


def _check_names(suite: Suite, where: str) -> None:
    """The keys that are names must exist, or an override would be silently without effect."""
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


def _check_sources(suite: Suite, pairs: Sequence[Pair], root: Path | None, where: str) -> None:
    """Each task must exist and be served by its data set; each data set must be usable."""
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


def _check_abilities(pairs: Sequence[Pair], bodies: Sequence[BackboneSpec], where: str) -> None:
    """Each backbone must be able to do what each task needs."""
    for (task, _), body in product(pairs, bodies):
        reason = TASKS.get(task)().refuses(BACKBONES.get(body.name), _configured(body, where))
        if reason:
            raise UserError(f"{where}: backbone '{body.name}' cannot serve task '{task}': {reason}")


def _recipe(suite: Suite, spec: MethodSpec, task: str, backbone: str, limit: int | None, where: str) -> Recipe:
    """The layers of a cell's recipe, weakest first; each is checked alone, so that a message names its place."""
    known = _augmentations(task)
    layers: dict[str, Mapping[str, Any]] = {
        f"recipe of task {task}": TASKS.get(task).recipe,
        f"recipe of method {spec.name}": authors_recipe(_method(spec, task), backbone, task),
        "recipe": suite.recipe,
        f"task_recipes.{task}": suite.task_recipes.get(task, {}),
        f"methods.{spec.label}.recipe": spec.recipe,
        "--limit": {} if limit is None else {"train_limit": limit, "eval_limit": limit},
    }
    merged: dict[str, Any] = {}
    for name, layer in layers.items():
        validated(Recipe, layer, f"{where}: {name}")
        merged |= layer
    recipe = Recipe.model_validate(merged)
    if recipe.augment not in known:
        hint = did_you_mean(recipe.augment, known) or f": it has {', '.join(known)}"
        raise UserError(f"{where}: task {task} has no augmentation '{recipe.augment}'{hint}")
    return recipe


def _augmentations(task: str) -> tuple[str, ...]:
    return "none", *TASKS.get(task).augmentations


def authors_recipe(method: Method, backbone: str, task: str) -> dict[str, Any]:
    """The method's own recipe on a backbone, less an augmentation that is for another task."""
    recipe = dict(method.default_recipe(backbone.partition(":")[0]))
    if recipe.get("augment") not in _augmentations(task):
        recipe.pop("augment", None)
    return recipe


def _check_cached(cells: Iterable[Cell], where: str) -> None:
    """Features are kept by image, and augmentation makes every image a new one."""
    for cell in cells:
        if cell.recipe.augment != "none" and cell.backbone_config.get("features") == "cached":
            raise UserError(f"{where}: {cell.label} augments images whose features are cached: take `features: live`")


def _check_distinct(cells: Iterable[Cell], where: str) -> None:
    """Cells that no table could tell apart are a mistake, also where their configurations differ."""
    seen: set[str] = set()
    for cell in cells:
        key = f"{cell.label} {cell.backbone_config}"
        if key in seen:
            raise UserError(f"{where}: {cell.label} occurs twice: give each a `variant` of its own, or remove one")
        seen.add(key)
