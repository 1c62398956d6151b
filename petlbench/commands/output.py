"""Print tables and read JSON options, for several verbs."""

from __future__ import annotations

import json
import sys
from typing import Any

from petlbench.core.errors import UserError


def json_object(text: str | None, example: str) -> dict[str, Any]:
    """Parse the value of --config; without one, return an empty dict."""
    try:
        config = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config is not JSON ({error}): give an object such as '{example}'") from error
    if not isinstance(config, dict):
        raise UserError(f"--config must be a JSON object such as '{example}'")
    return config


def print_table(table: Any) -> None:
    """Print a rich table; at its full width if the output is not a terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else Console(width=10_000).measure(table).maximum
    Console(width=width).print(table)
