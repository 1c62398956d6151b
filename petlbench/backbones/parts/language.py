"""BART (Lewis et al., 2020), built from transformers' modules, with visual tokens in its input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig, BartModel

from petlbench.api.backbone import C
from petlbench.api.sites import TEXT, Stack
from petlbench.api.tokens import Texts, Tokens, plain_tokens
from petlbench.backbones.parts.encoder_decoder import EncoderDecoder
from petlbench.backbones.parts.masks import additive, causal
from petlbench.backbones.parts.transformers_parts import bart_decoder_layer, bart_encoder_layer
from petlbench.backbones.weights.library_models import grown_table, library_model

FIXED = (
    "encoder_attention_heads",
    "decoder_attention_heads",
    "activation_function",
    "scale_embedding",
)  # BART's options that shapes do not show


class BartHost(EncoderDecoder[C]):
    """BART as a backbone; a subclass adds how an image becomes tokens."""

    def build_bart(self, config: BartConfig, *, source: str = "none", added_rows: int = 0) -> None:
        """Split a library model into token table, positions and stacks.

        `source`: of its weights, see `library_model`. `added_rows`: random rows to add at the end of the token table.
        """
        bart = library_model(BartModel, config, source, fixed=FIXED)
        self.width, self.dropout, self.max_text = config.d_model, config.dropout, config.max_position_embeddings
        self.token_embedding = grown_table(bart.shared, added_rows, config.init_std)
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
    """Initialise a module as BART does, for modules outside a library model; pass it to `apply`."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@dataclass(frozen=True, kw_only=True)
class BartSizes:
    """Sizes of BART, where encoder and decoder share them; `dropout` applies everywhere, as in VL-BART."""

    vocabulary: int
    width: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    ffn: int
    positions: int
    dropout: float
    attention: str = "sdpa"

    def config(self) -> BartConfig:
        """Return the library's configuration of these sizes."""
        return BartConfig(
            vocab_size=self.vocabulary,
            d_model=self.width,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            encoder_attention_heads=self.heads,
            decoder_attention_heads=self.heads,
            encoder_ffn_dim=self.ffn,
            decoder_ffn_dim=self.ffn,
            max_position_embeddings=self.positions,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            activation_dropout=self.dropout,
            attn_implementation=self.attention,
        )
