"""Data sets on disk, as their authors publish them: find, read once, check and cache them as tables.

A source declares its splits, its readers (one for each layout in use) and its published sizes. A reader turns the
annotations of one official part into rows. This module holds the code that all sources share.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from petlbench.api.source import SPLITS, Split
from petlbench.core import table_cache
from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean
from petlbench.core.paths import cache_dir, data_root
from petlbench.core.source_code.closure import closure_of
from petlbench.datasets.files import images
from petlbench.datasets.files.declaration import Choice, Declaration
from petlbench.datasets.files.reader import Part, Reader, Skips

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

HELD_OUT = 20  # one training image in this many is for validation, if a data set has no validation part

SKIPS = b"skipped"

PLACING = frozenset({"layout", "hub", "skip_broken"})  # options that say where the rows lie, not which rows they are


def existing_root(given: Path | None) -> Path | None:
    """Return the given data root, else the environment's, else None. Raise UserError if it does not exist."""
    root = given or data_root()
    if root is not None and not root.is_dir():
        raise UserError(f"the data root {root} does not exist: fix --data-root or PETLBENCH_DATA")
    return root


class FileSource(Declaration):
    """A data set of files. Subclasses declare the attributes below and those of `Declaration`.

    Rows keep the order of the files. A limit draws rows from the whole split, the same ones every time.
    """

    readers: ClassVar[tuple[type[Reader], ...]]  # in the order in which they are tried

    @cached_property
    def reader(self) -> Reader:
        """Return the reader whose files are present.

        Raise UserError with the files that were looked for and their origin if there is none.
        """
        classes = {cls.layout: cls for cls in self.readers}
        chosen = self.config.layout
        if chosen is not None and chosen not in classes:
            raise UserError(f"{self.name} has no layout '{chosen}'{_hint(chosen, classes)}")
        root = existing_root(self.root)
        if chosen is None and self.config.hub is not None and "parquet" in classes:
            chosen = "parquet"
        tried = list(classes.values()) if chosen is None else [classes[chosen]]
        for cls in tried:
            if reader := cls.find(self, root):
                return reader
        sought = "; or ".join(cls.places(self) for cls in tried)
        where = f"below {root}" if root else "(pass --data-root DIR or set PETLBENCH_DATA)"
        raise UserError(f"{self.name} is not there: looked {where} for {sought}; {self.origin}")

    def parts(self, task: str) -> tuple[str, ...]:
        return self.reader.parts(task)

    def check(self) -> None:
        """Raise UserError unless every part and its images are present; this reads and caches the annotations once."""
        task = min(self.tasks)  # the other tasks are about the same images
        choices = {split: self._choice(task, split) for split in SPLITS}
        for split, choice in choices.items():
            self._present(task, split, choice)

    def load(self, task: str, split: Split, limit: int | None = None) -> Dataset:
        return self._opening(task, self._present(task, split, self._choice(task, split)), limit)

    def load_part(self, task: str, part: str) -> Dataset:
        self._known(task, [part])
        return self._opening(task, self._present(task, part, Choice((part,))), None)

    def _opening(self, task: str, table: pa.Table, limit: int | None) -> Dataset:
        import pyarrow as pa
        from datasets import Dataset, Image

        features = self.features(task).copy()
        for name in self._pictures(task):
            features[name] = Image(decode=False)
        try:
            table = _thinned(table, limit).select(list(features)).cast(features.arrow_schema)
        except (pa.ArrowException, ValueError) as error:
            raise UserError(f"{self._read_by(task)} gives a column of another type ({error}): fix it") from None
        return images.open_lazily(Dataset(table), self.reader.opened)

    def stream(self, task: str, split: Split) -> IterableDataset:
        rows, pictures = self.load(task, split).with_format(None), self._pictures(task)
        return rows.to_iterable_dataset().map(lambda row: images.open_row(row, pictures, self.reader.opened))

    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    def fingerprint(self, task: str) -> str:
        """Return a digest of the annotation files' content, the options that choose rows, and the rows left out.

        Code does not count: records hold digests of it, and the same files are the same data in every version.
        """
        options = self.config.model_dump(mode="json", exclude=set(PLACING))
        hashed: list[object] = [self.name, self.reader.layout, task, options]
        for split in SPLITS:
            choice = self._choice(task, split)
            hashed.append([split, *choice.parts, choice.images])
            hashed += [self.reader.digest(path) for part in choice.parts for path in self.reader.files(task, part)]
            hashed.append(self._left_out(task, self.rows(task, split, choice)))
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()

    def _left_out(self, task: str, table: pa.Table) -> list[str]:
        """Return the ids of the samples that have an image which cannot be used."""
        kept = self._without(table, task, self._faults(task, table))
        missing = (
            set(table["sample_id"].to_pylist()) - set(kept["sample_id"].to_pylist()) if kept is not table else set()
        )
        return sorted(missing)

    def _pictures(self, task: str) -> list[str]:
        return images.columns(self.features(task))

    def _read_by(self, task: str) -> str:
        """Return the start of an error about a reader's rows: the data set, the layout and the task."""
        return f"{self.name}: the reader of layout '{self.reader.layout}', for task '{task}',"

    def _without(self, table: pa.Table, task: str, faults: Iterable[str]) -> pa.Table:
        """Return the rows without an image at one of the places `faults`."""
        import pyarrow as pa
        import pyarrow.compute as pc

        places = pa.array(list(faults), pa.string())
        for name in self._pictures(task) if len(places) else ():
            table = table.filter(pc.invert(pc.is_in(_paths(table, name), places)))
        return table

    @cached_property
    def _in_files(self) -> bool:
        """Return whether the reading code has a digest; a notebook's has none, so its changes would go unnoticed."""
        return all(map(closure_of, (type(self), type(self.reader))))

    @cached_property
    def _held(self) -> dict[str, Part]:
        """Return the parts kept in memory, by the digest of their files, if they cannot be cached on disk."""
        return {}

    @cached_property
    def _notes(self) -> dict[str, None]:
        return {}

    def _known(self, task: str, parts: Iterable[str]) -> None:
        """Raise UserError unless the reader knows each of these parts."""
        present = self.reader.parts(task)
        for part in parts:
            if part not in present:
                hint = _hint(part, present)
                raise UserError(f"{self.name} ({self.reader.layout}) has no part '{part}'{hint}; {self.origin}")

    def _choice(self, task: str, split: Split) -> Choice:
        if task not in self.tasks:
            raise UserError(f"{self.name} has no task {task!r}: choose one of {', '.join(sorted(self.tasks))}")
        if split in SPLITS:
            choice = self.choice(task, split)
        elif split in self.reader.parts(task):
            choice = Choice((split,))
        else:
            names = dict.fromkeys([*SPLITS, *self.reader.parts(task)])
            raise UserError(f"{self.name} has no split '{split}'{_hint(split, names)}")
        self._known(task, choice.parts)
        return choice

    def _key(self, task: str, part: str) -> str:
        """Return a digest of all on which the rows of a part depend: files' content, reading code and options."""
        code = [closure.digest if closure else "" for closure in map(closure_of, (type(self), type(self.reader)))]
        # Rows may name their file, so file names count here, though not in the digest of the data.
        paths = self.reader.files(task, part)
        files = [(os.path.relpath(path, self.reader.root), self.reader.digest(path)) for path in paths]
        hashed = [self.name, self.reader.layout, task, part, self.config.model_dump(mode="json"), code, files]
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()

    def part(self, task: str, part: str) -> Part:
        """Return a part from the cache, or read it."""
        key = self._key(task, part)
        if not self._in_files:
            if key not in self._held:
                self._held[key] = self.reader.read(task, part)
            return self._held[key]
        path = cache_dir() / "tables" / f"{key[:32]}.parquet"
        table = table_cache.read_table(path)
        if table is not None and SKIPS in (table.schema.metadata or {}):
            skipped = json.loads(table.schema.metadata[SKIPS])
            return Part(table.replace_schema_metadata(), Skips({name: tuple(count) for name, count in skipped.items()}))
        part_read = self.reader.read(task, part)
        table_cache.write_table(
            part_read.table.replace_schema_metadata({SKIPS: json.dumps(part_read.skips.found)}), path
        )
        return part_read

    def rows(self, task: str, split: Split, choice: Choice) -> pa.Table:
        """Return the rows of a split; each `image` is a struct with its place, whether the file is present or not."""
        import pyarrow as pa

        parts = {name: self.part(task, name) for name in choice.parts}
        common = set.intersection(*(set(part.table.column_names) for part in parts.values()))
        if missing := [name for name in self.features(task) if name not in common]:
            raise UserError(f"{self._read_by(task)} gives no column {', '.join(missing)}: fix it")
        for name, part in parts.items():
            self._notes.update(dict.fromkeys(part.skips.notes(f"{self.name} {name}")))
        table = _of_images(pa.concat_tables([part.table for part in parts.values()]), choice.images)
        if not table.num_rows:
            raise UserError(f"{self.name} has no usable row for {task}, {split}: get the files again")
        for name in self._pictures(task):
            table = table.set_column(table.column_names.index(name), name, self._placed(table[name]))
        return table

    def _placed(self, names: pa.ChunkedArray) -> pa.Array:
        import pyarrow as pa

        coded = names.combine_chunks().dictionary_encode()
        places = pa.array(self.reader.located(coded.dictionary.to_pylist()), pa.string()).take(coded.indices)
        return pa.StructArray.from_arrays([pa.nulls(len(places), pa.binary()), places], ["bytes", "path"])

    def _faults(self, task: str, table: pa.Table) -> dict[str, str]:
        """Return the table's unusable images, each with the reason; decode each only if `skip_broken` is set."""
        places = [place for name in self._pictures(task) for place in _paths(table, name).unique().to_pylist()]
        faults = self.reader.absent(places)
        if self.config.skip_broken:
            faults |= _undecodable(self.reader, [place for place in places if place not in faults])
        return faults

    def _present(self, task: str, split: Split, choice: Choice) -> pa.Table:
        """Return the rows whose images can be used; without `skip_broken`, raise UserError if an image cannot."""
        table = self.rows(task, split, choice)
        faults = self._faults(task, table)
        if not faults:
            return table
        first, reason = next(iter(faults.items()))
        message = (
            f"{len(faults)} images of {self.name}, {split}, are missing or do not decode, first {first} ({reason})"
        )
        if not self.config.skip_broken:
            raise UserError(f"{message}: get them again or set dataset_configs: {{{self.name}: {{skip_broken: true}}}}")
        table = self._without(table, task, faults)
        if not table.num_rows:
            raise UserError(f"{message}: none is left, get the images again")
        self._notes[f"skipped: {message}"] = None
        return table


