"""Find source files as the import system does, and read them without importing anything."""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from petlbench.core.errors import UserError


@dataclass(frozen=True)
class ModulePlace:
    """The location of a module: its file (None: a package without `__init__`), and the folders of a package."""

    file: Path | None
    folders: tuple[str, ...] | None


@cache
def place_of(name: str) -> ModulePlace | None:
    """Return where the import system would find `name`; unlike importlib's `find_spec`, import no parent package."""
    parent, _, tail = name.rpartition(".")
    package = place_of(parent) if parent else None
    if parent and (package is None or package.folders is None):
        return None
    path = list(package.folders) if package and package.folders is not None else None
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
            folders = spec and spec.submodule_search_locations and tuple(spec.submodule_search_locations)
        except KeyError:  # a namespace package inside a package asks for its parent, which is not imported
            continue
        if spec is not None:
            return ModulePlace(Path(spec.origin) if spec.origin and spec.has_location else None, folders or None)
    inside = tuple(joined for folder in path or () if os.path.isdir(joined := os.path.join(folder, tail)))
    return ModulePlace(None, inside) if inside else None


@cache
def read_module(name: str) -> ast.Module | bytes | None:
    """Return the syntax tree of a module, the bytes of a compiled one, or None if there is no module with code.

    Raises UserError if the file is missing or is not valid Python.
    """
    place = place_of(name)
    if place is None or place.file is None:
        return None
    try:
        data = place.file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {place.file}: {error.strerror or error}; reinstall its distribution") from error
    if place.file.suffix != ".py":
        return data
    try:
        return ast.parse(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f" line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"{place.file}{line} is not valid Python ({reason}): fix or uninstall it") from error
