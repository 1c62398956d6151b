"""Images inside Parquet files: named by file and row, and fetched when needed."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from petlbench.core.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

KEPT_BYTES = 256 << 20  # of encoded images in memory, for all threads of the process
MOST_GROUP_BYTES = 4 << 30  # of images in one row group: far above any copy, yet a hostile file cannot fill memory


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn the errors of reading a damaged file into a UserError of one line that names the file."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, MemoryError, OverflowError) as error:
        message = " ".join(str(error).replace(str(path), "it").split())[:160] or type(error).__name__
        raise UserError(f"{path} is truncated, or not a Parquet file ({message}): get the file again") from None


def metadata(path: Path) -> pq.FileMetaData:
    """Return the footer of a Parquet file. Raise UserError if the file is damaged."""
    with parquet_errors(path):
        return _metadata(path, *_stamp(path))


def stamp(path: Path) -> str:
    """Return a text that changes when the file changes: its size and its time of change."""
    with parquet_errors(path):
        return " ".join(map(str, _stamp(path)))


def nulls(footer: pq.FileMetaData, group: int, column: str) -> int:
    """Return how many rows of a group have no image; 0 if the file does not say."""
    for chunk in chunks(footer, group):
        if chunk.path_in_schema == column and chunk.statistics is not None and chunk.statistics.has_null_count:
            return int(chunk.statistics.null_count)
    return 0


def chunks(footer: pq.FileMetaData, group: int) -> Iterator[pq.ColumnChunkMetaData]:
    """Return the column chunks of a row group."""
    return map(footer.row_group(group).column, range(footer.num_columns))


def text_digest(path: Path) -> str:
    """Return a hex digest of a file without the content of its images; the footer has their sizes."""
    with parquet_errors(path):
        return _text_digest(path, *_stamp(path))


def text_chunks(footer: pq.FileMetaData) -> Iterator[pq.ColumnChunkMetaData]:
    """Yield all column chunks of all row groups, except possible images: bytes that are not text."""
    plain = [footer.schema.column(i) for i in range(footer.num_columns)]
    images = {c.path for c in plain if c.physical_type == "BYTE_ARRAY" and c.logical_type.type == "NONE"}
    for group in range(footer.num_row_groups):
        yield from (chunk for chunk in chunks(footer, group) if chunk.path_in_schema not in images)


def encoded(path: Path, column: str, row: int) -> bytes | None:
    """Return the bytes of the image in a row, counted from the file's start. Raise UserError if the row is absent."""
    footer = metadata(path)
    first = 0
    for group in range(footer.num_row_groups):
        count = footer.row_group(group).num_rows
        if row < first + count:
            images = _GROUPS.images(path, group, column)
            return images[row - first].as_py() if row - first < len(images) else None
        first += count
    raise UserError(f"{path} has no row {row}: get the file again")


def group_images(path: Path, group: int, column: str) -> pa.ChunkedArray:
    """Return all encoded images of a row group. Raise UserError if they are too large or damaged."""
    import pyarrow.parquet as pq

    footer = metadata(path)
    size = sum(chunk.total_uncompressed_size for chunk in chunks(footer, group) if chunk.path_in_schema == column)
    if not 0 <= size <= MOST_GROUP_BYTES:
        raise UserError(f"{path} claims {size:,} bytes of images in one row group: do not trust it")
    with parquet_errors(path), pq.ParquetFile(path, metadata=footer) as file:
        table = file.read_row_group(group, columns=[column], use_threads=False)
        images = table.column(0)
        for name in column.split(".")[1:]:
            images = images.flatten()[images.type.get_field_index(name)]
        return images


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1024)
def _metadata(path: Path, size: int, mtime_ns: int) -> pq.FileMetaData:
    import pyarrow.parquet as pq

    return pq.read_metadata(path)


@lru_cache(maxsize=1024)
def _text_digest(path: Path, size: int, mtime_ns: int) -> str:
    footer = _metadata(path, size, mtime_ns)
    digest = hashlib.sha256(str(footer.to_dict()).encode())
    with path.open("rb") as file:
        for chunk in text_chunks(footer):
            file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
            digest.update(file.read(max(0, chunk.total_compressed_size)))
    return digest.hexdigest()


class _Groups:
    """A cache of the row groups used last: fetching one row decodes its group, and rows are often taken in order.

    Threads that want the same group wait while one of them reads it; other groups are read at the same time.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[tuple[Path, str, int, str], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()
        self._reading = [threading.Lock() for _ in range(16)]

    def images(self, path: Path, group: int, column: str) -> pa.ChunkedArray:
        key = (path, stamp(path), group, column)
        with self._reading[hash(key) % len(self._reading)]:
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
            read = group_images(path, group, column)
            with self._lock:
                self._kept[key] = read
                while len(self._kept) > 1 and sum(images.nbytes for images in self._kept.values()) > self._most_bytes:
                    self._kept.popitem(last=False)
            return read


_GROUPS = _Groups(KEPT_BYTES)
