"""The caption metrics of COCO's evaluation, from raw captions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from petlbench.metrics.bleu import ORDERS, bleu, check_pairs
from petlbench.metrics.cider import cider_d
from petlbench.metrics.ptb import tokenize_all
from petlbench.metrics.rouge import rouge_l


def _words(tokens: Sequence[str]) -> list[str]:
    """Split tokens at any white space, as BLEU and CIDEr-D do: a token with a no-break space is two words."""
    return " ".join(tokens).split()


def tokenize_pairs(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Tokens of the candidates and of the references, each lexed as the lines of one file: their order matters."""
    flat = iter(tokenize_all([reference for own in references for reference in own]))
    return tokenize_all(candidates), [list(islice(flat, len(own))) for own in references]


def caption_scores(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Scores of the corpus and of each sample under `cider_d`, `bleu_1` to `bleu_4` and `rouge_l`.

    `candidates` and `references` (one or more each) are captions as written; they are tokenised here. CIDEr-D is in the
    toolkit's unit (papers print it times 100), the others are in [0, 1]. The corpus's BLEU is not the samples' mean.
    Raises ValueError when the two differ in length, are empty, or a candidate has no reference.
    """
    check_pairs(candidates, references)
    tokens, reference_tokens = tokenize_pairs(candidates, references)
    words = [_words(t) for t in tokens]
    reference_words = [[_words(t) for t in own] for own in reference_tokens]

    blue = bleu(words, reference_words)
    cider = cider_d(words, reference_words)
    rouge = rouge_l(tokens, reference_tokens)

    def row(cider_score: float, bleu_scores: Sequence[float], rouge_score: float) -> dict[str, float]:
        named = {f"bleu_{n + 1}": bleu_scores[n] for n in range(ORDERS)}
        return {"cider_d": cider_score, **named, "rouge_l": rouge_score}

    samples = [row(*scores) for scores in zip(cider.samples, blue.samples, rouge.samples, strict=True)]
    return row(cider.corpus, blue.corpus, rouge.corpus), samples
