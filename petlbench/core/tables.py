"""The look that tables in a terminal share."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def plain_table(columns: Iterable[str], numbers: Container[str], *, wrap: bool = False) -> Table:
    """Return a table with nothing but a line below its heads. The columns `numbers` stand right, in one line.

    `wrap` lets numbers wrap too: for cells that hold a remark beside the number.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in columns:
        if name in numbers:
            table.add_column(name, justify="right", no_wrap=not wrap)
        else:
            table.add_column(name, overflow="fold")
    return table
