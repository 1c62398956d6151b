"""Turn a suite into cells: read a YAML file, apply the command line's filters, and check everything before a run."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

import yaml

from petlbench.api.registries import METHODS
from petlbench.core import paths
from petlbench.core.cell import BackboneSpec, Cell, MethodSpec, Suite
from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean, one_line
from petlbench.core.recipe import Recipe
from petlbench.core.validation import validated
from petlbench.pipeline.plan import variants
from petlbench.pipeline.plan.checks import (
    check_abilities,
    check_cached,
    check_distinct,
    check_names,
    check_sources,
    configured,
    host_of,
)
from petlbench.pipeline.plan.recipes import recipe_of
from petlbench.pipeline.plan.selection import Pair, select_backbones, select_methods, select_tasks, with_sizes

PACKAGED = Path(__file__).with_name("suites")


def suite_names(pattern: str = "*") -> list[str]:
    """Return the sorted names of the packaged suites that match a shell wildcard."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml") if fnmatchcase(path.stem, pattern))


def load_suite(name_or_path: str | Path) -> Suite:
    """Load a packaged suite by name, or a YAML file by path. Raise UserError, in one line, if it is not valid."""
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
    """Return the suite's cells, seed by seed, so that the first seed's table is complete first.

    `methods`, `tasks` and `backbone` select by name or wildcard (methods also by `name:variant`, tasks also by
    `task:dataset`). A name that the suite lacks gets its default configuration; a wildcard of methods stands for all
    installed ones, with their variants. `limit` caps the training, validation and test rows. `data_root` is the folder
    of data sets (default: PETLBENCH_DATA).

    Checks every name, configuration, recipe and data set. Raise UserError, in one line, if one is wrong.
    """
    where = f"suite '{suite.name}'"
    from_suite = with_sizes(suite, [variants.resolve_variant(spec, METHODS) for spec in suite.methods])
    specs = with_sizes(suite, select_methods(from_suite, methods))  # again, for methods beyond the suite
    bodies = list(suite.backbones) if backbone is None else select_backbones(suite.backbones, backbone)
    pairs = select_tasks(suite.tasks, tasks)
    check_names(suite, where)
    for spec in specs:
        validated(METHODS.get(spec.name).Config, spec.config, f"{where}: method {spec.label}: config")
    for body in bodies:
        configured(body, where)
    check_sources(suite, pairs, data_root or paths.data_root(), where)
    hosts = [(host_of(body, spec, where), spec) for body, spec in product(bodies, specs)]
    check_abilities(pairs, [body for body, _ in hosts], where)

    recipes = {
        (body.name, spec.label, task): recipe_of(suite, spec, task, body.name, limit, where)
        for (body, spec), (task, _) in product(hosts, pairs)
    }
    cells = [
        _cell(suite, spec, pair, body, seed, recipes[body.name, spec.label, pair[0]])
        for seed, pair, (body, spec) in product(seeds or suite.seeds, pairs, hosts)
    ]
    check_distinct(cells, where)
    check_cached(cells, where)
    return cells


def _cell(suite: Suite, spec: MethodSpec, pair: Pair, body: BackboneSpec, seed: int, recipe: Recipe) -> Cell:
    task, dataset = pair
    return Cell(
        method=spec.name,
        variant=spec.variant,
        method_config=spec.config,
        task=task,
        dataset=dataset,
        dataset_config=suite.dataset_configs.get(dataset, {}),
        backbone=body.name,
        backbone_config=body.config,
        seed=seed,
        recipe=recipe,
    )
