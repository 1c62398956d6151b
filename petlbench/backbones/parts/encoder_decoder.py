"""Language models with an encoder and a decoder, as hosts of visual tokens: what a side network re-enters them by."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from petlbench.api.backbone import Backbone, C
from petlbench.api.tokens import Tokens, decoding_pass, join
from petlbench.backbones.parts.masks import additive


class EncoderDecoder(Backbone[C]):
    """Encoder input is text tokens, then visual tokens; the decoder attends to all of them."""

    stacked_decoder = True
    token_embedding: nn.Embedding
    dropout: float

    @abstractmethod
    def encoder_bias(self, tokens: Tokens) -> Tensor | None:
        """What the encoder's attention adds to its scores: (B or 1, heads or 1, N or 1, N)."""

    @abstractmethod
    def decoder_bias(self, ids: Tensor, step: int, dtype: torch.dtype) -> Tensor | None:
        """What the decoder's self-attention adds for `ids` (B, T) after `step` earlier ones: (1, …, T, step + T)."""

    def memory_bias(self, memory: Tokens) -> Tensor | None:
        """What the decoder's cross-attention adds to its scores: (B, 1, 1, N)."""
        return additive(memory.mask, memory.states.dtype)

    @abstractmethod
    def embed_decoder(self, ids: Tensor, step: int) -> Tensor:
        """(B, T) -> (B, T, width): the decoder's input states for ids that follow `step` earlier ones."""

    @abstractmethod
    def logits(self, states: Tensor) -> Tensor:
        """(…, width) -> (…, vocabulary): the output head is the embedding table."""

    def leave(self, states: Tensor) -> Tensor:
        """States as they come out of a stack -> as the rest of the model sees them."""
        return states

    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        tokens = join(parts)
        context = tokens.context(task=task, bias=self.encoder_bias(tokens))
        states = F.dropout(tokens.states, self.dropout, self.training)
        states = self.leave(self.stack("encoder").run(states, context)[0])
        return Tokens(states, tokens.mask, tokens.types, tokens.positions, tokens.segments)

    def new_cache(self) -> EncoderDecoderCache:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def reorder_cache(self, cache: EncoderDecoderCache, index: Tensor) -> EncoderDecoderCache:
        cache.reorder_cache(index)
        return cache

    def decode(self, memory: Tokens, ids: Tensor, cache: Any = None, *, task: str) -> tuple[Tensor, Any]:
        step = 0 if cache is None else int(cache.get_seq_length())
        biases = {"bias": self.decoder_bias(ids, step, memory.states.dtype), "memory_bias": self.memory_bias(memory)}
        context = decoding_pass(ids, memory, task=task, step=step, cache=cache, **biases)
        states, _ = self.stack("decoder").run(self.embed_decoder(ids, step), context)
        return self.logits(self.leave(states)), cache

    def word_table(self) -> Tensor:
        return self.token_embedding.weight


def encodes_and_decodes(backbone: Backbone) -> TypeGuard[EncoderDecoder[Any]]:
    """Whether its decoder attends to an encoder, as its trait says."""
    return backbone.stacked_decoder
