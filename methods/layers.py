"""Layers, initialisations and a recipe that several methods use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]
# TransVG, and all who adapt it, train the towers at a tenth of the rate of fusion encoder and head.
REC_RECIPE: dict[str, Any] = {
    "lr": 1e-4,
    "method_lr": 0.1,
    "weight_decay": 1e-4,
    "warmup": 0.0,
    "schedule": "step",
    "clip_norm": None,
    "augment": "transvg",
}


def gelu_tanh(x: Tensor) -> Tensor:
    """Apply GELU's tanh approximation, which every adapter and gate of VL-Adapter and VL-PET uses."""
    return F.gelu(x, approximate="tanh")


class Bottleneck(nn.Module):
    """bn(z) = W_u phi(W_d z + b_d) + b_u without a residual; (…, width) -> (…, out), by default `width`.

    The initial values are torch's for linear layers; `draw_like_bart` and `start_at_zero` set others.
    """

    def __init__(self, width: int, rank: int, activation: Activation = gelu_tanh, out: int | None = None) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width if out is None else out)
        self.activation = activation

    def forward(self, z: Tensor) -> Tensor:
        up: Tensor = self.up(self.activation(self.down(z)))
        return up


def draw_like_bart(module: nn.Module) -> None:
    """Draw every linear weight from N(0, 0.02^2), set every linear bias to 0: BART's generic initialisation."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def start_at_zero(*linears: nn.Linear) -> None:
    """Set weights and biases to 0."""
    for linear in linears:
        nn.init.zeros_(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def draw_like_lora(bottleneck: Bottleneck) -> None:
    """Draw as LoRA: down Kaiming-uniform (a = sqrt 5) with bias 0, up 0; the bottleneck's output starts at 0."""
    nn.init.kaiming_uniform_(bottleneck.down.weight, a=math.sqrt(5))
    nn.init.zeros_(bottleneck.down.bias)
    start_at_zero(bottleneck.up)


def reduced(width: int, reduction: int) -> int:
    """Return the rank of a bottleneck: width // reduction, at least 1."""
    return max(1, width // reduction)
