"""Check a data set: count its rows, compare the counts with the published sizes, open images (`petlbench data check`).

The counts come from the Arrow tables that loading leaves, so that no row becomes a Python object.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from petlbench.api.registries import DATASETS, TASKS
from petlbench.api.source import SPLITS, Source
from petlbench.core.errors import UserError
from petlbench.core.messages import one_line
from petlbench.core.validation import validated
from petlbench.datasets.files import images
from petlbench.datasets.files.declaration import Choice
from petlbench.datasets.files.reader import Skips
from petlbench.datasets.files.source import FileSource, existing_root
from petlbench.describe.variants import attribute

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

NAME_COLUMNS = ("sample_id", "image_id")  # every task's rows have them


@dataclass(frozen=True)
class DatasetPart:
    """An official part, or one of the splits train, validation and test; a split also names the parts it is made of."""

    name: str
    made_of: str = ""
    needed: bool = True  # train, validation or test uses it
    there: bool = True
    counts: dict[str, int] = field(default_factory=dict)  # usable images and samples
    published: Mapping[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)  # number of rows by reason
    opened: int = 0
    faults: dict[str, str] = field(default_factory=dict)  # reason by image: missing, or does not decode
    error: str = ""

    @property
    def differing(self) -> dict[str, int]:
        """Return the published sizes that differ from ours."""
        return {what: n for what, n in self.published.items() if self.counts.get(what, n) != n}

    @property
    def verdict(self) -> str:
        if self.error or not self.there:
            return "cannot be used" if self.there else "not there"
        problems = [f"missing or broken images: {len(self.faults):,}"] if self.faults else []
        problems += ["sizes differ"] if self.differing else []
        return ", ".join(problems) or ("as published" if self.published else "sound")

    @property
    def ok(self) -> bool:
        return self.there and not (self.error or self.faults or self.differing)


@dataclass(frozen=True)
class DatasetReport:
    """The check of one data set for one task."""

    task: str
    dataset: str
    origin: str
    entries: list[DatasetPart]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether all parts that train, validation and test need exist, are sound and as large as published."""
        return all(entry.ok for entry in self.entries if entry.needed)

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        entries = [{**asdict(entry), "verdict": entry.verdict, "ok": entry.ok} for entry in self.entries]
        return {**asdict(self), "entries": entries, "ok": self.ok}


def opened_source(name: str, config: Mapping[str, Any], root: Path | None) -> tuple[str, str, Source]:
    """Return the task, the data set and its source for `task:dataset`, or for `task` with its default data set.

    Raise UserError if a name does not exist, if task and data set do not fit, if the data set does not have an option,
    or if the data root does not exist.
    """
    task, _, dataset = name.partition(":")
    TASKS.origin(task)  # checks the name; importing the task would cost seconds
    dataset = dataset or TASKS.get(task).default_dataset
    cls = DATASETS.get(dataset)
    if task not in cls.tasks:
        raise UserError(f"data set '{dataset}' does not serve task '{task}', only {', '.join(sorted(cls.tasks))}")
    existing_root(root)
    source = cls(validated(cls.Config, config, f"--config for {dataset}"), root)
    if isinstance(source, FileSource) and source.config.layout not in {None, *(r.layout for r in source.readers)}:
        assert source.reader  # raises, and names the layouts that exist
    return task, dataset, source


def report_dataset(task: str, dataset: str, source: Source, sample: int | None) -> DatasetReport:
    """Count each part of a data set and open `sample` of its images, spread evenly; None opens all of them.

    `source` need not be registered; `task` need not be either if the source declares its columns. An error in one part
    is kept in its entry, so that the other parts are still checked. Raise UserError if the rows have no names.
    """
    if missing := [name for name in NAME_COLUMNS if name not in source.features(task)]:
        raise UserError(f"the columns of task '{task}' lack {' and '.join(missing)}: add them to its `features`")
    opener = _Opener(sample)
    if isinstance(source, FileSource):
        entries = _check_files(task, source, opener)
    else:
        entries = _check_rows(task, source, opener)
    return DatasetReport(task, dataset, source.origin, list(entries), source.notes())


