"""Show the report on a data set in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from petlbench.core.tables import plain_table
from petlbench.describe.dataset import DatasetPart, DatasetReport

if TYPE_CHECKING:
    from rich.console import Group

SHOWN = 5  # faulty images named for each part


def dataset_table(report: DatasetReport) -> Group:
    """Return a table with a line for each part and split; errors, faulty images and notes follow below."""
    from rich.console import Group
    from rich.text import Text

    entries = report.entries
    columns = list(dict.fromkeys(what for entry in entries for what in entry.counts))
    parted = any(entry.made_of for entry in entries)
    numbers = [*columns, "left out", "opened"]
    table = plain_table(["part", *(["made of"] if parted else []), *numbers, "verdict"], numbers, wrap=True)
    for entry in entries:
        sizes = [_size(entry, what) for what in columns]
        left_out = f"{sum(entry.left_out.values()):,}" if entry.left_out else ""
        opened = f"{entry.opened:,}" if entry.opened else ""
        verdict = entry.verdict + ("" if entry.needed else " (not needed)")
        name = f"split {entry.name}" if entry.made_of else entry.name
        texts = [name, *([entry.made_of] if parted else []), *sizes, left_out, opened, verdict]
        table.add_row(*map(Text, texts), style="" if entry.ok else "bold red" if entry.needed else "dim")
    heading = Text(f"{report.task}:{report.dataset}", style="italic")
    return Group(heading, table, *(Text(line, overflow="fold") for line in _messages(report)))


def _size(entry: DatasetPart, what: str) -> str:
    if what not in entry.counts:
        return ""
    published = f" (published {entry.published[what]:,})" if what in entry.differing else ""
    return f"{entry.counts[what]:,}{published}"


def _messages(report: DatasetReport) -> Iterator[str]:
    """Yield each error once, with its parts; then faulty images, the data set's notes and its origin."""
    errors: dict[str, list[str]] = {}
    for entry in report.entries:
        if entry.error:
            errors.setdefault(entry.error, []).append(entry.name)
    for error, names in errors.items():
        yield f"{', '.join(dict.fromkeys(names))}: {error}"
    for entry in report.entries:
        for number, (image, reason) in enumerate(entry.faults.items()):
            if number == SHOWN:
                yield f"{entry.name}: and {len(entry.faults) - SHOWN:,} more: --json lists all"
                break
            yield f"{entry.name}: {reason if image in reason else f'{image}: {reason}'}"
    yield from report.notes
    if report.origin and any(entry.faults for entry in report.entries):
        yield f"to fix it: {report.origin}"
