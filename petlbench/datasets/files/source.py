"""Data sets that lie on disk as their authors publish them: found, read once, checked, and kept as tables.

A source is a declaration: its splits, its readers (one for each layout that is in use), its published sizes. A reader
turns the annotations of one official part into rows. What is here is the same for all.
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

HELD_OUT = 20  # one image in this many, where a validation split has to be taken from the training part

SKIPS = b"skipped"

PLACING = frozenset({"layout", "hub", "skip_broken"})  # options that say where rows are found, not which rows they are


def existing_root(given: Path | None) -> Path | None:
    """The data root that was given, or else the environment's, if any. Raises UserError for one that does not exist."""
    root = given or data_root()
    if root is not None and not root.is_dir():
        raise UserError(f"the data root {root} does not exist: mend --data-root or PETLBENCH_DATA")
    return root


class FileSource(Declaration):
    """A data set of files. Subclasses declare; see the attributes, also those of `Declaration`.

    Rows stand in the order of the files. A limit takes rows from all over a split, the same ones every time.
    """

    readers: ClassVar[tuple[type[Reader], ...]]  # in the order in which they are tried

    @cached_property
    def reader(self) -> Reader:
        """The one whose files are there. Raises UserError that says what was looked for, and where it can be had."""
        kinds = {kind.layout: kind for kind in self.readers}
        chosen = self.config.layout
        if chosen is not None and chosen not in kinds:
            raise UserError(f"{self.name} has no layout '{chosen}'{_hint(chosen, kinds)}")
        root = existing_root(self.root)
        if chosen is None and self.config.hub is not None and "parquet" in kinds:
            chosen = "parquet"
        tried = list(kinds.values()) if chosen is None else [kinds[chosen]]
        for kind in tried:
            if found := kind.find(self, root):
                return found
        sought = "; or ".join(kind.places(self) for kind in tried)
        where = f"below {root}" if root else "(pass --data-root DIR or set PETLBENCH_DATA)"
        raise UserError(f"{self.name} is not there: looked {where} for {sought}; {self.origin}")

    def parts(self, task: str) -> tuple[str, ...]:
        return self.reader.parts(task)

    def check(self) -> None:
        """That every part is there, and its images: annotations are read for that, once, and kept in the cache."""
        task = min(self.tasks)  # the others are about the same images
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
            raise UserError(f"{self._read_by(task)} gives a column of another type ({error}): mend it") from None
        return images.lazily(Dataset(table), self.reader.opened)

    def stream(self, task: str, split: Split) -> IterableDataset:
        rows, pictures = self.load(task, split).with_format(None), self._pictures(task)
        return rows.to_iterable_dataset().map(lambda row: images.opened_row(row, pictures, self.reader.opened))

    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes)

    def fingerprint(self, task: str) -> str:
        """Of the content of the annotation files, the options that decide what is read, and the rows left out.

        No code counts: records have digests of that, and the same files are the same data in every version.
        """
        options = self.config.model_dump(mode="json", exclude=set(PLACING))
        said: list[object] = [self.name, self.reader.layout, task, options]
        for split in SPLITS:
            choice = self._choice(task, split)
            said.append([split, *choice.parts, choice.images])
            said += [self.reader.digest(path) for part in choice.parts for path in self.reader.files(task, part)]
            said.append(self._left_out(task, self.rows(task, split, choice)))
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def _left_out(self, task: str, table: pa.Table) -> list[str]:
        """The samples one of whose images cannot be used."""
        kept = self._without(table, task, self._faults(task, table))
        gone = set(table["sample_id"].to_pylist()) - set(kept["sample_id"].to_pylist()) if kept is not table else set()
        return sorted(gone)

    def _pictures(self, task: str) -> list[str]:
        return images.columns(self.features(task))

    def _read_by(self, task: str) -> str:
        """The reader of a task's rows, as a message names it."""
        return f"{self.name}: the reader of layout '{self.reader.layout}', for task '{task}',"

    def _without(self, table: pa.Table, task: str, faults: Iterable[str]) -> pa.Table:
        """The rows none of whose images is at one of these places."""
        import pyarrow as pa
        import pyarrow.compute as pc

        places = pa.array(list(faults), pa.string())
        for name in self._pictures(task) if len(places) else ():
            table = table.filter(pc.invert(pc.is_in(_paths(table, name), places)))
        return table

    @cached_property
    def _in_files(self) -> bool:
        """Whether a change of the code that reads can be told: the code of a notebook has no digest."""
        return all(map(closure_of, (type(self), type(self.reader))))

    @cached_property
    def _held(self) -> dict[str, Part]:
        """What was read where nothing can be kept on disk, by the digest of its files."""
        return {}

    @cached_property
    def _notes(self) -> dict[str, None]:
        return {}

    def _known(self, task: str, parts: Iterable[str]) -> None:
        there = self.reader.parts(task)
        for part in parts:
            if part not in there:
                hint = _hint(part, there)
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
        """Digest of all that the rows of a part depend on: the files' content, the code that reads them, options."""
        code = [found.digest if found else "" for found in map(closure_of, (type(self), type(self.reader)))]
        # Rows may name a file that they are from, so names count here, though not in the digest of the data.
        found = self.reader.files(task, part)
        files = [(os.path.relpath(path, self.reader.root), self.reader.digest(path)) for path in found]
        said = [self.name, self.reader.layout, task, part, self.config.model_dump(mode="json"), code, files]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def part(self, task: str, part: str) -> Part:
        """Read, or taken from the cache."""
        key = self._key(task, part)
        if not self._in_files:
            if key not in self._held:
                self._held[key] = self.reader.read(task, part)
            return self._held[key]
        path = cache_dir() / "tables" / f"{key[:32]}.parquet"
        table = table_cache.read_table(path)
        if table is not None and SKIPS in (table.schema.metadata or {}):
            found = json.loads(table.schema.metadata[SKIPS])
            return Part(table.replace_schema_metadata(), Skips({reason: tuple(told) for reason, told in found.items()}))
        made = self.reader.read(task, part)
        table_cache.write_table(made.table.replace_schema_metadata({SKIPS: json.dumps(made.skips.found)}), path)
        return made

    def rows(self, task: str, split: Split, choice: Choice) -> pa.Table:
        """The rows of a split, each `image` as a struct of the place where it is, present or not."""
        import pyarrow as pa

        parts = {name: self.part(task, name) for name in choice.parts}
        there = set.intersection(*(set(part.table.column_names) for part in parts.values()))
        if lacking := [name for name in self.features(task) if name not in there]:
            raise UserError(f"{self._read_by(task)} gives no column {', '.join(lacking)}: mend it")
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
        """The images of the table that cannot be used, with the reason; only where asked for, each is decoded."""
        places = [place for name in self._pictures(task) for place in _paths(table, name).unique().to_pylist()]
        faults = self.reader.absent(places)
        if self.config.skip_broken:
            faults |= _undecodable(self.reader, [place for place in places if place not in faults])
        return faults

    def _present(self, task: str, split: Split, choice: Choice) -> pa.Table:
        """The rows whose images are there."""
        table = self.rows(task, split, choice)
        faults = self._faults(task, table)
        if not faults:
            return table
        first, reason = next(iter(faults.items()))
        told = f"{len(faults)} images of {self.name}, {split}, are missing or do not decode, first {first} ({reason})"
        if not self.config.skip_broken:
            raise UserError(f"{told}: get them again or set dataset_configs: {{{self.name}: {{skip_broken: true}}}}")
        table = self._without(table, task, faults)
        if not table.num_rows:
            raise UserError(f"{told}: none is left, get the images again")
        self._notes[f"skipped: {told}"] = None
        return table


