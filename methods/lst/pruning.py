"""Ladder side-tuning's initialisation: rows and columns of the backbone's own weights, the most important ones.

Structured selection in network order (as the authors' code, "v2"), with K the columns that the previous matrix left:

    K <- sel(I(table)^T)
    attention: norm[K];  q, k, v: columns K, then one common K <- sel(I_q * I_k * I_v);  o: columns K, K <- sel(I_o)
    FFN: norm[K];  in: columns K, K <- sel(I_in);  out: columns K, K <- sel(I_out);  final norm: [K]

sel(S) drops the round(amount rows) rows of the smallest sum |S|. The decoder starts with the encoder's last K, in
cross-attention too. Weights keep their scale; relative positions stay whole; a bias keeps the entries of its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from petlbench.api.decoding import token_losses
from petlbench.api.sites import Layer
from petlbench.api.tokens import Texts
from petlbench.backbones.parts.encoder_decoder import EncoderDecoder

ROLES = ("encoder", "decoder")
TABLE = "table"
GROUPS = (("q", "k", "v"), ("o",), ("in",), ("out",))  # projections that share one cut, in order
Named = dict[str, Tensor]


def parts(backbone: EncoderDecoder) -> dict[str, nn.Parameter]:
    """Return the language model's parameters by names of sites: `encoder.0.attention.q.weight`, `table`."""
    (table,) = backbone.token_embedding.parameters()
    named = {TABLE: table}
    for role in ROLES:
        stack = backbone.stack(role)
        first = next(iter(stack))["attention"].core
        relative = getattr(getattr(first, "attention", None), "relative_attention_bias", None)
        if relative is not None:
            named[f"{role}.relative"] = relative.weight
        for index, layer in enumerate(stack):
            named |= layer_parts(layer, f"{role}.{index}")
        if stack.final_norm is not None:
            named |= _prefixed(stack.final_norm, f"{role}.final.norm")
    return named


def layer_parts(layer: Layer, prefix: str) -> dict[str, nn.Parameter]:
    """Return the parameters of one layer, a host's or a side network's."""
    named: dict[str, nn.Parameter] = {}
    for name, sublayer in layer.items():
        named |= _prefixed(sublayer.norm, f"{prefix}.{name}.norm")
        for role, projection in sublayer.projections.items():
            named |= _prefixed(projection.singles()[0].linear, f"{prefix}.{name}.{role}")
    return named


def _prefixed(module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    return {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}


def pruned(values: Mapping[str, Tensor], importance: Mapping[str, Tensor], reduction: int, steps: int = 1) -> Named:
    """Keep 1 / `reduction` of the rows and columns of `values`, by the names of `parts`: the most important ones.

    With more `steps` ("v5": 10), each step drops the same share of the original size; rounding in every step can then
    leave other sizes.
    """
    now, weight = dict(values), dict(importance)
    for amount in _amounts(reduction, steps):
        now, weight = _once(now, weight, amount)
    return now


def left(count: int, reduction: int, steps: int) -> int:
    """Return how many of `count` rows pruning leaves."""
    for amount in _amounts(reduction, steps):
        count -= round(amount * count)
    return count


def _amounts(reduction: int, steps: int) -> list[float]:
    """Return the share of the present rows that each step drops."""
    share = (1 - 1 / reduction) / steps
    return [share / (1 - share * step) for step in range(steps)]


def _once(values: Named, importance: Named, amount: float) -> tuple[Named, Named]:
    columns = selected(importance[TABLE].T, amount)
    cuts: dict[str, tuple[list[int] | slice, list[int] | slice]] = {TABLE: (slice(None), columns)}
    for prefix, group in _groups(values):
        if group == ("norm",):
            cuts[f"{prefix}.norm"] = (columns, slice(None))
            continue
        names = [f"{prefix}.{role}" for role in group]
        score = torch.stack([importance[f"{name}.weight"][:, columns] for name in names]).prod(0)
        rows = selected(score, amount)
        cuts |= dict.fromkeys(names, (rows, columns))
        columns = rows

    def cut(name: str, value: Tensor) -> Tensor:
        place = cuts.get(name) or cuts.get(name.rpartition(".")[0])
        if place is None:
            return value
        return value[place[0]] if value.ndim == 1 else value[place[0]][:, place[1]]

    return tuple({name: cut(name, value) for name, value in each.items()} for each in (values, importance))  # type: ignore[return-value]


def _groups(values: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (prefix, projections that share one cut) in network order; `norm` is a sub-layer's or a stack's norm."""
    prefixes = dict.fromkeys(name.rsplit(".", 2)[0] for name in values if name.count(".") >= 2)
    for prefix in prefixes:
        yield prefix, ("norm",)
        for group in GROUPS:
            if f"{prefix}.{group[0]}.weight" in values:
                yield prefix, group


def selected(score: Tensor, amount: float) -> list[int]:
    """Return the rows of `score` that stay after dropping the share `amount` of the smallest.

    As in the authors' code, their order is Python's for the difference of two sets of integers. It is not ascending
    when few rows stay, and it decides which rows form a head.
    """
    count = len(score)
    order = score.abs().sum(1).argsort()
    return list(set(range(count)) - set(order[: round(amount * count)].tolist()))


def fisher(backbone: EncoderDecoder, samples: Iterable[tuple[Texts, Texts]], limit: int = 1024) -> Named:
    """Return importances by the names of `parts`: the sum over at most `limit` samples of (d loss / d w)^2.

    A sample is (source, target), a batch of one. The loss is the token-mean cross-entropy of the target given the
    source text, without an image, in evaluation mode. The function restores modes, flags and gradients.
    """
    named = parts(backbone)
    flags = {name: p.requires_grad for name, p in named.items()}
    modes = [(module, module.training) for module in backbone.modules()]
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    backbone.eval()
    for p in named.values():
        p.requires_grad_(True)
    try:
        for _, (source, target) in zip(range(limit), samples, strict=False):
            memory = backbone.fuse(backbone.embed_text(source), task="language")
            loss = token_losses(backbone, memory, target, "language").sum() / target.mask.sum()
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.square()
    finally:
        for name, p in named.items():
            p.requires_grad_(flags[name])
        for module, mode in modes:
            module.training = mode
    return sums
