"""VQA soft accuracy (Antol et al., 2015), as the official evaluation computes it (`vqaEval.py`)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The official code passes re.UNICODE (32) where `re.sub` takes its count: at most 32 periods go.
_MOST_PERIODS = 32
_ARTICLES = frozenset(("a", "an", "the"))
_COUNTING = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_COUNTING.split())}
# Contractions whose official spelling only puts the apostrophe back where it was left out: "dont" -> "don't".
_REGULAR = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
    isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
    shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
    there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
    you've
"""
# Double contractions, for which the official table has both half-written forms: "couldnt've" and "couldn'tve".
_DOUBLE = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've
"""
# The rest of the table, oddities included. Its keys with a capital never match, as words are in lower case by then.
_IRREGULAR = {
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


CONTRACTIONS = {
    **{word.replace("'", ""): word for word in _REGULAR.split()},
    **{word.replace("'", "", 1): word for word in _DOUBLE.split()},
    **{"".join(word.rsplit("'", 1)): word for word in _DOUBLE.split()},
    **_IRREGULAR,
}


def _clean(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _strip_punctuation(answer: str) -> str:
    comma_in_number = _COMMA_IN_NUMBER.search(answer) is not None
    stripped = answer
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        stripped = stripped.replace(mark, "" if beside_space or comma_in_number else " ")
    return _PERIOD.sub("", stripped, count=_MOST_PERIODS)


def normalise(answer: str) -> str:
    """Return an answer in the form that the official evaluation compares.

    Lower case, number words as digits, articles and punctuation dropped, contractions with their apostrophe.
    """
    words = (_NUMBERS.get(word, word) for word in _strip_punctuation(_clean(answer)).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy in [0, 1] of `prediction` against the people's `answers`, ten in VQA.

    Each answer in turn is left out, and the prediction scores min(1, matches / 3) against the others; the mean counts.
    As in the official evaluation, nothing is normalised where the answers are all equal. Where two or three answers
    leave fewer than three others, agreeing with all of them is full accuracy. A single answer stands for unanimity:
    equality after normalisation is 1, anything else 0. Raises ValueError without answers.
    """
    if not answers:
        raise ValueError("a question needs at least one answer")
    cleaned, guess = [_clean(answer) for answer in answers], _clean(prediction)
    if len(cleaned) == 1:
        return float(normalise(guess) == normalise(cleaned[0]))
    if len(set(cleaned)) > 1:
        cleaned, guess = [normalise(answer) for answer in cleaned], normalise(guess)
    matches, enough = cleaned.count(guess), min(3, len(cleaned) - 1)
    others = ((matches - (answer == guess)) / enough for answer in cleaned)
    return sum(min(1.0, share) for share in others) / len(cleaned)
