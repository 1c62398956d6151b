"""CIDEr-D (Vedantam et al., 2015) as COCO's caption evaluation computes it (coco-caption, `cider_scorer.py`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from petlbench.metrics.bleu import ORDERS, check_pairs, ngrams

SIGMA = 6.0

Gram = tuple[str, ...]


class CiderScores(NamedTuple):
    """A corpus score, the mean of the samples' scores, and those."""

    corpus: float
    samples: list[float]


class _Vector(NamedTuple):
    """TF-IDF weights of one caption, with the norm of each order and the length."""

    weights: dict[Gram, float]
    norms: tuple[float, ...]
    length: int


def _vector(counts: Mapping[Gram, int], document_frequency: Mapping[Gram, int], log_documents: float) -> _Vector:
    weights: dict[Gram, float] = {}
    squares, length = [0.0] * ORDERS, 0
    for gram, count in counts.items():
        weight = count * (log_documents - math.log(max(1.0, document_frequency.get(gram, 0))))
        weights[gram] = weight
        squares[len(gram) - 1] += weight * weight
        # The toolkit's length counts bigrams: equal differences, except against captions without any word.
        length += count if len(gram) == 2 else 0
    return _Vector(weights, tuple(map(math.sqrt, squares)), length)


def _similarity(candidate: _Vector, reference: _Vector) -> float:
    """Clipped cosine, averaged over the orders, times the Gaussian penalty on the difference in length."""
    dots = [0.0] * ORDERS
    for gram, weight in candidate.weights.items():
        other = reference.weights.get(gram, 0.0)
        dots[len(gram) - 1] += min(weight, other) * other
    norms = [a * b for a, b in zip(candidate.norms, reference.norms, strict=True)]
    cosines = [dot / norm if norm else dot for dot, norm in zip(dots, norms, strict=True)]
    delta = candidate.length - reference.length
    return sum(cosines) / ORDERS * math.exp(-(delta**2) / (2 * SIGMA**2))


def cider_d(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> CiderScores:
    """CIDEr-D of tokenised `candidates` (N) against `references` (N, at least one each), in [0, 10].

    The toolkit's unit: cosine times 10; papers print it times 100. Document frequencies come from the references given,
    one document a sample, so a corpus of one sample scores 0 and sample scores of different corpora do not compare.
    Raises ValueError when the two differ in length, are empty, or a candidate has no reference.
    """
    check_pairs(candidates, references)
    counts = [[ngrams(reference) for reference in own] for own in references]
    frequency: Counter[Gram] = Counter()
    for own in counts:
        frequency.update({gram for reference in own for gram in reference})
    log_documents = math.log(len(references))
    samples = []
    for candidate, own in zip(candidates, counts, strict=True):
        vector = _vector(ngrams(candidate), frequency, log_documents)
        similarities = [_similarity(vector, _vector(reference, frequency, log_documents)) for reference in own]
        samples.append(10.0 * sum(similarities) / len(own))
    return CiderScores(sum(samples) / len(samples), samples)
