"""Columns of the hub's copies: the names that each thing goes by, and texts in whatever shape they are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

# By our name, the names in use, the surest first. As the copies had them when this was written; `columns` overrides.
IMAGE = {
    "image": ("image", "img", "picture", "jpg", "image_path", "file_name", "filename", "image_file", "coco_url"),
    "folder": ("filepath",),  # of the image's file, where a second column names the file
    "image_id": ("cocoid", "coco_id", "image_id", "imageId", "img_id", "imgid"),
    "file_name": ("image_path", "file_name", "filename", "image_file"),  # tells COCO's number where no id does
    "split": ("split",),
    "width": ("width", "image_width"),
    "height": ("height", "image_height"),
}
# By what a row is about: REC, VQA or CAPTIONING of `schemas`, whichever task has these columns.
CAPTIONS = {**IMAGE, "captions": ("captions", "caption", "sentences", "answer", "raw", "texts", "text", "sentence")}
BY_KIND: dict[str, dict[str, tuple[str, ...]]] = {
    "expressions": {
        **IMAGE,
        "expression": (
            *("sentences", "expressions", "expression", "answer", "answers", "captions", "caption", "sentence", "sent"),
            *("referring_expression", "refs", "text", "phrase"),
        ),
        "box": ("bbox", "box", "bbox_xywh", "gt_bbox"),  # x, y, width, height, unless `raw_anns` tells otherwise
        "corners": ("bbox_xyxy", "box_xyxy", "corners", "xyxy"),  # x1, y1, x2, y2
        "raw_anns": ("raw_anns",),  # COCO's own annotation, as JSON
        "sample_id": ("sent_id", "sent_ids"),  # no question_id: the copies give the annotated object's, which may recur
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
# What a task cannot do without; where several are given, one of them.
NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {
    "expressions": (("expression",), ("box", "corners"), ("image", "image_id")),
    "questions": (("question",), ("image", "image_id")),
    "captions": (("captions",), ("image", "image_id")),
}
TEXT = ("raw", "sent", "answer", "caption", "text", "sentence")  # fields of a record that holds a text
NORMALISED = ("sent", "raw", "expression", *TEXT[2:])  # of expressions: the refer toolkit trains and tests on `sent`
IDENTIFIERS = ("sent_id", "sentid")


def kind_of(features: Features) -> str | None:
    """What rows of these columns are about; None for columns that no copy is known to have."""
    from petlbench.api.schemas import CAPTIONING, REC, VQA

    kinds = {"expressions": REC, "questions": VQA, "captions": CAPTIONING}
    return next((kind for kind, known in kinds.items() if known == features), None)


def resolve_columns(kind: str, there: Sequence[str], said: Mapping[str, str]) -> dict[str, str]:
    """Our names of the columns that are there, and theirs. `said`: the option `columns`."""
    found = {}
    for ours, known in BY_KIND[kind].items():
        names = [said[ours]] if ours in said else known
        if (theirs := next((name for name in names if name in there), None)) is not None:
            found[ours] = theirs
    return found


def check_said(said: Mapping[str, str], kinds: Iterable[str], there: Sequence[str], where: object) -> None:
    """Raise UserError for a name in `said` that is not ours, or that no file has: `there` are all that any has."""
    names = list(dict.fromkeys(name for kind in sorted(kinds) for name in BY_KIND[kind]))
    for ours, theirs in said.items():
        if ours not in names:
            raise UserError(f"columns: there is no '{ours}'{did_you_mean(ours, names)}; choose of {', '.join(names)}")
        if theirs not in there:
            raise UserError(f"{where} has no column '{theirs}'{did_you_mean(theirs, there)}; {listed(there)}")


def lacking(kind: str, found: Mapping[str, str]) -> list[str]:
    """What rows of a kind need and is not among the columns found."""
    return [" or ".join(names) for names in NEEDED[kind] if not any(name in found for name in names)]


def picture_of(schema: pa.Schema, found: Mapping[str, str]) -> str | None:
    """The path of the column of encoded images (the hub's struct, or bytes), where `image` is one."""
    import pyarrow as pa

    if (name := found.get("image")) is None:
        return None
    kind = schema.field(name).type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return name
    return f"{name}.bytes" if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else None


def identifier_column(schema: pa.Schema) -> str | None:
    """Of a file that holds images by identifier."""
    return next((name for name in (*IMAGE["image_id"], "id") if name in schema.names), None)


def listed(there: Sequence[str]) -> str:
    return f"it has {', '.join(there) or 'no columns'}"


def text_lists(array: pa.Array, fields: Sequence[str], where: object) -> pa.Array:
    """Texts as lists, one list per row: from texts, lists of texts, lists of records, or a record of lists.

    A row without any gives an empty list. Raises UserError for a column of something else.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_null(array.type):
        return pa.array([[]] * len(array), pa.list_(pa.string()))
    if pa.types.is_struct(array.type):
        array = _field(array, fields, where)
    if _is_text(array.type):
        return listed_by(array.drop_null(), pc.is_valid(array))
    if not _is_list(array.type):
        raise UserError(f"{where} is of type {array.type}, not text or lists of text: set `columns`")
    values = pc.list_flatten(array)
    if pa.types.is_struct(values.type):
        values = _field(values, fields, where)
    if not _is_text(values.type):
        raise UserError(f"{where} is of type {array.type}, not text or lists of text: set `columns`")
    return listed_by(values.cast(pa.string()), pc.fill_null(pc.list_value_length(array), 0))


def identifiers(array: pa.Array) -> pa.Array | None:
    """Those that stand beside the texts of `text_lists`, one after the other, as text; None if there are none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = pc.list_flatten(array) if _is_list(array.type) else array
    if not pa.types.is_struct(values.type):
        return None
    name = next((name for name in IDENTIFIERS if values.type.get_field_index(name) >= 0), None)
    if name is None:
        return None
    found = pc.struct_field(values, name)
    return (pc.list_flatten(found) if _is_list(found.type) else found).cast(pa.string())


def listed_by(values: pa.Array, lengths: Any) -> pa.Array:
    """`values` as lists of the given lengths."""
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
