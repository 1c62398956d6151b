"""Tables in Markdown, and the fields of pydantic models as rows of one."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

FIELD_COLUMNS = ("field", "type", "default", "meaning")
BOUNDS = (("gt", "`> {}`"), ("ge", "`>= {}`"), ("lt", "`< {}`"), ("le", "`<= {}`"))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; bars, line ends and, outside of code, angle brackets in a cell are escaped."""
    lines = [list(columns), ["---"] * len(columns), *map(list, rows)]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return without_tags(text.replace("|", "\\|").replace("\n", " "))


def without_tags(text: str) -> str:
    """The text with angle brackets written out, so that `<suite>` is no tag of HTML; code in backticks stays."""
    pieces = text.split("`")
    pieces[::2] = [piece.replace("<", "&lt;").replace(">", "&gt;") for piece in pieces[::2]]
    return "`".join(pieces)


def field_table(model: type[BaseModel]) -> str:
    """A row for each field of a model: name, type with its bounds, default, meaning."""
    rows = [
        (f"`{name}`", f"`{type_name(info.annotation)}`{_bounds(info)}", _default(info), info.description or "")
        for name, info in model.model_fields.items()
    ]
    return table(FIELD_COLUMNS, rows)


def type_name(annotation: Any) -> str:
    """A type as a reader writes it: `int`, `"linear" | "cosine"`, `list of int`, `Cell`, `null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return " | ".join(json.dumps(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(one) for one in arguments)
    if origin is tuple or origin is list:
        inner = [type_name(one) for one in arguments if one is not Ellipsis]
        return f"list of {inner[0]}" if len(set(inner)) == 1 else f"[{', '.join(inner)}]"
    if origin is dict or (isinstance(origin, type) and len(arguments) == 2):
        return f"{type_name(arguments[0])}: {type_name(arguments[1])}"
    if annotation is type(None):
        return "null"
    return {"str": "text", "bool": "true | false", "float": "number"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", str(annotation))
    )


def _bounds(info: FieldInfo) -> str:
    found = [form.format(getattr(one, key)) for one in info.metadata for key, form in BOUNDS if hasattr(one, key)]
    return f", {', '.join(found)}" if found else ""


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.default_factory() if info.default_factory else info.default  # type: ignore[call-arg]
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is PydanticUndefined:
        return ""
    return f"`{json.dumps(value, ensure_ascii=False, default=str)}`"
