"""The same computation on every machine: dropout that keeps one byte per element, attention as matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class _Dropout(torch.autograd.Function):
    """Inverted dropout that saves a boolean mask and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
        ctx.save_for_backward(kept)
        ctx.gain = 0.0 if p == 1 else 1 / (1 - p)
        return x * kept * ctx.gain

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return grad * kept * ctx.gain, None


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.dropout`."""
    if p == 0 or not training:
        return input
    dropped: Tensor = _Dropout.apply(input, p)
    return input.copy_(dropped) if inplace else dropped


def _bias(attn_mask: Tensor | None, is_causal: bool, scores: Tensor) -> Tensor | None:
    """Return what to add to the scores (…, L, S). Adding saves nothing for backward; selecting would save a mask."""
    if is_causal:
        if attn_mask is not None:
            raise RuntimeError("attention takes a mask or is_causal=True, not both")
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return attn_mask
    return torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill_(~attn_mask, -torch.inf)


def _scored(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, enable_gqa: bool = False
) -> tuple[Tensor, Tensor]:
    """Map (…, L, E), (…, S, E), (…, S, Ev) to scores (…, L, S) and to values with as many heads (…, S, Ev)."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    return query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale), value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: (…, L, E), (…, S, E), (…, S, Ev) -> (…, L, Ev).

    `options` are the two that torch takes by keyword only, see `_scored`.
    """
    scores, value = _scored(query, key, value, **options)
    bias = _bias(attn_mask, is_causal, scores)
    if bias is not None:
        scores = scores + bias
    # torch's own softmax of attention: a row with nothing to attend to gives zeros, not NaN.
    weights = torch._safe_softmax(scores, -1)
    return _dropout(weights, dropout_p) @ value


def _torch_dropout(input: Tensor, p: float, train: bool) -> Tensor:
    return _dropout(input, p, train)


_REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _torch_dropout,
    F.scaled_dot_product_attention: _attention,
}


class _Canonical(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def canonical() -> Iterator[None]:
    """A context in which the computation, and what autograd saves for backward, do not depend on the machine.

    The ordinary kernels keep dropout masks of different sizes (four bytes per element on a CPU, one on a GPU, none when
    fused), and attention maps or none. Here dropout keeps one byte per element, and attention is plain matrix products.
    Values and gradients are those of the ordinary operations, except for random draws. It holds for all threads.
    """
    # The mode sees calls under any name, but it is off inside torch functions written in Python: in torch's attention
    # layer, and in backward, where checkpointed layers run again. Those find the functions by name in
    # torch.nn.functional. With the mode alone, backward through a checkpointed layer with dropout ends in a
    # CheckpointError, because the mask has one type in the first pass and another in the second.
    ordinary = F.dropout, F.scaled_dot_product_attention
    F.dropout = _dropout
    F.scaled_dot_product_attention = _attention  # type: ignore[assignment]  # torch's types do not know of keyword-only
    try:
        with _Canonical():
            yield
    finally:
        F.dropout, F.scaled_dot_product_attention = ordinary
