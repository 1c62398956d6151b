"""Cache tables on disk. A table is kept whole or not at all; a failed write is no error, as tables can be remade."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petlbench.core.errors import Unwritable
from petlbench.core.files import replacing

if TYPE_CHECKING:
    import pyarrow as pa

# Write no statistics, because checksums cover pages only.
SOUND: dict[str, Any] = {"write_page_checksum": True, "write_statistics": False}


def read_table(path: Path) -> pa.Table | None:
    """Return the table, or None if it is missing, truncated or damaged (its pages have checksums)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, page_checksum_verification=True, partitioning=None)
    except (OSError, pa.ArrowException):
        return None


def write_table(table: pa.Table, path: Path, **options: Any) -> None:
    """Write a table; processes that race write the same content. `options` go to pyarrow's `write_table`."""
    import pyarrow.parquet as pq

    with suppress(OSError, Unwritable):  # the cache is a convenience: read-only or full disks must not stop a run
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            pq.write_table(table, temporary, **SOUND, **options)
