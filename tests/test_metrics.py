"""The metrics equal the official evaluations' values."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from petlbench.metrics.ptb import tokenize
from tests.golden import FOLDER, compare, load
from tests.golden.__main__ import main

FILES = sorted((FOLDER / "metrics").glob("*.json"))


def test_golden_files_of_captions_and_of_answers_are_there() -> None:
    assert {path.name.split("_")[0] for path in FILES} == {"captions", "vqa"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_official_value_is_reproduced(path: Path) -> None:
    comparisons = list(compare(load(path)))
    assert len(comparisons) >= 400
    assert [item for item in comparisons if not item.agrees] == []


def test_command_reports_agreement(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path) for path in FILES]) == 0
    printed = capsys.readouterr().out
    assert "340 cases" in printed
    assert "corpus_bleu_4" in printed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_command_fails_on_a_value_that_differs(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = copy.deepcopy(load(path))
    key = "overall" if "overall" in data else "corpus_cider_d"
    data[key] += 2e-6
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(data))
    assert main([str(changed)]) == 1
    assert f"  {key}, " in capsys.readouterr().out


def test_command_fails_on_another_tokenisation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load(FILES[0])
    data["cases"][0]["tokenized_candidate"] += " ."
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(data))
    assert main([str(changed)]) == 1
    assert "tokens             differ" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "[]", '{"cases": []}'])
def test_command_refuses_other_files_in_one_line(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert main([str(path)]) == 2
    assert main([str(tmp_path / "missing.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_metrics_import_no_torch() -> None:
    modules = ", ".join(f"petlbench.metrics.{name}" for name in ("captions", "vqa", "boxes", "recall"))
    run = subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; sys.exit('torch' in sys.modules)"], check=False
    )
    assert run.returncode == 0


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("", ""),
        (" \n\t ", ""),
        ("... , ; : -- - ' \" .", ""),
        ("Wow!!! Really?!", "wow !!! really ?!"),
        ("DON'T Cannot GOTTA", "do n't can not got ta"),
        ("a friend’s house; don’t", "a friend 's house do n't"),
        ("‘single’ “double” «angle»", "single double angle"),
        ("ma'am o'er o'clock y'all'd've", "ma'am o'er o'clock y' all 'd 've"),
        ("Mr. Smith vs. Dr. Jones etc.", "mr. smith vs. dr. jones etc."),
        ("no. 5, but no.", "no. 5 but no"),
        ("plan b. the next, plan b. The end", "plan b. the next plan b the end"),
        ("at 5:30 p.m. 1,000.5 -3 10-12 1/2 50% #1", "at 5:30 p.m. 1,000.5 -3 10-12 1/2 50 % # 1"),
        ("1 1/2 cups, ½ cup", "1\u00a01/2 cups 1/2 cup"),
        ("€5 £5 5¢ US$5", "$ 5 # 5 5 cents us$ 5"),
        ("AT&T, R & B, &amp;", "at&t r & b &"),
        ("me@x.org, http://x.com/a?b=c, www.x.com.", "me@x.org http://x.com/a?b=c www.x.com"),
        ("(a) [b] {c}", "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb-"),
        ("and/or mother-in-law word--word end.Start", "and/or mother-in-law word word end.start"),
        ("colour 😀 日本語。 ☀️", "colour 日本語 。 ☀"),
        ("it is a smile :)", "it is a smile :-rrb-"),
    ],
)
def test_tokens_follow_the_treebank(caption: str, tokens: str) -> None:
    assert " ".join(tokenize(caption)) == tokens
