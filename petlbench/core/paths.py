"""The data and cache folders, which environment variables name."""

from __future__ import annotations

import os
from pathlib import Path


def data_root() -> Path | None:
    """Return the folder in `PETLBENCH_DATA`, or None."""
    value = os.environ.get("PETLBENCH_DATA")
    return Path(value) if value else None


def cache_dir() -> Path:
    """Return the folder for files that can be recomputed.

    It is `PETLBENCH_CACHE`, else `petlbench` in `XDG_CACHE_HOME` or `~/.cache`.
    """
    value = os.environ.get("PETLBENCH_CACHE")
    if value:
        return Path(value)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "petlbench"
