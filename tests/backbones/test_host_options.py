"""A method may need options of its backbone: the cell shows them, and a contradiction is an error."""

from __future__ import annotations

from typing import Any

import pytest

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method, MethodConfig
from petlbench.api.registries import METHODS
from petlbench.core.cell import Cell, Suite
from petlbench.core.errors import UserError
from petlbench.pipeline.plan.suite import expand


class PickyConfig(MethodConfig):
    dropout: float = 0.2


class Picky(Method):
    """A method that needs `tiny` with dropout."""

    Config = PickyConfig

    def host_options(self, family: str) -> dict[str, Any]:
        return {"dropout": self.config.dropout} if family == "tiny" else {}

    def adapt(self, backbone: Backbone) -> Backbone:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    known = METHODS.get
    monkeypatch.setattr(METHODS, "get", lambda name: Picky if name == "picky" else known(name))


def cells(backbone: dict[str, Any], method: dict[str, Any]) -> list[Cell]:
    suite = {"name": "s", "methods": ["lora", {"name": "picky", **method}], "tasks": ["rec"], "backbones": [backbone]}
    return expand(Suite.model_validate(suite))


@pytest.mark.parametrize(
    ("given", "expected"), [({}, {"dropout": 0.2}), ({"ffn": 64}, {"ffn": 64, "dropout": 0.2}), ({"dropout": 0.2},) * 2]
)
def test_what_a_method_needs_of_its_backbone_is_in_its_own_cells_only(
    given: dict[str, Any], expected: dict[str, Any]
) -> None:
    plain, picky = cells({"name": "tiny", "config": given}, {})
    assert (plain.method, picky.method) == ("lora", "picky")
    assert plain.backbone_config == given and picky.backbone_config == expected


def test_it_follows_from_the_method_s_own_configuration() -> None:
    assert cells({"name": "tiny"}, {"config": {"dropout": 0.3}})[1].backbone_config == {"dropout": 0.3}


def test_another_family_is_left_alone() -> None:
    assert cells({"name": "vl_bart:tiny"}, {})[1].backbone_config == {}


@pytest.mark.parametrize(
    ("backbone", "method", "message"),
    [
        ({"dropout": 0.1}, {}, r"suite 's': method picky needs backbone tiny with dropout: 0.2, not 0.1: leave"),
        ({"dropout": 0.1}, {"variant": "v"}, r"method picky:v needs"),
        ({}, {"config": {"dropout": 3}}, r"backbone tiny: config: dropout: Input should be less than 1, got 3"),
    ],
)
def test_a_contradiction_is_one_line(backbone: dict[str, Any], method: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        cells({"name": "tiny", "config": backbone}, method)
    assert "\n" not in str(error.value)
