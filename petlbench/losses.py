"""Losses that tasks and pre-training share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from petlbench.backbones.base import Backbone, Texts, Tokens


def token_losses(backbone: Backbone, memory: Tokens, target: Texts, task: str) -> Tensor:
    """(B, T) cross-entropy of each target token given those before it; zero at padding."""
    start = torch.full_like(target.ids[:, :1], backbone.start_id)
    logits, _ = backbone.decode(memory, torch.cat([start, target.ids[:, :-1]], dim=1), task=task)
    losses = F.cross_entropy(logits.transpose(1, 2), target.ids, reduction="none")
    return losses * target.mask
