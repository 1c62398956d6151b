"""VQA soft accuracy on cases that can be worked out by hand."""

from __future__ import annotations

import pytest

from petlbench.metrics.vqa import CONTRACTIONS, normalise, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("", ""),
        ("The", ""),
        ("?!", ""),
        ("An Apple.", "apple"),
        ("two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("10:30", "10:30"),
        ("left-handed", "left handed"),
        ("left- handed", "left handed"),
        ("red/white", "red white"),
        ("5,6 red/white", "56 redwhite"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("a\nb\tthe c", "b c"),
        ("Café", "café"),
        ("." * 40, "." * 8),
    ],
)
def test_answers_are_normalised_as_officially(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


def test_contractions_have_every_official_kind() -> None:
    examples = {
        "yall": "y'all",
        "y'allll": "y'all'll",
        "it'dve": "it'd've",
        "twas": "'twas",
        "oclock": "o'clock",
        "itd've": "it'd've",
    }
    assert {word: CONTRACTIONS[word] for word in examples} == examples


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_ten_answers_leave_one_out(matches: int, accuracy: float) -> None:
    answers = ["yes"] * matches + [f"other {n}" for n in range(10 - matches)]
    assert vqa_accuracy("Yes.", answers) == pytest.approx(accuracy)


def test_unanimous_answers_are_compared_as_written() -> None:
    assert vqa_accuracy("dog", ["dog"] * 10) == 1
    assert vqa_accuracy("Dog", ["dog"] * 10) == 0
    assert vqa_accuracy(" dog\n", ["dog"] * 10) == 1


def test_empty_prediction_matches_only_empty_answers() -> None:
    assert vqa_accuracy("", ["yes"] * 5 + ["no"] * 5) == 0
    assert vqa_accuracy("", [""] * 5 + ["no"] * 5) == 1


def test_one_answer_is_an_exact_match_after_normalisation() -> None:
    assert vqa_accuracy("The Dog.", ["dog"]) == 1
    assert vqa_accuracy("dogs", ["dog"]) == 0
    assert vqa_accuracy("", [""]) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_agreeing_with_everybody_is_full_accuracy_however_few_they_are(count: int) -> None:
    assert vqa_accuracy("dog", ["dog"] * count) == 1
    assert vqa_accuracy("cat", ["dog"] * count) == 0


def test_half_of_two_answers_is_half_an_accuracy() -> None:
    assert vqa_accuracy("dog", ["dog", "cat"]) == pytest.approx(0.5)


def test_question_without_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one answer"):
        vqa_accuracy("dog", [])