class _Opener:
    """Opens images of a part; an image that several parts share is opened once."""

    def __init__(self, sample: int | None) -> None:
        self.sample = sample
        self.reasons: dict[str, str | None] = {}  # by image; None for one that opens

    def __call__(self, keys: Sequence[str], opened: Callable[[str], Any]) -> tuple[int, dict[str, str]]:
        """Return how many of `keys` it tried to open, and the reason for each image that did not open."""
        count = len(keys) if self.sample is None else min(self.sample, len(keys))
        places = np.linspace(0, len(keys) - 1, count).round().astype(int).tolist() if count else []
        chosen = [keys[i] for i in places]

        def reason(key: str) -> str | None:
            try:
                opened(key)
            except UserError as error:
                return str(error)
            except Exception as error:  # on a damaged stream a decoder may raise any exception
                return one_line(error)
            return None

        new = [key for key in chosen if key not in self.reasons]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding runs outside of Python's lock
            self.reasons.update(zip(new, pool.map(reason, new), strict=True))
        return len(chosen), {key: why for key in chosen if (why := self.reasons[key])}


def _check_files(task: str, source: FileSource, opener: _Opener) -> Iterator[DatasetPart]:
    """Yield the official parts with their images, then the splits made of them."""
    choices: dict[str, Choice | str] = {}
    for split in SPLITS:
        try:
            choices[split] = source.choice(task, split)
        except UserError as error:
            choices[split] = str(error)
    needed = dict.fromkeys(part for choice in choices.values() if isinstance(choice, Choice) for part in choice.parts)
    sizes = source.sizes.get(task, {})
    try:
        there = source.parts(task)
    except UserError:  # the error of each split names the missing files and where to get them
        there, listed = (), {}
    else:
        listed = dict.fromkeys([*there, *needed, *(part for part in sizes if part not in SPLITS)])
    for part in listed:
        expected: dict[str, Any] = {"needed": part in needed, "published": sizes.get(part, {})}
        if part in there:
            yield _full_part(task, part, source, opener, expected)
        else:
            yield DatasetPart(part, there=False, **expected)
    for split, choice in choices.items():
        if isinstance(choice, str):
            yield DatasetPart(split, error=choice)
        else:
            published = {} if split in there else sizes.get(split, {})
            yield _split_part(task, split, source, choice, published or _summed_sizes(sizes, choice))


def _full_part(task: str, part: str, source: FileSource, opener: _Opener, expected: Mapping[str, Any]) -> DatasetPart:
    """Count the rows of an official part, whether or not their images exist, and open images."""
    counted: dict[str, Any]
    try:
        read = source.part(task, part)
        columns = [read.table[name] for name in images.columns(source.features(task))]
        counted = {"counts": _counts(task, read.table, columns), "left_out": _left_out(read.skips)}
    except UserError as error:
        return DatasetPart(part, error=str(error), **expected)
    try:
        places = source.reader.located(_distinct(columns).to_pylist())
        absent = source.reader.absent(places)
    except UserError as error:
        return DatasetPart(part, error=str(error), **counted, **expected)
    opened, broken = opener(
        [place for place in places if place not in absent],
        lambda place: source.reader.opened({"path": place, "bytes": None}),
    )
    return DatasetPart(part, opened=opened, faults={**absent, **broken}, **counted, **expected)


def _split_part(task: str, split: str, source: FileSource, choice: Choice, published: Mapping[str, int]) -> DatasetPart:
    """Count train, validation or test as a run loads it; its images are checked with its parts."""
    made_of = " + ".join(choice.parts) + ("" if choice.images == "all" else f", images {choice.images}")
    try:
        rows = source.load(task, split)
        # A source refuses a split with a missing image, unless `skip_broken` is set.
        before = source.rows(task, split, choice).num_rows if source.config.skip_broken else len(rows)
    except UserError as error:
        return DatasetPart(split, made_of, error=str(error))
    left_out = {"image missing or broken": before - len(rows)} if before > len(rows) else {}
    return DatasetPart(split, made_of, counts=_row_counts(task, rows), published=published, left_out=left_out)


