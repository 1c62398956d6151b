"""What a definition's text is made of: plain tokens, and names that are left open."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from petlbench.core.source_code.names import Definition, Target
from petlbench.core.source_code.silence import is_silent


class Parameter(NamedTuple):
    """A parameter that may be passed by position, and its ordinal."""

    name: str
    ordinal: str


class Private(NamedTuple):
    """A name that starts with one underscore, of an attribute."""

    name: str


Token = str | Definition | Parameter | Private


@dataclass
class Text:
    """Statements as tokens, and what a whole closure has to know of them."""

    tokens: list[Token] = field(default_factory=list)
    words: set[str] = field(default_factory=set)  # names that something is passed by, or that stand in a string
    hidden: set[str] = field(default_factory=set)  # private attributes that a class of ours defines
    open: set[str] = field(default_factory=set)  # those that somebody else may know by name
    imported: list[str] = field(default_factory=list)  # modules of the project that it imports when it runs


def silenced(target: Target) -> Token:
    return "silent" if is_silent(target) else target


class Given(NamedTuple):
    """A token in the place of a field's value."""

    token: Token
