"""The tokens of a definition's text: plain ones, and names that the whole closure resolves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from petlbench.core.source_code.names import Definition, Target
from petlbench.core.source_code.silence import is_silent


class Parameter(NamedTuple):
    """The name and ordinal of a parameter that callers may pass by position."""

    name: str
    ordinal: str


class Private(NamedTuple):
    """The name of a private attribute: it starts with one underscore."""

    name: str


Token = str | Definition | Parameter | Private


@dataclass
class Text:
    """Statements as tokens, with the names that the whole closure needs to resolve them."""

    tokens: list[Token] = field(default_factory=list)
    words: set[str] = field(default_factory=set)  # names of keyword arguments, and names in strings
    hidden: set[str] = field(default_factory=set)  # private attributes that the project's classes define
    open: set[str] = field(default_factory=set)  # private attributes that other code may use by name
    imported: list[str] = field(default_factory=list)  # the project's modules that the statements import when they run


def silenced(target: Target) -> Token:
    return "silent" if is_silent(target) else target


class Given(NamedTuple):
    """A finished token that replaces the value of a field."""

    token: Token
