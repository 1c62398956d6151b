"""Greedy and beam decoding against exhaustive search, and a cache that changes nothing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petlbench.api.decoding import generate, generated_texts
from petlbench.api.sites import current_pass
from petlbench.api.tokens import Tokens
from petlbench.backbones.tiny import Tiny
from tests.backbone_factory import Bare, draw, small_tiny

END, VOCABULARY = 2, 4
QUESTIONS = ["is there a red circle", "two", "what stands on the left of the two blue squares below"]


class Table(Bare):
    """Logits looked up by (sample, prefix); the cache is the list of prefixes, so a wrong reordering shows."""

    pad_id, eos_id, start_id = 9, END, END

    def __init__(self, seed: int = 0, forbidden: int | None = None) -> None:
        super().__init__()
        self.seed, self.forbidden = seed, forbidden
        self.fed: list[list[int]] = []  # ids, step by step

    def logits(self, sample: int, prefix: tuple[int, ...]) -> Tensor:
        seed = self.seed
        for item in (sample, *prefix):
            seed = (seed * 31 + item + 1) % (2**31)
        row = 2 * draw(VOCABULARY, seed=seed)
        if self.forbidden is not None:
            row[self.forbidden] = -torch.inf
        return row

    def new_cache(self) -> list[tuple[int, ...]]:
        return []

    def reorder_cache(self, cache: Any, index: Tensor) -> Any:
        return [cache[i] for i in index.tolist()]

    def decode(self, memory: Tokens, ids: Tensor, cache: Any = None, *, task: str) -> tuple[Tensor, Any]:
        assert ids.shape[1] == 1
        self.fed.append(ids[:, 0].tolist())
        cache = [(*before, int(new)) for before, new in zip(cache or [()] * len(ids), ids[:, 0], strict=True)]
        samples = memory.states[:, 0, 0].int().tolist()
        rows = [self.logits(sample, prefix[1:]) for sample, prefix in zip(samples, cache, strict=True)]
        return torch.stack(rows)[:, None], cache


def memory_of(*samples: int) -> Tokens:
    states = torch.tensor(samples, dtype=torch.float64)[:, None, None]
    mask = torch.ones(len(samples), 1, dtype=torch.bool)
    return Tokens(states, mask, mask.long(), torch.zeros(len(samples), 1, 2))


def mean_log_probability(table: Table, sample: int, ids: tuple[int, ...]) -> float:
    """Of a finished hypothesis: its end token counts."""
    steps = [table.logits(sample, ids[:i]).log_softmax(-1)[token] for i, token in enumerate((*ids, END))]
    return float(sum(steps)) / len(steps)


def hypotheses(longest: int) -> list[tuple[int, ...]]:
    """Everything that can be said within `longest` tokens, the end token included."""
    tokens = [t for t in range(VOCABULARY) if t != END]
    return [ids for length in range(longest) for ids in itertools.product(tokens, repeat=length)]


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_enough_beam_finds_the_best_hypothesis(seed: int) -> None:
    table, samples = Table(seed), (0, 1, 2)
    best = [
        list(max(hypotheses(4), key=lambda ids, sample=sample: mean_log_probability(table, sample, ids)))
        for sample in samples
    ]
    assert generate(table, memory_of(*samples), task="t", max_length=4, beams=27) == best


def test_beams_rank_by_mean_log_probability_and_beat_greedy() -> None:
    gains = []
    for seed in range(8):
        table = Table(seed)
        greedy, beam = (generate(table, memory_of(0), task="t", max_length=6, beams=b)[0] for b in (1, 4))
        if len(greedy) < 6:
            scores = [mean_log_probability(table, 0, tuple(ids)) for ids in (greedy, beam)]
            gains.append(scores[1] - scores[0])
    assert len(gains) > 2 and max(gains) > 0.01 and min(gains) > -0.2


def greedy_by_hand(table: Table, sample: int, longest: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < longest:
        token = int(table.logits(sample, tuple(ids)).argmax())
        if token == END:
            break
        ids.append(token)
    return ids


def test_one_beam_is_greedy_and_nothing_follows_the_end() -> None:
    table, samples = Table(3), tuple(range(6))
    found = generate(table, memory_of(*samples), task="t", max_length=8)
    assert found == [greedy_by_hand(table, sample, 8) for sample in samples]
    lengths = [len(ids) for ids in found]
    assert min(lengths) < max(lengths), "the samples should end at different steps"
    for sample, length in enumerate(lengths):  # start, the tokens, the end; from there on padding
        fed = [step[sample] for step in table.fed]
        assert fed == ([END, *found[sample], END] + [table.pad_id] * 9)[: len(fed)]
        assert len(fed) <= 8 and length <= 8


@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_stops_at_the_longest_length(beams: int) -> None:
    table = Table(forbidden=END)
    found = generate(table, memory_of(0, 1), task="t", max_length=5, beams=beams)
    assert [len(ids) for ids in found] == [5, 5] and len(table.fed) == 5
    assert all(END not in ids for ids in found)


def test_unfinished_beams_give_the_most_probable_sequence() -> None:
    table = Table(seed=2, forbidden=END)

    def total(ids: tuple[int, ...]) -> float:
        return float(sum(table.logits(0, ids[:i]).log_softmax(-1)[token] for i, token in enumerate(ids)))

    best = max(itertools.product([0, 1, 3], repeat=3), key=total)
    assert generate(table, memory_of(0), task="t", max_length=3, beams=27) == [list(best)]


@pytest.mark.parametrize("beams", [1, 3])
def test_samples_of_a_batch_do_not_influence_one_another(beams: int) -> None:
    table = Table(5)
    together = generate(table, memory_of(0, 1, 2), task="t", max_length=6, beams=beams)
    assert together == [generate(table, memory_of(i), task="t", max_length=6, beams=beams)[0] for i in range(3)]
    backbone = small_tiny(seed=3, std=0.5)  # one whose answers differ
    batched = generate(backbone, padded_memory(backbone), task="vqa", max_length=8, beams=beams)
    alone = [padded_memory(backbone, [question]) for question in QUESTIONS]
    assert batched == [generate(backbone, m, task="vqa", max_length=8, beams=beams)[0] for m in alone]
    assert len({tuple(ids) for ids in batched}) > 1
    texts = generated_texts(backbone, padded_memory(backbone), task="vqa", max_length=8, beams=beams)
    assert texts == [backbone.text_of(ids) for ids in batched]


def padded_memory(backbone: Tiny, texts: list[str] = QUESTIONS) -> Tokens:
    return backbone.fuse(backbone.embed_text(backbone.texts(texts, 30)), task="vqa")


def test_greedy_decoding_is_stepping_by_argmax_without_a_cache() -> None:
    backbone = small_tiny(seed=3, std=0.5)
    memory = padded_memory(backbone)
    ids = torch.full((3, 1), backbone.start_id)
    for _ in range(8):
        logits, cache = backbone.decode(memory, ids, task="vqa")
        assert cache is None
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    expected = [list(itertools.takewhile(lambda t: t not in (1, END), row)) for row in ids[:, 1:].tolist()]
    assert generate(backbone, memory, task="vqa", max_length=8) == expected


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        self.seen.append(current_pass().step)
        return value


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cache_changes_no_logits_not_even_reordered(attention: str) -> None:
    backbone = small_tiny(attention=attention)
    memory, ids = padded_memory(backbone), torch.tensor([[2, 0, 7, 9, 30], [2, 0, 40, 8, 8], [2, 0, 5, 6, 7]])
    assert not memory.mask.all()
    whole, _ = backbone.decode(memory, ids, task="vqa")
    steps = Steps()
    backbone.stack("decoder").layers[0]["cross_attention"].insert("output", steps)
    cache, pieces = backbone.new_cache(), []
    for start, stop in ((0, 1), (1, 2), (2, 4), (4, 5)):  # also several tokens at once
        logits, cache = backbone.decode(memory, ids[:, start:stop], cache, task="vqa")
        pieces.append(logits)
    assert steps.seen == [0, 1, 2, 4]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)

    order = torch.tensor([2, 0, 0, 1])
    picked = Tokens(memory.states[order], memory.mask[order], memory.types[order], memory.positions[order])
    cache, again = backbone.new_cache(), ids[order]
    _, cache = backbone.decode(memory, ids[:, :3], cache, task="vqa")
    logits, _ = backbone.decode(picked, again[:, 3:], backbone.reorder_cache(cache, order), task="vqa")
    torch.testing.assert_close(logits, whole[order, 3:], rtol=0, atol=1e-10)
