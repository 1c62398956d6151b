"""The store of results: one JSON per cell, written atomically; folders can be merged. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import UserError
from .spec import SCHEMA_VERSION, Cell, Record

FOLDERS = ("records", "samples", "adapters")


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new one.

    The temporary name is unique, so that several processes can write the same path: the last one wins.
    Raises UserError when the disk is full, the folder cannot be written, or the name is too long.
    """
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space there or choose another folder"
        ) from error


def make_folder(path: Path) -> None:
    """Create `path` and its parents. Raises UserError when that is impossible or the folder cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{uuid.uuid4().hex}.tmp"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to folder {path}: {error.strerror or error}; choose another folder or its permissions"
        ) from error


class Store:
    """A results folder: `records/ID.json`, `samples/ID.json` and `adapters/ID.safetensors`, ID being `Cell.id`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records, self.sample_scores, self.adapters = (root / name for name in FOLDERS)

    @classmethod
    def open(cls, root: Path | str, create: bool) -> Store:
        """The store at `root`. Raises UserError when it is no results folder, or, with `create`, cannot be written."""
        root = Path(root)
        if root.exists() and not root.is_dir():
            raise UserError(f"{root} is a file, not a results folder; name a folder")
        store = cls(root)
        if create:
            for folder in (store.records, store.sample_scores, store.adapters):
                make_folder(folder)
        elif not root.exists():
            raise UserError(f"no results folder at {root}; check the path, or run a suite to create it")
        elif not store.records.is_dir():
            raise UserError(f"{root} is not a results folder (it holds no folder `records`); check the path")
        return store

    def save(self, record: Record, samples: dict[str, Any] | None = None) -> Record:
        """Keep `record`, replacing an earlier one of the same cell, and return it as saved.

        `samples` is {"metric": name, "sample_ids": [n], "scores": {metric: [n floats]}, "predictions": [n]}; it is
        written first, so that a record never points to a file that is not there. Raises UserError on a full disk.
        """
        name = f"{record.cell.id}.json"
        if samples is not None:
            write_atomic(self.sample_scores / name, _to_json(samples))
        saved = record.model_copy(update={"samples": name if samples is not None else None})
        write_atomic(self.records / name, _to_json(saved.model_dump(mode="json")))
        return saved

    def load(self) -> list[Record]:
        """All records, by file name. Raises UserError naming the file that is truncated, invalid or too new."""
        # Names with a leading dot are not ours: editors and file systems leave them behind.
        paths = sorted(p for p in self.records.glob("*.json") if not p.name.startswith("."))
        return [_read_record(path) for path in paths]

    def get(self, cell: Cell) -> Record | None:
        """The record of `cell`, or None when it has not been run."""
        path = self.records / f"{cell.id}.json"
        return _read_record(path) if path.exists() else None

    def samples(self, record: Record) -> dict[str, Any] | None:
        """What was saved beside `record`; None when nothing was. Raises UserError for a missing or damaged file."""
        if record.samples is None:
            return None
        # Only the name counts: a record from elsewhere must not point outside its folder.
        path = self.sample_scores / Path(record.samples).name
        content = _read_json(path, f"rerun the cell {record.cell.label}")
        if not isinstance(content.get("sample_ids"), list) or not isinstance(content.get("scores"), dict):
            raise UserError(f"{path} holds no `sample_ids` and `scores`; rerun the cell {record.cell.label}")
        return content


class Merged:
    """Several stores read as one; of two records of the same cell the one that started later counts."""

    def __init__(self, stores: Iterable[Store]) -> None:
        self._homes: dict[str, tuple[Record, Store]] = {}
        for store in stores:
            for record in store.load():
                known = self._homes.get(record.cell.id)
                if known is None or record.started > known[0].started:
                    self._homes[record.cell.id] = (record, store)

    def load(self) -> list[Record]:
        """One record per cell, by cell id."""
        return [self._homes[key][0] for key in sorted(self._homes)]

    def get(self, cell: Cell) -> Record | None:
        """The record of `cell`, or None when no store holds it."""
        home = self._homes.get(cell.id)
        return home[0] if home else None

    def samples(self, record: Record) -> dict[str, Any] | None:
        """As Store.samples, from the store that holds `record`."""
        home = self._homes.get(record.cell.id)
        return home[1].samples(record) if home else None


def find(roots: Sequence[Path | str]) -> Merged:
    """The results folders at `roots`, merged. Raises UserError for a root that is not one."""
    return Merged([Store.open(root, create=False) for root in roots])


def _to_json(value: Any) -> bytes:
    return (json.dumps(_strict(value), allow_nan=False, ensure_ascii=False, indent=1) + "\n").encode()


def _strict(value: Any) -> Any:
    """NaN and infinities as the strings that pydantic and numpy read back: JSON has no literal for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is truncated or not JSON; {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object; {remedy}")
    return content


def _read_record(path: Path) -> Record:
    remedy = "delete it and rerun its cell"
    content = _read_json(path, remedy)
    version = content.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}, newer than {SCHEMA_VERSION}: upgrade petlbench, or leave it out"
        )
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "record"
        raise UserError(f"{path} is not a valid record ({where}: {first['msg']}); {remedy}") from error
