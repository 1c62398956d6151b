"""DETR's image encoder (Carion et al., ECCV 2020): timm's ResNet, then encoder layers of transformers' modules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DetrConfig
from transformers.models.detr.modeling_detr import DetrEncoderLayer

from petlbench.api.sites import Layer, Pass, Projection, Stack, SubLayer
from petlbench.backbones.parts.transformers_parts import FeedForward

STRIDE = 32  # pixels per token along each axis
TEMPERATURE = 10_000.0
SMALL_GAIN = 0.2  # gain of a new block's branch: frozen normalisation does not keep sums of branches in range
FIXED = ("conv1.", "layer1.")  # parts of the ResNet that never train


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation as a fixed affine map: statistics, gain and offset are buffers."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        offset = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + offset[:, None, None]


def resnet(blocks: Sequence[int], channels: int) -> Any:
    """Return timm's ResNet of bottleneck blocks, with frozen normalisation and without a classifier.

    Its `forward_features` maps (B, 3, H, W) to (B, 32 * channels, H / 32, W / 32).
    """
    from timm.models import resnet as timm  # imported here because timm takes seconds to import

    widths = tuple(channels * 2**stage for stage in range(4))
    block: Any = timm.Bottleneck
    norm = FrozenBatchNorm2d
    net = timm.ResNet(block, tuple(blocks), num_classes=0, channels=widths, norm_layer=norm, zero_init_last=False)
    for module in net.modules():
        if isinstance(module, block):
            module.bn3.weight.fill_(SMALL_GAIN)
    return net


def detr_sine_positions(mask: Tensor, width: int) -> Tensor:
    """Map a mask (B, H, W), True where real, to (B, H * W, width): half the channels code y, half x.

    The precision is torch's default.

    Coordinates count real cells up to 2 pi; sines and cosines of geometric frequencies alternate.
    """
    real = mask.to(torch.get_default_dtype())
    rate = TEMPERATURE ** (-torch.arange(0, width // 2, 2, device=mask.device) / (width // 2))
    parts = []
    for axis in (1, 2):
        count = real.cumsum(axis)
        last = count.narrow(axis, count.shape[axis] - 1, 1)
        angle = (count / (last + 1e-6) * 2 * math.pi).unsqueeze(-1) * rate
        parts.append(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(3))
    return torch.cat(parts, dim=-1).flatten(1, 2)


def grid_mask(mask: Tensor, rows: int, columns: int) -> Tensor:
    """Resize a mask (B, H, W) to (B, rows, columns) by the nearest pixel."""
    return F.interpolate(mask[:, None].float(), size=(rows, columns))[:, 0].bool()


class DetrAttention(nn.Module):
    """The library's attention, which adds the pass's positions to queries and keys but not to values."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        return self.attention(x, attention_mask=context.bias, position_embeddings=context.positions)[0]


def detr_layer(layer: DetrEncoderLayer) -> Layer:
    """Build a post-norm layer: attention, ffn."""
    attention, mlp, width = layer.self_attn, layer.mlp, layer.hidden_size
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    core = FeedForward(mlp.fc1, mlp.fc2, mlp.activation_fn, mlp.activation_dropout)
    return Layer(
        attention=SubLayer(
            DetrAttention(attention),
            layer.self_attn_layer_norm,
            nn.Dropout(layer.dropout),
            width=width,
            pre_norm=False,
            projections={role: Projection(attention, name) for role, name in names.items()},
        ),
        ffn=SubLayer(
            core,
            layer.final_layer_norm,
            nn.Dropout(layer.dropout),
            width=width,
            pre_norm=False,
            projections={"in": Projection(core, "fc1"), "out": Projection(core, "fc2")},
        ),
    )


def detr_stack(width: int, layers: int, heads: int, ffn: int, dropout: float) -> Stack:
    """Build encoder layers with DETR's initial values; dropout also follows attention weights and activation."""
    config = DetrConfig(
        d_model=width,
        encoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=dropout,
        activation_function="relu",
        attn_implementation="sdpa",
    )
    built = [DetrEncoderLayer(config) for _ in range(layers)]
    for layer in built:
        _initialise(layer)
    return Stack([detr_layer(layer) for layer in built], width=width)


def _initialise(layer: DetrEncoderLayer) -> None:
    """Draw Xavier-uniform matrices, with q, k and v counted as one packed matrix; set attention biases to zero."""
    attention = layer.self_attn
    packed = attention.q_proj, attention.k_proj, attention.v_proj
    for module in (*packed, attention.o_proj, layer.mlp.fc1, layer.mlp.fc2):
        nn.init.xavier_uniform_(module.weight, gain=math.sqrt(0.5) if module in packed else 1.0)
    for module in (*packed, attention.o_proj):
        nn.init.zeros_(module.bias)


_LAYER = {
    "self_attn.out_proj.": "attention.core.attention.o_proj.",
    "self_attn.": "attention.core.attention.",
    "self_attn_layer_norm.": "attention.norm.",
    "norm1.": "attention.norm.",
    "mlp.": "ffn.core.",
    "linear1.": "ffn.core.fc1.",
    "linear2.": "ffn.core.fc2.",
    "final_layer_norm.": "ffn.norm.",
    "norm2.": "ffn.norm.",
}


def from_layers(tensors: Mapping[str, Tensor], theirs: str, stack: str) -> dict[str, Tensor]:
    """Rename encoder layers to those of our `stack`: names that start with `theirs`, as in transformers or torch."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(theirs):
            continue
        index, rest = name.removeprefix(theirs).split(".", 1)
        layer = f"{stack}.layers.{index}.sublayers"
        if rest.startswith("self_attn.in_proj_"):
            for role, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{layer}.attention.core.attention.{role}_proj.{rest.rpartition('_')[2]}"] = part
            continue
        known_prefix = next((prefix for prefix in _LAYER if rest.startswith(prefix)), "")
        renamed[f"{layer}.{_LAYER[known_prefix]}{rest.removeprefix(known_prefix)}" if known_prefix else name] = tensor
    return renamed


_RESNET = ("backbone.model.", "backbone.0.body.")  # in transformers, in DETR's own code
_PROJECTION = ("input_projection.", "input_proj.")
_LAYERS = ("encoder.layers.", "transformer.encoder.layers.")


def from_detr(tensors: Mapping[str, Tensor], resnet: str, projection: str, stack: str) -> dict[str, Tensor]:
    """Rename a detector's image encoder, from transformers' or DETR's names to ours; leave out all other tensors."""
    renamed: dict[str, Tensor] = {}
    for sources, target in ((_RESNET, resnet), (_PROJECTION, projection)):
        for source in sources:
            renamed |= {
                f"{target}.{name.removeprefix(source)}": tensor
                for name, tensor in tensors.items()
                if name.startswith(source) and not name.endswith("num_batches_tracked")
            }
    for source in _LAYERS:
        renamed |= from_layers(tensors, source, stack)
    return renamed
