"""What attention adds to its scores, to hide keys."""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN, MEMORY_HIDDEN = -1e4, -1e9  # T5's, for hidden keys: in self- and in cross-attention


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(B, N) True-is-real -> (B, 1, 1, N) additive attention bias; None when nothing is masked, which is faster."""
    if not mask.is_meta and bool(mask.all()):
        return None
    return (~mask)[:, None, None, :].to(dtype) * torch.finfo(dtype).min


def causal(ids: Tensor, step: int, dtype: torch.dtype) -> Tensor | None:
    """(1, 1, T, step + T): ids (B, T) see what is before them, and `step` earlier ones."""
    length = ids.shape[1]
    if length == 1:
        return None  # one new token sees everything before it
    blocked = torch.ones(length, step + length, dtype=torch.bool, device=ids.device).triu(step + 1)
    return blocked[None, None].to(dtype) * torch.finfo(dtype).min
