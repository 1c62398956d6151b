"""Read rows of a copy's file unchanged, under our names of the columns, each with its image's name and place."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from petlbench.datasets.files import images
from petlbench.datasets.files.coco import image_name
from petlbench.datasets.hub import shards
from petlbench.datasets.hub.columns import identifier_column, picture_of
from petlbench.datasets.hub.local_copy import CopyFile

COCO = re.compile(r"(?:COCO_(\w+?)_)?(\d{12})(?:_\d+)?\.jpg")  # _<annotation> follows if a copy repeats an image
COCO_FOLDER = re.compile(r"(train|val|test)(?:-dev)?(20\d\d)")  # a part named like its folder of images


def raw_rows(file: CopyFile, columns: dict[str, str], part: str, first: int) -> pa.Table:
    """Return all rows: texts, `number` (counted from `first`) and `image`, its place, null if the row has none."""
    picture, image_column = picture_of(file.schema, columns), columns.get("image")
    wanted = {ours: theirs for ours, theirs in columns.items() if ours != "image"}
    table = file.read(list(dict.fromkeys(wanted.values())))
    raw = pa.table({ours: table[theirs] for ours, theirs in wanted.items()})
    inside = references(file, picture) if picture else pa.nulls(file.rows, pa.string())
    if inside.null_count and image_column is not None:
        inside = pc.coalesce(inside, _image_file_names(file, image_column, raw, part))
    return raw.append_column("number", pa.array(first + np.arange(file.rows))).append_column("image", inside)


def with_images(
    raw: pa.Table, part: str, source: Path, stores: Sequence[tuple[CopyFile, str]], *, named: bool
) -> pa.Table:
    """Return the rows with `image_id`, and with `image` found by identifier unless the rows name it (`named`).

    `source` is the rows' file. `stores` are files that hold images by identifier, each with the images' column.
    """
    ids = as_text(_array(raw, "image_id")) if "image_id" in raw.column_names else None
    places = _array(raw, "image")
    if ids is not None and not named:
        places = (
            _find_stored(ids, stores) if stores else _map_distinct(lambda name: _by_identifier(name, part, source), ids)
        )
    numbers = [_map_distinct(_number_or_name, _array(raw, "file_name"))] if "file_name" in raw.column_names else []
    ids = pc.coalesce(*([] if ids is None else [ids]), *numbers, places)
    kept = [name for name in raw.column_names if name not in ("image", "image_id")]
    return raw.select(kept).append_column("image", places).append_column("image_id", ids)


def references(file: CopyFile, column: str) -> pa.Array:
    """Return names of the images inside a file, null if a row has none; images are read only if some are null."""
    present = np.ones(file.rows, dtype=bool)
    footer = shards.metadata(file.path)
    first = 0
    for group in range(footer.num_row_groups):
        count = footer.row_group(group).num_rows
        if nulls := shards.nulls(footer, group, column):
            valid = nulls < count and shards.group_images(file.path, group, column).is_valid().to_numpy()
            present[first : first + count] = valid
        first += count
    return pa.array([f"{file.name}#{row}" if present[row] else None for row in range(file.rows)], pa.string())


def as_text(array: pa.Array) -> pa.Array:
    """Return identifiers as text; whole numbers that were stored as floats lose their `.0`."""
    if pa.types.is_floating(array.type):
        array = array.cast(pa.int64(), safe=False)
    return array.cast(pa.string())


def _image_file_names(file: CopyFile, column: str, raw: pa.Table, part: str) -> pa.Array:
    """Return image files' names below an image base, COCO's in COCO's form; null if a row has none."""
    column_type = file.schema.field(column).type
    if pa.types.is_struct(column_type):
        if column_type.get_field_index("path") < 0:
            return pa.nulls(file.rows, pa.string())
        names = pc.struct_field(_array(file.read([f"{column}.path"]), column), "path")
    elif pa.types.is_string(column_type) or pa.types.is_large_string(column_type):
        names = _array(file.read([column]), column).cast(pa.string())
    else:
        return pa.nulls(file.rows, pa.string())
    if "folder" in raw.column_names:
        names = pc.coalesce(pc.binary_join_element_wise(_array(raw, "folder").cast(pa.string()), names, "/"), names)
    return _map_distinct(lambda name: _file_name(name, part, file.path), names)


def _file_name(name: str, part: str, source: Path) -> str:
    name = images.relative(re.sub(r"^https?://images\.cocodataset\.org/", "", name), source)
    coco = COCO.fullmatch(name.rpartition("/")[2])
    folder = coco and (coco[1] or ("/" not in name and _coco_folder(part)))
    return image_name(folder, int(coco[2])) if coco and folder else name


def _number_or_name(name: str) -> str:
    coco = COCO.fullmatch(name.rpartition("/")[2])
    return str(int(coco[2])) if coco else name


def _coco_folder(part: str) -> str | None:
    match = COCO_FOLDER.fullmatch(part)
    return match and match[1] + match[2]


def _by_identifier(name: str, part: str, source: Path) -> str:
    if (folder := _coco_folder(part)) and name.isdigit():
        return image_name(folder, int(name))
    return f"{images.relative(name, source)}.jpg"


def _find_stored(ids: pa.Array, stores: Sequence[tuple[CopyFile, str]]) -> pa.Array:
    keys, places = [], []
    for store, column in stores:
        keys.append(as_text(_array(store.read([identifier_column(store.schema) or ""]), 0)))
        places.append(references(store, column))
    return pa.concat_arrays(places).take(pc.index_in(ids, pa.concat_arrays(keys)))


def _map_distinct(convert: Callable[[str], str | None], names: pa.Array) -> pa.Array:
    """Return `convert` of each name, called once for each different name; null stays null."""
    coded = names.dictionary_encode()
    return pa.array([convert(name) for name in coded.dictionary.to_pylist()], pa.string()).take(coded.indices)


def _array(table: pa.Table, name: str | int) -> pa.Array:
    return table[name].combine_chunks()
