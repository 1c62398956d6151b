"""The Penn Treebank tokenisation that the COCO caption evaluation applies before every caption metric.

Behaviour of Stanford CoreNLP 3.4.1's `PTBTokenizer -preserveLines -lowerCase` followed by the toolkit's removal of
punctuation tokens (pycocoevalcap 1.2, `ptbtokenizer.py`). That tokenizer is a JFlex lexer: at every position the rule
with the longest match wins. `ptb_rules` holds the rules; only what can change the tokens that survive is modelled: a
sentence-final period that the lexer emits twice, for instance, is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

from petlbench.metrics.ptb_rules import FRAGMENTS, RULES

# What ptbtokenizer.py drops. Brackets are in lower case by then, so "-lrb-" survives "-LRB-", in the toolkit too.
_DROPPED = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;"
PUNCTUATION = frozenset(_DROPPED.split())

_ASSIMILATED = frozenset(("cannot", "gonna", "gotta", "lemme", "gimme", "wanna"))
_PLAIN = re.compile(r"([A-Za-z]+)(?=[ \n])")  # other gaps may stand inside addresses
_SPACES = re.compile(r"[ \t][ \t\u00A0\u2000-\u200A\u3000]*")
# The toolkit replaces "\n" alone; the others would break the line and shift the tokens of all later captions.
_BREAKS = re.compile("[\n\r\v\f\u2028\u2029]")


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    normalise: Callable[[str], str]


@cache
def _compiled() -> tuple[_Rule, ...]:
    def expand(pattern: str) -> str:
        return re.sub(r"<([A-Z]+)>", lambda match: f"(?:{expand(FRAGMENTS[match[1]])})", pattern)

    return tuple(_Rule(re.compile(expand(pattern)), normalise) for pattern, normalise in RULES)


def _lex(text: str, position: int, end: int) -> Iterator[str]:
    """Tokens of the line of `text` that ends at `end`, in their original case, punctuation included.

    What follows the line counts: whether a period belongs to "b." may hang on the next caption's first letter.
    """
    while position < end:
        if gap := _SPACES.match(text, position):
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


def tokenize_all(captions: Sequence[str]) -> list[list[str]]:
    """Lower-case Penn Treebank tokens of each caption without punctuation tokens, as COCO's caption evaluation sees it.

    The captions are lexed as the lines of one file, as in the toolkit. Other line breaks inside them count as spaces.
    Clitics are split (`it 's`, `do n't`), brackets become `-lrb-`, abbreviations keep their period. A fraction such as
    `1 1/2` is one token with a no-break space. Empty when only punctuation is left.
    """
    lines = [_BREAKS.sub(" ", caption) for caption in captions]
    text, position, tokens = "\n".join(lines), 0, []
    for line in lines:
        lowered = [token.lower() for token in _lex(text, position, position + len(line)) if token]
        if lowered:
            lowered[-1] = lowered[-1].rstrip()  # as the toolkit does to the line: some spaces may end an address
        tokens.append([token for token in lowered if token not in PUNCTUATION])
        position += len(line) + 1
    return tokens


def tokenize(caption: str) -> list[str]:
    """`tokenize_all` of one caption alone."""
    return tokenize_all([caption])[0]
