"""The reference of the command line, from its parsers."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator

from petlbench.commands import main
from site_pages.tables import table

USAGE_WIDTH = 76  # signs that fit beside the contents


def reference() -> str:
    """A section for each verb: what it does, its usage, its arguments and its options."""
    return "\n".join(_section(verb, purpose) for verb, purpose in main.VERBS.items())


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser of one verb, as the command line builds it."""
    parser = argparse.ArgumentParser(prog=f"petlbench {verb}", add_help=False)
    main.verb_module(verb).add_arguments(parser)
    return parser


def _section(verb: str, purpose: str) -> str:
    parser = parser_of(verb)
    usage = "\n".join(textwrap.wrap(_usage(parser), USAGE_WIDTH, subsequent_indent="    ", break_on_hyphens=False))
    parts = [f"### petlbench {verb}", f"{purpose[0].upper()}{purpose[1:]}.", f"```text\n{usage}\n```"]
    positional = [_row(parser, action) for action in parser._actions if not action.option_strings]
    options = [_row(parser, action) for action in parser._actions if action.option_strings]
    if positional:
        parts.append(table(("argument", "meaning"), positional))
    if options:
        parts.append(table(("option", "meaning"), options))
    return "\n\n".join(parts) + "\n"


def _usage(parser: argparse.ArgumentParser) -> str:
    return " ".join(parser.format_usage().removeprefix("usage: ").split())


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str]:
    return f"`{' '.join(_names(action))}`", "; ".join(filter(None, _meanings(parser, action)))


def _names(action: argparse.Action) -> Iterator[str]:
    if action.option_strings:
        yield ", ".join(action.option_strings)
    if not action.option_strings or action.nargs != 0:
        yield str(action.metavar or ("" if action.choices and action.option_strings else action.dest))


def _meanings(parser: argparse.ArgumentParser, action: argparse.Action) -> Iterator[str]:
    if action.help:
        yield parser._get_formatter()._expand_help(action)
    if action.choices:
        yield "one of " + ", ".join(f"`{choice}`" for choice in action.choices)
    if action.nargs in ("+", "*"):
        yield "one or more" if action.nargs == "+" else "any number"
