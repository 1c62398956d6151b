"""Store results: one JSON file per cell, written atomically; several folders can be merged. Imports no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from petlbench.core.cell import Cell
from petlbench.core.errors import UserError
from petlbench.core.files import make_folder, write_atomic
from petlbench.core.gc_pause import collector_paused
from petlbench.core.record import SCHEMA_VERSION, Record
from petlbench.results.upgrade import STEPS, former_ids, may_name, upgraded, without

FOLDERS = ("records", "samples", "adapters", "checkpoints", "logs", "claims", "cache")

Rank = tuple[str, bool]


class Damaged(UserError):
    """An unusable file in a results folder. `reason` continues the file's name, such as "is truncated"."""

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(f"{path} {reason}; {remedy}")
        self.path, self.reason = path, reason


class Store:
    """A results folder: `records/ID.json`, `samples/ID.json` and `adapters/ID.safetensors`, ID being `Cell.id`.

    Files keep the names that they got by earlier rules for ids. Of two records of one cell the later one counts.
    The folders `checkpoints`, `logs` and `claims` serve running cells only; `cache` can be rebuilt.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records, self.sample_scores, self.adapters = (root / name for name in FOLDERS[:3])
        self.checkpoints, self.logs, self.claims, self.cache = (root / name for name in FOLDERS[3:])

    @classmethod
    def open(cls, root: Path | str, create: bool) -> Store:
        """Open the store at `root`. Raise UserError if it is no results folder or, with `create`, cannot be written."""
        root = Path(root)
        if root.exists() and not root.is_dir():
            raise UserError(f"{root} is a file, not a results folder; name a folder")
        store = cls(root)
        if create:
            for name in FOLDERS:
                make_folder(root / name)
        elif not root.exists():
            raise UserError(f"no results folder at {root}; check the path, or run a suite to create it")
        elif not store.records.is_dir():
            raise UserError(f"{root} is not a results folder (it holds no folder `records`); check the path")
        return store

    def save(self, record: Record, samples: dict[str, Any] | None = None) -> Record:
        """Save `record`, replace an earlier one of the same cell, and return it as saved.

        `samples` is {"metric": name, "sample_ids": [n], "scores": {metric: [n floats]}, "predictions": [n]}; it is
        written first, so that a record never points to a missing file. Files under an earlier id of the cell are
        removed last: a process that is killed before leaves both and loses none. Raise UserError on a full disk.
        """
        name = f"{record.cell.id}.json"
        if samples is not None:
            write_atomic(self.sample_scores / name, _to_json(samples))
        saved = record.model_copy(update={"samples": name if samples is not None else None})
        write_atomic(self.records / name, _to_json(saved.model_dump(mode="json")))
        self._remove_superseded(saved)
        return saved

    def _remove_superseded(self, record: Record) -> None:
        """Remove the files under earlier ids of the cell, unless they are another cell's, newer, or unreadable.

        A file that cannot be removed does no harm beside the later record. No process of this petlbench writes under
        an earlier id, and if another one removes the same files first, the result is the same.
        """
        for key in former_ids(record.cell):
            path = self.records / f"{key}.json"
            with suppress(UserError, OSError):
                former = read_record(path)
                if former.cell.differences(record.cell) or former.started > record.started:
                    continue
                path.unlink()  # first, so that a record never lacks its samples
                for folder, suffix in ((self.sample_scores, "json"), (self.adapters, "safetensors")):
                    (folder / f"{key}.{suffix}").unlink(missing_ok=True)
                (self.checkpoints / f"{key}.safetensors").unlink(missing_ok=True)

    def paths(self) -> list[Path]:
        """Return the files of all records, by name."""
        # Files with a leading dot come from editors and file systems, not from petlbench.
        return sorted(path for path in self.records.glob("*.json") if not path.name.startswith("."))

    def by_cell(self) -> dict[str, Record]:
        """Return the record of each cell by cell id, in the order of file names. Raise Damaged as `load` does."""
        best: dict[str, tuple[Rank, Record]] = {}
        seen: set[Path] = set()
        while new := [path for path in self.paths() if path not in seen]:
            seen.update(new)
            for path in new:
                try:
                    key, record = self._read(path)
                except Damaged:
                    if os.path.lexists(path):
                        raise
                    continue  # superseded meanwhile: the next round reads the later record
                rank = rank_of(record, key, path)
                if key not in best or rank > best[key][0]:
                    best[key] = (rank, record)
        return {key: record for key, (_, record) in best.items()}

    def load(self) -> list[Record]:
        """Return the record of each cell, by file name; records of earlier schema versions are `older`.

        Raise Damaged, a UserError with the file and the remedy, if a file is truncated, is not a record, has a newer
        schema version, or does not have its cell's name.
        """
        with collector_paused():
            return list(self.by_cell().values())

    def get(self, cell: Cell) -> Record | None:
        """Return the record of `cell`, or None if it has not been run. Raise Damaged as `load` does.

        If no file holds it but a file has its id, because a default has changed since, return that other cell's record.
        """
        matches: list[tuple[Rank, Record]] = []
        same_id = None
        for key in (*former_ids(cell), cell.id):  # in this order, as `save` writes the new file and removes the old
            path = self.records / f"{key}.json"
            if not path.exists():
                continue
            try:
                record = self._read(path)[1]
            except Damaged:
                if os.path.lexists(path):
                    raise
                continue  # superseded meanwhile
            if not cell.differences(record.cell):
                matches.append((rank_of(record, cell.id, path), record))
            elif key == cell.id:
                same_id = record
        return max(matches, key=lambda match: match[0])[1] if matches else same_id

    def _read(self, path: Path) -> tuple[str, Record]:
        """Return the cell id and the record of a file, whose name must be one that the cell has or had."""
        record = read_record(path)
        key = record.cell.id
        if path.stem == key or may_name(path.stem, record.cell):
            return key, record
        wanted = path.with_name(f"{key}.json")
        if wanted.exists():
            fault = f"is a second record of the cell of {wanted.name}", "keeps the later one and sets the other aside"
        else:
            fault = f"holds the record that belongs into {wanted.name}", "renames it"
        raise Damaged(path, fault[0], f"`petlbench repair {self.root}` {fault[1]}")

    def samples(self, record: Record) -> dict[str, Any] | None:
        """Return the samples saved with `record`, or None. Raise Damaged if their file is missing or damaged."""
        if record.samples is None:
            return None
        # Use the file name only, so that no record points outside its folder.
        path = self.sample_scores / Path(record.samples).name
        remedy = f"`petlbench repair {self.root}` sets its record aside, then rerun the cell {record.cell.label}"
        if record.older:  # never set aside
            remedy = f"rerun the cell {record.cell.label}"
        content = _read_json(path, remedy)
        ids, scores = content.get("sample_ids"), content.get("scores")
        if not isinstance(ids, list) or not isinstance(scores, dict):
            raise Damaged(path, "holds no `sample_ids` and `scores`", remedy)
        for name, values in scores.items():
            if not isinstance(values, list) or len(values) != len(ids):
                raise Damaged(path, f"does not hold one score `{name}` for each of its {len(ids)} samples", remedy)
        return content


class Merged:
    """Several stores that are read as one; of two records of a cell the one that started later counts."""

    def __init__(self, stores: Iterable[Store]) -> None:
        self.stores = list(stores)
        self._homes: dict[str, tuple[Record, Store]] = {}
        with collector_paused():
            for store in self.stores:
                for key, record in store.by_cell().items():
                    earlier = self._homes.get(key)
                    if earlier is None or record.started > earlier[0].started:
                        self._homes[key] = (record, store)

    def load(self) -> list[Record]:
        """Return one record per cell, by cell id."""
        return [self._homes[key][0] for key in sorted(self._homes)]

    def get(self, cell: Cell) -> Record | None:
        """Return the record of `cell`, or None if no store holds it."""
        home = self._homes.get(cell.id)
        return home[0] if home else None

    def samples(self, record: Record) -> dict[str, Any] | None:
        """Return the samples from the store that holds `record`, as Store.samples does."""
        home = self._homes.get(record.cell.id)
        return home[1].samples(record) if home else None


def find(roots: Sequence[Path | str]) -> Merged:
    """Open and merge the results folders at `roots`. Raise UserError if one is not a results folder."""
    return Merged([Store.open(root, create=False) for root in roots])


def _to_json(value: Any) -> bytes:
    return (json.dumps(_strict(value), allow_nan=False, ensure_ascii=False, indent=1) + "\n").encode()


def _strict(value: Any) -> Any:
    """Replace NaN and infinities by strings that pydantic and numpy read back, as JSON has no literal for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(_read_bytes(path, remedy))
    except (ValueError, RecursionError) as error:
        raise Damaged(path, "is truncated or not JSON", remedy) from error
    if not isinstance(content, dict):
        raise Damaged(path, "does not hold a JSON object", remedy)
    return content


