"""BLEU (Papineni et al., 2002) as COCO's caption evaluation computes it (coco-caption, `bleu_scorer.py`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

ORDERS = 4
# The toolkit's constants; they decide the values of samples without any matching n-gram.
_TINY, _SMALL = 1e-15, 1e-9


class BleuScores(NamedTuple):
    """BLEU-1 to BLEU-4 in [0, 1]: of the corpus (statistics pooled before the ratio) and of each sample."""

    corpus: tuple[float, ...]
    samples: list[tuple[float, ...]]


class _Counts(NamedTuple):
    matched: tuple[int, ...]
    guessed: tuple[int, ...]
    length: int
    reference_length: int


def ngrams(tokens: Sequence[str], orders: int = ORDERS) -> Counter[tuple[str, ...]]:
    """Counts of every n-gram of 1 to `orders` tokens."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, orders + 1) for i in range(len(tokens) - n + 1))


def _count(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> _Counts:
    ceiling: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        ceiling |= ngrams(reference)
    matched = [0] * ORDERS
    for gram, count in ngrams(candidate).items():
        matched[len(gram) - 1] += min(count, ceiling[gram])
    length = len(candidate)
    closest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    return _Counts(tuple(matched), tuple(max(0, length - n) for n in range(ORDERS)), length, closest)


def _score(counts: _Counts) -> tuple[float, ...]:
    product, scores = 1.0, []
    for order, (matched, guessed) in enumerate(zip(counts.matched, counts.guessed, strict=True), start=1):
        product *= (matched + _TINY) / (guessed + _SMALL)
        scores.append(product ** (1 / order))
    ratio = (counts.length + _TINY) / (counts.reference_length + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return tuple(score * penalty for score in scores)


def bleu(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> BleuScores:
    """BLEU of tokenised `candidates` (N) against `references` (N, at least one each); closest reference length.

    Raises ValueError when the two differ in length, are empty, or a candidate has no reference.
    """
    check_pairs(candidates, references)
    counts = [_count(c, r) for c, r in zip(candidates, references, strict=True)]
    pooled = _Counts(
        tuple(map(sum, zip(*(c.matched for c in counts), strict=True))),
        tuple(map(sum, zip(*(c.guessed for c in counts), strict=True))),
        sum(c.length for c in counts),
        sum(c.reference_length for c in counts),
    )
    return BleuScores(_score(pooled), [_score(c) for c in counts])


def check_pairs(candidates: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    """Raise ValueError unless there is one non-empty list of references per candidate, and any candidate at all."""
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates but {len(references)} lists of references")
    if not candidates:
        raise ValueError("no candidates to score")
    for index, own in enumerate(references):
        if not own:
            raise ValueError(f"candidate {index} has no reference")
