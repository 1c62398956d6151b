"""Turn rows of the hub's copies into our rows: one to many, one to one, or many to one.

`raw` has the copy's columns under our names in `hub.columns`, and always `image` (its place), `image_id` and `number`
(of the row within the part).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from petlbench.core.errors import UserError
from petlbench.datasets.files.reader import Skips
from petlbench.datasets.hub.columns import NORMALISED, TEXT, as_lists, identifiers, text_lists
from petlbench.datasets.hub.raw import as_text

CHECKED = 32  # rows that are enough to see how boxes are written
Array = np.ndarray[Any, np.dtype[Any]]


def expression_rows(raw: pa.Table, part: str, where: str, skips: Skips) -> pa.Table:
    """Return one row per expression; `sample_id` is the sentence's, or `<part>-<row>-<number within the row>`."""
    boxes = _boxes(raw, where)
    usable = _usable_boxes(boxes, raw, where, skips)
    column = _array(raw, "expression")
    texts = text_lists(column, NORMALISED, f"{where}, expression")
    values, parents = pc.utf8_trim_whitespace(pc.list_flatten(texts)), pc.list_parent_indices(texts).to_numpy()
    own_ids = _ids(raw, texts) or identifiers(column)
    if own_ids is not None and len(own_ids) == len(values) and not own_ids.null_count:
        ids = own_ids.to_pylist()
    else:
        within = np.arange(len(values)) - texts.offsets.to_numpy()[:-1][parents]
        numbers = raw["number"].to_numpy()[parents]
        ids = [f"{part}-{number}-{k}" for number, k in zip(numbers, within, strict=True)]
    blank = _blank(values)
    _count(skips, "empty expression", where, raw["number"].to_numpy()[parents[blank]])
    _count(skips, "no expression", where, _numbers_without_text(texts, raw))
    kept = ~blank & usable[parents]
    rows = raw.select(["image_id", "image"]).take(pa.array(parents[kept]))
    chosen = boxes[parents[kept]].astype(np.float32)
    return pa.table(
        {
            "sample_id": pa.array(np.array(ids, dtype=object)[kept], pa.string()),
            "image_id": rows["image_id"],
            "image": rows["image"],
            "expression": values.filter(pa.array(kept)),
            "box": pa.FixedSizeListArray.from_arrays(pa.array(chosen.reshape(-1)), 4),
            "subset": pa.array([part] * len(chosen), pa.string()),
        }
    )


def question_rows(raw: pa.Table, part: str, where: str, skips: Skips) -> pa.Table:
    """Return one row per question; a missing or empty column of answers gives no answers."""
    kept = ~_blank(pc.utf8_trim_whitespace(_text(raw, "question")))
    _count(skips, "empty question", where, raw["number"].to_numpy()[~kept])
    raw = raw.filter(pa.array(kept))
    nothing = pa.array([[]] * len(raw), pa.list_(pa.string()))
    answers = (
        text_lists(_array(raw, "answers"), TEXT, f"{where}, answers") if "answers" in raw.column_names else nothing
    )
    ids = _text(raw, "sample_id") if "sample_id" in raw.column_names else None
    if ids is None or ids.null_count:
        ids = pa.array([f"{part}-{number}" for number in raw["number"].to_pylist()], pa.string())
    kinds = _answer_types(raw) if "answer_type" in raw.column_names else pa.nulls(len(raw), pa.string())
    return pa.table(
        {
            "sample_id": ids,
            "image_id": raw["image_id"],
            "image": raw["image"],
            "question": _text(raw, "question"),
            "answers": as_lists(pc.fill_null(pc.list_flatten(answers), ""), pc.list_value_length(answers)),
            "answer_type": pc.fill_null(kinds, ""),
        }
    )


def caption_rows(raw: pa.Table, part: str, where: str, skips: Skips) -> pa.Table:
    """Return one row per image, even if the copy has one per caption; only white space around captions is cut."""
    column = _array(raw, "captions")
    texts = text_lists(column, TEXT, f"{where}, captions")
    values, parents = pc.utf8_trim_whitespace(pc.list_flatten(texts)), pc.list_parent_indices(texts).to_numpy()
    blank = _blank(values)
    _count(skips, "empty caption", where, raw["number"].to_numpy()[parents[blank]])
    lengths = np.bincount(parents[~blank], minlength=len(raw))
    _count(skips, "no caption", where, raw["number"].to_numpy()[lengths == 0])
    lists = as_lists(values.filter(pa.array(~blank)), lengths)
    table = pa.table({"image_id": raw["image_id"], "image": raw["image"], "captions": lists})
    table = table.filter(pa.array(lengths > 0))
    if not pa.types.is_list(column.type) and not pa.types.is_struct(column.type):
        table = _by_image(table)
    return table.append_column("sample_id", table["image_id"]).select(["sample_id", *table.column_names])


def with_answers(table: pa.Table, where: str, skips: Skips) -> pa.Table:
    """Drop questions without answers, unless no question has any, because then the part's answers are not public."""
    lengths = pc.list_value_length(table["answers"])
    kept = pc.greater(lengths, 0)
    dropped = table.filter(pc.invert(kept))
    if len(dropped) in (0, len(table)):
        return table
    skips.add("no answer", f"{dropped['sample_id'][0]} ({where})", len(dropped))
    return table.filter(kept)


