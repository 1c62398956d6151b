"""Images that lie in Parquet files: named by file and row, fetched when they are needed."""

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

KEPT_BYTES = 256 << 20  # of encoded images, for all threads of the process
MOST_GROUP_BYTES = 4 << 30  # of images in one row group: no copy comes near, and a hostile file must not fill memory


@contextmanager
def sound(path: Path) -> Iterator[None]:
    """What reading a damaged file ends in, as one line that names it."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, MemoryError, OverflowError) as error:
        said = " ".join(str(error).replace(str(path), "it").split())[:160] or type(error).__name__
        raise UserError(f"{path} is truncated, or no Parquet file ({said}): get the file again") from None


def metadata(path: Path) -> pq.FileMetaData:
    """The footer. Raises UserError."""
    with sound(path):
        return _metadata(path, *_stamp(path))


def stamp(path: Path) -> str:
    """What tells that a file has changed."""
    with sound(path):
        return " ".join(map(str, _stamp(path)))


def nulls(told: pq.FileMetaData, group: int, column: str) -> int:
    """How many rows of a group have no image; 0 where the file does not say."""
    for chunk in chunks(told, group):
        if chunk.path_in_schema == column and chunk.statistics is not None and chunk.statistics.has_null_count:
            return int(chunk.statistics.null_count)
    return 0


def chunks(told: pq.FileMetaData, group: int) -> Iterator[pq.ColumnChunkMetaData]:
    """The columns of a row group."""
    return map(told.row_group(group).column, range(told.num_columns))


def text_digest(path: Path) -> str:
    """A hex digest of a file but for the content of its images; the sizes of these are in the footer."""
    with sound(path):
        return _text_digest(path, *_stamp(path))


def text_chunks(told: pq.FileMetaData) -> Iterator[pq.ColumnChunkMetaData]:
    """All columns of all row groups, but for what may be images: bytes that are no text."""
    plain = [told.schema.column(i) for i in range(told.num_columns)]
    images = {c.path for c in plain if c.physical_type == "BYTE_ARRAY" and c.logical_type.type == "NONE"}
    for group in range(told.num_row_groups):
        yield from (chunk for chunk in chunks(told, group) if chunk.path_in_schema not in images)


def encoded(path: Path, column: str, row: int) -> bytes | None:
    """The bytes of the image in a row of the file, counted from its start. Raises UserError."""
    found = metadata(path)
    first = 0
    for group in range(found.num_row_groups):
        count = found.row_group(group).num_rows
        if row < first + count:
            images = _GROUPS.images(path, group, column)
            return images[row - first].as_py() if row - first < len(images) else None
        first += count
    raise UserError(f"{path} has no row {row}: get the file again")


def group_images(path: Path, group: int, column: str) -> pa.ChunkedArray:
    """All encoded images of a row group. Raises UserError."""
    import pyarrow.parquet as pq

    told = metadata(path)
    size = sum(chunk.total_uncompressed_size for chunk in chunks(told, group) if chunk.path_in_schema == column)
    if not 0 <= size <= MOST_GROUP_BYTES:
        raise UserError(f"{path} claims {size:,} bytes of images in one row group: do not trust it")
    with sound(path), pq.ParquetFile(path, metadata=told) as file:
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
    told = _metadata(path, size, mtime_ns)
    digest = hashlib.sha256(str(told.to_dict()).encode())
    with path.open("rb") as file:
        for chunk in text_chunks(told):
            file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
            digest.update(file.read(max(0, chunk.total_compressed_size)))
    return digest.hexdigest()


class _Groups:
    """The row groups that were used last: rows of one lie together, and to fetch one row is to decode its group.

    Threads that want the same group wait for one of them to read it; other groups are read at the same time.
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