def _check_rows(task: str, source: Source, opener: _Opener) -> Iterator[DatasetPart]:
    """Yield the parts and splits of a source that offers rows only, and no files."""
    try:
        parts = source.parts(task)
    except UserError:
        parts = ()
    for name in dict.fromkeys([*parts, *SPLITS]):
        expected: dict[str, Any] = {"needed": name in SPLITS, "published": source.sizes.get(task, {}).get(name, {})}
        try:
            rows = source.load_part(task, name) if name in parts else source.load(task, name)
        except UserError as error:
            yield DatasetPart(name, error=str(error), **expected)
            continue
        places = _image_places(rows)
        opened, faults = opener(list(places), _image_loader(rows, places))
        empty = "" if len(rows) else "it has no rows"
        yield DatasetPart(name, counts=_row_counts(task, rows), opened=opened, faults=faults, error=empty, **expected)


def _image_loader(rows: Dataset, places: Mapping[str, tuple[str, int]]) -> Callable[[str], Any]:
    columns = {name: rows.select_columns([name]) for name in {name for name, _ in places.values()}}

    def load(key: str) -> Any:
        name, row = places[key]
        return columns[name][row]

    return load


def _image_places(rows: Dataset) -> dict[str, tuple[str, int]]:
    """Return the column and row of each image's first occurrence, by its key (see `_keys`)."""
    first: dict[str, tuple[str, int]] = {}
    for name in images.columns(rows.features):
        coded = _keys(_table(rows, ["image_id", name]), name).combine_chunks().dictionary_encode()
        _, places = np.unique(coded.indices.to_numpy(), return_index=True)
        for key, place in zip(coded.dictionary.to_pylist(), places.tolist(), strict=True):
            first.setdefault(key, (name, place))
    return first


def _row_counts(task: str, rows: Dataset) -> dict[str, int]:
    """Return the counts of loaded rows."""
    pictures = images.columns(rows.features)
    table = _table(rows, [name for name in rows.column_names if name in {"image_id", _unit(task), *pictures}])
    return _counts(task, table, [_keys(table, name) for name in pictures])


def _counts(task: str, table: pa.Table, pictures: Sequence[pa.ChunkedArray]) -> dict[str, int]:
    """Count the images and the task's units: rows, or the items of a column of lists."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # With one image a row, count `image_id`, as two files may show one image; with several, it names them together.
    shown = pc.count_distinct(table["image_id"]).as_py() if len(pictures) == 1 else len(_distinct(pictures))
    unit, number = _unit(task), table.num_rows
    if unit in table.column_names and pa.types.is_list(table[unit].type):
        number = pc.sum(pc.list_value_length(table[unit])).as_py() or 0
    return {"images": shown, unit: number}


def _unit(task: str) -> str:
    """Return the name of what the task counts, such as questions."""
    try:
        return str(attribute(TASKS, task, "unit"))
    except UserError:  # the task is not registered
        return "rows"


def _distinct(columns: Sequence[pa.ChunkedArray]) -> pa.Array:
    import pyarrow as pa

    chunks = [chunk for column in columns for chunk in column.cast(pa.string()).chunks]
    return pa.chunked_array(chunks, pa.string()).unique()


def _keys(table: pa.Table, name: str) -> pa.ChunkedArray:
    """Return a key for each image of a column: its path, or its row's `image_id` and the column if it has no path."""
    import pyarrow.compute as pc

    without_path = pc.binary_join_element_wise(table["image_id"], name, " ")
    return pc.coalesce(pc.struct_field(table[name], "path"), without_path)


def _table(rows: Dataset, columns: Sequence[str]) -> pa.Table:
    """Return columns of the rows as a table in row order; images stay unopened."""
    return rows.select_columns(list(columns)).with_format("arrow")[:]


def _left_out(skips: Skips) -> dict[str, int]:
    return {reason: count for reason, (count, _) in skips.found.items()}


def _summed_sizes(sizes: Mapping[str, Mapping[str, int]], choice: Choice) -> dict[str, int]:
    """Add up the published sizes of whole parts; images are left out of a sum, as parts may share them."""
    if choice.images != "all" or any(part not in sizes for part in choice.parts):
        return {}
    shared = set.intersection(*(set(sizes[part]) for part in choice.parts))
    shared -= {"images"} if len(choice.parts) > 1 else set()
    return {what: sum(sizes[part][what] for part in choice.parts) for what in shared}
