"""Layers of every family, built from the library's layers, with the library's forward pass to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig, CLIPVisionConfig, T5Config
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.t5.modeling_t5 import T5Block

from petlbench.api.sites import Layer, Pass
from petlbench.backbones.parts.transformers_parts import (
    bart_decoder_layer,
    bart_encoder_layer,
    clip_layer,
    t5_decoder_layer,
    t5_encoder_layer,
)
from tests.backbone_factory import draw, randomise

Part = tuple[str, Callable[[Tensor], Tensor], nn.Module]  # a sub-layer's name, its core and its norm
FAMILIES = ["bart_encoder", "bart_decoder", "clip", "t5_encoder", "t5_decoder"]
B, N, D = 2, 5, 16


@dataclass
class Case:
    """A library layer, our layer built from its modules, and the pass of both."""

    library: nn.Module
    layer: Layer
    context: Pass
    call: Callable[[Tensor], Tensor]  # the library's own forward
    parts: list[Part]  # our sub-layers by hand, from the library's modules
    dropout: float  # on the branch

    @property
    def pre_norm(self) -> bool:
        return isinstance(self.library, CLIPEncoderLayer | T5Block)

    def train(self, mode: bool) -> None:
        self.library.train(mode)
        self.layer.train(mode)


def bias(length: int = N, rows: int = 1) -> Tensor:
    """Return an additive bias with padding in the middle of one sample."""
    mask = torch.zeros(B, 1, rows, length, dtype=torch.float64)
    mask[1, :, :, 2] = torch.finfo(torch.float64).min
    return mask


def bart(decoder: bool, p: float) -> Case:
    heads = {
        f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in [("attention_heads", 4), ("ffn_dim", 24)]
    }
    config = BartConfig(
        d_model=D, dropout=p, attention_dropout=p, activation_dropout=p, attn_implementation="sdpa", **heads
    )
    lib = randomise((BartDecoderLayer if decoder else BartEncoderLayer)(config, layer_idx=0))

    def feed(x: Tensor) -> Tensor:
        return lib.fc2(F.dropout(F.gelu(lib.fc1(x)), p, lib.training))

    context = Pass(bias=bias())
    parts = [
        ("attention", lambda x: lib.self_attn(x, attention_mask=context.bias)[0], lib.self_attn_layer_norm),
        ("ffn", feed, lib.final_layer_norm),
    ]
    if not decoder:
        return Case(lib, bart_encoder_layer(lib), context, lambda x: lib(x, context.bias), parts, p)
    memory, hidden = draw(B, 7, D, seed=7), bias(7)
    context = replace(context, bias=torch.full((N, N), -1e300, dtype=torch.float64).triu(1)[None, None])
    context = replace(context, memory=memory, memory_bias=hidden)

    def cross(x: Tensor) -> Tensor:
        return lib.encoder_attn(x, key_value_states=memory, attention_mask=hidden)[0]

    def call(x: Tensor) -> Tensor:
        options = {"encoder_hidden_states": memory, "encoder_attention_mask": hidden}
        return lib(x, attention_mask=context.bias, **options)

    parts.insert(1, ("cross_attention", cross, lib.encoder_attn_layer_norm))
    return Case(lib, bart_decoder_layer(lib), context, call, parts, p)


def clip(p: float) -> Case:
    config = CLIPVisionConfig(
        hidden_size=D, intermediate_size=24, num_attention_heads=4, attention_dropout=p, attn_implementation="sdpa"
    )
    lib, context = randomise(CLIPEncoderLayer(config)), Pass(bias=bias())
    parts = [
        ("attention", lambda x: lib.self_attn(x, attention_mask=context.bias)[0], lib.layer_norm1),
        ("ffn", lib.mlp, lib.layer_norm2),
    ]
    return Case(lib, clip_layer(lib), context, lambda x: lib(x, context.bias), parts, 0.0)


def t5(p: float, decoder: bool = False) -> Case:
    sizes = {"d_model": D, "d_kv": 4, "d_ff": 24, "num_heads": 4, "dropout_rate": p}
    lib = randomise(T5Block(T5Config(**sizes, is_decoder=decoder, attn_implementation="sdpa"), layer_idx=0))
    context = Pass(bias=bias(rows=N) + draw(1, 4, N, N, seed=3))
    first, last = lib.layer[0], lib.layer[-1]
    parts = [
        ("attention", lambda x: first.SelfAttention(x, position_bias=context.bias)[0], first.layer_norm),
        ("ffn", last.DenseReluDense, last.layer_norm),
    ]
    if decoder:
        return t5_decoder(lib, context, parts, p)
    return Case(lib, t5_encoder_layer(lib), context, lambda x: lib(x, position_bias=context.bias)[0], parts, p)


def t5_decoder(lib: T5Block, context: Pass, parts: list[Part], p: float) -> Case:
    memory, hidden = draw(B, 7, D, seed=7), bias(7)
    future = torch.full((N, N), -1e300, dtype=torch.float64).triu(1)[None, None]
    context = replace(context, bias=draw(1, 4, N, N, seed=3) + future, memory=memory, memory_bias=hidden)
    first, second = lib.layer[0], lib.layer[1]

    def own(x: Tensor) -> Tensor:
        return first.SelfAttention(x, position_bias=context.bias, is_causal=False)[0]

    def cross(x: Tensor) -> Tensor:
        return second.EncDecAttention(x, key_value_states=memory, position_bias=hidden)[0]

    def call(x: Tensor) -> Tensor:
        options = {"encoder_hidden_states": memory, "encoder_decoder_position_bias": hidden}
        return lib(x, position_bias=context.bias, **options)[0]

    parts = [("attention", own, first.layer_norm), ("cross_attention", cross, second.layer_norm), *parts[1:]]
    return Case(lib, t5_decoder_layer(lib), context, call, parts, p)


def make(family: str, p: float = 0.5) -> Case:
    makers = {
        "clip": clip,
        "t5_encoder": t5,
        "t5_decoder": lambda p: t5(p, True),
        "bart_encoder": lambda p: bart(False, p),
    }
    case = makers.get(family, lambda p: bart(True, p))(p)
    case.train(False)
    return case
