"""Packages of source code written to disk for tests, of which nothing is imported."""

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
    """Files are read once per process: after a change, again."""
    for cached in CACHED:
        cached.cache_clear()
    importlib.invalidate_caches()


def write(folder: Path, files: Mapping[str, str]) -> None:
    """`{"a/b": source}` as files, in place of all that was there."""
    for path in folder.rglob("*.py"):
        path.unlink()
    for name, source in {"__init__": "", **files}.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    forget()
