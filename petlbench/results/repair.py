"""Repair a results folder: set aside files that do not belong in it, with the reason; never delete a result."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from petlbench.core.errors import UserError
from petlbench.core.record import Record
from petlbench.results.store import FOLDERS, Damaged, Rank, Store, rank_of, read_record
from petlbench.results.upgrade import may_name

SET_ASIDE = "set-aside"
LEFTOVER_SECONDS = 3600  # no write takes that long, so an older temporary file was left by a killed process


def repair(store: Store) -> list[str]:
    """Make `store` readable: one complete record per cell, in a file with the cell's name, with its samples.

    A file that has an earlier name of its cell keeps it. A record of an earlier schema version is set aside only for a
    later record of its cell; it need not have its samples.

    Every other file moves to `set-aside/`, in the same sub-folder under the same name (numbered if that is taken), with
    its samples and adapter unless another record uses them. Temporary files of killed processes are removed. Return
    one line for each action. Raise UserError if `store` is not a results folder, or if files cannot be read or moved.
    Do not call it for a folder in which cells are running.
    """
    if not _is_ours(store):
        raise UserError(f"{store.root} is not a results folder (no record of petlbench in it); check the path")
    try:
        folders = [store.root, *(store.root / name for name in FOLDERS)]
        return [*remove_leftovers(store, folders, LEFTOVER_SECONDS), *Repair(store).run()]
    except OSError as error:
        raise UserError(
            f"cannot repair {store.root}: {error.strerror or error} ({error.filename}); check its permissions"
        ) from error


def _is_ours(store: Store) -> bool:
    """Return whether petlbench made the folder: another folder that is called `records` must not be emptied."""
    if not store.records.is_dir():
        return False
    if store.sample_scores.is_dir() and store.adapters.is_dir():
        return True
    files = (path for path in store.paths() if path.is_file())
    return any(b'"schema_version"' in path.read_bytes() for path in files)  # also in a truncated record


def remove_leftovers(store: Store, folders: Iterable[Path], seconds: float) -> list[str]:
    """Remove the temporary files in `folders` that are older than `seconds`; return one line for each."""
    lines = []
    for folder in folders:
        for path in sorted(folder.glob(".*.tmp")):
            if path.is_file() and time.time() - path.stat().st_mtime >= seconds:
                path.unlink(missing_ok=True)
                lines.append(f"{path.relative_to(store.root)} removed: an interrupted write left it behind")
    return lines


class Repair:
    """One pass over the records of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.lines: list[str] = []
        self.names: dict[Path, str] = {}  # of each kept record: the file name that it should have, without the suffix

    def run(self) -> list[str]:
        rejected, used = self._select()
        used |= {f"{name}.safetensors" for name in self.names.values()}
        for path, reason in rejected.items():
            self._set_aside(path, reason, used)
        self._rename(used)
        return self.lines

    def _select(self) -> tuple[dict[Path, str], set[str]]:
        """Fill `names`; return the reason for each rejected file, and the samples files that kept records use."""
        rejected: dict[Path, str] = {}
        records: dict[Path, Record] = {}
        best: dict[str, tuple[Rank, Path]] = {}
        for path in self.store.paths():
            try:
                record = read_record(path)
                if not record.older:
                    self.store.samples(record)
            except Damaged as error:
                subject = "it" if error.path == path else f"its samples file {error.path.name}"
                rejected[path] = f"{subject} {error.reason}"
                continue
            key = record.cell.id
            ranked = (rank_of(record, key, path), path)
            if key in best:
                _, earlier = min(ranked, best[key])
                rejected[earlier] = f"the cell {key} has a later record"
            best[key] = max(ranked, best.get(key, ranked))
            records[path] = record
        for key, (_, path) in best.items():
            self.names[path] = path.stem if may_name(path.stem, records[path].cell) else key
        return rejected, {Path(records[path].samples or "").name for path in self.names}

    def _rename(self, used: set[str]) -> None:
        """Rename kept records to their cells' names; a name that another kept record holds may become free first."""
        wrong = {path: path.with_name(f"{name}.json") for path, name in self.names.items() if path.stem != name}
        while wrong:
            path = next((path for path, target in wrong.items() if not os.path.lexists(target)), None)
            if path is None:  # the remaining files hold each other's records
                path, target = wrong.popitem()
                self._set_aside(path, f"its right name, {target.name}, is taken", used)
                continue
            target = wrong.pop(path)
            os.rename(path, target)
            self.lines.append(f"records/{path.name} renamed to {target.name}: that is its cell")

    def _set_aside(self, path: Path, reason: str, used: set[str]) -> None:
        """Move `path`, and the samples and adapter with its name unless they are in `used`."""
        companions = (
            self.store.sample_scores / f"{path.stem}.json",
            self.store.adapters / f"{path.stem}.safetensors",
        )
        moved = self._move(path)
        others = [self._move(file) for file in companions if file.is_file() and file.name not in used]
        together = f" (with {' and '.join(others)})" if others else ""
        self.lines.append(f"records/{path.name} moved to {moved}{together}: {reason}")

    def _move(self, path: Path) -> str:
        """Move `path` to `set-aside/` and overwrite nothing; return its new path in the results folder."""
        folder = self.store.root / SET_ASIDE / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        names = (path.name if n == 1 else f"{path.stem}.{n}{path.suffix}" for n in count(1))
        target = next(folder / name for name in names if not os.path.lexists(folder / name))
        os.rename(path, target)
        return str(target.relative_to(self.store.root))
