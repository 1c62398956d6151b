"""The package keeps its structure: imports go down only and form no circle, and no file or function is too long."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_FILES = {"__init__.py", "__main__.py", "py.typed"}
LINES, FUNCTION_LINES, PARAMETERS = 350, 50, 7

Sources = Mapping[str, str]  # text by path
Graph = dict[str, set[str]]  # imported modules by module

# The folders that the files of each folder may import besides one another.
MAY: Mapping[str, set[str]] = {
    "core": set(),
    "api": {"core"},
    "metrics": {"core"},
    "measure": {"core"},
    "results": {"core"},
    "backbones": {"core", "api"},
    "datasets": {"core", "api"},
    "training": {"core", "api", "measure"},
    "tasks": {"core", "api", "metrics"},
    "methods": {"core", "api", "backbones"},
    "pipeline": (RUN := {"core", "api", "measure", "results", "backbones", "datasets", "training"}),
    "adapters": (SHOWN := RUN | {"metrics", "pipeline"}),  # tasks and methods are found through registries
    "describe": SHOWN,
    "conformance": SHOWN,
    "__init__": (PUBLIC := SHOWN | {"adapters", "describe", "conformance"}),
    "commands": PUBLIC | {"__init__"},
    "__main__": {"commands"},
}


def sources(root: Path) -> dict[str, str]:
    """Read all source files of the package by their paths in the repository."""
    paths = [path for top in ("petlbench", "methods", "tasks") for path in sorted((root / top).rglob("*.py"))]
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def module(path: str) -> str:
    """Return the module name of a file."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.split(".")[0] == "petlbench" else f"petlbench.{name}"


def folder(name: str) -> str:
    """Return the folder of a module, or its file name if it is at the top."""
    return [*name.split("."), "__init__"][1]


@cache
def named(path: str, text: str) -> frozenset[str]:
    """Return all names that a file imports, also in functions and under TYPE_CHECKING."""
    package = module(path) if path.endswith("__init__.py") else module(path).rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom():
                base = resolve_name("." * node.level + (node.module or ""), package)
                found |= {f"{base}.{alias.name}" for alias in node.names}
            case ast.Call(
                func=ast.Name("import_module") | ast.Attribute(attr="import_module"), args=[ast.Constant(str(name)), *_]
            ):
                found.add(name)
    return frozenset(found)


def imports(files: Sources) -> Graph:
    """Return the modules of the package that each module imports."""
    graph: Graph = {module(path): set() for path in files}
    for path, text in files.items():
        for name in named(path, text):
            while name and name not in graph:
                name = name.rpartition(".")[0]
            graph[module(path)] |= {name} - {"", module(path)}
    return graph


def arrows(graph: Graph) -> list[str]:
    """Return the imports that the table does not allow."""
    return [
        f"{a} imports {b}"
        for a, found in sorted(graph.items())
        for b in sorted(found)
        if folder(a) != folder(b) and folder(b) not in MAY.get(folder(a), set())
    ]


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return a circle of imports, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def rooms(graph: Graph) -> Graph:
    """Merge each sub-folder into one node, which imports everything that its files import."""
    packages = {name.rpartition(".")[0] for name in graph}
    inner = {name: ".".join(name.split(".")[:3]) for name in graph}
    inner = {name: at if at in packages else name for name, at in inner.items()}
    found: Graph = {at: set() for at in inner.values()}
    for name, others in graph.items():
        found[inner[name]] |= {inner[other] for other in others} - {inner[name]}
    return found


def public(files: Sources) -> set[str]:
    """Return the public names of `petlbench`."""
    for node in ast.walk(ast.parse(files["petlbench/__init__.py"])):
        match node:
            case (
                ast.Assign(targets=[ast.Name("__all__")], value=ast.expr() as value)
                | ast.AnnAssign(target=ast.Name("__all__"), value=ast.expr() as value)
            ):
                return set(ast.literal_eval(value))
    raise AssertionError("petlbench/__init__.py has no __all__ that can be read")


