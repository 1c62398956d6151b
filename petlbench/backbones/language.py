"""Language models with an encoder and a decoder, as hosts of visual tokens: what BART and T5 share, and BART."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig, BartModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from petlbench.backbones.base import Backbone, Texts, Tokens, decoding_pass, join, plain_tokens
from petlbench.backbones.library_models import enlarged, library_model
from petlbench.backbones.sites import TEXT, Stack
from petlbench.backbones.transformers_parts import bart_decoder_layer, bart_encoder_layer
from petlbench.backbones.vision import additive

FIXED = ("encoder_attention_heads", "decoder_attention_heads", "activation_function", "scale_embedding")  # of BART


class EncoderDecoder(Backbone):
    """Encoder input is text tokens, then visual tokens; the decoder attends to all of them."""

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


def causal(ids: Tensor, step: int, dtype: torch.dtype) -> Tensor | None:
    """(1, 1, T, step + T): ids (B, T) see what is before them, and `step` earlier ones."""
    length = ids.shape[1]
    if length == 1:
        return None  # one new token sees everything before it
    blocked = torch.ones(length, step + length, dtype=torch.bool, device=ids.device).triu(step + 1)
    return blocked[None, None].to(dtype) * torch.finfo(dtype).min


class BartHost(EncoderDecoder):
    """BART (Lewis et al., 2020) from transformers' modules; subclasses add how an image becomes tokens."""

    def build_bart(self, config: BartConfig, *, source: str = "none", added_rows: int = 0) -> None:
        """Take a library model apart into token table, positions and stacks.

        `source`: of its weights, see `library_model`. `added_rows`: at the end of the token table, random.
        """
        bart = library_model(BartModel, config, source, fixed=FIXED)
        self.width, self.dropout, self.max_text = config.d_model, config.dropout, config.max_position_embeddings
        self.token_embedding = enlarged(bart.shared, added_rows, config.init_std)
        self.encoder_positions = bart.encoder.embed_positions
        self.decoder_positions = bart.decoder.embed_positions
        encoder = [bart_encoder_layer(layer) for layer in bart.encoder.layers]
        decoder = [bart_decoder_layer(layer) for layer in bart.decoder.layers]
        self.stacks["encoder"] = Stack(encoder, width=self.width, embedding_norm=bart.encoder.layernorm_embedding)
        self.stacks["decoder"] = Stack(decoder, width=self.width, embedding_norm=bart.decoder.layernorm_embedding)

    def embed_text(self, texts: Texts, *, task: str | None = None) -> Tokens:
        x = self.token_embedding(texts.ids) + self.encoder_positions(texts.ids)
        norm = self.stack("encoder").embedding_norm
        assert norm is not None
        return plain_tokens(norm(x), texts.mask, TEXT)

    def encoder_bias(self, tokens: Tokens) -> Tensor | None:
        return additive(tokens.mask, tokens.states.dtype)

    def decoder_bias(self, ids: Tensor, step: int, dtype: torch.dtype) -> Tensor | None:
        return causal(ids, step, dtype)

    def embed_decoder(self, ids: Tensor, step: int) -> Tensor:
        norm = self.stack("decoder").embedding_norm
        assert norm is not None
        x = norm(self.token_embedding(ids) + self.decoder_positions(ids, past_key_values_length=step))
        return F.dropout(x, self.dropout, self.training)

    def logits(self, states: Tensor) -> Tensor:
        return F.linear(states, self.token_embedding.weight)


def initialise_bart(module: nn.Module) -> None:
    """BART's generic initialisation, for modules beside a library model; to be given to `apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def bart_config(
    *, vocabulary: int, width: int, encoder_layers: int, decoder_layers: int, heads: int, ffn: int, positions: int,
    dropout: float, attention: str = "sdpa",
) -> BartConfig:  # fmt: skip
    """Both halves of the same sizes; `dropout` everywhere, as VL-BART has it."""
    return BartConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        max_position_embeddings=positions,
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=dropout,
        attn_implementation=attention,
    )
