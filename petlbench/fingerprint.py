"""What a result depends on, as digests: a record whose code, data or weights have changed since is stale.

Code is read, never run: a fingerprint costs no import of torch, and a plug-in that cannot be imported still has one.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petlbench.datasets.reading import content_digest
from petlbench.errors import UserError
from petlbench.registry import BACKBONES, DATASETS, METHODS, TASKS
from petlbench.spec import Cell, Record

if TYPE_CHECKING:
    from petlbench.datasets.base import Source

CORE = "petlbench"
TRAINING = "petlbench.runner"  # where the code that trains, evaluates and measures every cell starts
DIGITS = 16


@dataclass(frozen=True)
class Place:
    """Where a module lies: its file (None: a package without `__init__`), and a package's folders."""

    file: Path | None
    folders: tuple[str, ...] | None


@dataclass(frozen=True)
class Module:
    """The digest of a module's code, and the names that it may import."""

    digest: str
    imports: tuple[str, ...]


def code_fingerprints(cell: Cell) -> dict[str, str]:
    """Digests of the code of `cell`'s method, task, metric, backbone and source, and of `training`.

    Each covers the module of the registered class and all that it imports of petlbench and of its own distribution's
    top-level package. Comments, docstrings and formatting do not count. Every file is read once per process.
    Raises UserError for a name that is not registered, and for a file that is missing or no valid Python.
    """
    starts = {
        "method": METHODS.target(cell.method),
        "task": TASKS.target(cell.task),
        "backbone": BACKBONES.target(cell.backbone),
        "source": DATASETS.target(cell.dataset),
        "training": TRAINING,
    }
    modules = {part: dict(closure(target.partition(":")[0].strip())) for part, target in starts.items()}
    task = modules["task"]
    metrics = {name: digest for name, digest in task.items() if "metrics" in name.split(".")}
    own = TASKS.target(cell.task).partition(":")[0].strip()
    modules["metric"] = metrics or {own: task[own]}
    return {part: _digest(f"{name} {digest}" for name, digest in found.items()) for part, found in modules.items()}


def fingerprints(cell: Cell, data_root: Path | None = None, source: Source | None = None) -> dict[str, str]:
    """`code_fingerprints`, and digests of the `data` and of the backbone's `weights` files. Imports torch.

    `source`: the cell's, where it is at hand, as a source keeps the digest of its data.
    Raises UserError as `code_fingerprints` does, and for data or weights that cannot be read.
    """
    from petlbench.assembly import load_source

    source = source or load_source(cell, data_root)
    backbone: Any = BACKBONES.get(cell.backbone)
    files = backbone.files(backbone.configured(cell.backbone, cell.backbone_config))
    return {
        **code_fingerprints(cell),
        "data": source.fingerprint(cell.task),
        "weights": _digest(map(content_digest, files)),
    }


def changed(record: Record, now: Mapping[str, str]) -> tuple[str, ...]:
    """The parts of `now` that differ from `record`'s fingerprints or are missing there; none: the record is fresh."""
    return tuple(part for part, digest in now.items() if record.fingerprints.get(part) != digest)


@cache
def closure(start: str) -> tuple[tuple[str, str], ...]:
    """(module, digest of its code), by name: `start` and all it imports within petlbench and its top-level package."""
    if _module(start) is None:
        raise UserError(f"module {start}, which an entry point names, has no file: mend or reinstall its distribution")
    projects = {CORE, start.partition(".")[0]}
    found: dict[str, str] = {}
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in seen or name.partition(".")[0] not in projects:
            continue
        seen.add(name)
        waiting.append(name.rpartition(".")[0])  # importing a.b.c runs a and a.b too
        if module := _module(name):
            found[name] = module.digest
            waiting.extend(module.imports)
    return tuple(sorted(found.items()))


@cache
def _module(name: str) -> Module | None:
    """None for what is no module with code: an attribute, a name that does not exist, or a namespace package."""
    place = place_of(name)
    if place is None or place.file is None:
        return None
    try:
        data = place.file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {place.file}: {error.strerror or error}; reinstall its distribution") from error
    if place.file.suffix != ".py":  # compiled code is what it is
        return Module(_digest([data.hex()]), ())
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f" line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"{place.file}{line} is not valid Python ({said}): mend or uninstall it") from error
    package = name if place.folders is not None else name.rpartition(".")[0]
    return Module(_digest(_normalised(tree)), tuple(_imports(tree, package)))


@cache
def place_of(name: str) -> Place | None:
    """Where the import system would find `name`, without importing its parents as `find_spec` of importlib does."""
    parent, _, tail = name.rpartition(".")
    above = place_of(parent) if parent else None
    if parent and (above is None or above.folders is None):
        return None
    path = list(above.folders) if above and above.folders is not None else None
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
            folders = spec and spec.submodule_search_locations and tuple(spec.submodule_search_locations)
        except KeyError:  # a namespace package inside a package asks for its parent, which is not imported
            continue
        if spec is not None:
            return Place(Path(spec.origin) if spec.origin and spec.has_location else None, folders or None)
    inside = tuple(joined for folder in path or () if os.path.isdir(joined := os.path.join(folder, tail)))
    return Place(None, inside) if inside else None


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Absolute names of what the code imports when it runs, wherever the statement stands.

    Of `from a import b` both `a` and `a.b`, as `b` may be a module; what only a type checker sees is left out.
    """
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                base = resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # above the top-level package: importing it fails too
                continue
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            stack.extend(node.orelse)
        else:
            stack.extend(ast.iter_child_nodes(node))


def _is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def _normalised(tree: ast.AST) -> Iterator[str]:
    """The syntax tree as text that is the same for every Python: node names, and the fields that are not empty.

    `ast.dump` prints empty fields in some versions, and new versions add fields; `ast.unparse` changes its quoting;
    tokens cut f-strings differently and keep formatting. Strings that stand as statements (docstrings) and `pass`,
    which such a string can replace, are left out. A stack, as long sums nest deeper than Python recurses.
    """
    stack: list[Any] = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
            continue
        parts: list[Any] = []
        if isinstance(item, list):
            parts += ["[", *(_part(child) for child in item if not _is_mute(child)), "]"]
        else:
            parts.append(f"{type(item).__name__}(")
            for name in sorted(set(item._fields) - {"kind"}):  # the u of u"text"
                value = getattr(item, name, None)
                if (
                    isinstance(item, ast.JoinedStr) and value
                ):  # Python 3.12 leaves empty pieces around some replacements
                    value = [piece for piece in value if getattr(piece, "value", None) != ""]
                if value is not None and value != []:
                    parts += [f"{name}=", _part(value)]
            parts.append(")")
        stack.extend(reversed(parts))


def _part(value: Any) -> Any:
    """Nodes and lists as they are; a constant as text, in ASCII, as what is printable grows with Unicode."""
    return value if isinstance(value, (ast.AST, list)) else ascii(value)


def _is_mute(node: Any) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return isinstance(node.value.value, str)
    return isinstance(node, ast.Pass)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:DIGITS]
