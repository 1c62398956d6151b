"""Texts that many errors share: a hint at the right name, and an exception on one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return `: did you mean 'lora'?` with the closest of `names`, or an empty text; append it to an error text."""
    close = get_close_matches(name, list(names), n=1)
    return f": did you mean '{close[0]}'?" if close else ""


def one_line(error: BaseException) -> str:
    """Return the type and message of an exception on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
