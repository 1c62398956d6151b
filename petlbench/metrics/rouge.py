"""ROUGE-L (Lin, 2004) as COCO's caption evaluation computes it (coco-caption, `rouge.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from petlbench.metrics.bleu import check_pairs
from petlbench.metrics.cider import CiderScores

BETA = 1.2


def _common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def _sample(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    # The toolkit splits at single spaces, so a caption without tokens is one empty word and matches another such one.
    words = candidate or [""]
    pairs = [(_common_length(reference or [""], words), len(reference or [""])) for reference in references]
    precision = max(common / len(words) for common, _ in pairs)
    recall = max(common / length for common, length in pairs)
    if not (precision and recall):
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def rouge_l(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> CiderScores:
    """ROUGE-L (F with beta 1.2; best precision and best recall over the references) of tokenised captions, in [0, 1].

    Raises ValueError when the two differ in length, are empty, or a candidate has no reference.
    """
    check_pairs(candidates, references)
    samples = [_sample(c, r) for c, r in zip(candidates, references, strict=True)]
    return CiderScores(sum(samples) / len(samples), samples)
