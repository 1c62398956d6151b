"""Descriptions of backbones: built-in or plugged in, in any size, with the tasks that each serves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from petlbench.commands import main
from petlbench.core.errors import UserError
from petlbench.describe.backbones import FamilyEntry, Service, entries, matrix
from tests.core.test_registry import install

FAMILIES = ["beit3", "clip", "tiny", "transvg", "vl_bart", "vl_t5"]
STRANGER = """
from pydantic import Field
from torch import nn
from petlbench.api.backbone import Backbone, BackboneConfig
from petlbench.api.sites import Layer, Stack, SubLayer

class Config(BackboneConfig):
    width: int = Field(8, gt=0)

class Stranger(Backbone):
    Config = Config
    abilities = frozenset({"embed"})
    refusals = {"ground": "it sees no places", "decode": "it has no words"}

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.width, config.width)
        options = dict(width=config.width, pre_norm=True, projections={})
        layer = Layer(ffn=SubLayer(nn.Identity(), nn.Identity(), nn.Identity(), **options))
        self.stacks["tower"] = Stack([layer] * 3, width=config.width)

    def host_parameters(self):
        return set()

    images = texts = embed_image = embed_text = fuse = None

class Demanding(Stranger):
    class Config(BackboneConfig):
        path: str
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in with a plain family, one whose options have no defaults, and one that cannot be imported."""
    points = {
        "stranger": "cat_strangers:Stranger",
        "demanding": "cat_strangers:Demanding",
        "shattered": "cat_nowhere:Thing",
    }
    install(tmp_path, "strangers", points, {"cat_strangers": STRANGER}, group="petlbench.backbones")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cat_strangers", raising=False)


def test_every_family_says_how_large_it_is_and_where_methods_can_go() -> None:
    found = {entry.name: entry for entry in entries()}
    assert sorted(found) == FAMILIES
    assert not [entry.error for entry in found.values() if entry.error]
    assert found["transvg"].parameters == 149_745_860
    assert found["vl_bart"].stacks == {"encoder": {"layers": 6, "width": 768}, "decoder": {"layers": 6, "width": 768}}
    assert found["clip"].stacks == {"vision": {"layers": 12, "width": 768}, "text": {"layers": 12, "width": 512}}
    assert (found["beit3"].default, found["beit3"].sizes[0]) == ("base-224", "base-224")
    assert all("tiny" in entry.sizes for name, entry in found.items() if name != "tiny")


def test_sizes_are_described_by_name_or_wildcard() -> None:
    large, larger = entries("beit3:large-*")
    assert (large.name, large.parameters) == ("beit3:large-224", 674_799_617)
    assert larger.parameters == 675_188_737
    (other,) = entries("clip:ViT-L-14")  # a size that the family knows but does not list
    assert other.parameters == 427_616_513


def test_the_matrix_says_what_is_supplied_and_why_a_task_is_refused() -> None:
    found = {entry.name: entry.tasks for entry in matrix()}
    assert found["clip"]["vqa"] == Service(("fusion", "decoder"))
    assert found["clip"]["retrieval"] == Service()
    assert found["beit3"]["captioning"] == Service(("decoder",))
    assert (found["beit3"]["pairs"], found["vl_bart"]["pairs"]) == (Service(("decoder", "order")), Service())
    assert found["vl_bart"].keys() == {"rec", "vqa", "pairs", "captioning", "retrieval"}
    refused = found["transvg"]["retrieval"]
    assert refused.reason and refused.reason.startswith("it cannot embed (") and str(refused) == "no"
    assert found["clip:coca-tiny"]["captioning"] == Service()  # a size that serves other tasks has its own row
    assert "clip:tiny" not in found


@pytest.mark.usefixtures("stranger")
def test_a_third_partys_family_is_described_and_one_that_is_broken_disturbs_nobody() -> None:
    stranger, demanding, shattered = (entries(name)[0] for name in ("stranger", "demanding", "shattered"))
    assert stranger == FamilyEntry(
        "stranger",
        "strangers",
        "cat_strangers:Stranger",
        parameters=72,
        stacks={"tower": {"layers": 3, "width": 8}},
        tasks={
            "captioning": Service(reason="it cannot decode (it has no words)"),
            "pairs": Service(reason="it cannot decode (it has no words)"),
            "rec": Service(reason="it cannot ground (it sees no places)"),
            "retrieval": Service(),
            "vqa": Service(reason="it cannot decode (it has no words)"),
        },
    )
    assert demanding.error and "path" in demanding.error and "\n" not in demanding.error
    assert shattered.error and "No module named 'cat_nowhere'" in shattered.error
    assert [entry.name for entry in matrix("s*")] == ["shattered", "stranger"]


@pytest.mark.usefixtures("stranger")
def test_the_listing_as_people_and_programs_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["list", "backbones", "t*"]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    tasks = "captioning, pairs (+order), rec, retrieval, vqa"
    assert f"tiny petlbench 1.09M vision 3 x 96, encoder 3 x 96, decoder 2 x 96 {tasks}" in shown
    (transvg,) = [line for line in shown if line.startswith("transvg ")]
    assert "150M vision 6 x 256, text 12 x 768, fusion 6 x 256 r50 (default)," in transvg
    assert transvg.endswith("captioning (+decoder), rec, vqa (+decoder)")
    assert any(line.startswith("+fusion, +decoder, +order: a part supplied") for line in shown)
    assert main.main(["list", "backbones", "t*", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["tiny"]["target"] == "petlbench.backbones.tiny:Tiny"
    assert rows["transvg"]["tasks"]["vqa"] == {"supplied": ["decoder"], "reason": None}
    assert main.main(["list", "backbones", "s*", "--matrix"]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "backbone captioning pairs rec retrieval vqa" in shown
    assert "stranger no no no yes no" in shown
    assert "stranger, rec: it cannot ground (it sees no places)" in shown
    assert any(line.startswith("shattered cannot be described: backbone 'shattered'") for line in shown)
    assert main.main(["list", "backbones", "s*", "--check"]) == 1
    assert main.main(["list", "backbones", "stranger", "--check"]) == 0


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("clipp", "no backbone matches 'clipp': did you mean 'clip'? `petlbench list backbones` shows all"),
        ("clipp:tiny", "no backbone matches 'clipp:tiny': did you mean 'clip'?"),
        ("vl_bart:bsae", "VLBart has no size 'bsae': did you mean 'base'?"),
        ("vl_bart:x*", "no size matches 'vl_bart:x*': `petlbench list backbones vl_bart` shows some"),
    ],
)
def test_what_matches_nothing_is_a_mistake(pattern: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        entries(pattern)
    assert str(caught.value).startswith(message)
