"""Suites: a YAML file and the command line's filters become cells, and each mistake is reported in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from pydantic import Field

from petlbench.api.backbone import BackboneConfig
from petlbench.api.method import MethodConfig
from petlbench.api.registries import METHODS
from petlbench.api.source import SourceConfig
from petlbench.core.cell import Cell, Suite
from petlbench.core.errors import UserError
from petlbench.core.registry import Registry
from petlbench.pipeline.plan import checks, recipes, selection
from petlbench.pipeline.plan import suite as suites
from petlbench.pipeline.plan.suite import expand, load_suite, suite_names
from tests.core.test_registry import install


class Plain:
    """A method, task, data set and backbone in one, without options: expansion reads attributes only."""

    Config: ClassVar[Any] = MethodConfig
    recipe: ClassVar[dict[str, Any]] = {}
    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    impossible: ClassVar[dict[str, str]] = {}
    size_option = None

    def __init__(self, config: object = None) -> None: ...

    def default_recipe(self, family: str) -> dict[str, Any]:
        return self.recipe

    def host_options(self, family: str) -> dict[str, Any]:
        return {}


class RankConfig(MethodConfig):
    rank: int = Field(4, gt=0)


class Ranked(Plain):
    Config = RankConfig
    variants: ClassVar[dict[str, dict[str, Any]]] = {"usual": {}, "wide": {"rank": 64}}
    impossible: ClassVar[dict[str, str]] = {"flat": "rank 0 is no rank"}
    recipe: ClassVar[dict[str, Any]] = {"lr": 5e-3, "weight_decay": 0.5}


class Boxes(Plain):
    default_dataset = "photos"
    recipe: ClassVar[dict[str, Any]] = {"lr": 2e-3, "batch_size": 7}
    augmentations: ClassVar[dict[str, Any]] = {"turned": None}

    def refuses(self, backbone: type, config: BackboneConfig) -> str | None:
        return "it cannot ground" if backbone is Blind else None


class Captions(Boxes):
    default_dataset = "photos"
    recipe: ClassVar[dict[str, Any]] = {}


class Photos(Plain):
    class Config(SourceConfig):
        size: int = 1

    tasks = frozenset({"boxes", "captions"})
    checked: ClassVar[list[Path | None]] = []

    def __init__(self, config: SourceConfig, root: Path | None = None) -> None:
        self.root = root

    def check(self) -> None:
        self.checked.append(self.root)


class Prose(Photos):
    tasks = frozenset({"captions"})


class Body(Plain):
    Config = BackboneConfig

    @staticmethod
    def options_of(size: str) -> dict[str, Any]:
        return {}


class Blind(Body):
    pass


@pytest.fixture(autouse=True)
def registries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use separate registries, so that no test depends on installed plug-ins."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Photos, "checked", [])
    monkeypatch.delenv("PETLBENCH_DATA", raising=False)
    offers = {
        "methods": {"plain": Plain, "ranked": Ranked, "rated": Ranked},
        "tasks": {"boxes": Boxes, "captions": Captions},
        "datasets": {"photos": Photos, "prose": Prose},
        "backbones": {"body": Body, "blind": Blind},
    }
    for plural, classes in offers.items():
        group = f"suitetest.{plural}"
        install(tmp_path, group, {n: f"{__name__}:{c.__name__}" for n, c in classes.items()}, {}, group)
        noun = {"datasets": "data set"}.get(plural, plural[:-1])
        registry: Registry[Any] = Registry(group, noun, f"{__name__}:Plain")
        for module in (suites, selection, recipes, checks):
            monkeypatch.setattr(module, plural.upper(), registry, raising=False)


def suite(**changes: Any) -> Suite:
    base = {"name": "s", "methods": ["plain", "ranked"], "tasks": ["boxes", "captions:prose"], "backbones": ["body"]}
    return Suite.model_validate({**base, **changes})


def grid(cells: list[Cell]) -> list[tuple[str, str, str]]:
    return [(cell.method, cell.task, cell.dataset) for cell in cells]


def test_cells_are_the_product_seed_by_seed() -> None:
    cells = expand(suite(seeds=[0, 1]))
    once = [(m, t, d) for t, d in [("boxes", "photos"), ("captions", "prose")] for m in ("plain", "ranked")]
    assert grid(cells) == once + once
    assert [cell.seed for cell in cells] == [0] * 4 + [1] * 4
    assert len({cell.id for cell in cells}) == 8


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"methods": ["ranked"], "tasks": ["boxes"]}, [("ranked", "boxes", "photos")]),
        ({"methods": ["p*"], "tasks": ["*:prose"]}, [("plain", "captions", "prose")]),
        ({"methods": ["rated"], "tasks": ["b*"]}, [("rated", "boxes", "photos")]),
        ({"methods": ["plain"], "tasks": ["captions:photos"]}, [("plain", "captions", "photos")]),
        (
            {"methods": ["ranked", "*"], "tasks": ["boxes", "boxes:photos"]},
            [(name, "boxes", "photos") for name in ("ranked", "plain", "ranked", "rated", "rated")],
        ),
    ],
)
def test_filters_select_from_the_suite_and_beyond(filters: Any, expected: list[tuple[str, str, str]]) -> None:
    assert grid(expand(suite(), **filters)) == expected


def test_a_selected_method_keeps_the_suites_configuration_and_a_foreign_one_has_the_default() -> None:
    variants = [{"name": "ranked", "variant": v, "config": {"rank": r}} for v, r in [("small", 1), ("large", 9)]]
    cells = expand(suite(methods=variants), methods=["ranked:large", "plain"], tasks=["boxes"], seeds=[5])
    assert [(c.method, c.variant, c.method_config, c.seed) for c in cells] == [
        ("ranked", "large", {"rank": 9}, 5),
        ("plain", "", {}, 5),
    ]


def test_a_variant_is_a_method_with_the_options_that_it_names() -> None:
    cells = expand(suite(methods=["ranked:wide", {"name": "ranked:wide", "variant": "odd", "config": {"rank": 3}}]))
    assert [(c.method, c.variant, c.method_config) for c in cells[:2]] == [
        ("ranked", "wide", {"rank": 64}),
        ("ranked", "odd", {"rank": 3}),
    ]


def test_a_wildcard_stands_for_every_method_and_variant_once() -> None:
    def labels(own: list[Any], pattern: str) -> list[str]:
        cells = expand(suite(methods=own, tasks=["boxes"]), methods=[pattern])
        return [f"{cell.method}:{cell.variant}" for cell in cells]

    assert labels(["plain"], "*") == ["plain:", "ranked:", "ranked:wide", "rated:", "rated:wide"]
    assert labels([{"name": "ranked", "variant": "mine", "config": {"rank": 64}}], "ranked*") == [
        "ranked:mine",
        "ranked:",
    ]
    assert labels(["plain"], "ranked:*") == ["ranked:usual", "ranked:wide"]
    assert labels(["plain"], "ranked:usual") == ["ranked:usual"]


def test_a_backbone_outside_the_suite_takes_its_place() -> None:
    assert {cell.backbone for cell in expand(suite(tasks=["boxes"], backbones=["blind"]), backbone="body")} == {"body"}


def test_recipe_layers_from_weakest_to_strongest() -> None:
    ranked = {"name": "ranked", "recipe": {"beams": 6}}
    layered = suite(methods=["plain", ranked], recipe={"steps": 11, "beams": 2}, task_recipes={"boxes": {"beams": 3}})
    cells = expand(layered, limit=9)
    recipes = {(cell.method, cell.task): cell.recipe for cell in cells}
    assert [recipes["plain", task].beams for task in ("boxes", "captions")] == [3, 2]
    assert recipes["ranked", "captions"].beams == 6
    assert recipes["plain", "boxes"].lr == 2e-3  # the task's
    assert recipes["ranked", "boxes"].lr == 5e-3  # the method's
    assert recipes["plain", "captions"].lr == 1e-3  # the default
    assert recipes["ranked", "boxes"].batch_size == 7
    assert {(r.steps, r.train_limit, r.eval_limit) for r in recipes.values()} == {(11, 9, 9)}


def test_an_augmentation_must_be_one_of_the_tasks() -> None:
    (cell,) = expand(suite(task_recipes={"boxes": {"augment": "turned"}}), methods=["plain"], tasks=["boxes"])
    assert cell.recipe.augment == "turned"
    message = "task boxes has no augmentation 'turn': did you mean 'turned'?"
    with pytest.raises(UserError, match=re.escape(message)):
        expand(suite(recipe={"augment": "turn"}), methods=["plain"], tasks=["boxes"])


def test_a_methods_own_augmentation_goes_to_the_tasks_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plain, "recipe", {"augment": "turned"})
    monkeypatch.setattr(Captions, "augmentations", {})
    cells = expand(suite(), methods=["plain"])
    assert {cell.task: cell.recipe.augment for cell in cells} == {"boxes": "turned", "captions": "none"}


def test_augmented_images_are_not_looked_up_among_cached_features(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cached(BackboneConfig):
        features: str = "live"

    monkeypatch.setattr(Body, "Config", Cached)
    with pytest.raises(UserError, match="augments images whose features are cached: take `features: live`"):
        expand(
            suite(backbones=[{"name": "body", "config": {"features": "cached"}}], recipe={"augment": "turned"}),
            tasks=["boxes"],
        )


def test_the_suites_learning_rate_beats_the_methods_own() -> None:
    cells = expand(suite(recipe={"lr": 0.25}), methods=["ranked"])
    assert {(cell.recipe.lr, cell.recipe.weight_decay) for cell in cells} == {(0.25, 0.5)}


def test_each_data_set_is_checked_once_at_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expand(suite(tasks=["boxes", "captions"]), data_root=tmp_path)
    assert Photos.checked == [tmp_path]
    monkeypatch.setenv("PETLBENCH_DATA", "/from/environment")
    expand(suite(tasks=["boxes", "captions"]))
    assert Photos.checked[1:] == [Path("/from/environment")]


@pytest.mark.parametrize(
    ("changes", "filters", "message"),
    [
        ({}, {"methods": ["rankd"]}, "unknown method 'rankd': did you mean 'ranked'?"),
        ({}, {"methods": ["z*"]}, "unknown method 'z*': `petlbench list methods` shows all"),
        ({}, {"methods": ["ranked:wid"]}, "method 'ranked' has no variant 'wid': did you mean 'wide'?"),
        ({}, {"methods": ["plain:xyz"]}, "method 'plain' has no variant 'xyz': there are none"),
        ({"methods": ["ranked:flat"]}, {}, "method 'ranked:flat' cannot be run: rank 0 is no rank"),
        ({}, {"tasks": ["boxs"]}, "unknown task 'boxs': did you mean 'boxes'?"),
        ({}, {"tasks": ["boxes:photo"]}, "unknown data set 'photo': did you mean 'photos'?"),
        ({}, {"backbone": "bod"}, "unknown backbone 'bod': did you mean 'body'?"),
        ({"methods": ["rankd"]}, {}, "unknown method 'rankd': did you mean 'ranked'?"),
        ({"tasks": ["boxs"]}, {}, "unknown task 'boxs': did you mean 'boxes'?"),
        ({"tasks": ["boxes:prose"]}, {}, "suite 's': data set 'prose' does not serve task 'boxes', only captions"),
        ({}, {"backbone": "blind"}, "suite 's': backbone 'blind' cannot serve task 'boxes': it cannot ground"),
        (
            {"methods": [{"name": "ranked", "config": {"rnk": 1}}]},
            {},
            "suite 's': method ranked: config: rnk: unknown key: did you mean 'rank'?",
        ),
        (
            {"methods": [{"name": "ranked", "config": {"rank": 0}}]},
            {},
            "suite 's': method ranked: config: rank: Input should be greater than 0, got 0",
        ),
        (
            {"methods": [{"name": "plain", "config": {"rank": 1}}]},
            {},
            "suite 's': method plain: config: rank: unknown key: known keys are (none)",
        ),
        ({"recipe": {"stesp": 3}}, {}, "suite 's': recipe: stesp: unknown key: did you mean 'steps'?"),
        ({"task_recipes": {"boxes": {"lr": -1}}}, {}, "suite 's': task_recipes.boxes: lr: Input should be greater"),
        ({"task_recipes": {"boxs": {}}}, {}, "suite 's': task_recipes: unknown task 'boxs': did you mean 'boxes'?"),
        ({"dataset_configs": {"poses": {}}}, {}, "suite 's': dataset_configs: unknown data set 'poses'"),
        (
            {"dataset_configs": {"photos": {"sise": 2}}},
            {},
            "suite 's': dataset_configs.photos: sise: unknown key: did you mean 'size'?",
        ),
    ],
)
def test_mistakes_are_reported_in_one_line(changes: Any, filters: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        expand(suite(**changes), **filters)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("second", ["ranked", {"name": "ranked", "config": {"rank": 8}}])
def test_cells_that_no_table_can_tell_apart_are_refused(second: Any) -> None:
    with pytest.raises(UserError, match=r"ranked on boxes:photos \(body, seed 0\) occurs twice: give each a `variant`"):
        expand(suite(methods=["ranked", second]))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_users_file_is_named_after_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", "methods: [plain]\ntasks: [boxes]\nbackbones: [body]\n")
    assert load_suite(path).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: [a\n", "is not valid YAML: "),
        ("- a\n", "must be a mapping with the keys name, "),
        ("methds: [a]\ntasks: [b]\nbackbones: [c]\nmethods: [a]\n", "methds: unknown key: did you mean 'methods'?"),
        ("methods: [{name: a, confg: {}}]\ntasks: [b]\nbackbones: [c]\n", "methods.0.confg: unknown key: did you mean"),
        ("methods: [a]\ntasks: [b]\nbackbones: [c]\nseeds: [x]\n", "seeds.0: Input should be a valid integer, "),
        ("tasks: [b]\n", "methods: Field required (and 1 more)"),
        ("seeds: 2024-13-45\n", "is not valid YAML: "),
    ],
)
def test_a_bad_file_is_reported_with_its_path_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(UserError) as caught:
        load_suite(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown suite 'qiuck': did you mean 'quick'\?"):
        load_suite("qiuck")
    with pytest.raises(UserError, match=r"none\.yaml cannot be read: No such file"):
        load_suite(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", suite_names())
def test_every_packaged_suite_expands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real registries
    packaged = load_suite(name)
    cells = expand(packaged)
    assert packaged.name == name
    assert packaged.description
    methods, tasks, bodies, seeds = (
        len(x) for x in (packaged.methods, packaged.tasks, packaged.backbones, packaged.seeds)
    )
    assert (len(cells) > methods * tasks * bodies * seeds) == packaged.sweep
    assert packaged.sweep or len(cells) == methods * tasks * bodies * seeds


def test_a_sweep_runs_every_method_at_each_size_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real registries
    data = {
        "name": "s",
        "methods": ["full", "lora", {"name": "vl_adapter", "config": {"reduction": 3}}],
        "tasks": ["vqa"],
        "backbones": ["tiny"],
        "sweep": True,
    }
    cells = expand(Suite.model_validate(data))
    ranks = METHODS.get("lora").size_option.values  # type: ignore[union-attr]
    sized = {cell.variant: cell.method_config for cell in cells if cell.method == "lora"}
    assert sized == {f"rank={rank}": {"rank": rank} for rank in ranks}
    assert [cell.method_config for cell in cells if cell.method == "vl_adapter"] == [{"reduction": 3}]
    assert [cell.label for cell in expand(Suite.model_validate(data), methods=["lora:rank=4"])] == [
        "lora:rank=4 on vqa:digits (tiny, seed 0)"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0, 1, 0]}, "a seed is given more than once: 0, 1, 0"),
        ({"timeout": 0}, "timeout: Input should be greater than 0"),
        ({"memory_limit": "much"}, "a size such as 4 GiB or 800 MB is needed, not 'much'"),
        ({"memory_limit": 0}, "memory_limit: Input should be greater than 0"),
    ],
)
def test_limits_and_seeds_that_make_no_sense_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"methods": ["lora"], "tasks": ["vqa"], "backbones": ["tiny"], **changes}))
    with pytest.raises(UserError, match=re.escape(message)):
        load_suite(path)


def test_a_memory_limit_may_be_text_with_a_unit() -> None:
    limits = [
        Suite.model_validate({"name": "s", "methods": ["a"], "tasks": ["t"], "backbones": ["b"], "memory_limit": limit})
        for limit in ("4 GiB", "1.5MB", 1024)
    ]
    assert [suite.memory_limit for suite in limits] == [4 * 2**30, 1_500_000, 1024]
