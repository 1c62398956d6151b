"""Find a copy of a data set in Parquet files, on the hub or in a folder, and the part to which each file belongs.

The hub library's environment variables HF_HOME and HF_HUB_OFFLINE decide about caches and the network.
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
from petlbench.datasets.hub.shards import metadata, parquet_errors

if TYPE_CHECKING:
    import pyarrow as pa

KNOWN = (
    *("lmms-lab/RefCOCO", "lmms-lab/RefCOCOplus", "lmms-lab/RefCOCOg"),
    *("jxu124/refcoco", "jxu124/refcocoplus", "jxu124/refcocog"),
    *("lmms-lab/VQAv2", "lmms-lab/GQA", "lmms-lab/flickr30k", "nlphuji/flickr30k"),
    *("lmms-lab/COCO-Caption", "lmms-lab/COCO-Caption2017", "yerevann/coco-karpathy"),
    "nlphuji/mscoco_2014_5k_test_image_text_retrieval",
)
CONVERTED = "refs/convert/parquet"  # the hub's own conversion of data sets in other formats
DEPTH = 2  # levels of folders below the copy's: <configuration>/<split>/0000.parquet
SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(-\w+)?")
GQA = re.compile(r"(?P<split>.+_(all|balanced))_(instructions|images)")
SYNONYMS = {"validation": "val", "valid": "val", "dev": "val", "training": "train"}
SPLITS = ("train", "restval", "val", "test", "testa", "testb", "testdev")  # plain names of splits that files may carry
MOST_ROWS = 50_000_000
MOST_TEXT_BYTES = 1 << 30  # in one file's columns other than images: five times the largest copy's


@dataclass(frozen=True)
class CopyFile:
    """One Parquet file: its path, its name below the copy's folder, and the split and series that the name gives.

    `series` is the folder without the split's own folder, and the number of shards; shards of one part share it.
    """

    path: Path
    name: str
    split: str
    series: str

    @cached_property
    def schema(self) -> pa.Schema:
        with parquet_errors(self.path):
            return metadata(self.path).schema.to_arrow_schema()

    @cached_property
    def rows(self) -> int:
        count = metadata(self.path).num_rows
        if not 0 <= count <= MOST_ROWS:
            raise UserError(f"{self.path} claims {count:,} rows: do not trust it")
        return count

    def read(self, columns: Sequence[str], most: int | None = None) -> pa.Table:
        """Return these columns of the first `most` rows. Raise UserError if the file is damaged or too large."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        batches: list[Any] = []
        size = count = 0
        with parquet_errors(self.path), pq.ParquetFile(self.path, metadata=metadata(self.path)) as file:
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
    """Return the folder of a copy; `hub` is a folder, or a name on the hub, which is fetched unless cached here."""
    for folder in [Path(hub).expanduser(), *([root / hub] if root else [])]:
        if hub and folder.is_dir():
            return folder.absolute()
    name, _, revision = hub.partition("@")
    owner, *rest = name.split("/")
    if not rest or not {"", ".", "..", "~"}.isdisjoint([owner, *rest]):
        raise UserError(f"hub: folder '{hub}' does not exist: give a folder of Parquet files, or OWNER/NAME on the hub")
    return _fetch(f"{owner}/{rest[0]}", "/".join(rest[1:]), revision or None)


def files(folder: Path) -> list[CopyFile]:
    """Return the Parquet files below a folder, sorted. Raise UserError if one of several shards is missing."""
    copies = [_copy_file(folder, path) for path in _parquet_files(folder, DEPTH)]
    for file in copies:
        if shard := SHARD.fullmatch(file.path.stem):
            stems = {
                other.path.stem[: shard.end("number")] for other in copies if other.path.parent == file.path.parent
            }
            for number in range(min(int(shard["count"]), 1 + len(stems))):
                stem = f"{shard['split']}-{number:05d}"
                if stem not in stems:
                    raise UserError(f"{stem} is missing beside {file.path}: get the copy again")
    return copies


def official_part(name: str, parts: Sequence[str], hint: str = "") -> str | None:
    """Return the official part, of `parts`, that `name` means, or None; a year in `hint` decides val2014 or val2017."""
    if name in parts:
        return name
    alike = [part for part in parts if plain_name(part) == plain_name(name)]
    dated = [part for part in alike if (year := re.search(r"\d{4}", part)) and year[0] in name + hint]
    return next(iter([*dated, *alike]), None)


def plain_name(name: str) -> str:
    """Return a split's name without years and punctuation: `validation` and `val2014` give `val`."""
    letters = re.sub(r"[^a-z]", "", name.lower()).replace("balanced", "")
    return SYNONYMS.get(letters, letters)


def folders_named(name: str, root: Path) -> Iterator[Path]:
    """Yield the folders named like a data set: the root itself, and folders directly below it."""
    wanted = _letters(name)
    if _letters(root.absolute().name) == wanted:
        yield root.absolute()
    with os.scandir(root) as entries:
        yield from sorted(Path(e.path).absolute() for e in entries if _letters(e.name) == wanted and e.is_dir())


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "plus"))


def _parquet_files(folder: Path, depth: int) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            children = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror or error}; fix its permissions") from None
    for name, is_folder in children:
        if is_folder and depth:
            yield from _parquet_files(folder / name, depth - 1)
        elif not is_folder and name.endswith(".parquet"):
            yield folder / name


def _copy_file(folder: Path, path: Path) -> CopyFile:
    name = path.relative_to(folder)
    shard = SHARD.fullmatch(path.stem)
    folders = [part for part in name.parts[:-1] if part != "data"]
    split = shard["split"] if shard else path.stem
    if split.isdigit() and folders:  # the hub's own conversion: <configuration>/<split>/0000.parquet
        split = folders.pop()
    if folders and (configuration := GQA.fullmatch(folders[-1])):
        split = configuration["split"]
    return CopyFile(path, name.as_posix(), split, "/".join([*folders, shard["count"] if shard else ""]))


def _fetch(name: str, below: str, revision: str | None) -> Path:
    """Return the cache folder of a repository's Parquet files; fetch no other file, and run none."""
    from huggingface_hub import snapshot_download

    failure: Exception | None = None
    for tried in [revision] if revision else [None, CONVERTED]:
        try:
            pattern = f"{below}/*.parquet" if below else "*.parquet"
            folder = snapshot_download(name, repo_type="dataset", revision=tried, allow_patterns=pattern)
        except Exception as error:  # classes of the hub library and of the HTTP library, and OSError
            failure = failure or error
            continue
        if (copy := Path(folder) / below).is_dir() and next(_parquet_files(copy, DEPTH), None):
            return copy.absolute()
    if failure is None:
        raise UserError(f"hub: '{name}' holds no Parquet file{f' below {below}' if below else ''}: choose another copy")
    hint = "" if name in KNOWN else did_you_mean(name, KNOWN).replace(":", ";", 1)
    raise UserError(
        f"hub: '{name}' is not on this machine and was not fetched{hint} ({one_line(failure)[:160]}): connect once, "
        "point HF_HOME to a cache that has it, or give a folder of Parquet files"
    ) from failure
