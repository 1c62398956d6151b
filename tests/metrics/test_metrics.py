"""The metrics equal the official evaluations' values."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from petlbench.metrics.ptb import tokenize, tokenize_all
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
    assert "340 cases" in printed and "278 cases" in printed
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
        ("ma'am o'er o'clock y'all'd've.", "ma'am o'er o'clock y' all 'd 've"),
        ("the last word they've", "the last word they ve"),  # a slip at the end of the file
        ("Mr. Smith vs. Dr. Jones etc.", "mr. smith vs. dr. jones etc."),
        ("no. 5, but no.", "no. 5 but no"),
        ("plan b. the next, plan b. The end", "plan b. the next plan b the end"),
        ("at 5:30 p.m. 1,000.5 -3 10-12 1/2 50% #1", "at 5:30 p.m. 1,000.5 -3 10-12 1/2 50 % # 1"),
        ("1 1/2 cups, ½ cup", "1\u00a01/2 cups 1/2 cup"),
        ("€5 £5 5¢ US$5", "$ 5 # 5 5 cents us$ 5"),
        ("AT&T, R & B, &amp;", "at&t r & b &"),
        ("me@x.org, http://x.com/a?b=c, www.x.com.", "me@x.org, http://x.com/a?b=c www.x.com"),
        ("(a) [b] {c}", "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb-"),
        ("and/or mother-in-law word--word end.Start", "and/or mother-in-law word word end.start"),
        ("colour 😀 日本語。 ☀️", "colour 日本語 。 ☀"),
        ("it is a smile :) .", "it is a smile :-rrb-"),
        ("ends with :)", "ends with -rrb-"),
        ("caf&eacute; a&nbsp;b &APOS;", "caf&eacute; a b &apos;"),
        ("Yahoo! C++ c# C+++", "yahoo c++ c# c++ +"),
        ("o’clock ’twas y’all l’avion 'twas", "o’clock twas y’ all l’avion 't was"),
        ("Co.j. Mr.j. Sept.-a", "co. j. mr.j sept. a"),
        ("half-cup., 2nd.: semi-U.S. x-a.b.c", "half-cup. 2nd. semi-u.s. x-a.b. c"),
        ("#tag1 #été @a1_b", "#tag 1 #été @a1_b"),
        ("a-b.txt a.b.txt, X.com/a x.com/a", "a-b txt a.b.txt x.com / a x.com / a"),
        ("http://x.com' a@b,c", "http://x.com' a@b,c"),
        ("</a b> <a b='c'> </a/>", "< / a b > <a\u00a0b='c'> < / a / >"),
        ("x==y 5.\u00ad6 \u0301e 1\u03012", "x = = y 5 6 \u0301e 1 \u03012"),
        ("b\u0528c b\u0300c 〒 「a」", "b c b\u0300c 〒 a"),
    ],
)
def test_tokens_follow_the_treebank(caption: str, tokens: str) -> None:
    assert " ".join(tokenize(caption)) == tokens


def test_the_next_caption_decides_a_last_period() -> None:
    captions = ["plan b.", "The end", "plan b.", "the end", "plan b.", "", "Mr. X", "plan b."]
    last = [tokens[-1] for tokens in tokenize_all(captions) if tokens[:1] == ["plan"]]
    assert last == ["b", "b.", "b", "b."]


def test_a_lone_letter_ends_a_sentence_before_these_words_alone() -> None:
    starters = "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More"
    starters += " Now Once One Other Our She Since So Some Such That The Their Then There These They This We What When"
    starters += " While Yet You Mr. Ms. THE"
    assert [word for word in starters.split() if tokenize(f"plan b. {word} x")[1] != "b"] == []
    others = ["the", "Mrs.", "Zebra", "To", "For", "3"]
    assert [word for word in others if tokenize(f"plan b. {word} x")[1] != "b."] == []


@pytest.mark.parametrize("line_break", ["\n", "\r", "\v", "\f", "\u2028", "\u2029"])
def test_line_breaks_inside_a_caption_are_spaces_and_shift_no_other(line_break: str) -> None:
    assert tokenize_all([f"http://a{line_break}cat", "a dog"]) == [*tokenize_all(["http://a cat"]), ["a", "dog"]]


def test_letters_do_not_follow_the_unicode_of_the_interpreter() -> None:
    # Letters since Unicode 7 to 15, all of which Python knows by now; the lexer knows none.
    assert [tokenize(f"a{letter}b") for letter in "\u0528\u08a1\u1c80\ua7b0\uab30"] == [["a", "b"]] * 5


def test_a_test_set_of_captions_takes_seconds() -> None:
    captions = [f"A man, {number} years old, doesn't ride Mr. Smith's half-broken bike." for number in range(3000)]
    start = time.process_time()
    tokenize_all(captions)
    assert time.process_time() - start < 5  # 0.6 s on one slow core; 25,010 such captions would take 5 s


def test_command_takes_any_further_file_of_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = {
        "references": ["né ☀ 日本"],
        "candidate": "",
        "tokenized_references": ["né ☀ 日本"],
        "tokenized_candidate": "",
    }
    empty = {"references": [""], "candidate": "...", "tokenized_references": [""], "tokenized_candidate": ""}
    scores = {"bleu": [0.0] * 4, "cider_d": 0.0}
    cases = [{"id": "x", **case, **scores, "rouge_l": 0.0}, {"id": 1, **empty, **scores, "rouge_l": 1.0}]
    corpus = {"corpus_bleu": [0.0] * 4, "corpus_cider_d": 0.0, "corpus_rouge_l": 0.5}
    path = tmp_path / "further.json"
    path.write_text(json.dumps({"cases": cases, **corpus}, ensure_ascii=False), encoding="utf-8")
    assert main([str(path)]) == 0
    assert "2 cases, 0 values differ" in capsys.readouterr().out
