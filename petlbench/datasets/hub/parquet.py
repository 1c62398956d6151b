"""Copies of the data sets in Parquet files, as the hub has them: with the images inside, or naming image files.

Columns go by many names (petlbench.datasets.hub.columns); the option `columns` tells those that are not known. Of the
columns only texts are read; an image inside is named by file and row (`val-00000-of-00002.parquet#7`), and fetched when
its row is taken. `hub: OWNER/NAME` takes `OWNER/NAME/FOLDER` and `OWNER/NAME@REVISION` too. No code of a copy runs.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from petlbench.api.source import SPLITS
from petlbench.core.errors import UserError
from petlbench.core.paths import cache_dir
from petlbench.datasets.files import images
from petlbench.datasets.files.declaration import Declaration
from petlbench.datasets.files.reader import Part, Reader, Skips
from petlbench.datasets.hub import columns, local_copy, shards
from petlbench.datasets.hub.local_copy import CopyFile

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

MARK = ".parquet#"  # of an image inside: <file>.parquet#<row>
YEAR = re.compile(r"COCO_[a-z]+(20\d\d)_")
SURPLUS = 1.1  # times the published size: counts differ a little between editions


class HubParquet(Reader):
    """A folder of Parquet files that are named after splits, or have a column `split`."""

    layout = "parquet"

    def __init__(self, source: Declaration, root: Path, copy: Path) -> None:
        super().__init__(source, root)
        self.copy = copy
        self._told: dict[tuple[str, str], dict[str, list[str] | None]] = {}

    @classmethod
    def find(cls, source: Declaration, root: Path | None) -> Self | None:
        if not any(columns.kind_of(source.features(task)) for task in source.tasks):
            return None
        if source.config.hub is not None:
            copy = local_copy.locate_copy(source.config.hub, root)
            made = cls(source, root or copy, copy)
            made._demand()
            return made
        for folder in local_copy.named_after(source.name, root) if root else ():
            made = cls(source, root or folder, folder)
            if made._named and (source.config.columns or source.config.layout == cls.layout):
                made._demand()
            if any(True for task in source.tasks for _ in made._serving(task)):
                return made
        return None

    @classmethod
    def places(cls, source: Declaration) -> str:
        return f"Parquet files in {source.name}/, {source.name}/data/ (or set `hub`)"

    def parts(self, task: str) -> tuple[str, ...]:
        there = {part for file in self._serving(task) for part in self._values(task, file)}
        return tuple(part for part in self._official(task) if part in there)

    def files(self, task: str, part: str) -> list[Path]:
        return [file.path for file in [*self._of(task, part), *self._stores(task, part)]]

    def read(self, task: str, part: str) -> Part:
        import pyarrow as pa
        import pyarrow.compute as pc

        from petlbench.datasets.hub.rows import BY_KIND, with_answers

        kind, skips, tables, first = self._kinds[task], Skips(), [], 0
        for file in self._of(task, part):
            try:
                raw = self._raw(task, part, file, first, skips)
                tables.append(BY_KIND[kind](raw, part, str(file.path), skips))
            except pa.ArrowException as error:
                said = " ".join(str(error).split())[:160]
                raise UserError(f"{file.path}: a column is of another type ({said}): set `columns`") from None
            first += file.rows
        table = pa.concat_tables(tables)
        if kind == "questions":
            table = with_answers(table, part, skips)
        self._compare(task, part, table.num_rows)
        counts = pc.value_counts(table["sample_id"].combine_chunks())
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            raise UserError(f"{self.copy}, {part}: '{twice[0]['values']}' identifies several rows: get the copy again")
        return Part(table, skips)

    def digest(self, path: Path) -> str:
        """Of all that rows depend on: the footer, with the sizes of the images, and the content of other columns."""
        return shards.text_digest(path)

    def located(self, names: Sequence[str]) -> list[str]:
        outside = [name for name in names if MARK not in name]
        places = dict(zip(outside, super().located(outside), strict=True))
        for name in names:
            if MARK in name:
                self._inside(name)
                places[name] = f"{self.copy}/{name}"
        return [places[name] for name in names]

    def absent(self, places: Iterable[str]) -> dict[str, str]:
        return super().absent(place for place in places if MARK not in place)

    def opened(self, image: Mapping[str, Any]) -> Image:
        if image["bytes"] is None and MARK in image["path"]:
            return images.decoded({"path": image["path"], "bytes": self._encoded(image["path"])})
        return images.decoded(image)

    def stamp(self, place: str) -> str:
        """What changes when the image at a place does."""
        return shards.stamp(Path(place.rpartition("#")[0] if MARK in place else place))

    def fault(self, place: str) -> str | None:
        """Why the image at a place cannot be used, or None."""
        if MARK not in place:
            return images.fault(Path(place))
        return images.fault(io.BytesIO(self._encoded(place)))

    @cached_property
    def _kinds(self) -> dict[str, str]:
        """What the rows of each task are about, of those tasks that have columns of the hub's copies."""
        kinds = {task: columns.kind_of(self.source.features(task)) for task in self.source.tasks}
        return {task: kind for task, kind in kinds.items() if kind is not None}

    @cached_property
    def _files(self) -> list[CopyFile]:
        return local_copy.files(self.copy)

    @cached_property
    def _by_name(self) -> dict[str, CopyFile]:
        return {file.name: file for file in self._files}

    def _compare(self, task: str, part: str, count: int) -> None:
        """Raise UserError for a part with more rows than were published: it is another division by the same name."""
        kind = self._kinds[task]
        what = "images" if kind == "captions" else kind
        published = self.source.sizes.get(task, {}).get(part, {}).get(what)
        if published is not None and count > SURPLUS * published:
            told = f"{count:,} {what} in {part}, where {published:,} were published"
            raise UserError(
                f"{self.copy} has {told}: it is divided otherwise, choose another copy or the official files"
            )

    def _columns(self, task: str, file: CopyFile) -> dict[str, str]:
        return columns.resolve_columns(self._kinds[task], file.schema.names, self.source.config.columns)

    def _serving(self, task: str) -> Iterator[CopyFile]:
        """The files with what the task needs that tell which part they are of."""
        for file in self._named if task in self._kinds else ():
            if not columns.lacking(self._kinds[task], self._columns(task, file)):
                yield file

    @cached_property
    def _named(self) -> list[CopyFile]:
        """Without those that are of no split, which may be of anything."""
        return [
            f for f in self._files if local_copy.plain_name(f.split) in local_copy.SPLITS or "split" in f.schema.names
        ]

    def _demand(self) -> None:
        """Raise UserError when the copy that was asked for serves nothing."""
        if not self._named:
            raise UserError(f"{self.copy} has no Parquet file named after a split or with a column `split`: mend `hub`")
        there = list(dict.fromkeys(name for file in self._named for name in file.schema.names))
        columns.check_said(self.source.config.columns, self._kinds.values(), there, self.copy)
        for task in self._kinds:
            if next(self._serving(task), None):
                return
        task, file = min(self._kinds), self._named[0]
        names = columns.lacking(self._kinds[task], self._columns(task, file))
        told = f"columns: {{{names[0].split()[0]}: NAME}}"
        listed = columns.listed(file.schema.names)
        raise UserError(f"{file.path} has no column for {', '.join(names)}: {listed}; set {told}")

    def _official(self, task: str) -> list[str]:
        """The source's names of its parts; those that its splits are made of first."""
        chosen = [part for split in SPLITS for part in self.source.choice(task, split).parts]
        return list(dict.fromkeys([*chosen, *self.source.sizes.get(task, {})]))

    def _values(self, task: str, file: CopyFile) -> dict[str, list[str] | None]:
        """The parts of which a file has rows, each with the values of the column `split` that mean it, or None."""
        if (task, file.name) not in self._told:
            self._told[task, file.name] = self._told_values(task, file)
        return self._told[task, file.name]

    def _told_values(self, task: str, file: CopyFile) -> dict[str, list[str] | None]:
        import pyarrow.compute as pc

        columns = self._columns(task, file)
        hint = f"{self.source.config.hub or self.copy.name} {file.name}"
        if "file_name" in columns:
            names = str(file.read([columns["file_name"]], most=1).to_pylist())
            hint = " ".join(YEAR.findall(names)) or hint
        known, column = self._official(task), columns.get("split")
        found: dict[str, list[str] | None] = {}
        if column is not None and str(file.schema.field(column).type) in ("string", "large_string"):
            for value in pc.unique(file.read([column])[column].combine_chunks()).drop_null().to_pylist():
                if part := local_copy.official(value, known, hint):
                    found[part] = [*(found.get(part) or []), value]
        if not found and (part := local_copy.official(file.split, known, hint)):
            found[part] = None
        return found

    def _of(self, task: str, part: str) -> list[CopyFile]:
        """The files with rows of a part. Raises UserError where it is there more than once."""
        found = [file for file in self._serving(task) if part in self._values(task, file)]
        divided = all(self._values(task, file)[part] for file in found)
        if len({(file.series, divided or file.split) for file in found}) > 1:
            names = ", ".join(file.name for file in found)
            raise UserError(f"{self.copy} has {part} more than once ({names}): set `hub` to the folder of one")
        return found

    def _stores(self, task: str, part: str) -> list[CopyFile]:
        """Files that hold images by identifier, for annotations of the same part without images."""
        if all("image" in self._columns(task, file) for file in self._of(task, part)):
            return []
        known = self._official(task)
        of_part = [file for file in self._named if local_copy.official(file.split, known) == part]
        return [file for file in of_part if self._picture(file) and columns.identifier_column(file.schema)]

    def _picture(self, file: CopyFile) -> str | None:
        """The column of encoded images."""
        return columns.picture_of(file.schema, self._columns(min(self._kinds), file))

    def _raw(self, task: str, part: str, file: CopyFile, first: int, skips: Skips) -> pa.Table:
        """The file's rows of a part, as `hub_rows` takes them; `first`: how many rows of the part's files precede."""
        import pyarrow as pa
        import pyarrow.compute as pc

        from petlbench.datasets.hub.raw import raw_rows, with_images

        columns = self._columns(task, file)
        raw = raw_rows(file, columns, part, first)
        if (values := self._values(task, file)[part]) is not None:
            raw = raw.filter(pc.is_in(raw["split"].cast(pa.string()), pa.array(values)))
        stores = [(store, str(self._picture(store))) for store in self._stores(task, part)]
        raw = with_images(raw, part, file.path, stores, named="image" in columns)
        if nowhere := raw["image"].null_count:
            which = raw.filter(pc.is_null(raw["image"]))["number"][0]
            skips.add("no image", f"row {which} ({file.path})", nowhere)
        return raw.filter(pc.is_valid(raw["image"]))

    def _encoded(self, place: str) -> bytes:
        """The bytes of an image inside; none where the row has none. Raises UserError."""
        file, row = self._inside(place.removeprefix(f"{self.copy}/"))
        return shards.encoded(file.path, str(self._picture(file)), row) or b""

    def _inside(self, name: str) -> tuple[CopyFile, int]:
        """Of the image `name`: the file, which is one of the copy's own, and the row. Raises UserError."""
        file_name, _, row = name.rpartition("#")
        file = self._by_name.get(file_name)
        if file is None or not row.isdecimal() or int(row) >= file.rows:
            raise UserError(f"{name} is no image of the copy in {self.copy}: clear {cache_dir()}")
        return file, int(row)
