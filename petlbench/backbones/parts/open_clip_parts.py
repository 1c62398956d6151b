"""Split layers of open_clip's towers, which are its own or timm's vision transformers', into sub-layers with sites.

The computing modules and the parameters are the libraries' own. Ours are the residual additions around them, and the
packed attention of `nn.MultiheadAttention`, whose projections become linear modules over the same parameters.
"""

from __future__ import annotations

from open_clip.transformer import ResidualAttentionBlock
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.sites import Layer, Pass, Projection, SubLayer
from petlbench.core.errors import UserError


class Scaled(nn.Module):
    """A library module that takes only x, then its layer scale: the output h enters the residual addition."""

    def __init__(self, module: nn.Module, scale: nn.Module) -> None:
        super().__init__()
        self.module, self.scale = module, scale

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        return self.scale(self.module(x))


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """Return a linear module that holds these parameters, not copies."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = weight, bias  # type: ignore[assignment]
    return linear


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """Attend from queries (B, N, d) to keys and values (B, M, d); return (B, N, d)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class PackedAttention(nn.Module):
    """`nn.MultiheadAttention` over one sequence, with q, k and v in one projection; then layer scale."""

    def __init__(self, attention: nn.MultiheadAttention, scale: nn.Module) -> None:
        super().__init__()
        self.in_proj = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj, self.scale, self.heads = attention.out_proj, scale, attention.num_heads

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        return self.scale(self.out_proj(_attend(q, k, v, self.heads, context.bias)))


class PackedCrossAttention(nn.Module):
    """`nn.MultiheadAttention` from one sequence to the pass's memory, which has its own norm; then layer scale.

    The packed projection is split in three: used on both sequences, it would compute outputs that nobody needs.
    """

    def __init__(self, attention: nn.MultiheadAttention, norm: nn.Module, scale: nn.Module) -> None:
        super().__init__()
        weights, biases = attention.in_proj_weight.detach().chunk(3), attention.in_proj_bias.detach().chunk(3)
        parts = zip(weights, biases, strict=True)
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(nn.Parameter(w.clone()), nn.Parameter(b.clone())) for w, b in parts
        )
        self.out_proj, self.norm, self.scale = attention.out_proj, norm, scale
        self.heads = attention.num_heads

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        memory = self.norm(context.memory)
        q, k, v = self.q_proj(x), self.k_proj(memory), self.v_proj(memory)
        return self.scale(self.out_proj(_attend(q, k, v, self.heads, context.memory_bias)))


def _packed(owner: nn.Module, into: str, out: str, width: int) -> dict[str, Projection]:
    rows = {role: slice(i * width, (i + 1) * width) for i, role in enumerate("qkv")}
    return {role: Projection(owner, into, part) for role, part in rows.items()} | {"o": Projection(owner, out)}


def _ffn(block: ResidualAttentionBlock, width: int) -> SubLayer:
    projections = {"in": Projection(block.mlp, "c_fc"), "out": Projection(block.mlp, "c_proj")}
    core = Scaled(block.mlp, block.ls_2)
    return SubLayer(core, block.ln_2, nn.Identity(), width=width, pre_norm=True, projections=projections)


def block_layer(block: ResidualAttentionBlock, crossing: ResidualAttentionBlock | None = None) -> Layer:
    """Build a pre-norm layer: attention, ffn; with `crossing`, CoCa's block, also cross_attention and cross_ffn."""
    if type(block) is not ResidualAttentionBlock:
        raise UserError(f"clip does not support layers of class {type(block).__name__}: choose a model with plain ones")
    width = block.attn.embed_dim
    core = PackedAttention(block.attn, block.ls_1)
    projections = _packed(core, "in_proj", "out_proj", width)
    attention = SubLayer(core, block.ln_1, nn.Identity(), width=width, pre_norm=True, projections=projections)
    if crossing is None:
        return Layer(attention=attention, ffn=_ffn(block, width))
    across = PackedCrossAttention(crossing.attn, crossing.ln_1_kv, crossing.ls_1)
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    cross_attention = SubLayer(
        across,
        crossing.ln_1,
        nn.Identity(),
        width=width,
        pre_norm=True,
        projections={role: Projection(across, name) for role, name in names.items()},
    )
    return Layer(
        attention=attention, ffn=_ffn(block, width), cross_attention=cross_attention, cross_ffn=_ffn(crossing, width)
    )


def timm_layer(block: TimmBlock) -> Layer:
    """Build a pre-norm layer: attention, ffn, with timm's drop-path on both branches."""
    if type(block) is not TimmBlock or type(block.attn) is not TimmAttention or not hasattr(block.mlp, "fc1"):
        raise UserError(f"clip does not support layers of class {type(block).__name__}: choose a model with plain ones")
    block.attn.fused_attn = True  # type: ignore[misc]  # one call, which a recipe may replace
    width = block.attn.qkv.in_features
    attention = SubLayer(
        Scaled(block.attn, block.ls1),
        block.norm1,
        block.drop_path1,
        width=width,
        pre_norm=True,
        projections=_packed(block.attn, "qkv", "proj", block.attn.qkv.out_features // 3),
    )
    ffn = SubLayer(
        Scaled(block.mlp, block.ls2),
        block.norm2,
        block.drop_path2,
        width=width,
        pre_norm=True,
        projections={"in": Projection(block.mlp, "fc1"), "out": Projection(block.mlp, "fc2")},
    )
    return Layer(attention=attention, ffn=ffn)