def _hint(name: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"{did_you_mean(name, known) or ':'} there are {', '.join(known) or 'none'}"


def _paths(table: pa.Table, name: str) -> pa.Array:
    return table[name].combine_chunks().field("path")


def _of_images(table: pa.Table, which: str) -> pa.Table:
    """The rows whose image is held out, or is not. A hash of the image decides: no image is on both sides."""
    import pyarrow as pa

    if which == "all":
        return table
    coded = table["image_id"].combine_chunks().dictionary_encode()
    held = pa.array([held_out(image_id) == (which == "held out") for image_id in coded.dictionary.to_pylist()])
    return table.filter(held.take(coded.indices))


def held_out(image_id: str) -> bool:
    """Whether an image of a training part is for validation; the same on every machine and version."""
    return int(hashlib.sha256(image_id.encode()).hexdigest()[:8], 16) % HELD_OUT == 0


def _thinned(table: pa.Table, limit: int | None) -> pa.Table:
    """At most `limit` rows, drawn from all over the table by a fixed seed, in their order."""
    import numpy as np

    if limit is None or limit >= table.num_rows:
        return table
    return table.take(np.sort(np.random.default_rng(0).permutation(table.num_rows)[:limit]))


def _undecodable(reader: Reader, places: Sequence[str]) -> dict[str, str]:
    """Those that do not decode in full, with the reason. Kept in the cache until one of the files changes."""
    import pyarrow as pa

    said = "\n".join(f"{place} {reader.stamp(place)}" for place in places)
    path = cache_dir() / "images" / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.parquet"
    known = table_cache.read_table(path)
    if known is not None:
        return dict(zip(known["place"].to_pylist(), known["reason"].to_pylist(), strict=True))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding runs outside of Python's lock
        reasons = list(pool.map(reader.fault, places))
    faults = {place: reason for place, reason in zip(places, reasons, strict=True) if reason}
    table_cache.write_table(pa.table({"place": list(faults), "reason": list(faults.values())}), path)
    return faults
