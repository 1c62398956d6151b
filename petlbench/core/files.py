"""Write files atomically, and compute digests of their content."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from petlbench.core.errors import Unwritable, UserError


def content_digest(path: Path) -> str:
    """Return the SHA-256 of the content in hex; compute it again only if the file's size or time has changed.

    Raises UserError if the file cannot be read.
    """
    try:
        status = path.stat()
        return _content_digest(path.absolute(), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; get the file again") from None


@cache
def _content_digest(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the block a temporary file to write; when the block ends well, that file takes the place of `path`.

    So `path` holds either its old content or all of the new one. The temporary name is unique, so that several
    processes can write the same path: the last one wins. Raises Unwritable when the disk is full, the folder cannot be
    written, or the name is too long.
    """
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise Unwritable(
            f"cannot write {path}: {error.strerror or error}; free some space there or choose another folder"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the content of `path` by `data` as `replacing` does. Raises Unwritable as it does."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def make_folder(path: Path) -> None:
    """Create `path` and its parents. Raises Unwritable if the folder cannot be written to, or its disk is full."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{uuid.uuid4().hex}.tmp"
        try:
            probe.write_bytes(bytes(4096))  # an empty file fits on a full disk
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise Unwritable(
            f"cannot write to folder {path}: {error.strerror or error}; choose another folder or its permissions"
        ) from error
