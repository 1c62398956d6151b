"""The pages that are generated from the code say what the code has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field
from site_pages import cards, command_line, schemas
from site_pages.tables import field_table, table, type_name, without_tags

from petlbench.api.registries import BACKBONES, DATASETS, METHODS
from petlbench.commands import main
from petlbench.core.cell import Cell, Suite
from petlbench.core.recipe import Recipe
from petlbench.core.record import Memory, Parameters, Peak, Record, Trial
from petlbench.core.registry import Registry
from petlbench.describe.methods import rows
from petlbench.pipeline.plan.suite import suite_names


class Inner(BaseModel):
    a: int = 1


class Example(BaseModel):
    """A model with a field of each kind."""

    steps: int = Field(3, gt=0, le=9, description="a | b")
    names: tuple[str, ...] = ()
    betas: tuple[float, float] = (0.9, 0.999)
    pair: tuple[int, str] | None = None
    kind: Literal["x", "y"]
    inner: Inner = Inner()
    options: dict[str, Inner] = {}


def test_a_table_of_fields_has_type_bounds_default_and_meaning() -> None:
    assert field_table(Example).splitlines() == [
        "| field | type | default | meaning |",
        "| --- | --- | --- | --- |",
        "| `steps` | `int`, `> 0`, `<= 9` | `3` | a \\| b |",
        "| `names` | `list of text` | `[]` |  |",
        "| `betas` | `list of number` | `[0.9, 0.999]` |  |",
        "| `pair` | `[int, text] \\| null` | `null` |  |",
        '| `kind` | `"x" \\| "y"` | required |  |',
        "| `inner` | `Inner` | its defaults |  |",
        "| `options` | `text: Inner` | `{}` |  |",
    ]


def test_an_annotation_is_named_by_its_type() -> None:
    assert type_name(Annotated[int, Field(gt=0)]) == "int"


def test_a_cell_of_a_table_stays_in_its_cell() -> None:
    assert table(("a",), [("x|y\n<z> `<b>`",)]).splitlines()[2] == "| x\\|y &lt;z&gt; `<b>` |"


@pytest.mark.parametrize("verb", main.VERBS)
def test_the_reference_has_every_option_of_every_verb_with_its_help(verb: str) -> None:
    _, _, rest = command_line.reference().partition(f"### petlbench {verb}\n")
    section = rest.partition("\n### ")[0]
    for action in command_line.parser_of(verb)._actions:
        name = action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)
        assert f"\n| `{name}" in section
        assert without_tags((action.help or "").partition("%")[0].strip()) in section


def test_the_fields_of_a_record_come_with_those_of_every_part() -> None:
    found = schemas.models_in(Record)
    assert {Record, Cell, Recipe, Trial, Parameters, Memory, Peak} <= set(found)
    assert len(found) == len(set(found))
    page = schemas.record_fields()
    for model in set(found) - {Recipe}:
        assert f"### {model.__name__}\n" in page
        assert [name for name in model.model_fields if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize(("model", "page"), [(Recipe, schemas.recipe_fields), (Suite, schemas.suite_fields)])
def test_the_page_of_a_schema_has_its_fields_in_order(model: type[BaseModel], page: Callable[[], str]) -> None:
    lines = [line for line in page().splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines[: len(model.model_fields)]] == list(model.model_fields)


def test_every_packaged_suite_has_a_row() -> None:
    assert [name for name in suite_names("*") if f"| `{name}` |" not in schemas.suites()] == []


@pytest.mark.parametrize(
    ("registry", "page"), [(BACKBONES, schemas.backbone_options), (DATASETS, schemas.dataset_options)]
)
def test_every_option_of_a_backbone_and_a_data_set_is_listed(registry: Registry[Any], page: Callable[[], str]) -> None:
    sections = {part.partition("\n")[0]: part for part in page().split("### ")}
    for name in registry.names("*"):
        fields = registry.get(name).Config.model_fields
        assert [field for field in fields if f"| `{field}` |" not in sections[name]] == []


def test_a_card_says_formula_counts_variants_and_options() -> None:
    (row,) = rows("lora")
    card = cards.card(row, METHODS.get("lora"))
    assert card.startswith("### lora\n\n**y = x W^T + b + (alpha / r) (drop(x) A^T) B^T on query and value")
    for text in ("Hu et al., ICLR 2022", f"{row.method_parameters:,} of the method", row.verified, "| `lora:plain` |"):
        assert text in card
    assert '??? note "Options of lora"' in card
    assert "    | `rank` |" in card


def test_signs_of_markdown_in_a_docstring_show_as_they_stand() -> None:
    (row,) = rows("vl_pet")
    card = cards.card(row, METHODS.get("vl_pet"))
    assert "```text\ndH = W_up gelu_t(" in card
    assert "(`compacter_*`)" in card
    assert "Table 9's" in card
    (row,) = rows("compacter")
    assert "M = sum\\_i kron(A\\_i, S\\_i)" in cards.card(row, METHODS.get("compacter"))
