"""Small trained parts for what a backbone lacks for a task; they count as the task's head.

A dual encoder has no joint pass, an encoder has no decoder, and most families cannot tell two images apart. The suite
adds small, untrained parts after the method has adapted the backbone. So no method goes into these parts, and methods
are compared only by how they adapt the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer, BartLearnedPositionalEmbedding

from petlbench.api.backbone import Backbone
from petlbench.api.sites import IMAGE, TEXT, Stack
from petlbench.api.tokens import Images, Tokens, decoding_pass, halves, join
from petlbench.api.wrapper import Wrapper
from petlbench.backbones.parts.language import BartSizes, initialise_bart
from petlbench.backbones.parts.masks import additive, causal
from petlbench.backbones.parts.transformers_parts import bart_decoder_layer, bart_encoder_layer

LAYERS = 2
HEAD_WIDTH = 64  # at least this, if the backbone is wide enough
ABILITIES = {"fusion": "fuse", "decoder": "decode", "order": "pair"}  # the ability that each part adds
LONGEST = 128  # tokens that can be decoded
DROPOUT = 0.1


def supply(backbone: Backbone, needs: frozenset[str]) -> Backbone:
    """Return `backbone` with parts for the `needs` that it lacks and that parts can add; itself if there are none."""
    lacking = needs - backbone.abilities
    parts: dict[str, nn.Module] = {}
    if "fuse" in lacking:
        parts["fusion"] = Fusion(backbone.text_width, backbone.width)
    if "decode" in lacking:
        parts["decoder"] = Decoder(backbone.word_table().shape[1], backbone.width)
    if "pair" in lacking:
        parts["order"] = Order(backbone.width)
    return SuppliedBackbone(backbone, parts) if parts else backbone


def with_parts_of(backbone: Backbone, other: Backbone) -> Backbone:
    """Return `backbone` with the parts of `other` (the same modules), if any, to compare both under equal parts."""
    return SuppliedBackbone(backbone, dict(other.supplied.items())) if isinstance(other, SuppliedBackbone) else backbone


def _config(width: int) -> BartConfig:
    heads = next(n for n in range(max(1, width // HEAD_WIDTH), 0, -1) if width % n == 0)
    return BartSizes(
        vocabulary=3,  # it has no words of its own, but the library's special ids must exist
        width=width,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        heads=heads,
        ffn=4 * width,
        positions=LONGEST,
        dropout=DROPOUT,
    ).config()


class Fusion(nn.Module):
    """A joint pass over the outputs of two towers: a projection and norm for each, then post-norm layers."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        config = _config(width)
        self.text = nn.Sequential(nn.Linear(text_width, width), nn.LayerNorm(width))
        self.image = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.stack = Stack([bart_encoder_layer(BartEncoderLayer(config)) for _ in range(LAYERS)], width=width)
        self.apply(initialise_bart)

    def forward(self, parts: Sequence[Tokens], task: str) -> Tokens:
        """Fuse texts (B, N', text_width) and images (B, N'', width), a part each, to one sequence (B, N, width)."""
        projections = {TEXT: self.text, IMAGE: self.image}
        states = [projections[part.segments[0][0]](part.states) for part in parts]
        tokens = join([Tokens(x, p.mask, p.types, p.positions, p.segments) for x, p in zip(states, parts, strict=True)])
        bias = additive(tokens.mask, tokens.states.dtype)
        context = tokens.context(task=task, bias=bias)
        fused, _ = self.stack.run(F.dropout(tokens.states, DROPOUT, self.training), context)
        return Tokens(fused, tokens.mask, tokens.types, tokens.positions, tokens.segments)


class Decoder(nn.Module):
    """A post-norm decoder of `width`, which embeds and predicts words by the backbone's own token table (V, words)."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        config = _config(width)
        self.enter, self.leave = nn.Linear(words, width), nn.Linear(width, words)
        self.positions = BartLearnedPositionalEmbedding(LONGEST, width)
        layers = [bart_decoder_layer(BartDecoderLayer(config, layer_idx=i)) for i in range(LAYERS)]
        self.stack = Stack(layers, width=width, embedding_norm=nn.LayerNorm(width))
        self.apply(initialise_bart)

    def forward(self, memory: Tokens, ids: Tensor, table: Tensor, cache: Any, task: str) -> Tensor:
        """Return logits (B, T, V) for `ids` (B, T), which follow those in the cache."""
        step = 0 if cache is None else int(cache.get_seq_length())
        dtype = memory.states.dtype
        biases = {"bias": causal(ids, step, dtype), "memory_bias": additive(memory.mask, dtype)}
        context = decoding_pass(ids, memory, task=task, step=step, cache=cache, **biases)
        norm = self.stack.embedding_norm
        assert norm is not None
        x = norm(self.enter(F.embedding(ids, table)) + self.positions(ids, past_key_values_length=step))
        states, _ = self.stack.run(F.dropout(x, DROPOUT, self.training), context)
        return F.linear(self.leave(states), table)


class Order(nn.Module):
    """One vector (width) for each of two images, added to all tokens of that image, like E_img in VL-T5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image = nn.Embedding(2, width)
        self.apply(initialise_bart)

    def forward(self, pair: Sequence[Tokens]) -> tuple[Tokens, Tokens]:
        first, second = (
            replace(image, states=image.states + vector) for image, vector in zip(pair, self.image.weight, strict=True)
        )
        return first, second


class SuppliedBackbone(Wrapper):
    """A backbone, adapted or not, with supplied parts."""

    def __init__(self, inner: Backbone, parts: dict[str, nn.Module]) -> None:
        super().__init__(inner)
        self.supplied = nn.ModuleDict(parts)
        self.abilities = inner.abilities | {ABILITIES[name] for name in parts}

    def head_parameters(self) -> set[str]:
        return super().head_parameters() | {f"supplied.{name}" for name, _ in self.supplied.named_parameters()}

    def embed_pair(self, images: Images, *, task: str | None = None) -> tuple[Tokens, Tokens]:
        if "order" not in self.supplied:
            return super().embed_pair(images, task=task)
        ordered: tuple[Tokens, Tokens] = self.supplied["order"](halves(self.inner.embed_image(images, task=task)))
        return ordered

    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        if "fusion" not in self.supplied:
            return super().fuse(*parts, task=task)
        fused: Tokens = self.supplied["fusion"]([self.inner.fuse(part, task=task) for part in parts], task)
        return fused

    def new_cache(self) -> Any:
        if "decoder" not in self.supplied:
            return super().new_cache()
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def reorder_cache(self, cache: Any, index: Tensor) -> Any:
        if "decoder" not in self.supplied:
            return super().reorder_cache(cache, index)
        cache.reorder_cache(index)
        return cache

    def decode(self, memory: Tokens, ids: Tensor, cache: Any = None, *, task: str) -> tuple[Tensor, Any]:
        if "decoder" not in self.supplied:
            return super().decode(memory, ids, cache, task=task)
        return self.supplied["decoder"](memory, ids, self.word_table(), cache, task), cache