def functions(text: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Yield each function, and whether it is in a class."""
    tree = ast.parse(text)
    methods = {child for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, node in methods


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, method: bool, offered: set[str]) -> int:
    """Count parameters without `self` or `cls`, and without the options of public functions."""
    found = function.args
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
    given = len(found.posonlyargs) + len(found.args) + bool(found.vararg) - (method and not static)
    return given + (0 if function.name in offered and not method else len(found.kwonlyargs) + bool(found.kwarg))


def oversized(files: Sources) -> list[str]:
    """Return the files, functions and parameter lists that are too long."""
    found, offered = [], public(files)
    for path, text in files.items():
        if (lines := len(text.splitlines())) > LINES:
            found.append(f"{path} has {lines} lines")
        for function, method in functions(text):
            where = f"{path}:{function.lineno} {function.name}"
            if (lines := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES:
                found.append(f"{where} has {lines} lines")
            if (count := parameters(function, method, offered)) > PARAMETERS:
                found.append(f"{where} has {count} parameters")
    return found


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return sources(ROOT)


def test_no_folder_imports_to_its_right(files: Sources) -> None:
    assert arrows(imports(files)) == []


def test_there_is_no_circle_between_files_or_folders(files: Sources) -> None:
    graph = imports(files)
    assert (circle(graph), circle(rooms(graph)), circle(MAY)) == ([], [], [])


def test_the_top_is_a_few_folders_and_three_files() -> None:
    entries = [path for path in (ROOT / "petlbench").iterdir() if path.name != "__pycache__"]
    assert {path.name for path in entries if path.is_file()} == TOP_FILES
    assert {path.name for path in entries if path.is_dir()} <= MAY.keys() - {"tasks", "methods"}


def test_no_folder_has_the_name_of_what_the_package_offers(files: Sources) -> None:
    assert public(files) & MAY.keys() == set()


def test_nothing_is_too_large(files: Sources) -> None:
    assert oversized(files) == []


def with_line(files: Sources, name: str, line: str) -> dict[str, str]:
    """Return the files with one line added to the named file, or to a folder's first file that is not `__init__`."""
    path = next(path for path in files if path.startswith(name) and not path.endswith("__init__.py"))
    return {**files, path: f"{files[path]}\n{line}\n"}


LAZILY = "def later() -> None:\n    {}"
FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}"


@pytest.mark.parametrize("way", ["{}", LAZILY, FOR_TYPES], ids=["at once", "lazily", "for types"])
@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("petlbench/core/", "import petlbench.commands.main", "imports petlbench.commands.main"),
        ("petlbench/measure/", "from ..pipeline import cell", "imports petlbench.pipeline.cell"),
        ("petlbench/results/", "from petlbench.metrics import *", "imports petlbench.metrics"),
        ("petlbench/pipeline/", "from petlbench.methods.lora import LoRA", "imports petlbench.methods.lora"),
        ("methods/", "from ..tasks.vqa import VisualQuestionAnswering", "imports petlbench.tasks.vqa"),
        ("petlbench/api/", "from petlbench.backbones.tiny import Tiny", "imports petlbench.backbones.tiny"),
        ("petlbench/training/", "from petlbench import run", "imports petlbench"),
    ],
)
def test_one_import_to_the_right_is_found(files: Sources, way: str, name: str, line: str, message: str) -> None:
    (found,) = arrows(imports(with_line(files, name, way.format(line))))
    assert found.endswith(message)


@pytest.mark.parametrize("way", ["{}", LAZILY, FOR_TYPES], ids=["at once", "lazily", "for types"])
def test_one_circle_is_found(files: Sources, way: str) -> None:
    graph = imports(files)
    below, above = next(
        (below, above) for above in sorted(graph) for below in sorted(graph[above]) if folder(above) == folder(below)
    )
    (path,) = (path for path in files if module(path) == below)
    found = circle(imports({**files, path: files[path] + "\n" + way.format(f"import {above}") + "\n"}))
    assert {below, above} <= set(found)


def test_a_circle_between_inner_folders_is_found() -> None:
    tree = {
        "petlbench/datasets/files/reader.py": "from ..hub import columns",
        "petlbench/datasets/hub/columns.py": "",
        "petlbench/datasets/hub/rows.py": "from petlbench.datasets.files.images import opened",
        "petlbench/datasets/files/images.py": "",
    }
    graph = imports(tree)
    assert circle(graph) == []
    assert set(circle(rooms(graph))) == {"petlbench.datasets.files", "petlbench.datasets.hub"}


def test_what_is_too_large_is_found() -> None:
    tree = {
        "petlbench/__init__.py": '__all__ = ["run"]',
        "petlbench/pipeline/run.py": "def run(a, *, b, c, d, e, f, g, h): pass",
        "petlbench/pipeline/cell.py": "def run_cell(a, *, b, c, d, e, f, g, h): pass",
        "methods/lora.py": "class LoRA:\n    def __init__(self, a, b, c, d, e, f, g): pass",
        "tasks/vqa.py": "\n" * 351,
        "tasks/rec.py": "def collate():\n" + "    pass\n" * 50,
    }
    assert oversized(tree) == [
        "petlbench/pipeline/cell.py:1 run_cell has 8 parameters",
        "tasks/vqa.py has 351 lines",
        "tasks/rec.py:1 collate has 51 lines",
    ]
