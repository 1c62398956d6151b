"""The Penn Treebank tokenisation that the COCO caption evaluation applies before every caption metric.

Behaviour of Stanford CoreNLP 3.4.1's `PTBTokenizer -preserveLines -lowerCase` followed by the toolkit's removal of
punctuation tokens (pycocoevalcap 1.2, `ptbtokenizer.py`). That tokenizer is a JFlex lexer: at every position the rule
with the longest match wins. `ptb_rules` holds the rules; only what can change the tokens that survive is modelled: a
sentence-final period that the lexer emits twice, for instance, is not.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

from .ptb_rules import FRAGMENTS, GAP, RULES

# What ptbtokenizer.py drops. Brackets are in lower case by then, so "-lrb-" survives "-LRB-", in the toolkit too.
_DROPPED = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;"
PUNCTUATION = frozenset(_DROPPED.split())

_ASSIMILATED = frozenset(("cannot", "gonna", "gotta", "lemme", "gimme", "wanna"))
_PLAIN = re.compile(rf"([A-Za-z]+)(?={GAP})")
_GAPS = re.compile(rf"{GAP}+")


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    normalise: Callable[[str], str]


def _letter_class() -> str:
    """A character class: letters of the basic plane, combining marks of the alphabets before Tibetan, soft hyphen."""
    ranges: list[list[int]] = []
    for code in range(0x10000):
        kind = unicodedata.category(chr(code))[0]
        if kind == "L" or (kind == "M" and code < 0xF00) or code == 0xAD:
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "[" + "".join(f"\\u{low:04x}-\\u{high:04x}" for low, high in ranges) + "]"


@cache
def _compiled() -> tuple[_Rule, ...]:
    fragments = {**FRAGMENTS, "LETTER": _letter_class()}

    def expand(pattern: str) -> str:
        return re.sub(r"<([A-Z]+)>", lambda match: f"(?:{expand(fragments[match[1]])})", pattern)

    return tuple(_Rule(re.compile(expand(pattern)), normalise) for pattern, normalise in RULES)


def _lex(text: str) -> Iterator[str]:
    """Tokens of one line, in their original case, punctuation included."""
    # Captions are lexed as lines of one file. What follows a caption is a line break and, as a rule, a capital letter.
    end, text = len(text), text + "\n\n"
    position = 0
    while position < end:
        if gap := _GAPS.match(text, position):
            position = gap.end()
        elif (word := _PLAIN.match(text, position)) and word[0].lower() not in _ASSIMILATED:
            position = word.end()  # the bulk of any caption: no rule can match more than such a word
            yield word[0]
        else:
            token, width = _longest(text, position)
            position += width
            yield token


def _longest(text: str, position: int) -> tuple[str, int]:
    """The normalised token of the longest match and its width; an unknown character gives an empty token."""
    best, reach = ("", 1), position
    for pattern, normalise in _compiled():
        match = pattern.match(text, position)
        if match and match.end() > reach:
            best, reach = (normalise(match[1]), match.end(1) - position), match.end()
    return best


def tokenize(text: str) -> list[str]:
    """Lower-case Penn Treebank tokens of one caption without punctuation tokens, as COCO's caption evaluation sees it.

    Line breaks count as spaces. Clitics are split (`it 's`, `do n't`), brackets become `-lrb-`, abbreviations keep
    their period. A fraction such as `1 1/2` is one token with a no-break space. Empty when only punctuation is left.
    """
    lowered = (token.lower() for token in _lex(text.replace("\n", " ")))
    return [token for token in lowered if token and token not in PUNCTUATION]
