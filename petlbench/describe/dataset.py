"""What of a data set is there: counted, held against the published sizes, its images opened (`petlbench data check`).

Counting never makes rows into Python objects: it is done on the tables that loading leaves.
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

NAMED = ("sample_id", "image_id")  # columns of every task's rows


@dataclass(frozen=True)
class DatasetPart:
    """An official part, or one of train, validation and test (then with what it is made of)."""

    name: str
    made_of: str = ""
    needed: bool = True  # by train, validation or test
    there: bool = True
    counts: dict[str, int] = field(default_factory=dict)  # of what is used
    published: Mapping[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)  # rows, by reason
    opened: int = 0
    faults: dict[str, str] = field(default_factory=dict)  # images that are missing or do not decode, and the reason
    error: str = ""

    @property
    def differing(self) -> dict[str, int]:
        """The published sizes that ours are not equal to."""
        return {what: n for what, n in self.published.items() if self.counts.get(what, n) != n}

    @property
    def verdict(self) -> str:
        if self.error or not self.there:
            return "cannot be used" if self.there else "not there"
        known = "as published" if self.published else "sound"
        said = [f"missing or broken images: {len(self.faults):,}"] if self.faults else []
        return ", ".join([*said, *(["sizes differ"] if self.differing else [])]) or known

    @property
    def ok(self) -> bool:
        return self.there and not (self.error or self.faults or self.differing)


@dataclass(frozen=True)
class DatasetReport:
    """Of one task with one data set."""

    task: str
    dataset: str
    origin: str
    entries: list[DatasetPart]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all that train, validation and test need is there, sound, and as large as published."""
        return all(entry.ok for entry in self.entries if entry.needed)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        entries = [{**asdict(entry), "verdict": entry.verdict, "ok": entry.ok} for entry in self.entries]
        return {**asdict(self), "entries": entries, "ok": self.ok}


def opened_source(name: str, config: Mapping[str, Any], root: Path | None) -> tuple[str, str, Source]:
    """Task, data set and its source for `task:dataset`, or for `task` with its default data set.

    Raises UserError for names that do not exist or do not go together, for options that the data set does not have, and
    for a data root that does not exist.
    """
    task, _, dataset = name.partition(":")
    TASKS.origin(task)  # importing it would cost seconds
    dataset = dataset or TASKS.get(task).default_dataset
    kind = DATASETS.get(dataset)
    if task not in kind.tasks:
        raise UserError(f"data set '{dataset}' does not serve task '{task}', only {', '.join(sorted(kind.tasks))}")
    existing_root(root)
    source = kind(validated(kind.Config, config, f"--config for {dataset}"), root)
    if isinstance(source, FileSource) and source.config.layout not in {None, *(r.layout for r in source.readers)}:
        assert source.reader  # which raises, naming the layouts that there are
    return task, dataset, source


def report_dataset(task: str, dataset: str, source: Source, sample: int | None) -> DatasetReport:
    """The inventory. Of each part `sample` images are opened, spread evenly over it; None: all.

    `source` need not be registered, nor `task` where the source declares its columns. What is wrong with one part
    stands in its entry and keeps nobody from the others. Raises UserError for rows that have no names.
    """
    if lacking := [name for name in NAMED if name not in source.features(task)]:
        raise UserError(f"the columns of task '{task}' lack {' and '.join(lacking)}: add them to its `features`")
    opener = _Opener(sample)
    entries = _of_files(task, source, opener) if isinstance(source, FileSource) else _of_rows(task, source, opener)
    return DatasetReport(task, dataset, source.origin, list(entries), source.notes())


class _Opener:
    """Opens images of a part, each only once where several parts share them."""

    def __init__(self, sample: int | None) -> None:
        self.sample = sample
        self.known: dict[str, str | None] = {}

    def __call__(self, keys: Sequence[str], opened: Callable[[str], Any]) -> tuple[int, dict[str, str]]:
        """How many of `keys` were opened, and those that could not be, with the reason."""
        count = len(keys) if self.sample is None else min(self.sample, len(keys))
        places = np.linspace(0, len(keys) - 1, count).round().astype(int).tolist() if count else []
        chosen = [keys[i] for i in places]

        def reason(key: str) -> str | None:
            try:
                opened(key)
            except UserError as error:
                return str(error)
            except Exception as error:  # decoders raise whatever a damaged stream makes them stumble over
                return one_line(error)
            return None

        new = [key for key in chosen if key not in self.known]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding runs outside of Python's lock
            self.known.update(zip(new, pool.map(reason, new), strict=True))
        return len(chosen), {key: why for key in chosen if (why := self.known[key])}


def _of_files(task: str, source: FileSource, opener: _Opener) -> Iterator[DatasetPart]:
    """The official parts, with their images; then what is made of them."""
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
    except UserError:  # what is sought, and where it can be had, is said of each split
        there, listed = (), {}
    else:
        listed = dict.fromkeys([*there, *needed, *(part for part in sizes if part not in SPLITS)])
    for part in listed:
        said: dict[str, Any] = {"needed": part in needed, "published": sizes.get(part, {})}
        yield _part(task, part, source, opener, said) if part in there else DatasetPart(part, there=False, **said)
    for split, choice in choices.items():
        if isinstance(choice, str):
            yield DatasetPart(split, error=choice)
        else:
            direct = {} if split in there else sizes.get(split, {})
            yield _split(task, split, source, choice, direct or _together(sizes, choice))


