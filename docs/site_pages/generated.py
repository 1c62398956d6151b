"""What pages can have generated, by the name in a marker: a line `<!-- generated: NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from site_pages import cards, command_line, schemas

MARKER = re.compile(r"^<!-- generated: ([\w ]+) -->$", re.MULTILINE)
ROOT = Path(__file__).resolve().parents[2]


def changelog() -> str:
    """The changelog without its heading, which the page has."""
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("\n")[2]


GENERATED: dict[str, Callable[[], str]] = {
    **schemas.PAGES,
    "command line": command_line.reference,
    "method cards": cards.cards,
    "changelog": changelog,
}
