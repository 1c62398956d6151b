"""Write packages of source code to disk for tests, which never import them."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Mapping
from pathlib import Path

from petlbench.core.source_code import closure, files, names, scopes, silence, text

CACHED = [
    value
    for module in (closure, files, names, scopes, silence, text)
    for value in vars(module).values()
    if hasattr(value, "cache_clear")
]


def forget() -> None:
    """Clear all caches of source files, so that changed files are read again."""
    for cached in CACHED:
        cached.cache_clear()
    importlib.invalidate_caches()


def write(folder: Path, files: Mapping[str, str]) -> None:
    """Write `{"a/b": source}` as files, in place of all Python files in the folder."""
    for path in folder.rglob("*.py"):
        path.unlink()
    for name, source in {"__init__": "", **files}.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    forget()
