"""Split layers of transformers' BART, CLIP and T5 into sub-layers with sites.

The computing modules are the library's own; only the residual additions around them are ours.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.t5.modeling_t5 import T5Block

from petlbench.api.sites import Layer, Pass, Projection, SubLayer


class SelfAttention(nn.Module):
    """The library's self-attention, which takes mask and cache from the pass."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        options = {} if context.cache is None else {"past_key_values": context.cache}
        return self.attention(x, attention_mask=context.bias, **options)[0]


class CrossAttention(SelfAttention):
    """The library's attention over the pass's memory."""

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        return self.attention(
            x,
            key_value_states=context.memory,
            attention_mask=context.memory_bias,
            past_key_values=context.cache,
        )[0]


class T5SelfAttention(SelfAttention):
    """T5's attention; the pass's bias is the sum of mask, causal mask and relative positions."""

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        options = {"position_bias": context.bias, "past_key_values": context.cache, "is_causal": False}
        return self.attention(x, **options)[0]


class T5CrossAttention(SelfAttention):
    """T5's attention over the pass's memory, without relative positions."""

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        options = {"position_bias": context.memory_bias, "past_key_values": context.cache}
        return self.attention(x, key_value_states=context.memory, **options)[0]


class FeedForward(nn.Module):
    """fc2(drop(act(fc1(x)))) of a library layer's own linear modules."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module, activation: nn.Module, drop: float) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation, self.drop = fc1, fc2, activation, nn.Dropout(drop)

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        return self.fc2(self.drop(self.activation(self.fc1(x))))


class Stateless(nn.Module):
    """A library feed-forward network that takes only x and ignores the pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        return self.module(x)


def _attention_projections(attention: nn.Module) -> dict[str, Projection]:
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    return {role: Projection(attention, name) for role, name in names.items()}


def _bart_attention(attention: nn.Module, norm: nn.Module, drop: float, core: type[SelfAttention]) -> SubLayer:
    width = int(attention.embed_dim)  # type: ignore[arg-type]
    projections = _attention_projections(attention)
    return SubLayer(core(attention), norm, nn.Dropout(drop), width=width, pre_norm=False, projections=projections)


def _bart_ffn(layer: BartEncoderLayer | BartDecoderLayer) -> SubLayer:
    core = FeedForward(layer.fc1, layer.fc2, layer.activation_fn, layer.activation_dropout)
    projections = {"in": Projection(core, "fc1"), "out": Projection(core, "fc2")}
    drop = nn.Dropout(layer.dropout)
    norm = layer.final_layer_norm
    return SubLayer(core, norm, drop, width=layer.embed_dim, pre_norm=False, projections=projections)


def bart_encoder_layer(layer: BartEncoderLayer) -> Layer:
    """Build a post-norm layer: attention, ffn."""
    attention = _bart_attention(layer.self_attn, layer.self_attn_layer_norm, layer.dropout, SelfAttention)
    return Layer(attention=attention, ffn=_bart_ffn(layer))


def bart_decoder_layer(layer: BartDecoderLayer) -> Layer:
    """Build a post-norm layer: attention, cross_attention, ffn."""
    attention = _bart_attention(layer.self_attn, layer.self_attn_layer_norm, layer.dropout, SelfAttention)
    cross = _bart_attention(layer.encoder_attn, layer.encoder_attn_layer_norm, layer.dropout, CrossAttention)
    return Layer(attention=attention, cross_attention=cross, ffn=_bart_ffn(layer))


def clip_layer(layer: CLIPEncoderLayer, drop: float = 0.0) -> Layer:
    """Build a pre-norm layer (CLIP, ViT): attention, ffn. `drop`: dropout of both branches; CLIP itself has none."""
    width, mlp = layer.embed_dim, layer.mlp
    attention = SubLayer(
        SelfAttention(layer.self_attn),
        layer.layer_norm1,
        nn.Dropout(drop),
        width=width,
        pre_norm=True,
        projections=_attention_projections(layer.self_attn),
    )
    ffn = SubLayer(
        Stateless(mlp),
        layer.layer_norm2,
        nn.Dropout(drop),
        width=width,
        pre_norm=True,
        projections={"in": Projection(mlp, "fc1"), "out": Projection(mlp, "fc2")},
    )
    return Layer(attention=attention, ffn=ffn)


def _t5_sublayer(part: nn.Module, core: nn.Module, projections: dict[str, Projection]) -> SubLayer:
    width = len(part.layer_norm.weight)  # type: ignore[union-attr, arg-type]
    norm, drop = part.layer_norm, part.dropout
    return SubLayer(core, norm, drop, width=width, pre_norm=True, projections=projections)  # type: ignore[arg-type]


def _t5_attention(part: nn.Module, attention: nn.Module, core: type[SelfAttention]) -> SubLayer:
    projections = {name: Projection(attention, name) for name in ("q", "k", "v", "o")}
    sublayer = _t5_sublayer(part, core(attention), projections)
    sublayer.score_scale = 1.0
    return sublayer


def _t5_ffn(part: nn.Module) -> SubLayer:
    dense = part.DenseReluDense
    assert isinstance(dense, nn.Module)
    return _t5_sublayer(part, Stateless(dense), {"in": Projection(dense, "wi"), "out": Projection(dense, "wo")})


def t5_encoder_layer(block: T5Block) -> Layer:
    """Build a pre-norm layer: attention, ffn."""
    first, last = block.layer
    return Layer(attention=_t5_attention(first, first.SelfAttention, T5SelfAttention), ffn=_t5_ffn(last))


def t5_decoder_layer(block: T5Block) -> Layer:
    """Build a pre-norm layer: attention, cross_attention, ffn."""
    first, second, last = block.layer
    return Layer(
        attention=_t5_attention(first, first.SelfAttention, T5SelfAttention),
        cross_attention=_t5_attention(second, second.EncDecAttention, T5CrossAttention),
        ffn=_t5_ffn(last),
    )
