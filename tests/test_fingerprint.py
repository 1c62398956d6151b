"""Fingerprints: they change exactly when what a result depends on does, and cost no import of what they read."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from petlbench import fingerprint
from petlbench.errors import UserError
from petlbench.fingerprint import changed, closure, code_fingerprints, fingerprints
from petlbench.registry import BACKBONES, DATASETS, METHODS, TASKS, Registry
from petlbench.spec import Cell
from petlbench.states import fingerprints_of

from .record_factory import make_record
from .test_registry import install

CELL = Cell(method="lora", task="captioning", dataset="digits", backbone="tiny")
PARTS = {"method", "task", "metric", "backbone", "source", "training"}
FILES = {
    "__init__.py": "",
    "method.py": "import torch\nfrom .layers import Bottleneck\nclass Mine:\n    pass\n",
    "layers.py": "from fpkit import sizes\nclass Bottleneck:\n    width = sizes.WIDTH\n",
    "sizes.py": "WIDTH = 8\n",
    "other.py": "class Other:\n    pass\n",
}

Code = tuple[tuple[str, str], ...]
Kit = Callable[..., dict[str, Code]]


def forget() -> None:
    for cached in (fingerprint.closure, fingerprint._module, fingerprint.place_of):
        cached.cache_clear()
    importlib.invalidate_caches()


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kit:
    """A third party's package of two methods. Call it with changed files for what each then consists of."""
    points = {"mine": "fpkit.method:Mine", "other": "fpkit.other:Other"}
    install(tmp_path, "fp-kit", points, {}, group="petlbench.methods")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fpkit").mkdir()

    def code(**files: str) -> dict[str, Code]:
        for name, source in {**FILES, **{f"{name}.py": source for name, source in files.items()}}.items():
            path = tmp_path / "fpkit" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
        forget()
        return {name: closure(METHODS.target(name).partition(":")[0]) for name in points}

    return code


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("sizes", "# how wide\nWIDTH=(  8\n)"),
        ("sizes", '"""Sizes."""\n\nWIDTH = 8\n"""Of the bottleneck."""\n'),
        ("method", 'import torch\nfrom .layers import (\n    Bottleneck,\n)\nclass Mine:\n    """Mine."""\n'),
        ("other", "class Other:\n    x = 1\n"),
    ],
)
def test_comments_docstrings_formatting_and_other_modules_leave_a_digest(kit: Kit, name: str, source: str) -> None:
    assert kit()["mine"] == kit(**{name: source})["mine"]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("sizes", "WIDTH = 9\n"),
        ("sizes", "WIDTH = 8.0\n"),
        ("sizes", "WIDTH = '8'\n"),
        ("layers", FILES["layers.py"].replace("width", "height")),
        ("layers", FILES["layers.py"] + "    def f(self, x: int = 3) -> int:\n        return x\n"),
        ("__init__", "import os\n"),
    ],
)
def test_a_change_two_imports_away_changes_that_method_alone(kit: Kit, name: str, source: str) -> None:
    before, after = kit(), kit(**{name: source})
    assert before["mine"] != after["mine"]
    assert (before["other"] == after["other"]) is (name != "__init__")


@pytest.mark.parametrize(
    ("statement", "followed"),
    [
        ("from . import hidden", True),
        ("from .hidden import X", True),
        ("import fpkit.hidden", True),
        ("from fpkit import hidden as h", True),
        ("def f():\n    from .hidden import X", True),
        ("try:\n    from .hidden import X\nexcept ImportError:\n    X = 0", True),
        ("from .deep.below import Y", True),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .hidden import X", False),
        ("import typing\nif typing.TYPE_CHECKING:\n    from .hidden import X", False),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from .hidden import X", True),
        ("if not TYPE_CHECKING:\n    from .hidden import X", True),
        ("from ..hidden import X", False),
        ("from .nowhere import X", False),
        ("import hidden", False),
    ],
)
def test_an_import_is_followed_where_it_runs(kit: Kit, statement: str, followed: bool) -> None:
    deep = {"deep/__init__": "", "deep/below": "from ..hidden import X as Y\n"}
    code = [kit(layers=statement + "\n", hidden=f"X = {value}\n", **deep)["mine"] for value in (1, 2)]
    assert (code[0] != code[1]) is followed


