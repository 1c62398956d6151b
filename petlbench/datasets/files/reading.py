"""Annotation files, read whole and fast: JSON into validated columns, or an error of one line that names the file."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from petlbench.core.errors import UserError
from petlbench.core.gc_pause import collector_paused

T = TypeVar("T")


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises UserError that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; get the file again") from None


def read_json(path: Path, adapter: TypeAdapter[T]) -> T:
    """The file as `adapter` describes it: typed dicts of the keys that are used, so that nothing else is kept.

    Raises UserError with the file, the place in it and what is wrong, for a file that cannot be read, is truncated, is
    no JSON or holds something else.
    """
    data = read_bytes(path)
    try:
        with collector_paused():
            return adapter.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    said = " ".join(first["msg"].split())
    raise UserError(f"{path} is truncated or malformed ({': '.join(filter(None, [place, said]))}): get the file again")


def refuse_repeats(identifiers: Sequence[Hashable], what: str, path: Path) -> None:
    """Raise UserError that names the first identifier that `path` gives twice."""
    if len(set(identifiers)) == len(identifiers):
        return
    seen: set[Hashable] = set()
    for identifier in identifiers:
        if identifier in seen:
            raise UserError(f"{path} has {what} {identifier} twice: get the file again")
        seen.add(identifier)


def found_below(root: Path, folders: Iterable[str], name: str) -> Path | None:
    """The first of the folders' files of this name."""
    return next((path for folder in folders if (path := root / folder / name).is_file()), None)
