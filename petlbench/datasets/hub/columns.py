"""Columns of the hub's copies: their names in use, and texts in each shape in which copies keep them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

# Our name -> names in use, the surest first, as the known copies have them; the option `columns` overrides them.
IMAGE = {
    "image": ("image", "img", "picture", "jpg", "image_path", "file_name", "filename", "image_file", "coco_url"),
    "folder": ("filepath",),  # the folder of the image's file, if a second column names the file
    "image_id": ("cocoid", "coco_id", "image_id", "imageId", "img_id", "imgid"),
    "file_name": ("image_path", "file_name", "filename", "image_file"),  # gives COCO's number if no id column does
    "split": ("split",),
    "width": ("width", "image_width"),
    "height": ("height", "image_height"),
}
# By the kind of rows: those of REC, VQA or CAPTIONING of `schemas`, whichever task has these columns.
CAPTIONS = {**IMAGE, "captions": ("captions", "caption", "sentences", "answer", "raw", "texts", "text", "sentence")}
BY_KIND: dict[str, dict[str, tuple[str, ...]]] = {
    "expressions": {
        **IMAGE,
        "expression": (
            *("sentences", "expressions", "expression", "answer", "answers", "captions", "caption", "sentence", "sent"),
            *("referring_expression", "refs", "text", "phrase"),
        ),
        "box": ("bbox", "box", "bbox_xywh", "gt_bbox"),  # x, y, width, height, unless `raw_anns` says otherwise
        "corners": ("bbox_xyxy", "box_xyxy", "corners", "xyxy"),  # x1, y1, x2, y2
        "raw_anns": ("raw_anns",),  # COCO's own annotation, as JSON
        "sample_id": ("sent_id", "sent_ids"),  # not question_id: it is the annotated object's and may recur
    },
    "questions": {
        **IMAGE,
        "sample_id": ("question_id", "questionId", "qid", "id"),
        "question": ("question", "sent"),
        "answers": ("answers", "answer", "multiple_choice_answer"),
        "answer_type": ("answer_type", "types"),
    },
    "captions": CAPTIONS,
}
# The columns that a task needs; of each group, one is enough.
NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "expressions": (("expression",), ("box", "corners"), ("image", "image_id")),
    "questions": (("question",), ("image", "image_id")),
    "captions": (("captions",), ("image", "image_id")),
}
TEXT = ("raw", "sent", "answer", "caption", "text", "sentence")  # fields of a record that may hold its text
NORMALISED = (
    "sent",
    "raw",
    "expression",
    *TEXT[2:],
)  # fields for expressions: the refer toolkit trains and tests on `sent`
IDENTIFIERS = ("sent_id", "sentid")


def kind_of(features: Features) -> str | None:
    """Return the kind of rows with these columns, or None if no known copy has such rows."""
    from petlbench.api.schemas import CAPTIONING, REC, VQA

    kinds = {"expressions": REC, "questions": VQA, "captions": CAPTIONING}
    return next((kind for kind, schema in kinds.items() if schema == features), None)


def resolve_columns(kind: str, present: Sequence[str], overrides: Mapping[str, str]) -> dict[str, str]:
    """Return our name -> the copy's name for each column present; `overrides` is the option `columns`."""
    columns = {}
    for ours, names_in_use in BY_KIND[kind].items():
        names = [overrides[ours]] if ours in overrides else names_in_use
        if (theirs := next((name for name in names if name in present), None)) is not None:
            columns[ours] = theirs
    return columns


def check_overrides(overrides: Mapping[str, str], kinds: Iterable[str], present: Sequence[str], where: object) -> None:
    """Raise UserError if a name in `overrides` is not ours, or is not in `present`, the columns of all files."""
    names = list(dict.fromkeys(name for kind in sorted(kinds) for name in BY_KIND[kind]))
    for ours, theirs in overrides.items():
        if ours not in names:
            raise UserError(f"columns: there is no '{ours}'{did_you_mean(ours, names)}; choose of {', '.join(names)}")
        if theirs not in present:
            raise UserError(f"{where} has no column '{theirs}'{did_you_mean(theirs, present)}; {list_columns(present)}")


def missing_columns(kind: str, found: Mapping[str, str]) -> list[str]:
    """Return the columns that rows of a kind need and that were not found."""
    return [" or ".join(names) for names in NEEDED[kind] if not any(name in found for name in names)]


def picture_of(schema: pa.Schema, found: Mapping[str, str]) -> str | None:
    """Return the path of the column of encoded images (the hub's struct, or bytes), or None if `image` is not one."""
    import pyarrow as pa

    if (name := found.get("image")) is None:
        return None
    column_type = schema.field(name).type
    if pa.types.is_binary(column_type) or pa.types.is_large_binary(column_type):
        return name
    return f"{name}.bytes" if pa.types.is_struct(column_type) and column_type.get_field_index("bytes") >= 0 else None


def identifier_column(schema: pa.Schema) -> str | None:
    """Return the identifier column of a file that holds images by identifier, or None."""
    return next((name for name in (*IMAGE["image_id"], "id") if name in schema.names), None)


def list_columns(present: Sequence[str]) -> str:
    """Return `it has A, B`, the columns present, for an error."""
    return f"it has {', '.join(present) or 'no columns'}"


def text_lists(array: pa.Array, fields: Sequence[str], where: object) -> pa.Array:
    """Return texts as one list per row, from texts, lists of texts, lists of records or a record of lists.

    A row without texts gives an empty list. Raise UserError if the column holds something else.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_null(array.type):
        return pa.array([[]] * len(array), pa.list_(pa.string()))
    if pa.types.is_struct(array.type):
        array = _field(array, fields, where)
    if _is_text(array.type):
        return as_lists(array.drop_null(), pc.is_valid(array))
    if not _is_list(array.type):
        raise UserError(f"{where} is of type {array.type}, not text or lists of text: set `columns`")
    values = pc.list_flatten(array)
    if pa.types.is_struct(values.type):
        values = _field(values, fields, where)
    if not _is_text(values.type):
        raise UserError(f"{where} is of type {array.type}, not text or lists of text: set `columns`")
    return as_lists(values.cast(pa.string()), pc.fill_null(pc.list_value_length(array), 0))


def identifiers(array: pa.Array) -> pa.Array | None:
    """Return, flat and as text, the identifiers beside the texts of `text_lists`, or None if there are none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = pc.list_flatten(array) if _is_list(array.type) else array
    if not pa.types.is_struct(values.type):
        return None
    name = next((name for name in IDENTIFIERS if values.type.get_field_index(name) >= 0), None)
    if name is None:
        return None
    column = pc.struct_field(values, name)
    return (pc.list_flatten(column) if _is_list(column.type) else column).cast(pa.string())


def as_lists(values: pa.Array, lengths: Any) -> pa.Array:
    """Return `values` cut into lists of the given lengths."""
    import numpy as np
    import pyarrow as pa

    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(np.asarray(lengths), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), values.cast(pa.string()))


def _field(array: pa.Array, fields: Sequence[str], where: object) -> pa.Array:
    import pyarrow.compute as pc

    name = next((name for name in fields if array.type.get_field_index(name) >= 0), None)
    if name is None:
        raise UserError(f"{where} is of type {array.type}, which has none of {', '.join(fields)}: set `columns`")
    return pc.struct_field(array, name)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
