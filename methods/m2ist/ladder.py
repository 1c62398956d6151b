"""M2IST on encoder-decoders: a side ladder over the frozen decoder, the side's only way to the words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.tokens import Tokens, decoding_pass, join
from petlbench.api.wrapper import Wrapper
from petlbench.backbones.parts.encoder_decoder import EncoderDecoder

from ..layers import start_at_zero
from .side import SideStack

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SideTokens(Tokens):
    """Encoder output: the adapted `states`, the `frozen` encoder's output and the `side` state; all (B, N, d)."""

    frozen: Tensor | None = None
    side: Tensor | None = None


@dataclass
class LadderCache:
    """The frozen decoder's cache, and keys and values (B, N, r) of each crossing."""

    frozen: Any
    crossings: list[KeysValues] = field(default_factory=list)


class Crossing(nn.Module):
    """O softmax(Q s_d (K z)^T / sqrt r) V z with z = LN(s_e); one head of width r; starts at zero."""

    is_side_module = True

    def __init__(self, width: int, memory_width: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(memory_width)
        self.q, self.o = nn.Linear(width, rank), nn.Linear(rank, width)
        self.k, self.v = nn.Linear(memory_width, rank), nn.Linear(memory_width, rank)
        for linear in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        start_at_zero(self.o)

    def keys_values(self, side: Tensor) -> KeysValues:
        """Map s_e (B, N, memory_width) to keys and values, (B, N, r) each."""
        z = self.norm(side)
        return self.k(z), self.v(z)

    def forward(self, state: Tensor, keys_values: KeysValues, bias: Tensor | None) -> Tensor:
        """Map s_d (B, T, width) to (B, T, width); `bias` (B, 1, 1, N) is added to the scores."""
        k, v = (x.unsqueeze(1) for x in keys_values)
        mixed = F.scaled_dot_product_attention(self.q(state).unsqueeze(1), k, v, attn_mask=bias)
        output: Tensor = self.o(mixed.squeeze(1))
        return output


class Ladder(Wrapper):
    """An encoder-decoder whose frozen encoder and decoder each have a side network; no gradient enters either.

    Heads read the adapted encoder output. The frozen decoder attends to the frozen encoder. Its side attends to the
    encoder's side through crossings after the last pair: logits = head(N(f_d + s_d)), N and head frozen.
    """

    inner: EncoderDecoder

    def __init__(self, inner: EncoderDecoder, crossings: Sequence[Crossing]) -> None:
        super().__init__(inner)
        self.crossings = nn.ModuleList(crossings)
        self.training = inner.training  # adapting changes no mode

    def train(self, mode: bool = True) -> Ladder:
        """Set the mode, but keep the frozen model's own dropout on embeddings off."""
        super().train(mode)
        self.inner.training = False
        return self

    def _side(self, role: str) -> SideStack:
        stack = self.inner.stack(role)
        assert isinstance(stack, SideStack)
        return stack

    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        tokens, stack = join(parts), self._side("encoder")
        context = tokens.context(task=task, bias=self.inner.encoder_bias(tokens))
        climb, _ = stack.climb(tokens.states, context)
        return SideTokens(
            self.inner.leave(stack.read(climb)),
            tokens.mask,
            tokens.types,
            tokens.positions,
            tokens.segments,
            frozen=climb.frozen,
            side=climb.side,
        )

    def new_cache(self) -> LadderCache:
        return LadderCache(self.inner.new_cache())

    def reorder_cache(self, cache: LadderCache, index: Tensor) -> LadderCache:
        crossings = [(k[index], v[index]) for k, v in cache.crossings]
        return LadderCache(self.inner.reorder_cache(cache.frozen, index), crossings)

    def decode(
        self, memory: Tokens, ids: Tensor, cache: LadderCache | None = None, *, task: str
    ) -> tuple[Tensor, LadderCache | None]:
        assert isinstance(memory, SideTokens) and memory.frozen is not None and memory.side is not None
        stack, inner = self._side("decoder"), self.inner
        step = 0 if cache is None else int(cache.frozen.get_seq_length())
        seen = replace(memory, states=memory.frozen)
        frozen, hidden = None if cache is None else cache.frozen, inner.memory_bias(seen)
        bias = inner.decoder_bias(ids, step, seen.states.dtype)
        context = decoding_pass(ids, seen, task=task, step=step, cache=frozen, bias=bias, memory_bias=hidden)
        climb, _ = stack.climb(inner.embed_decoder(ids, step), context)
        terms = climb.terms
        for crossing, pair in zip(self.crossings, self._keys_values(memory.side, cache), strict=True):
            terms = terms + crossing(climb.entered + terms, pair, hidden)
        return inner.logits(inner.leave(stack.read(replace(climb, terms=terms)))), cache

    def _keys_values(self, side: Tensor, cache: LadderCache | None) -> list[KeysValues]:
        """Return the keys and values of each crossing; a cache keeps those of its first step."""
        if cache is not None and cache.crossings:
            return cache.crossings
        pairs: list[KeysValues] = [crossing.keys_values(side) for crossing in self.crossings]  # type: ignore[operator]
        if cache is not None:
            cache.crossings = pairs
        return pairs
