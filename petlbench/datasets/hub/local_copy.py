"""A copy of a data set in Parquet files: fetched from the hub or found in a folder, and which part each file is of.

The library's own environment variables decide about caches and the network (HF_HOME, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean, one_line
from petlbench.datasets.hub.shards import metadata, sound

if TYPE_CHECKING:
    import pyarrow as pa

KNOWN = (
    *("lmms-lab/RefCOCO", "lmms-lab/RefCOCOplus", "lmms-lab/RefCOCOg"),
    *("jxu124/refcoco", "jxu124/refcocoplus", "jxu124/refcocog"),
    *("lmms-lab/VQAv2", "lmms-lab/GQA", "lmms-lab/flickr30k", "nlphuji/flickr30k"),
    *("lmms-lab/COCO-Caption", "lmms-lab/COCO-Caption2017", "yerevann/coco-karpathy"),
    "nlphuji/mscoco_2014_5k_test_image_text_retrieval",
)
CONVERTED = "refs/convert/parquet"  # where the hub keeps its own conversion of data sets in other formats
DEPTH = 2  # of folders below a copy's: <configuration>/<split>/0000.parquet
SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(-\w+)?")
GQA = re.compile(r"(?P<split>.+_(all|balanced))_(instructions|images)")
SYNONYMS = {"validation": "val", "valid": "val", "dev": "val", "training": "train"}
SPLITS = ("train", "restval", "val", "test", "testa", "testb", "testdev")  # what files may be named after, plainly
MOST_ROWS = 50_000_000
MOST_TEXT_BYTES = 1 << 30  # of one file's columns but for images: the largest copies have a fifth


@dataclass(frozen=True)
class CopyFile:
    """One Parquet file: where it is, its name below the copy's folder, and what its name gives.

    `series`: the folder without the split's own, and how many shards there are; shards of one part have it in common.
    """

    path: Path
    name: str
    split: str
    series: str

    @cached_property
    def schema(self) -> pa.Schema:
        with sound(self.path):
            return metadata(self.path).schema.to_arrow_schema()

    @cached_property
    def rows(self) -> int:
        count = metadata(self.path).num_rows
        if not 0 <= count <= MOST_ROWS:
            raise UserError(f"{self.path} claims {count:,} rows: do not trust it")
        return count

    def read(self, columns: Sequence[str], most: int | None = None) -> pa.Table:
        """These columns, of the first `most` rows. Raises UserError."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        batches: list[Any] = []
        size = count = 0
        with sound(self.path), pq.ParquetFile(self.path, metadata=metadata(self.path)) as file:
            wanted = min(self.rows, self.rows if most is None else most)
            if not wanted or not columns:
                return file.read_row_groups([], columns=list(columns))
            for batch in file.iter_batches(min(8192, wanted), columns=list(columns), use_threads=False):
                batch.validate(full=True)
                batches.append(batch)
                size, count = size + batch.nbytes, count + batch.num_rows
                if size > MOST_TEXT_BYTES:
                    raise UserError(f"{self.path} holds more than {MOST_TEXT_BYTES:,} bytes of text: do not trust it")
                if count >= wanted:
                    break
            return pa.Table.from_batches(batches)


def locate_copy(hub: str, root: Path | None) -> Path:
    """The folder of a copy: `hub` is one, or a name on the hub, fetched where it is not on this machine."""
    for folder in [Path(hub).expanduser(), *([root / hub] if root else [])]:
        if hub and folder.is_dir():
            return folder.absolute()
    name, _, revision = hub.partition("@")
    owner, *rest = name.split("/")
    if not rest or not {"", ".", "..", "~"}.isdisjoint([owner, *rest]):
        raise UserError(f"hub: folder '{hub}' does not exist: give a folder of Parquet files, or OWNER/NAME on the hub")
    return _fetched(f"{owner}/{rest[0]}", "/".join(rest[1:]), revision or None)


def files(folder: Path) -> list[CopyFile]:
    """The Parquet files below a folder, in their order. Raises UserError where one of several shards is missing."""
    found = [_file(folder, path) for path in _below(folder, DEPTH)]
    for file in found:
        if shard := SHARD.fullmatch(file.path.stem):
            there = {other.path.stem[: shard.end("number")] for other in found if other.path.parent == file.path.parent}
            for number in range(min(int(shard["count"]), 1 + len(there))):
                stem = f"{shard['split']}-{number:05d}"
                if stem not in there:
                    raise UserError(f"{stem} is missing beside {file.path}: get the copy again")
    return found


def official(said: str, known: Sequence[str], hint: str = "") -> str | None:
    """Which of the official parts `known` is called `said`; of val2014 and val2017 that whose year is in `hint`."""
    if said in known:
        return said
    alike = [name for name in known if plain_name(name) == plain_name(said)]
    dated = [name for name in alike if (year := re.search(r"\d{4}", name)) and year[0] in said + hint]
    return next(iter([*dated, *alike]), None)


def plain_name(name: str) -> str:
    """A split's name without years, punctuation and the like: `validation` and `val2014` are `val`."""
    letters = re.sub(r"[^a-z]", "", name.lower()).replace("balanced", "")
    return SYNONYMS.get(letters, letters)


def named_after(name: str, root: Path) -> Iterator[Path]:
    """The folders that a data set's name gives: the root itself, and those right below it."""
    wanted = _letters(name)
    if _letters(root.absolute().name) == wanted:
        yield root.absolute()
    with os.scandir(root) as entries:
        yield from sorted(Path(e.path).absolute() for e in entries if _letters(e.name) == wanted and e.is_dir())


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "plus"))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            found = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror or error}; mend its permissions") from None
    for name, is_folder in found:
        if is_folder and depth:
            yield from _below(folder / name, depth - 1)
        elif not is_folder and name.endswith(".parquet"):
            yield folder / name


def _file(folder: Path, path: Path) -> CopyFile:
    name = path.relative_to(folder)
    shard = SHARD.fullmatch(path.stem)
    folders = [part for part in name.parts[:-1] if part != "data"]
    split = shard["split"] if shard else path.stem
    if split.isdigit() and folders:  # the hub's own conversion: <configuration>/<split>/0000.parquet
        split = folders.pop()
    if folders and (configuration := GQA.fullmatch(folders[-1])):
        split = configuration["split"]
    return CopyFile(path, name.as_posix(), split, "/".join([*folders, shard["count"] if shard else ""]))


def _fetched(name: str, below: str, revision: str | None) -> Path:
    """A repository's Parquet files in the library's cache; no other file is fetched, and none is run."""
    from huggingface_hub import snapshot_download

    failure: Exception | None = None
    for tried in [revision] if revision else [None, CONVERTED]:
        try:
            pattern = f"{below}/*.parquet" if below else "*.parquet"
            folder = snapshot_download(name, repo_type="dataset", revision=tried, allow_patterns=pattern)
        except Exception as error:  # of the hub's classes, of the HTTP library's, and OSError
            failure = failure or error
            continue
        if (copy := Path(folder) / below).is_dir() and next(_below(copy, DEPTH), None):
            return copy.absolute()
    if failure is None:
        raise UserError(f"hub: '{name}' holds no Parquet file{f' below {below}' if below else ''}: choose another copy")
    hint = "" if name in KNOWN else did_you_mean(name, KNOWN).replace(":", ";", 1)
    raise UserError(
        f"hub: '{name}' is not on this machine and was not fetched{hint} ({one_line(failure)[:160]}): connect once, "
        "point HF_HOME to a cache that has it, or give a folder of Parquet files"
    ) from failure
