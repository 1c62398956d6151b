"""Cards of methods: formula, paper, what differs, sites, counts, what it was verified against, variants, options."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator

from petlbench.api.method import Method
from petlbench.api.registries import METHODS
from petlbench.describe.methods import Row, rows
from petlbench.describe.variants import declared
from site_pages.tables import field_table, table, without_tags

MOST_VARIANTS = 12  # of a method that has more, the command lists them


def cards() -> str:
    """A card for each built-in method; building them on their home backbones takes no memory for weights."""
    return "\n".join(card(row, METHODS.get(row.name)) for row in rows() if row.distribution == "petlbench")


def card(row: Row, cls: type[Method]) -> str:
    """The card of one method, a section in Markdown."""
    parts = [f"### {row.name}", _described(inspect.cleandoc(cls.__doc__ or "")), table(("", ""), _facts(row, cls))]
    if variants := _variants(row.name):
        parts.append(variants)
    if cls.Config.model_fields:
        parts.append(f'??? note "Options of {row.name}"\n\n{_indent(field_table(cls.Config))}')
    return "\n\n".join(parts) + "\n"


def _described(docstring: str) -> str:
    """A docstring as Markdown: its first paragraph, which has the formula, in bold; the rest as it stands."""
    first, _, rest = docstring.partition("\n\n")
    return f"**{' '.join(_plain(first).split())}**\n\n{_paragraphs(rest)}"


def _paragraphs(text: str) -> str:
    """Plain paragraphs keep their signs; indented ones, which are formulas, become blocks of code."""
    blocks = text.split("\n\n")
    return "\n\n".join(
        f"```text\n{inspect.cleandoc(block)}\n```" if block.startswith("    ") else _plain(block) for block in blocks
    )


def _plain(text: str) -> str:
    """Signs that Markdown would take for marks are written out; code in backticks stays."""
    pieces = without_tags(text).split("`")
    pieces[::2] = [re.sub(r"([*_\[\]])", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def _facts(row: Row, cls: type[Method]) -> Iterator[tuple[str, str]]:
    yield "paper", row.paper or "none"
    yield "trains", row.trains
    yield "sites used", row.sites or f"unknown: {row.error}"
    if row.method_parameters is not None:
        counts = f"{row.method_parameters:,} of the method, {row.trainable_parameters:,} in all"
        yield "trainable parameters", f"{counts} (`{row.home}`, {row.task})"
    yield "verified against", row.verified
    if cls.recipe:
        yield "its authors' recipe", ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in cls.recipe.items())
    if cls.size_option:
        sizes = ", ".join(map(str, cls.size_option.values))
        yield "size", f"option `{cls.size_option.field}`; a curve runs through {sizes}"
    yield "code", f"`{cls.__module__}`"


def _variants(name: str) -> str:
    found = declared(name).variants
    if len(found) > MOST_VARIANTS:
        return f"It has {len(found)} variants: `petlbench list methods '{name}:*'` lists them."
    rows_of = [(f"`{name}:{variant}`", f"`{json.dumps(dict(options))}`") for variant, options in found.items()]
    return table(("variant", "options"), rows_of) if rows_of else ""


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())