def test_only_the_method_differs_between_cells_of_two_methods(kit: Kit) -> None:
    kit()
    mine, other, same = (code_fingerprints(CELL.model_copy(update={"method": m})) for m in ("mine", "other", "mine"))
    assert mine == same
    assert {part for part in PARTS if mine[part] != other[part]} == {"method"}
    kit(sizes="WIDTH = 9\n")
    later = code_fingerprints(CELL.model_copy(update={"method": "mine"}))
    assert {part for part in PARTS if mine[part] != later[part]} == {"method"}


def test_a_nested_namespace_package_is_followed(kit: Kit) -> None:
    code = [kit(layers="from .bare import x\n", **{"bare/x": f"X = {value}\n"})["mine"] for value in (1, 2)]
    assert code[0] != code[1]


def test_a_plugin_depends_on_the_core_that_it_imports(kit: Kit) -> None:
    kit(layers="from petlbench.method import Method\n")
    names = {name for name, _ in closure("fpkit.method")}
    assert {"fpkit.layers", "petlbench.method", "petlbench.backbones.sites"} <= names
    assert not {"fpkit.other", "torch", "petlbench.runner"} & names


@pytest.mark.parametrize("source", ["def f(:\n", "x = '\0'\n", "\xff\n"])
def test_a_plugin_that_is_no_python_is_named_with_its_file(kit: Kit, tmp_path: Path, source: str) -> None:
    kit()
    (tmp_path / "fpkit" / "layers.py").write_bytes(source.encode("latin-1"))
    forget()
    with pytest.raises(UserError) as caught:
        closure("fpkit.method")
    assert str(caught.value).startswith(str(tmp_path / "fpkit" / "layers.py")) and "\n" not in str(caught.value)


def test_a_plugin_without_its_module_and_an_unknown_method_are_named(kit: Kit, tmp_path: Path) -> None:
    kit()
    (tmp_path / "fpkit" / "method.py").unlink()
    forget()
    with pytest.raises(UserError, match=r"module fpkit\.method"):
        code_fingerprints(CELL.model_copy(update={"method": "mine"}))
    with pytest.raises(UserError, match="did you mean 'lora'"):
        code_fingerprints(CELL.model_copy(update={"method": "lorra"}))


def test_a_digest_is_the_same_on_every_python() -> None:
    """Python 3.12 parses f-strings anew, and later versions add fields to nodes; the digest is fixed here for all."""
    source = r"""
x = 3; w = 5; u = u"text"; big = 1e400, 1j, b"\xff", "\ue000\U0001fae8", ...
a = f"a{{b}}{x!r:>{w}}" "tail" f"{x=}" f"{x = :>4}" "b" f"{{" rf"\d{x}\{x}" f"{x:%Y}" f"" "" f"{x}" ""
def f(a, /, *rest, b=None, **k) -> "int":
    match a:
        case {"x": 1, **r} if r: return None
        case [1, *_] | None: return {**k, "b": [lambda: (yield), *rest]}
"""
    assert fingerprint._digest(fingerprint._normalised(ast.parse(source))) == "116b6cb011a31b26"


def test_a_sum_of_many_terms_is_no_error() -> None:
    assert list(fingerprint._normalised(ast.parse("x = " + " + ".join(["1"] * 2000))))


def test_every_builtin_entry_has_fingerprints() -> None:
    forget()
    registries: dict[str, Registry[Any]] = {
        "method": METHODS,
        "task": TASKS,
        "dataset": DATASETS,
        "backbone": BACKBONES,
    }
    builtin = {
        kind: [name for name in registry.names() if registry.target(name).startswith("petlbench.")]
        for kind, registry in registries.items()
    }
    found = []
    for kind, names in builtin.items():
        for name in names:
            found.append(code_fingerprints(CELL.model_copy(update={kind: name})))
            assert found[-1].keys() == PARTS
    assert all(len(digest) == 16 and int(digest, 16) for digests in found for digest in digests.values())
    tasks = [digests for digests, name in zip(found[len(builtin["method"]) :], builtin["task"], strict=False)]
    assert len({digests["task"] for digests in tasks}) == len({d["metric"] for d in tasks}) == len(builtin["task"])


