"""Greedy and beam decoding of transformers 4.2.1, the source of the authors' ids, over a backbone's `decode`.

petlbench's own loop differs in what no result depends on but such a file: it ends a text at padding too, and lets no
unfinished text compete with finished ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from petlbench.api.backbone import Backbone
from petlbench.api.tokens import Tokens

Finished = list[tuple[float, list[int]]]


@torch.no_grad()
def greedy(backbone: Backbone, memory: Tokens, longest: int, task: str) -> list[list[int]]:
    """Return ids in rows of one length: the start token, the text, the end token, padding."""
    rows: list[list[int]] = [[backbone.start_id] for _ in memory.states]
    done, cache = [False] * len(rows), backbone.new_cache()
    while len(rows[0]) < longest and not all(done):
        last = torch.tensor([row[-1:] for row in rows])
        logits, cache = backbone.decode(memory, last, cache, task=task)
        for place, token in enumerate(logits[:, -1].argmax(-1).tolist()):
            rows[place].append(backbone.pad_id if done[place] else token)
            done[place] |= token == backbone.eos_id
    return rows


class Search:
    """Beams of one sample: running texts with their log-probabilities, and the best finished ones."""

    def __init__(self, backbone: Backbone, beams: int) -> None:
        self.beams, self.eos = beams, backbone.eos_id
        self.texts = [[backbone.start_id] for _ in range(beams)]
        self.totals = [0.0] + [-1e9] * (beams - 1)
        self.finished: Finished = []
        self.done = False

    def finish(self, total: float, text: list[int]) -> None:
        """Keep a text if it is among the best by mean log-probability, the start token counted."""
        self.finished = sorted([*self.finished, (total / len(text), text)])[-self.beams :]

    def extend(self, scores: Tensor) -> list[int]:
        """Take totals (beams, V) of all next tokens; return the beam that each next beam continues."""
        values, places = scores.flatten().topk(2 * self.beams)
        chosen: list[tuple[int, int, float]] = []
        for rank, (total, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            beam, token = divmod(place, scores.shape[1])
            if token != self.eos:
                chosen.append((beam, token, total))
            elif rank < self.beams:
                self.finish(total, self.texts[beam])
            if len(chosen) == self.beams:
                break
        reachable = float(values.max()) / len(self.texts[0])
        self.done |= len(self.finished) == self.beams and self.finished[0][0] >= reachable
        self.texts = [[*self.texts[beam], token] for beam, token, _ in chosen]
        self.totals = [total for _, _, total in chosen]
        return [beam for beam, _, _ in chosen]

    def best(self) -> list[int]:
        if not self.done:
            for total, text in zip(self.totals, self.texts, strict=True):
                self.finish(total, text)
        return self.finished[-1][1]


@torch.no_grad()
def beam(backbone: Backbone, memory: Tokens, longest: int, beams: int, task: str) -> list[list[int]]:
    """As `greedy`, by beam search with a length penalty of one."""
    searches = [Search(backbone, beams) for _ in memory.states]
    memory = memory.rows(torch.arange(len(searches)).repeat_interleave(beams))
    cache = backbone.new_cache()
    while len(searches[0].texts[0]) < longest and not all(search.done for search in searches):
        last = torch.tensor([text[-1:] for search in searches for text in search.texts])
        logits, cache = backbone.decode(memory, last, cache, task=task)
        scores = logits[:, -1].log_softmax(-1).unflatten(0, (-1, beams))
        origins = []
        for place, search in enumerate(searches):
            if search.done:
                search.texts = [[*text, backbone.pad_id] for text in search.texts]
                origins += [place * beams] * beams
            else:
                found = search.extend(scores[place] + torch.tensor(search.totals)[:, None])
                origins += [place * beams + origin for origin in found]
        cache = backbone.reorder_cache(cache, torch.tensor(origins))
    texts = [search.best() for search in searches]
    length = min(max(len(text) for text in texts) + 1, longest)
    ended = [[*text, backbone.eos_id][:length] for text in texts]
    return [[*text, *[backbone.pad_id] * (length - len(text))] for text in ended]
