"""Files of source code: found as the import system finds them, and read; nothing is imported."""

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
    """Where a module lies: its file (None: a package without `__init__`), and a package's folders."""

    file: Path | None
    folders: tuple[str, ...] | None


@cache
def place_of(name: str) -> ModulePlace | None:
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
            return ModulePlace(Path(spec.origin) if spec.origin and spec.has_location else None, folders or None)
    inside = tuple(joined for folder in path or () if os.path.isdir(joined := os.path.join(folder, tail)))
    return ModulePlace(None, inside) if inside else None


@cache
def read_module(name: str) -> ast.Module | bytes | None:
    """The syntax tree of a module; the content of a file that is no source; None for what is no module with code.

    Raises UserError for a file that is missing or no valid Python.
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
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"{place.file}{line} is not valid Python ({said}): mend or uninstall it") from error