def test_a_metric_is_a_tasks_own_metrics_or_its_own_module() -> None:
    forget()
    own = {name: digest for name, digest in closure("petlbench.tasks.captioning") if "metrics" in name.split(".")}
    assert "petlbench.metrics.cider" in own and "petlbench.metrics.boxes" not in own
    expected = fingerprint._digest(f"{name} {digest}" for name, digest in own.items())
    assert code_fingerprints(CELL)["metric"] == expected


def test_what_follows_a_record_or_starts_a_cell_is_not_part_of_training() -> None:
    forget()
    names = [name for name, _ in closure(fingerprint.TRAINING)]
    assert {"petlbench.training", "petlbench.task", "petlbench.measure.memory"} <= set(names)
    barred = ("launch", "cli", "commands", "leaderboard", "plots", "statistics", "methods", "tasks", "metrics")
    assert [name for name in names if name.startswith(tuple(f"petlbench.{part}" for part in barred))] == []


def test_neither_torch_nor_any_of_the_code_is_imported() -> None:
    code = (
        "import sys; from petlbench.fingerprint import code_fingerprints; from petlbench.spec import Cell\n"
        "code_fingerprints(Cell(method='lora', task='captioning', dataset='digits', backbone='tiny'))\n"
        "print([n for n in ('torch', 'petlbench.runner', 'petlbench.tasks', 'petlbench.metrics') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_data_and_weights_count_by_their_content(tmp_path: Path) -> None:
    from petlbench.backbones.tiny import Tiny
    from petlbench.backbones.weights import ASSETS

    def now(**config: str) -> dict[str, str]:
        return fingerprints(cell.model_copy(update={"backbone_config": config}))

    cell = Cell(
        method="lora",
        task="rec",
        dataset="shapes",
        dataset_config={"train_scenes": 1, "validation_scenes": 1, "test_scenes": 1},
        backbone="tiny",
    )
    builtin = now()
    assert builtin.keys() == PARTS | {"data", "weights"}
    copy = tmp_path / "copy.safetensors"
    content = (ASSETS / Tiny.Config().weights).read_bytes()
    copy.write_bytes(content)
    assert now(weights=str(copy)) == builtin
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert now(weights=str(copy))["weights"] != builtin["weights"] != now(weights="none")["weights"]
    copy.unlink()
    with pytest.raises(UserError, match=r"copy\.safetensors"):
        now(weights=str(copy))
    other = cell.model_copy(update={"dataset_config": {**cell.dataset_config, "seed": 1}})
    assert changed(make_record(fingerprints=builtin), fingerprints(other)) == ("data",)


def test_what_changed_is_named_and_what_was_never_recorded_has_changed() -> None:
    record = make_record(fingerprints={"method": "a", "task": "b", "data": "c"})
    assert changed(record, {"method": "a", "task": "b"}) == ()
    assert changed(record, {"method": "x", "task": "b", "weights": "d"}) == ("method", "weights")


def test_the_cells_of_a_run_open_each_source_once_and_get_what_each_would_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from petlbench import assembly

    opened: list[str] = []
    real = assembly.load_source
    monkeypatch.setattr(assembly, "load_source", lambda cell, root: (opened.append(cell.dataset), real(cell, root))[1])
    small = {"train_scenes": 24, "validation_scenes": 12, "test_scenes": 12}
    cells = [
        CELL.model_copy(update={"task": task, "dataset": dataset, "dataset_config": small})
        for task in ("rec", "vqa")
        for dataset in ("digits", "shapes")
    ]
    found = fingerprints_of(cells, None)
    assert opened == ["digits", "shapes"]
    assert found == {cell.id: fingerprints(cell) for cell in cells}
