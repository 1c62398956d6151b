"""Lists of methods and variants: variants are read without an import, and docs/methods.md has the printed table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method, adapt
from petlbench.api.registries import METHODS
from petlbench.commands import main
from petlbench.core.cell import Cell
from petlbench.core.errors import UserError
from petlbench.core.source_code import files
from petlbench.describe import methods, variants
from petlbench.describe.methods import Row, markdown, rows, sites
from petlbench.describe.variants import declared, list_variants
from petlbench.pipeline.assembly import build_backbone
from tests.core.test_registry import install

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
SHIPPED = [name for name in METHODS.names() if METHODS.origin(name) == "petlbench"]
PLUGIN = """
from somewhere import Below
from petlbench.api.method import Method

class Base(Method):
    variants = {"a": {"rank": 2}}
    impossible = {"b": "it has no rank"}

class Inherits(Base):
    pass

class Computed(Base):
    variants = dict(a={})

class Foreign(Below):
    pass
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plug-in methods: one plain, one that inherits, one that only an import reveals, one that has no base."""
    points = {name: f"declared_plugin:{name.title()}" for name in ("base", "inherits", "computed", "foreign")}
    install(tmp_path, "declared-plugin", points, {"declared_plugin": PLUGIN}, "petlbench.methods")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "declared_plugin", raising=False)
    for read in (variants.module_of, files.read_module, files.place_of):
        read.cache_clear()


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_read_is_what_the_class_has(name: str) -> None:
    cls, found = METHODS.get(name), declared(name)
    assert (dict(found.variants), dict(found.impossible)) == (dict(cls.variants), dict(cls.impossible))
    assert not set(found.variants) & set(found.impossible)
    for options in found.variants.values():
        cls.Config(**options)


def test_listing_variants_imports_no_torch_and_no_method() -> None:
    code = (
        "import sys; from petlbench.describe.variants import list_variants; assert len(list_variants('*:*')) > 60; "
        "assert not {'torch', 'petlbench.api.method', 'petlbench.methods'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_variants_are_listed_with_their_options_or_the_reason(plugin: None) -> None:
    assert [one.as_row() for one in list_variants("base:*")] == [
        {"name": "base:a", "distribution": "declared-plugin", "options": '{"rank": 2}'},
        {"name": "base:b", "distribution": "declared-plugin", "options": "impossible: it has no rank"},
    ]
    assert [one.as_json() for one in list_variants("vl_pet:large")] == [
        {"name": "vl_pet:large", "distribution": "petlbench", "options": {}}
    ]
    assert [one.name for one in list_variants("inherits:*")] == ["inherits:a", "inherits:b"]


def test_a_class_that_has_to_be_imported_and_cannot_be_is_an_entry_with_the_error(plugin: None) -> None:
    found = list_variants("*:a")
    assert "declared_plugin:Computed" in str(found) and "base:a" in {variant.name for variant in found}
    (broken,) = [variant for variant in found if variant.name == "foreign"]
    assert broken.error and "No module named 'somewhere'" in broken.error


def test_a_pattern_without_a_match_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^no variant matches 'vl_pet:smal': did you mean 'vl_pet:small'\?"):
        list_variants("vl_pet:smal")
    with pytest.raises(UserError, match=r"^no variant matches 'full:x': full declares none"):
        list_variants("full:x")
    with pytest.raises(UserError, match=r"^unknown method 'vl_pt': did you mean 'vl_pet'"):
        list_variants("vl_pt:*")


def seen(name: str, home: str = "tiny", **options: object) -> str:
    device = torch.device("meta")
    cell = Cell(method=name, task="vqa", dataset="digits", backbone=home)
    backbone = build_backbone(cell, device)
    before = set(backbone.modules())
    cls = METHODS.get(name)
    with device:
        adapted, _ = adapt(cls(cls.Config(**options)), backbone)
    return sites(before, adapted)


def test_sites_are_observed() -> None:
    assert seen("bitfit") == methods.SELECTION
    assert seen("lora", stacks=["decoder"], targets=["q", "in"]) == (
        "beside q of attention and cross_attention (decoder); beside in of ffn (decoder)"
    )
    assert seen("vl_pet") == "`output` of attention and ffn (vision, encoder); beside v of cross_attention (decoder)"
    assert seen("multiway_adapter") == "`branch` of ffn (vision, encoder, decoder); tail of layers (encoder)"
    assert seen("prompt") == "a wrapper of the backbone (Prompted)"


def test_a_method_that_cannot_be_described_is_a_row_that_says_why() -> None:
    row = Row("odd", "a-plugin", "odd:Odd", error="it | broke")
    assert markdown([row]).splitlines()[-1] == "| `odd` | cannot be described: it \\| broke |  |  |  |  |  |"


def test_a_method_of_unknown_paper_has_a_row_of_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare(Method):
        def adapt(self, backbone: Backbone) -> Backbone:
            backbone.freeze()
            return backbone

    class Broken(Bare):
        def adapt(self, backbone: Backbone) -> Backbone:
            raise RuntimeError("no\nway")

    for cls, expected in ((Bare, ("tiny", 0, None)), (Broken, ("", None, "RuntimeError: no way"))):
        monkeypatch.setattr(METHODS, "get", lambda name, cls=cls: cls)
        (row,) = rows("bitfit")
        assert (row.home, row.method_parameters, row.error) == expected


def test_the_command_shows_table_and_variants(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["list", "methods", "bitfit", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown(rows("bitfit"))
    assert main.main(["list", "methods", "vl_pet:middle*", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["vl_pet:middleX", "vl_pet:middleY"]
    assert main.main(["list", "tasks", "--markdown"]) == 2
    assert "--markdown works with methods only" in capsys.readouterr().err


def test_the_page_of_methods_holds_their_table() -> None:
    """If this fails, put the output of `petlbench list methods --markdown` between the marks in docs/methods.md."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- methods -->\n")
    held, _, _ = rest.partition("<!-- /methods -->")
    assert held == markdown([row for row in rows() if row.name in SHIPPED])