def _read_bytes(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise Damaged(path, "is missing" if isinstance(error, FileNotFoundError) else "is a folder", remedy) from error
    except OSError as error:  # the disk or permissions are at fault, not the file
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the disk and permissions") from error


def rank_of(record: Record, key: str, path: Path) -> Rank:
    """Return the rank of a record of the cell `key`; the largest counts: the latest, of equals the one named `key`."""
    return record.started, path.stem == key


def read_record(path: Path) -> Record:
    """Read the record in a file of any name. Raise Damaged, with the reason in one line, if it holds none.

    A record of an earlier schema version is upgraded to today's form, keeps its `schema_version`, and may have keys
    that petlbench no longer uses; the file stays as it is.
    """
    remedy = f"`petlbench repair {path.parents[1]}` sets it aside; then rerun its cell"
    data = _read_bytes(path, remedy)
    with suppress(ValidationError):
        record = Record.model_validate_json(data)  # twice as fast as with json.loads
        if record.schema_version == SCHEMA_VERSION and "schema_version" in record.model_fields_set:
            return record
    content = _read_json(path, remedy)
    _check_version(path, content.get("schema_version"), remedy)
    try:
        return _validated(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "record"
        raise Damaged(path, f"is not a record of petlbench ({where}: {first['msg']})", remedy) from error


def _validated(content: dict[str, Any]) -> Record:
    """Return the record in `content`, an older one without its unknown keys. Raise ValidationError otherwise."""
    if content["schema_version"] == SCHEMA_VERSION:
        return Record.model_validate(content)
    content = upgraded(content)
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        unknown = [fault["loc"] for fault in error.errors() if fault["type"] == "extra_forbidden"]
        if not unknown:
            raise
    return Record.model_validate(without(content, unknown))


def _check_version(path: Path, version: Any, remedy: str) -> None:
    if not isinstance(version, int):
        raise Damaged(path, "is not a record of petlbench (it has no `schema_version`)", remedy)
    if version > SCHEMA_VERSION:
        remedy = f"upgrade petlbench, or `petlbench repair {path.parents[1]}` sets it aside"
        raise Damaged(path, f"has schema version {version}, newer than {SCHEMA_VERSION}", remedy)
    if version != SCHEMA_VERSION and version not in STEPS:
        raise Damaged(path, f"is not a record of petlbench (no schema version is {version})", remedy)
