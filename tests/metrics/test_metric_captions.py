"""Caption metrics on cases that can be worked out by hand."""

from __future__ import annotations

import math

import pytest

from petlbench.metrics.bleu import bleu
from petlbench.metrics.captions import caption_scores
from petlbench.metrics.cider import cider_d
from petlbench.metrics.rouge import rouge_l

NAMES = {"cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"}


def test_scores_are_named_alike_for_corpus_and_samples() -> None:
    corpus, samples = caption_scores(["a cat", "a dog"], [["a cat"], ["the dog", "a hound"]])
    assert set(corpus) == NAMES
    assert [set(sample) for sample in samples] == [NAMES, NAMES]


def test_perfect_long_captions_reach_the_top_of_every_scale() -> None:
    captions = ["one red box stands alone", "two green cats sleep here", "three dogs run away fast"]
    corpus, samples = caption_scores(captions, [[caption] for caption in captions])
    assert corpus["cider_d"] == pytest.approx(10)
    assert corpus["rouge_l"] == pytest.approx(1)
    assert corpus["bleu_4"] == pytest.approx(1, abs=1e-8)
    assert samples[1]["cider_d"] == pytest.approx(10)


@pytest.mark.parametrize("candidate", ["", "   ", "... !", "?"])
def test_caption_without_words_scores_zero(candidate: str) -> None:
    _, samples = caption_scores([candidate, "a cat"], [["a red cat", "one dog"], ["a cat"]])
    assert samples[0] == pytest.approx(dict.fromkeys(NAMES, 0.0), abs=1e-12)


def test_two_empty_captions_match_in_rouge_alone() -> None:
    _, samples = caption_scores(["...", "a cat"], [["", "."], ["a cat"]])
    assert samples[0] == {**dict.fromkeys(NAMES, 0.0), "rouge_l": 1.0}


def test_repeated_words_are_clipped_to_the_best_reference() -> None:
    references = [["the", "cat", "is", "on", "the", "mat"], ["there", "is", "a", "cat", "on", "the", "mat"]]
    scores = bleu([["the"] * 7], [references])
    assert scores.samples[0][0] == pytest.approx(2 / 7)


def test_bleu_pools_statistics_over_the_corpus() -> None:
    scores = bleu([["a"], ["b", "x", "x"]], [[["a"]], [["b", "c", "d"]]])
    assert scores.corpus[0] == pytest.approx(2 / 4)
    assert [sample[0] for sample in scores.samples] == pytest.approx([1, 1 / 3])


def test_brevity_uses_the_closest_reference_and_the_shorter_on_a_tie() -> None:
    references = [[["a", "b", "c"], ["a", "b", "c", "d", "e"]]]
    assert bleu([["a", "b", "c", "d"]], references).samples[0][0] == pytest.approx(1)
    assert bleu([["a", "b"]], references).samples[0][0] == pytest.approx(math.exp(1 - 3 / 2))


def test_cider_weighs_by_rarity_over_the_references() -> None:
    references = [[["a", "cat"]], [["a", "dog"]], [["a", "cow"]]]
    common, rare, _ = cider_d([["a", "x"], ["x", "dog"], ["y"]], references).samples
    assert common == pytest.approx(0)
    # Unigrams alone match, and a word that no reference holds weighs as much as one that a single sample's hold.
    assert rare == pytest.approx(10 / 4 / math.sqrt(2))


def test_cider_penalises_length_and_clips_repetition() -> None:
    references = [[["cat"]], [["a", "dog"]], [["a", "cow"]]]
    once, thrice = (cider_d([words, ["x"], ["x"]], references).samples[0] for words in (["cat"], ["cat"] * 3))
    assert once == pytest.approx(10 / 4)
    # The repeated bigrams weigh in no reference; two bigrams more than the reference's none: exp(-4 / 72).
    assert thrice == pytest.approx(10 / 4 / 3 * math.exp(-4 / 72))


def test_more_references_average_in_cider_and_the_best_counts_in_rouge() -> None:
    references = [[["red", "cat"], ["blue", "dog"]], [["a", "cow"]]]
    assert cider_d([["red", "cat"], ["x"]], references).samples[0] == pytest.approx(10 * 2 / 4 / 2)
    assert rouge_l([["red", "cat"], ["x"]], references).samples == pytest.approx([1, 0])


def test_rouge_follows_the_longest_common_subsequence() -> None:
    precision, recall = 3 / 4, 3 / 5
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert rouge_l([["a", "b", "c", "d"]], [[["a", "x", "b", "y", "d"]]]).corpus == pytest.approx(expected)


def test_captions_are_tokenised_in_their_order_as_lines_of_one_file() -> None:
    # Before "The ..." a period ends the sentence, before "the ..." it belongs to "b.".
    for candidates, expected in ((["plan b.", "The end"], 1.0), (["plan b.", "the end"], 0.5)):
        _, samples = caption_scores(candidates, [["plan b"], ["the end"]])
        assert samples[0]["bleu_1"] == pytest.approx(expected)


def test_single_sample_corpus_has_no_cider() -> None:
    assert caption_scores(["a cat"], [["a cat"]])[0]["cider_d"] == 0


@pytest.mark.parametrize(("candidates", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_pairs_that_do_not_fit_are_refused(candidates: list[str], references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="candidate"):
        caption_scores(candidates, references)
