"""The registry: lazy, strict about base classes, and immune to other people's broken plug-ins."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from petlbench.core.errors import UserError
from petlbench.core.registry import Registry

GROUP = "registrytest.animals"


class Animal:
    pass


def install(root: Path, distribution: str, points: dict[str, str], modules: dict[str, str], group: str = GROUP) -> None:
    """What pip leaves behind, as far as importlib.metadata looks at it."""
    info = root / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    entries = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{entries}")
    for name, source in modules.items():
        (root / f"{name}.py").write_text(source)


@pytest.fixture
def animals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[Animal]:
    source = f"from {__name__} import Animal\nclass Cat(Animal): pass\nclass Stone: pass\n"
    points = {"cat": "regtest_zoo:Cat", "camel": "regtest_zoo:Camel", "stone": "regtest_zoo:Stone"}
    install(tmp_path, "zoo", points, {"regtest_zoo": source})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "regtest_zoo", raising=False)
    return Registry(GROUP, "animal", f"{__name__}:Animal")


def test_listing_takes_wildcards_and_imports_nothing(animals: Registry[Animal]) -> None:
    assert animals.names() == ["camel", "cat", "stone"]
    assert animals.names("ca*") == ["camel", "cat"]
    assert (animals.origin("cat"), animals.target("cat")) == ("zoo", "regtest_zoo:Cat")
    assert "regtest_zoo" not in sys.modules


def test_get_imports_the_target(animals: Registry[Animal]) -> None:
    assert animals.get("cat").__name__ == "Cat"


def test_an_unknown_name_gets_a_suggestion_in_one_line(animals: Registry[Animal]) -> None:
    with pytest.raises(UserError) as caught:
        animals.get("cta")
    assert str(caught.value) == "unknown animal 'cta': did you mean 'cat'? `petlbench list animals` shows all"
    with pytest.raises(UserError, match=r"^unknown animal 'xyzzy': `petlbench list animals` shows all$"):
        animals.get("xyzzy")


def test_a_class_of_another_kind_is_refused(animals: Registry[Animal]) -> None:
    with pytest.raises(UserError, match=r"animal 'stone' .*regtest_zoo:Stone.* zoo\) is not a subclass of .*\.Animal"):
        animals.get("stone")


def test_a_missing_attribute_is_reported_with_its_entry_point(animals: Registry[Animal]) -> None:
    with pytest.raises(UserError, match=r"regtest_zoo:Camel of distribution zoo\) cannot be imported: AttributeError"):
        animals.get("camel")


@pytest.mark.parametrize("statement", ["raise RuntimeError('two\\nlines')", "import sys; sys.exit('two lines')"])
def test_a_broken_plugin_is_named_in_one_line_and_disturbs_nobody(
    animals: Registry[Animal], tmp_path: Path, statement: str
) -> None:
    install(tmp_path, "sick-zoo", {"dodo": "regtest_sick:Dodo"}, {"regtest_sick": statement})
    with pytest.raises(UserError) as caught:
        animals.get("dodo")
    message = str(caught.value)
    assert "regtest_sick:Dodo of distribution sick-zoo" in message
    assert "two lines" in message
    assert "\n" not in message
    assert "dodo" in animals.names()
    assert animals.get("cat").__name__ == "Cat"


def test_a_name_claimed_twice_is_an_error_only_when_used(animals: Registry[Animal], tmp_path: Path) -> None:
    install(tmp_path, "rival", {"cat": "regtest_zoo:Cat"}, {})
    assert animals.names() == ["camel", "cat", "stone"]
    assert animals.origin("cat") == "rival and zoo"
    with pytest.raises(UserError, match=r"animal 'cat' is offered by several distributions \(rival and zoo\)"):
        animals.get("cat")


class Dog(Animal):
    pass


def test_a_class_that_is_offered_is_found_by_this_process_alone(animals: Registry[Animal]) -> None:
    animals.offer("dog", Dog)
    assert (animals.get("dog"), animals.names("*o*"), animals.origin("dog")) == (Dog, ["dog", "stone"], "this process")
    animals.refuse_offered("cat")
    with pytest.raises(UserError, match=rf"^animal 'dog' is defined in {__name__}, .* entry points {GROUP}$"):
        animals.refuse_offered("dog")
    animals.offer("cat", Dog)
    with pytest.raises(UserError, match="offered by several distributions"):
        animals.get("cat")


def test_a_class_inside_a_function_is_not_offered(animals: Registry[Animal]) -> None:
    class Local(Animal):
        pass

    with pytest.raises(UserError, match="'local' is defined inside a function"):
        animals.offer("local", Local)
