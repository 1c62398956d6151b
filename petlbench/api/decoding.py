"""Decoding: one greedy and beam loop for every backbone, and the loss of given tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from petlbench.api.backbone import Backbone
from petlbench.api.tokens import Texts, Tokens


@torch.no_grad()
def generate(backbone: Backbone, memory: Tokens, *, task: str, max_length: int, beams: int = 1) -> list[list[int]]:
    """Return ids per sample, without the start token, and cut before the end token.

    Greedy for one beam; else beam search that ranks finished hypotheses by mean log-probability.
    """
    if beams == 1:
        return _greedy(backbone, memory, task, max_length)
    return _beam(backbone, memory, task, max_length, beams)


def generated_texts(backbone: Backbone, memory: Tokens, *, task: str, max_length: int, beams: int = 1) -> list[str]:
    """One text per sample."""
    ids = generate(backbone, memory, task=task, max_length=max_length, beams=beams)
    return [backbone.text_of(row) for row in ids]


def _greedy(backbone: Backbone, memory: Tokens, task: str, max_length: int) -> list[list[int]]:
    batch = memory.states.shape[0]
    ids = torch.full((batch, 1), backbone.start_id, device=memory.states.device)
    done = torch.zeros(batch, dtype=torch.bool, device=ids.device)
    cache, steps = backbone.new_cache(), []
    for _ in range(max_length):
        logits, cache = backbone.decode(memory, ids, cache, task=task)
        chosen = logits[:, -1].argmax(-1)
        chosen = chosen.masked_fill(done, backbone.pad_id)
        done |= (chosen == backbone.eos_id) | (chosen == backbone.pad_id)
        steps.append(chosen)
        if bool(done.all()):
            break
        ids = chosen[:, None]
    return [_until_end(backbone, row) for row in torch.stack(steps, dim=1).tolist()]


def _beam(backbone: Backbone, memory: Tokens, task: str, max_length: int, beams: int) -> list[list[int]]:
    batch, device = memory.states.shape[0], memory.states.device
    rows = torch.arange(batch, device=device).repeat_interleave(beams)
    memory = memory.rows(rows)
    ids = torch.full((batch * beams, 1), backbone.start_id, device=device)
    # All beams start equal, so only the first of each sample may spawn the next ones.
    totals = torch.full((batch, beams), -torch.inf, device=device)
    totals[:, 0] = 0.0
    sequences = torch.empty((batch, beams, 0), dtype=torch.long, device=device)
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(batch)]
    cache = backbone.new_cache()
    for length in range(1, max_length + 1):
        logits, cache = backbone.decode(memory, ids, cache, task=task)
        scores = totals[:, :, None] + logits[:, -1].float().log_softmax(-1).view(batch, beams, -1)
        totals, flat = scores.flatten(1).topk(2 * beams)
        origin, token = flat // scores.shape[-1], flat % scores.shape[-1]
        ended = token == backbone.eos_id
        _collect(finished, sequences, totals, origin, ended, length)
        # Twice the beams were kept, so at least `beams` unfinished ones remain.
        keep = totals.masked_fill(ended, -torch.inf).topk(beams)
        totals, origin, token = keep.values, origin.gather(1, keep.indices), token.gather(1, keep.indices)
        sequences = torch.cat([_pick(sequences, origin), token[:, :, None]], dim=2)
        if _settled(finished, totals, beams, length, max_length):
            break
        rows = (torch.arange(batch, device=device)[:, None] * beams + origin).flatten()
        cache = backbone.reorder_cache(cache, rows)
        ids = token.flatten()[:, None]
    for sample, hypotheses in enumerate(finished):
        if not hypotheses:
            best = int(totals[sample].argmax())
            hypotheses.append((0.0, sequences[sample, best].tolist()))
    return [_until_end(backbone, max(hypotheses)[1]) for hypotheses in finished]


def _pick(sequences: Tensor, origin: Tensor) -> Tensor:
    return sequences.gather(1, origin[:, :, None].expand(-1, -1, sequences.shape[2]))


def _collect(
    finished: list[list[tuple[float, list[int]]]],
    sequences: Tensor,
    totals: Tensor,
    origin: Tensor,
    ended: Tensor,
    length: int,
) -> None:
    for sample, place in ended.nonzero().tolist():
        total = float(totals[sample, place])
        if total > -torch.inf:
            finished[sample].append((total / length, sequences[sample, int(origin[sample, place])].tolist()))


def _settled(
    finished: list[list[tuple[float, list[int]]]], totals: Tensor, beams: int, length: int, max_length: int
) -> bool:
    """Return whether no running beam can beat the `beams` best finished ones; its mean is at most its total divided
    by the longest length."""
    for sample, hypotheses in enumerate(finished):
        best = sorted((score for score, _ in hypotheses), reverse=True)[:beams]
        if len(best) < beams or best[-1] < float(totals[sample].max()) / max_length:
            return False
    return True


def _until_end(backbone: Backbone, ids: list[int]) -> list[int]:
    stops = (backbone.eos_id, backbone.pad_id)
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


def token_losses(backbone: Backbone, memory: Tokens, target: Texts, task: str) -> Tensor:
    """(B, T) cross-entropy of each target token given those before it; zero at padding."""
    start = torch.full_like(target.ids[:, :1], backbone.start_id)
    logits, _ = backbone.decode(memory, torch.cat([start, target.ids[:, :-1]], dim=1), task=task)
    losses = F.cross_entropy(logits.transpose(1, 2), target.ids, reduction="none")
    return losses * target.mask
