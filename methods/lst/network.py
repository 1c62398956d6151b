"""The side network of ladder side-tuning: thin copies of a stack's layers that read its states."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.t5.modeling_t5 import T5Attention

from petlbench.api.sites import TEXT, Layer, Pass, Projection, ProjectionPair, Segments, Stack, SubLayer
from petlbench.api.tokens import Tokens
from petlbench.backbones.parts.masks import HIDDEN, additive

TEMPERATURE = 0.1  # of the gates
HEAD_COUNTS = (
    "num_heads",
    "n_heads",
    "heads",
    "num_attention_heads",
)  # attributes of cores that hold their number of heads

Linears = dict[str, nn.Linear]


class SideCache(dict[nn.Module, tuple[Tensor, Tensor]]):
    """Keys and values (B, heads, N, head width) of each attention during decoding."""

    def reordered(self, index: Tensor) -> SideCache:
        """Return a cache with the batch rows at `index` (B',)."""
        return SideCache({module: (key[index], value[index]) for module, (key, value) in self.items()})


def divided(size: int, reduction: int, what: str) -> int:
    """Return `size` / `reduction`. Raises ValueError if the division leaves a remainder."""
    if size % reduction:
        raise ValueError(f"reduction {reduction} does not divide its {what} of {size}")
    return size // reduction


class SideAttention(nn.Module):
    """o(softmax(scale q(x) k(m)^T + bias) v(m)), m = x or (`crossing`) the pass's memory; scale None: 1 / sqrt(width).

    A pass with a `SideCache` takes earlier tokens' keys and values from there, and computes the memory's once.
    """

    def __init__(self, linears: Linears, heads: int, drop: float, *, scale: float | None, crossing: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (linears[role] for role in "qkvo")
        self.heads, self.drop, self.scale, self.crossing = heads, drop, scale, crossing

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        key, value = self._attended(x, context)
        bias = context.memory_bias if self.crossing else context.bias
        drop = self.drop if self.training else 0.0
        y = F.scaled_dot_product_attention(
            self._split(self.q(x)), key, value, attn_mask=bias, dropout_p=drop, scale=self.scale
        )
        mixed: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return mixed

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _attended(self, x: Tensor, context: Pass) -> tuple[Tensor, Tensor]:
        cache = context.cache
        earlier = None if cache is None else cache.get(self)
        if self.crossing and earlier is not None:
            return earlier
        source = context.memory if self.crossing else x
        key, value = self._split(self.k(source)), self._split(self.v(source))
        if earlier is not None:
            key, value = torch.cat([earlier[0], key], dim=2), torch.cat([earlier[1], value], dim=2)
        if cache is not None:
            cache[self] = key, value
        return key, value


class SideFeedForward(nn.Module):
    """out(drop(act(in(x))))."""

    def __init__(self, linears: Linears, activation: nn.Module, drop: float) -> None:
        super().__init__()
        self.enter, self.leave = linears["in"], linears["out"]
        self.activation, self.drop = activation, nn.Dropout(drop)

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        y: Tensor = self.leave(self.drop(self.activation(self.enter(x))))
        return y


class RelativePositions(nn.Module):
    """T5's table of relative positions, buckets x heads, with all the host's heads."""

    def __init__(self, host: T5Attention) -> None:
        super().__init__()
        table = host.relative_attention_bias
        self.table = nn.Embedding(table.num_embeddings, table.embedding_dim)
        self.longest, self.both_ways = int(host.relative_attention_max_distance), not host.is_decoder

    def forward(self, queries: int, keys: int, step: int = 0) -> Tensor:
        """Return the bias (1, heads, queries, keys) of queries that follow `step` earlier ones."""
        where = torch.arange(max(keys, step + queries), device=self.table.weight.device)
        distance = where[None, :keys] - where[step : step + queries, None]
        bucket = T5Attention._relative_position_bucket(
            distance, self.both_ways, self.table.num_embeddings, self.longest
        )
        bias: Tensor = self.table(bucket).permute(2, 0, 1).unsqueeze(0)
        return bias

    def joint(self, tokens: Tokens) -> Tensor:
        """Return the bias (B or 1, heads, N, N) of text and visual tokens; only text tokens have distances."""
        kinds = [kind for kind, length in tokens.segments for _ in range(length)]
        texts = torch.tensor([i for i, kind in enumerate(kinds) if kind == TEXT], device=self.table.weight.device)
        relative = self(len(texts), len(texts))
        if len(texts) < len(kinds):
            bias = relative.new_zeros(1, relative.shape[1], len(kinds), len(kinds))
            bias[:, :, texts[:, None], texts] = relative
            relative = bias
        hidden = additive(tokens.mask, relative.dtype)
        return relative if hidden is None else relative + hidden.clamp_min(HIDDEN)


def thin_norm(host: nn.Module, width: int) -> nn.Module:
    """Return a norm of the host's kind (T5's gain alone, or a layer norm) and epsilon."""
    if hasattr(host, "variance_epsilon"):
        made: nn.Module = type(host)(width, host.variance_epsilon)
        return made
    eps = next(float(module.eps) for module in host.modules() if isinstance(module, nn.LayerNorm))
    return nn.LayerNorm(width, eps=eps)


def thin_layer(host: Layer, reduction: int) -> Layer:
    """Return a layer of the host's kind and number of heads, with widths of states, heads and FFN divided.

    Raises ValueError if the reduction does not divide one of the widths.
    """
    made = {}
    for name, sublayer in host.items():
        rate = sublayer.drop.p if isinstance(sublayer.drop, nn.Dropout) else 0.0
        thin = {role: _thin_linear(p, reduction) for role, p in sublayer.projections.items()}
        if "q" in thin:
            crossing = name == "cross_attention"
            core: nn.Module = _thin_attention(sublayer, thin, reduction, rate, crossing=crossing)
            names = {role: role for role in "qkvo"}
        else:
            core, names = _thin_feed_forward(sublayer, thin), {"in": "enter", "out": "leave"}
        width = divided(sublayer.width, reduction, "width")
        made[name] = SubLayer(
            core,
            thin_norm(sublayer.norm, width),
            nn.Dropout(rate),
            width=width,
            pre_norm=sublayer.pre_norm,
            projections={role: Projection(core, attribute) for role, attribute in names.items()},
        )
    return Layer(**made)


def _thin_linear(projection: Projection | ProjectionPair, reduction: int) -> nn.Linear:
    host = projection.singles()[0]
    size_in, size_out = (divided(size, reduction, "inner width") for size in (host.in_features, host.out_features))
    return nn.Linear(size_in, size_out, bias=host.linear.bias is not None)


def _thin_attention(host: SubLayer, thin: Linears, reduction: int, rate: float, *, crossing: bool) -> SideAttention:
    inner = host.projections["q"].singles()[0].out_features
    counts = [getattr(module, name, None) for module in host.core.modules() for name in HEAD_COUNTS]
    widths = [getattr(module, "head_dim", None) for module in host.core.modules()]
    heads = next((n for n in counts if isinstance(n, int)), 0) or inner // next(n for n in widths if isinstance(n, int))
    divided(inner // heads, reduction, "head width")
    return SideAttention(thin, heads, rate, scale=host.score_scale, crossing=crossing)


def _thin_feed_forward(host: SubLayer, thin: Linears) -> SideFeedForward:
    modules = list(host.core.modules())
    rate = next((module.p for module in modules if isinstance(module, nn.Dropout)), 0.0)
    plain = nn.Dropout | nn.Identity
    leaves = (m for m in modules if not ([*m.children(), *m.parameters()] or isinstance(m, plain)))
    return SideFeedForward(thin, copy.deepcopy(next(leaves)), rate)


class LSTSideStack(nn.Module):
    """side_0 = D_in drop(E_0);  z = mu_l side + (1 - mu_l) D_l E_l, side = block_l(z);  mu_l = sigma(alpha_l / T).

    Each layer l of `kept` has a block. A layer without a block still has its gate, since the authors' code counts it.
    If the host's stack ends with a norm, the side ends with one of its own width.
    """

    is_side_module = True

    def __init__(self, host: Stack, role: str, reduction: int, kept: Collection[int] | None, *, bias: bool) -> None:
        super().__init__()
        self.width = divided(host.width, reduction, "width")
        self.kept = tuple(range(len(host.layers)) if kept is None else sorted(kept))
        layers = list(host)
        if not self.kept or self.kept[-1] >= len(layers):
            raise ValueError(f"side layers of the stack '{role}' must be among 0 to {len(layers) - 1}")
        self.enter = nn.Linear(host.width, self.width, bias=bias)
        self.ladders = nn.ModuleDict({str(i): nn.Linear(host.width, self.width, bias=bias) for i in self.kept})
        self.layers = nn.ModuleDict({str(i): thin_layer(layers[i], reduction) for i in self.kept})
        trained = [index <= self.kept[-1] for index in range(len(layers))]  # the side ends with its last layer
        self.gates = nn.ParameterList([nn.Parameter(torch.zeros(1), requires_grad=one) for one in trained])
        self.final_norm = None if host.final_norm is None else thin_norm(host.final_norm, self.width)
        attention = getattr(layers[0]["attention"].core, "attention", None)
        of_t5 = isinstance(attention, T5Attention) and attention.has_relative_attention_bias
        self.relative = RelativePositions(attention) if of_t5 else None

    def forward(self, entering: Tensor, states: Sequence[Tensor], context: Pass, *, text_only: bool = False) -> Tensor:
        """Map E_0 (B, N, d) and E_1 to E_L of the frozen stack to side states (B, N, r).

        `text_only`: the states hold only the text tokens among the N; a ladder gives zero to all others.
        """
        side: Tensor = self.enter(entering)
        for index, ladder, layer in zip(self.kept, self.ladders.values(), self.layers.values(), strict=True):
            rung = ladder(states[index])
            if text_only:
                rung = spread(rung, context.segments)
            mu = torch.sigmoid(self.gates[index] / TEMPERATURE)
            side, _ = layer(mu * side + (1 - mu) * rung, context)
        return side if self.final_norm is None else self.final_norm(side)


def spread(texts: Tensor, segments: Segments) -> Tensor:
    """Spread values of text tokens (B, n, r) over all tokens (B, N, r), with zero rows at the others."""
    if all(kind == TEXT for kind, _ in segments):
        return texts
    parts, start = [], 0
    for kind, length in segments:
        if kind == TEXT:
            parts.append(texts[:, start : start + length])
            start += length
        else:
            parts.append(texts.new_zeros(len(texts), length, texts.shape[2]))
    return torch.cat(parts, dim=1)


def frozen_states(stack: Stack, x: Tensor, context: Pass) -> list[Tensor]:
    """Return the output (B, N, d) of every layer, before any final norm, without gradient."""
    states = []
    with torch.no_grad():
        for layer in stack:
            x, _ = layer(x, context)
            states.append(x)
    return states
