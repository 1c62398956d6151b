"""Encoder-decoder language models that also read visual tokens, with the methods that side networks call."""

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
    """The encoder reads text tokens, then visual tokens; the decoder attends to all of them."""

    stacked_decoder = True
    token_embedding: nn.Embedding
    dropout: float

    @abstractmethod
    def encoder_bias(self, tokens: Tokens) -> Tensor | None:
        """Return the bias (B or 1, heads or 1, N or 1, N) that the encoder's attention adds to its scores."""

    @abstractmethod
    def decoder_bias(self, ids: Tensor, step: int, dtype: torch.dtype) -> Tensor | None:
        """Return the decoder's self-attention bias (1, …, T, step + T) for `ids` (B, T) after `step` earlier ones."""

    def memory_bias(self, memory: Tokens) -> Tensor | None:
        """Return the bias (B, 1, 1, N) that the decoder's cross-attention adds to its scores."""
        return additive(memory.mask, memory.states.dtype)

    @abstractmethod
    def embed_decoder(self, ids: Tensor, step: int) -> Tensor:
        """Map ids (B, T) that follow `step` earlier ones to the decoder's input states (B, T, width)."""

    @abstractmethod
    def logits(self, states: Tensor) -> Tensor:
        """Map states (…, width) to logits (…, vocabulary); the output head is the embedding table."""

    def leave(self, states: Tensor) -> Tensor:
        """Map the output states of a stack to those that the rest of the model reads."""
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
    """Return whether the backbone is an encoder-decoder, by its trait `stacked_decoder`."""
    return backbone.stacked_decoder
