"""Wordings that many errors share: a name that is nearly right, an exception in one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`: did you mean 'lora'?` for the closest of `names`, else nothing; to follow the complaint in a message."""
    close = get_close_matches(name, list(names), n=1)
    return f": did you mean '{close[0]}'?" if close else ""


def one_line(error: BaseException) -> str:
    """Type and message of an exception with all white space collapsed."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