BY_KIND: dict[str, Callable[[pa.Table, str, str, Skips], pa.Table]] = {
    "expressions": expression_rows,
    "questions": question_rows,
    "captions": caption_rows,
}


def _by_image(table: pa.Table) -> pa.Table:
    """Merge rows of one caption each into one row per image, in the order of the images' first rows."""
    coded = table["image_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.argsort(coded, kind="stable")
    _, firsts, counts = np.unique(coded, return_index=True, return_counts=True)
    values = pc.list_flatten(table["captions"].combine_chunks()).take(pa.array(order))
    rows = table.take(pa.array(firsts))
    return rows.set_column(rows.column_names.index("captions"), "captions", as_lists(values, counts))


def _answer_types(raw: pa.Table) -> pa.Array:
    """Return answer types as text; of GQA's several types, the structural one."""
    column = _array(raw, "answer_type")
    if pa.types.is_struct(column.type) and column.type.get_field_index("structural") >= 0:
        column = pc.struct_field(column, "structural")
    return as_text(column)


def _boxes(raw: pa.Table, where: str) -> Array:
    """Return x, y, width, height in pixels, (rows, 4); NaN if a row has no box."""
    if "box" not in raw.column_names:
        return _from_corners(_fours(raw, "corners", where))
    boxes = _fours(raw, "box", where)
    if "raw_anns" not in raw.column_names:
        return boxes
    try:
        expected = np.array(
            [json.loads(text)["bbox"] for text in raw["raw_anns"][:CHECKED].to_pylist()], dtype=np.float64
        )
        first = boxes[: len(expected)]
        if np.allclose(first, expected, atol=1.5, equal_nan=True):
            return boxes
        if np.allclose(_from_corners(first), expected, atol=1.5, equal_nan=True):
            return _from_corners(boxes)
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(
        f"{where}: its boxes are not those of raw_anns: set columns: {{box: NAME}} (x, y, width, height) or "
        "{corners: NAME} (x1, y1, x2, y2)"
    )


def _from_corners(corners: Array) -> Array:
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def _fours(raw: pa.Table, name: str, where: str) -> Array:
    column = _array(raw, name)
    number_type = getattr(column.type, "value_type", pa.null())
    if not (pa.types.is_floating(number_type) or pa.types.is_integer(number_type)):
        raise UserError(f"{where}, {name} is of type {column.type}, not lists of four numbers: set `columns`")
    lengths = pc.list_value_length(column)
    wrong = pc.indices_nonzero(pc.fill_null(pc.not_equal(lengths, 4), False))
    if len(wrong):
        number = raw["number"][wrong[0].as_py()].as_py()
        raise UserError(
            f"{where}, row {number}: {name} has {lengths[wrong[0].as_py()]} numbers, not 4: get the copy again"
        )
    boxes = np.full((len(column), 4), np.nan)
    present = column.is_valid().to_numpy(zero_copy_only=False)
    boxes[present] = pc.list_flatten(column).cast(pa.float64()).to_numpy(zero_copy_only=False).reshape(-1, 4)
    return boxes


def _usable_boxes(boxes: Array, raw: pa.Table, where: str, skips: Skips) -> Array:
    """Return, for each row, whether its box can be used; count the others."""
    finite = np.isfinite(boxes).all(1)
    with np.errstate(invalid="ignore"):
        area = (boxes[:, 2] > 0) & (boxes[:, 3] > 0)
        inside = (boxes[:, 0] + boxes[:, 2] > 0) & (boxes[:, 1] + boxes[:, 3] > 0)
        for at, name in enumerate(("width", "height")):
            if name in raw.column_names:
                sizes = _array(raw, name).cast(pa.float64()).to_numpy(zero_copy_only=False)
                inside &= ~(boxes[:, at] >= sizes)
    numbers = raw["number"].to_numpy()
    _count(skips, "box that is missing or not finite", where, numbers[~finite])
    _count(skips, "box without area", where, numbers[finite & ~area])
    _count(skips, "box outside its image", where, numbers[finite & area & ~inside])
    return np.asarray(finite & area & inside)


def _ids(raw: pa.Table, texts: pa.Array) -> pa.Array | None:
    """Return the sentences' identifiers if a column holds them, else None."""
    if "sample_id" not in raw.column_names:
        return None
    column = _array(raw, "sample_id")
    return as_text(pc.list_flatten(column) if pa.types.is_list(column.type) else column)


def _blank(values: pa.Array) -> Array:
    return np.asarray(pc.fill_null(pc.equal(values, ""), True).to_numpy(zero_copy_only=False))


def _numbers_without_text(texts: pa.Array, raw: pa.Table) -> Array:
    return np.asarray(raw["number"].to_numpy()[pc.list_value_length(texts).to_numpy() == 0])


def _count(skips: Skips, reason: str, where: str, numbers: Array) -> None:
    if len(numbers):
        skips.add(reason, f"row {numbers[0]} ({where})", len(numbers))


def _array(raw: pa.Table, name: str) -> pa.Array:
    return raw[name].combine_chunks()


def _text(raw: pa.Table, name: str) -> pa.Array:
    return as_text(_array(raw, name))
