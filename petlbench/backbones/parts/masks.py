"""Biases that attention adds to its scores to hide keys."""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN, MEMORY_HIDDEN = -1e4, -1e9  # T5's biases of hidden keys, in self- and cross-attention


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Map a mask (B, N), True where real, to a bias (B, 1, 1, N); None if nothing is masked, which is faster."""
    if not mask.is_meta and bool(mask.all()):
        return None
    return (~mask)[:, None, None, :].to(dtype) * torch.finfo(dtype).min


def causal(ids: Tensor, step: int, dtype: torch.dtype) -> Tensor | None:
    """Return a bias (1, 1, T, step + T) by which `ids` (B, T) see themselves, those before, and `step` earlier ones."""
    length = ids.shape[1]
    if length == 1:
        return None  # one new token sees everything before it
    blocked = torch.ones(length, step + length, dtype=torch.bool, device=ids.device).triu(step + 1)
    return blocked[None, None].to(dtype) * torch.finfo(dtype).min
