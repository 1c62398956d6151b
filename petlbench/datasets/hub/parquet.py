"""Copies of the data sets in Parquet files, as on the hub, which hold images or name image files.

Copies name their columns differently (petlbench.datasets.hub.columns); the option `columns` names those that are not
known. Only text columns are read at once. A file and a row (`val-00000-of-00002.parquet#7`) name an image inside, which
is fetched when its row is taken. `hub` takes OWNER/NAME, OWNER/NAME/FOLDER and OWNER/NAME@REVISION. No code runs.
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

MARK = ".parquet#"  # in the name of an image inside: <file>.parquet#<row>
YEAR = re.compile(r"COCO_[a-z]+(20\d\d)_")
SURPLUS = 1.1  # times the published size: counts differ slightly between editions


class HubParquet(Reader):
    """A reader of a folder of Parquet files that are named after splits or have a column `split`."""

    layout = "parquet"

    def __init__(self, source: Declaration, root: Path, copy: Path) -> None:
        super().__init__(source, root)
        self.copy = copy
        self._read_parts: dict[tuple[str, str], dict[str, list[str] | None]] = {}

    @classmethod
    def find(cls, source: Declaration, root: Path | None) -> Self | None:
        if not any(columns.kind_of(source.features(task)) for task in source.tasks):
            return None
        if source.config.hub is not None:
            copy = local_copy.locate_copy(source.config.hub, root)
            reader = cls(source, root or copy, copy)
            reader._require_usable()
            return reader
        for folder in local_copy.folders_named(source.name, root) if root else ():
            reader = cls(source, root or folder, folder)
            if reader._split_files and (source.config.columns or source.config.layout == cls.layout):
                reader._require_usable()
            if any(True for task in source.tasks for _ in reader._usable_files(task)):
                return reader
        return None

    @classmethod
    def places(cls, source: Declaration) -> str:
        return f"Parquet files in {source.name}/, {source.name}/data/ (or set `hub`)"

    def parts(self, task: str) -> tuple[str, ...]:
        present = {part for file in self._usable_files(task) for part in self._values(task, file)}
        return tuple(part for part in self._official(task) if part in present)

    def files(self, task: str, part: str) -> list[Path]:
        return [file.path for file in [*self._select(task, part), *self._image_files(task, part)]]

    def read(self, task: str, part: str) -> Part:
        import pyarrow as pa
        import pyarrow.compute as pc

        from petlbench.datasets.hub.rows import BY_KIND, with_answers

        kind, skips, tables, first = self._kinds[task], Skips(), [], 0
        for file in self._select(task, part):
            try:
                raw = self._raw(task, part, file, first, skips)
                tables.append(BY_KIND[kind](raw, part, str(file.path), skips))
            except pa.ArrowException as error:
                message = " ".join(str(error).split())[:160]
                raise UserError(f"{file.path}: a column is of another type ({message}): set `columns`") from None
            first += file.rows
        table = pa.concat_tables(tables)
        if kind == "questions":
            table = with_answers(table, part, skips)
        self._check_size(task, part, table.num_rows)
        counts = pc.value_counts(table["sample_id"].combine_chunks())
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(repeated):
            raise UserError(
                f"{self.copy}, {part}: '{repeated[0]['values']}' identifies several rows: get the copy again"
            )
        return Part(table, skips)

    def digest(self, path: Path) -> str:
        """Return a digest of the footer, which has the images' sizes, and of the content of the other columns."""
        return shards.text_digest(path)

    def located(self, names: Sequence[str]) -> list[str]:
        outside = [name for name in names if MARK not in name]
        places = dict(zip(outside, super().located(outside), strict=True))
        for name in names:
            if MARK in name:
                self._locate_inside(name)
                places[name] = f"{self.copy}/{name}"
        return [places[name] for name in names]

    def absent(self, places: Iterable[str]) -> dict[str, str]:
        return super().absent(place for place in places if MARK not in place)

    def opened(self, image: Mapping[str, Any]) -> Image:
        if image["bytes"] is None and MARK in image["path"]:
            return images.decoded({"path": image["path"], "bytes": self._encoded(image["path"])})
        return images.decoded(image)

    def stamp(self, place: str) -> str:
        """Return a text that changes when the image at a place changes."""
        return shards.stamp(Path(place.rpartition("#")[0] if MARK in place else place))

    def fault(self, place: str) -> str | None:
        """Return why the image at a place cannot be used, or None."""
        if MARK not in place:
            return images.fault(Path(place))
        return images.fault(io.BytesIO(self._encoded(place)))

    @cached_property
    def _kinds(self) -> dict[str, str]:
        """Return the kind of rows of each task whose columns the hub's copies can give."""
        kinds = {task: columns.kind_of(self.source.features(task)) for task in self.source.tasks}
        return {task: kind for task, kind in kinds.items() if kind is not None}

    @cached_property
    def _files(self) -> list[CopyFile]:
        return local_copy.files(self.copy)

    @cached_property
    def _by_name(self) -> dict[str, CopyFile]:
        return {file.name: file for file in self._files}

    def _check_size(self, task: str, part: str, count: int) -> None:
        """Raise UserError if a part has more rows than published: it is another division of the same name."""
        kind = self._kinds[task]
        what = "images" if kind == "captions" else kind
        published = self.source.sizes.get(task, {}).get(part, {}).get(what)
        if published is not None and count > SURPLUS * published:
            sizes = f"{count:,} {what} in {part}, where {published:,} were published"
            raise UserError(
                f"{self.copy} has {sizes}: it is divided otherwise, choose another copy or the official files"
            )

    def _columns(self, task: str, file: CopyFile) -> dict[str, str]:
        return columns.resolve_columns(self._kinds[task], file.schema.names, self.source.config.columns)

    def _usable_files(self, task: str) -> Iterator[CopyFile]:
        """Yield the files that name a split and have the columns that the task needs."""
        for file in self._split_files if task in self._kinds else ():
            if not columns.missing_columns(self._kinds[task], self._columns(task, file)):
                yield file

    @cached_property
    def _split_files(self) -> list[CopyFile]:
        """Return the files that belong to a split; other files may hold anything."""
        return [
            f for f in self._files if local_copy.plain_name(f.split) in local_copy.SPLITS or "split" in f.schema.names
        ]

    def _require_usable(self) -> None:
        """Raise UserError if the copy that the user chose has no usable file."""
        if not self._split_files:
            raise UserError(f"{self.copy} has no Parquet file named after a split or with a column `split`: fix `hub`")
        present = list(dict.fromkeys(name for file in self._split_files for name in file.schema.names))
        columns.check_overrides(self.source.config.columns, self._kinds.values(), present, self.copy)
        for task in self._kinds:
            if next(self._usable_files(task), None):
                return
        task, file = min(self._kinds), self._split_files[0]
        names = columns.missing_columns(self._kinds[task], self._columns(task, file))
        option = f"columns: {{{names[0].split()[0]}: NAME}}"
        description = columns.list_columns(file.schema.names)
        raise UserError(f"{file.path} has no column for {', '.join(names)}: {description}; set {option}")

    def _official(self, task: str) -> list[str]:
        """Return the source's names of its parts, first those that make up its splits."""
        chosen = [part for split in SPLITS for part in self.source.choice(task, split).parts]
        return list(dict.fromkeys([*chosen, *self.source.sizes.get(task, {})]))

    def _values(self, task: str, file: CopyFile) -> dict[str, list[str] | None]:
        """Return the parts with rows in a file, each with the values of the column `split` that mean it, or None."""
        if (task, file.name) not in self._read_parts:
            self._read_parts[task, file.name] = self._read_values(task, file)
        return self._read_parts[task, file.name]

    def _read_values(self, task: str, file: CopyFile) -> dict[str, list[str] | None]:
        import pyarrow.compute as pc

        columns = self._columns(task, file)
        hint = f"{self.source.config.hub or self.copy.name} {file.name}"
        if "file_name" in columns:
            names = str(file.read([columns["file_name"]], most=1).to_pylist())
            hint = " ".join(YEAR.findall(names)) or hint
        parts, column = self._official(task), columns.get("split")
        values: dict[str, list[str] | None] = {}
        if column is not None and str(file.schema.field(column).type) in ("string", "large_string"):
            for value in pc.unique(file.read([column])[column].combine_chunks()).drop_null().to_pylist():
                if part := local_copy.official_part(value, parts, hint):
                    values[part] = [*(values.get(part) or []), value]
        if not values and (part := local_copy.official_part(file.split, parts, hint)):
            values[part] = None
        return values

    def _select(self, task: str, part: str) -> list[CopyFile]:
        """Return the files with rows of a part. Raise UserError if the copy has the part more than once."""
        files = [file for file in self._usable_files(task) if part in self._values(task, file)]
        divided = all(self._values(task, file)[part] for file in files)
        if len({(file.series, divided or file.split) for file in files}) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError(f"{self.copy} has {part} more than once ({names}): set `hub` to the folder of one")
        return files

    def _image_files(self, task: str, part: str) -> list[CopyFile]:
        """Return the files that hold images by identifier, for annotations of the same part without images."""
        if all("image" in self._columns(task, file) for file in self._select(task, part)):
            return []
        parts = self._official(task)
        of_part = [file for file in self._split_files if local_copy.official_part(file.split, parts) == part]
        return [file for file in of_part if self._picture(file) and columns.identifier_column(file.schema)]

    def _picture(self, file: CopyFile) -> str | None:
        """Return the column of encoded images, or None."""
        return columns.picture_of(file.schema, self._columns(min(self._kinds), file))

    def _raw(self, task: str, part: str, file: CopyFile, first: int, skips: Skips) -> pa.Table:
        """Return the file's rows of a part, as `rows` takes them; `first` rows of the part lie in earlier files."""
        import pyarrow as pa
        import pyarrow.compute as pc

        from petlbench.datasets.hub.raw import raw_rows, with_images

        columns = self._columns(task, file)
        raw = raw_rows(file, columns, part, first)
        if (values := self._values(task, file)[part]) is not None:
            raw = raw.filter(pc.is_in(raw["split"].cast(pa.string()), pa.array(values)))
        stores = [(store, str(self._picture(store))) for store in self._image_files(task, part)]
        raw = with_images(raw, part, file.path, stores, named="image" in columns)
        if nowhere := raw["image"].null_count:
            which = raw.filter(pc.is_null(raw["image"]))["number"][0]
            skips.add("no image", f"row {which} ({file.path})", nowhere)
        return raw.filter(pc.is_valid(raw["image"]))

    def _encoded(self, place: str) -> bytes:
        """Return the bytes of an image inside, empty if the row has none. Raise UserError if the file is damaged."""
        file, row = self._locate_inside(place.removeprefix(f"{self.copy}/"))
        return shards.encoded(file.path, str(self._picture(file)), row) or b""

    def _locate_inside(self, name: str) -> tuple[CopyFile, int]:
        """Return the file and the row of the image `name`. Raise UserError unless the file is one of the copy's own."""
        file_name, _, row = name.rpartition("#")
        file = self._by_name.get(file_name)
        if file is None or not row.isdecimal() or int(row) >= file.rows:
            raise UserError(f"{name} is not an image of the copy in {self.copy}: clear {cache_dir()}")
        return file, int(row)