def _hint(name: str, names: Iterable[str]) -> str:
    names = list(names)
    return f"{did_you_mean(name, names) or ':'} there are {', '.join(names) or 'none'}"


def _paths(table: pa.Table, name: str) -> pa.Array:
    return table[name].combine_chunks().field("path")


def _of_images(table: pa.Table, which: str) -> pa.Table:
    """Return the rows whose image is held out, or is not; a hash of the image decides, so no image is in both."""
    import pyarrow as pa

    if which == "all":
        return table
    coded = table["image_id"].combine_chunks().dictionary_encode()
    chosen = pa.array([held_out(image_id) == (which == "held out") for image_id in coded.dictionary.to_pylist()])
    return table.filter(chosen.take(coded.indices))


def held_out(image_id: str) -> bool:
    """Return whether an image of a training part is for validation; the same on every machine and version."""
    return int(hashlib.sha256(image_id.encode()).hexdigest()[:8], 16) % HELD_OUT == 0


def _thinned(table: pa.Table, limit: int | None) -> pa.Table:
    """Return at most `limit` rows, drawn from the whole table with a fixed seed, in the table's order."""
    import numpy as np

    if limit is None or limit >= table.num_rows:
        return table
    return table.take(np.sort(np.random.default_rng(0).permutation(table.num_rows)[:limit]))


def _undecodable(reader: Reader, places: Sequence[str]) -> dict[str, str]:
    """Return the places of images that do not decode in full, with the reason; cached until a file changes."""
    import pyarrow as pa

    stamps = "\n".join(f"{place} {reader.stamp(place)}" for place in places)
    path = cache_dir() / "images" / f"{hashlib.sha256(stamps.encode()).hexdigest()[:32]}.parquet"
    cached = table_cache.read_table(path)
    if cached is not None:
        return dict(zip(cached["place"].to_pylist(), cached["reason"].to_pylist(), strict=True))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases Python's lock
        reasons = list(pool.map(reader.fault, places))
    faults = {place: reason for place, reason in zip(places, reasons, strict=True) if reason}
    table_cache.write_table(pa.table({"place": list(faults), "reason": list(faults.values())}), path)
    return faults
