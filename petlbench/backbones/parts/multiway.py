"""Multiway transformer layers: every module exists once per modality, and attention is joint over all tokens.

Peng et al., "Multiway Transformers" (VLMo, NeurIPS 2022; BEiT-3, CVPR 2023). The computing modules come from timm's
blocks, one block per modality and layer; only the routing and the residual additions around them are ours.
"""

from __future__ import annotations

from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.sites import IMAGE, Layer, Pass, Projection, ProjectionPair, Stack, SubLayer, by_kind, current_pass
from petlbench.backbones.parts.transformers_parts import Stateless


class Routed(nn.Module):
    """One module per modality, (B, N, d) -> (B, N, e): each run of tokens passes through its modality's module.

    The runs are the `segments` of the current pass, so that no tensor is read; a pass over one modality splits nothing.
    Raise LookupError outside a pass, and ValueError in a pass without segments.
    """

    def __init__(self, text: nn.Module, image: nn.Module) -> None:
        super().__init__()
        self.text, self.image = text, image

    def of(self, kind: int) -> nn.Module:
        """Return the module of one token type."""
        return self.image if kind == IMAGE else self.text

    def forward(self, x: Tensor) -> Tensor:
        segments = current_pass().segments
        if not segments:
            raise ValueError("a pass through multiway layers needs `segments`: they route its tokens")
        return by_kind(x, segments, lambda kind, run: self.of(kind)(run))


class JointAttention(nn.Module):
    """Self-attention over the tokens of both modalities, with a norm before the output projection (sub-LN)."""

    def __init__(self, heads: int, qkv: Routed, norm: Routed, proj: Routed) -> None:
        super().__init__()
        self.heads, self.qkv, self.norm, self.proj = heads, qkv, norm, proj

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=context.bias)
        return self.proj(self.norm(y.transpose(1, 2).flatten(2)))


def _pair(routed: Routed, rows: slice | None = None) -> ProjectionPair:
    return ProjectionPair(text=Projection(routed, "text", rows), image=Projection(routed, "image", rows))


def multiway_layer(text: Block, image: Block, *, width: int, heads: int) -> Layer:
    """Build a pre-norm layer: attention, ffn. Drop-path is the text block's; both blocks have the same rate."""

    def routed(name: str) -> Routed:
        return Routed(text.get_submodule(name), image.get_submodule(name))

    attention = JointAttention(heads, routed("attn.qkv"), routed("attn.norm"), routed("attn.proj"))
    packed = {role: slice(i * width, (i + 1) * width) for i, role in enumerate("qkv")}
    mlp = routed("mlp")
    return Layer(
        attention=SubLayer(
            attention,
            routed("norm1"),
            text.get_submodule("drop_path1"),
            width=width,
            pre_norm=True,
            projections={
                **{role: _pair(attention.qkv, rows) for role, rows in packed.items()},
                "o": _pair(attention.proj),
            },
        ),
        ffn=SubLayer(
            Stateless(mlp),
            routed("norm2"),
            text.get_submodule("drop_path2"),
            width=width,
            pre_norm=True,
            projections={
                role: ProjectionPair(text=Projection(mlp.text, name), image=Projection(mlp.image, name))
                for role, name in (("in", "fc1"), ("out", "fc2"))
            },
        ),
    )


def multiway_stack(*, width: int, layers: int, heads: int, ffn: int, drop_path: float) -> Stack:
    """Build layers and a final norm; the drop-path rate rises from 0 at the first layer to `drop_path` at the last."""

    def block(rate: float) -> Block:
        return Block(
            width,
            heads,
            mlp_ratio=(ffn + 0.5) / width,  # timm rounds the product down
            qkv_bias=True,
            scale_attn_norm=True,
            scale_mlp_norm=True,
            drop_path=rate,
            norm_layer=nn.LayerNorm,  # eps 1e-5, unlike timm's own default
        )

    rates = [drop_path * i / max(1, layers - 1) for i in range(layers)]
    built = [multiway_layer(block(rate), block(rate), width=width, heads=heads) for rate in rates]
    return Stack(built, width=width, final_norm=Routed(nn.LayerNorm(width), nn.LayerNorm(width)))
