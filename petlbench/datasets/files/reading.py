"""Read annotation files whole and fast: validated JSON, or an error of one line that names the file."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from petlbench.core.errors import UserError
from petlbench.core.gc_pause import collector_paused

T = TypeVar("T")


def read_bytes(path: Path) -> bytes:
    """Return the content of a file. Raise UserError with its name if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; get the file again") from None


def read_json(path: Path, adapter: TypeAdapter[T]) -> T:
    """Return the file's content as `adapter` describes it: typed dicts keep only the keys that are used.

    Raise UserError with the file, the place in it and the reason if the file cannot be read, is truncated, is not JSON
    or holds something else.
    """
    data = read_bytes(path)
    try:
        with collector_paused():
            return adapter.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    message = " ".join(first["msg"].split())
    raise UserError(
        f"{path} is truncated or malformed ({': '.join(filter(None, [place, message]))}): get the file again"
    )


def refuse_repeats(identifiers: Sequence[Hashable], what: str, path: Path) -> None:
    """Raise UserError with the first identifier that `path` gives twice."""
    if len(set(identifiers)) == len(identifiers):
        return
    seen: set[Hashable] = set()
    for identifier in identifiers:
        if identifier in seen:
            raise UserError(f"{path} has {what} {identifier} twice: get the file again")
        seen.add(identifier)


def find_below(root: Path, folders: Iterable[str], name: str) -> Path | None:
    """Return the first file of this name in the folders below the root, or None."""
    return next((path for folder in folders if (path := root / folder / name).is_file()), None)
