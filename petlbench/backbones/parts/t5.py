"""T5 (Raffel et al., 2020), built from transformers' modules, with visual tokens in its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import T5Config, T5Model

from petlbench.api.backbone import C
from petlbench.api.sites import TEXT, Segments, Stack
from petlbench.api.tokens import Texts, Tokens, plain_tokens
from petlbench.backbones.parts.encoder_decoder import EncoderDecoder
from petlbench.backbones.parts.masks import HIDDEN, MEMORY_HIDDEN, additive, causal
from petlbench.backbones.parts.transformers_parts import t5_decoder_layer, t5_encoder_layer
from petlbench.backbones.weights.library_models import grown_table, library_model

FIXED = ("num_heads", "d_kv", "feed_forward_proj", "relative_attention_max_distance", "layer_norm_epsilon")


class T5Host(EncoderDecoder[C]):
    """T5 as a backbone; a subclass adds how an image becomes tokens.

    Only pairs of text tokens have a distance: the relative bias of other pairs is zero. Each stack computes the bias
    once per pass, from the table in its first layer.
    """

    initialisation = "t5"
    norm_bias = False

    def build_t5(self, config: T5Config, *, source: str = "none", added_rows: int = 0, longest: int) -> None:
        """Split a library model into token table and stacks.

        `source`: of its weights, see `library_model`. `added_rows`: random rows to add at the end of the token table.
        `longest`: the longest text in tokens, since T5 itself has no limit.
        """
        t5 = library_model(T5Model, config, source, fixed=FIXED)
        self.width, self.dropout, self.max_text = config.d_model, config.dropout_rate, longest
        self.token_embedding = grown_table(t5.shared, added_rows, config.initializer_factor)
        encoder = [t5_encoder_layer(block) for block in t5.encoder.block]
        decoder = [t5_decoder_layer(block) for block in t5.decoder.block]
        self.stacks["encoder"] = Stack(encoder, width=self.width, final_norm=t5.encoder.final_layer_norm)
        self.stacks["decoder"] = Stack(decoder, width=self.width, final_norm=t5.decoder.final_layer_norm)

    def _relative(self, role: str, queries: int, keys: int, step: int = 0) -> Tensor:
        """Return the bias (1, heads, queries, keys) from the stack's table, for queries after `step` earlier ones."""
        attention: Any = next(iter(self.stack(role)))["attention"].core.attention
        bias: Tensor = attention.compute_bias(queries, keys, past_seen_tokens=step)
        return bias

    def embed_text(self, texts: Texts, *, task: str | None = None) -> Tokens:
        return plain_tokens(self.token_embedding(texts.ids), texts.mask, TEXT)

    def encoder_bias(self, tokens: Tokens) -> Tensor:
        texts = _text_places(tokens.segments).to(tokens.states.device)
        relative = self._relative("encoder", len(texts), len(texts))
        length = tokens.states.shape[1]
        bias = relative.new_zeros(1, relative.shape[1], length, length)
        bias[:, :, texts[:, None], texts] = relative
        hidden = additive(tokens.mask, bias.dtype)
        return bias if hidden is None else bias + hidden.clamp_min(HIDDEN)

    def decoder_bias(self, ids: Tensor, step: int, dtype: torch.dtype) -> Tensor:
        relative = self._relative("decoder", ids.shape[1], step + ids.shape[1], step)
        hidden = causal(ids, step, relative.dtype)
        return relative if hidden is None else relative + hidden.clamp_min(HIDDEN)

    def memory_bias(self, memory: Tokens) -> Tensor | None:
        hidden = additive(memory.mask, memory.states.dtype)
        return None if hidden is None else hidden.clamp_min(MEMORY_HIDDEN)

    def embed_decoder(self, ids: Tensor, step: int) -> Tensor:
        return F.dropout(self.token_embedding(ids), self.dropout, self.training)

    def leave(self, states: Tensor) -> Tensor:
        """Apply the additional dropout that T5 has after its final norms."""
        return F.dropout(states, self.dropout, self.training)

    def logits(self, states: Tensor) -> Tensor:
        return F.linear(states * self.width**-0.5, self.token_embedding.weight)


def _text_places(segments: Segments) -> Tensor:
    """Return the positions of the text tokens in a sequence; visual tokens between them add no distance."""
    places, start = [], 0
    for kind, length in segments:
        places += list(range(start, start + length)) if kind == TEXT else []
        start += length
    return torch.tensor(places, dtype=torch.long)


@dataclass(frozen=True, kw_only=True)
class T5Sizes:
    """Sizes of T5's first version: ReLU in the feed-forward network, and one tensor for head and token table."""

    vocabulary: int
    width: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    head_width: int
    ffn: int
    dropout: float
    buckets: int = 32
    max_distance: int = 128

    def config(self) -> T5Config:
        """Return the library's configuration of these sizes."""
        return T5Config(
            vocab_size=self.vocabulary,
            d_model=self.width,
            d_kv=self.head_width,
            d_ff=self.ffn,
            num_layers=self.encoder_layers,
            num_decoder_layers=self.decoder_layers,
            num_heads=self.heads,
            relative_attention_num_buckets=self.buckets,
            relative_attention_max_distance=self.max_distance,
            dropout_rate=self.dropout,
            feed_forward_proj="relu",
            attn_implementation="sdpa",
        )
