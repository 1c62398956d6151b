"""Folders that the environment names: data, and the cache."""

from __future__ import annotations

import os
from pathlib import Path


def data_root() -> Path | None:
    """`PETLBENCH_DATA`, or None."""
    value = os.environ.get("PETLBENCH_DATA")
    return Path(value) if value else None


def cache_dir() -> Path:
    """Where what can be made anew is kept: `PETLBENCH_CACHE`, else `petlbench` in `XDG_CACHE_HOME` or `~/.cache`."""
    value = os.environ.get("PETLBENCH_CACHE")
    if value:
        return Path(value)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "petlbench"
