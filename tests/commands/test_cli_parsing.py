"""Parsing of command lines: options before, between and after positionals; help; mistakes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from petlbench.commands import main
from petlbench.commands.main import verb_module

# fmt: off
LINES = {  # command line to its verb and the positionals among the options
    "list records --results out l*": ("list", {"kind": "records", "pattern": "l*"}),
    "list --json methods peft:*": ("list", {"kind": "methods", "pattern": "peft:*"}),
    "list --results out records": ("list", {"kind": "records", "pattern": "*"}),
    "leaderboard a --csv t.csv b": ("leaderboard", {"results": [Path("a"), Path("b")]}),
    "leaderboard --csv t.csv a b": ("leaderboard", {"results": [Path("a"), Path("b")]}),
    "plot --out figures a b": ("plot", {"results": [Path("a"), Path("b")]}),
    "show --count 3 out": ("show", {"results": Path("out")}),
    "data check --sample 2 vqa --json rec": ("data check", {"names": ["vqa", "rec"]}),
    "data show --split val vqa": ("data show", {"name": "vqa"}),
    "score --csv t.csv out": ("score", {"results": Path("out")}),
    "compare out --csv t.csv full lora": ("compare", {"results": Path("out"), "a": "full", "b": "lora"}),
    "compare --csv t.csv out full lora": ("compare", {"results": Path("out"), "a": "full", "b": "lora"}),
    "check --backbone tiny lora full": ("check", {"method": ["lora", "full"]}),
    "check lora --json full": ("check", {"method": ["lora", "full"]}),
    "verify --json published": ("verify", {"figures": "published"}),
    "run --jobs 2 smoke": ("run", {"suite": "smoke"}),
    "run --jobs 2": ("run", {"suite": "quick"}),
}
MISTAKES = {
    "list methods a b": "unrecognized arguments: b: `petlbench --help` shows the usage",
    "list --results out methods --foo": "unrecognized arguments: --foo: `petlbench --help` shows the usage",
    "list --results out": "the following arguments are required: kind: `petlbench list --help` shows the usage",
    "--foo list methods": "unrecognized arguments: --foo: `petlbench --help` shows the usage",
    "data": "the following arguments are required: check|show: `petlbench data --help` shows the usage",
    "data foo": "argument check|show: invalid choice: 'foo'",
    "data check --all": "the following arguments are required: TASK:DATASET: `petlbench data check --help` shows",
    "data show a --seed 1 b": "unrecognized arguments: b: `petlbench --help` shows the usage",
    "leaderboard --csv x": "the following arguments are required: results: `petlbench leaderboard --help` shows the",
    "profile": "the following arguments are required: --methods: `petlbench profile --help` shows the usage",
    "repair --json out": "unrecognized arguments: --json: `petlbench --help` shows the usage",
}
# fmt: on


def parsed(line: str) -> argparse.Namespace:
    return main._parsed(line.split())


@pytest.mark.parametrize("line", LINES)
def test_options_may_stand_anywhere(line: str) -> None:
    verb, positionals = LINES[line]
    found = vars(parsed(line))
    assert found["command"] is verb_module(verb).command
    assert {name: found[name] for name in positionals} == positionals


def test_every_verb_takes_options_before_its_positionals() -> None:
    words = {line.split()[0] for line in LINES}
    assert set(main.COMMANDS) - words == {"profile", "repair"}  # no positionals, and no options


def test_both_orders_mean_the_same() -> None:
    options = ["--results", "out", "--json"]
    after, before = parsed("list records l* --results out --json"), main._parsed(["list", *options, "records", "l*"])
    assert after == before and after.results == Path("out") and after.json


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_reported_as_the_main_parser_reports_them(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(line.split()) == 2
    assert capsys.readouterr().err.startswith(f"petlbench: error: {MISTAKES[line]}")


@pytest.mark.parametrize("verb", [*main.COMMANDS, "data check", "data show"])
def test_help_of_a_verb_is_that_of_the_main_parser(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for show in (parsed, lambda line: main._parser().parse_args(line.split())):
        with pytest.raises(SystemExit, match="0"):
            show(f"{verb} --help")
    text = capsys.readouterr().out
    own, whole = text[: len(text) // 2], text[len(text) // 2 :]
    assert own == whole and own.startswith(f"usage: petlbench {verb} ")
