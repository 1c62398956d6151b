"""Validate data against models; an error is one line that names the key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean

M = TypeVar("M", bound=BaseModel)


def validated(model: type[M], data: Mapping[str, Any], where: str) -> M:
    """Return `model` built from `data`.

    Raises UserError, in one line, with `where`, the path of the first wrong key and what is wrong with it.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
    keys = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        fields = _fields_at(model, keys[:-1])
        what = "unknown key" + (did_you_mean(keys[-1], fields) or f": known keys are {', '.join(fields) or '(none)'}")
    else:
        what = " ".join(first["msg"].split())
        if isinstance(first["input"], str | int | float):
            what += f", got {first['input']!r:.60}"
    more = f" (and {len(others)} more)" if others else ""
    raise UserError(": ".join(filter(None, [where, ".".join(keys), what])) + more)


def _fields_at(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    """Return the keys of the model at `path`, through sequences and optional fields."""
    for part in path:
        if part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for argument in get_args(annotation) if (model := _model_in(argument))), None)