def _part(task: str, part: str, source: FileSource, opener: _Opener, said: Mapping[str, Any]) -> DatasetPart:
    """An official part: rows as they are read, whether or not their images are there; and the images."""
    found: dict[str, Any]
    try:
        read = source.part(task, part)
        columns = [read.table[name] for name in images.columns(source.features(task))]
        found = {"counts": _counts(task, read.table, columns), "left_out": _left_out(read.skips)}
    except UserError as error:
        return DatasetPart(part, error=str(error), **said)
    try:
        places = source.reader.located(_distinct(columns).to_pylist())
        absent = source.reader.absent(places)
    except UserError as error:
        return DatasetPart(part, error=str(error), **found, **said)
    opened, broken = opener(
        [place for place in places if place not in absent],
        lambda place: source.reader.opened({"path": place, "bytes": None}),
    )
    return DatasetPart(part, opened=opened, faults={**absent, **broken}, **found, **said)


def _split(task: str, split: str, source: FileSource, choice: Choice, published: Mapping[str, int]) -> DatasetPart:
    """One of train, validation and test, as a run would load it; its images are its parts'."""
    made_of = " + ".join(choice.parts) + ("" if choice.images == "all" else f", images {choice.images}")
    try:
        rows = source.load(task, split)
        # Unless it is told to skip them, a source refuses a split that lacks an image.
        before = source.rows(task, split, choice).num_rows if source.config.skip_broken else len(rows)
    except UserError as error:
        return DatasetPart(split, made_of, error=str(error))
    left_out = {"image missing or broken": before - len(rows)} if before > len(rows) else {}
    return DatasetPart(split, made_of, counts=_counted(task, rows), published=published, left_out=left_out)


def _of_rows(task: str, source: Source, opener: _Opener) -> Iterator[DatasetPart]:
    """Where a source is only known by its rows."""
    try:
        parts = source.parts(task)
    except UserError:
        parts = ()
    for name in dict.fromkeys([*parts, *SPLITS]):
        said: dict[str, Any] = {"needed": name in SPLITS, "published": source.sizes.get(task, {}).get(name, {})}
        try:
            rows = source.load_part(task, name) if name in parts else source.load(task, name)
        except UserError as error:
            yield DatasetPart(name, error=str(error), **said)
            continue
        firsts = _firsts(rows)
        opened, faults = opener(list(firsts), _opening(rows, firsts))
        empty = "" if len(rows) else "it has no rows"
        yield DatasetPart(name, counts=_counted(task, rows), opened=opened, faults=faults, error=empty, **said)


def _opening(rows: Dataset, firsts: Mapping[str, tuple[str, int]]) -> Callable[[str], Any]:
    columns = {name: rows.select_columns([name]) for name in {name for name, _ in firsts.values()}}

    def opened(key: str) -> Any:
        name, row = firsts[key]
        return columns[name][row]

    return opened


def _firsts(rows: Dataset) -> dict[str, tuple[str, int]]:
    """Column and row in which each image stands first, by its path, or by its row's `image_id` where it has none."""
    found: dict[str, tuple[str, int]] = {}
    for name in images.columns(rows.features):
        coded = _keys(_table(rows, ["image_id", name]), name).combine_chunks().dictionary_encode()
        _, places = np.unique(coded.indices.to_numpy(), return_index=True)
        for key, place in zip(coded.dictionary.to_pylist(), places.tolist(), strict=True):
            found.setdefault(key, (name, place))
    return found


def _counted(task: str, rows: Dataset) -> dict[str, int]:
    """The counts of loaded rows."""
    pictures = images.columns(rows.features)
    table = _table(rows, [name for name in rows.column_names if name in {"image_id", _unit(task), *pictures}])
    return _counts(task, table, [_keys(table, name) for name in pictures])


def _counts(task: str, table: pa.Table, pictures: Sequence[pa.ChunkedArray]) -> dict[str, int]:
    """Images, and what a task is about: rows, or the items of a column of lists."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # Of one image a row, files that show the same count as one; of several, `image_id` stands for all of them.
    shown = pc.count_distinct(table["image_id"]).as_py() if len(pictures) == 1 else len(_distinct(pictures))
    unit, number = _unit(task), table.num_rows
    if unit in table.column_names and pa.types.is_list(table[unit].type):
        number = pc.sum(pc.list_value_length(table[unit])).as_py() or 0
    return {"images": shown, unit: number}


def _unit(task: str) -> str:
    """What the task's data is counted in."""
    try:
        return str(attribute(TASKS, task, "unit"))
    except UserError:  # it is not registered
        return "rows"


def _distinct(columns: Sequence[pa.ChunkedArray]) -> pa.Array:
    import pyarrow as pa

    chunks = [chunk for column in columns for chunk in column.cast(pa.string()).chunks]
    return pa.chunked_array(chunks, pa.string()).unique()


def _keys(table: pa.Table, name: str) -> pa.ChunkedArray:
    """What tells the images of a column apart: their paths, or their rows' `image_id` where they have none."""
    import pyarrow.compute as pc

    own = pc.binary_join_element_wise(table["image_id"], name, " ")
    return pc.coalesce(pc.struct_field(table[name], "path"), own)


def _table(rows: Dataset, columns: Sequence[str]) -> pa.Table:
    """Columns of rows in their order, images unopened."""
    return rows.select_columns(list(columns)).with_format("arrow")[:]


def _left_out(skips: Skips) -> dict[str, int]:
    return {reason: count for reason, (count, _) in skips.found.items()}


def _together(sizes: Mapping[str, Mapping[str, int]], choice: Choice) -> dict[str, int]:
    """The published size of whole parts together; images that two of them share would count twice."""
    if choice.images != "all" or any(part not in sizes for part in choice.parts):
        return {}
    shared = set.intersection(*(set(sizes[part]) for part in choice.parts))
    shared -= {"images"} if len(choice.parts) > 1 else set()
    return {what: sum(sizes[part][what] for part in choice.parts) for what in shared}
