"""VL-Adapter (Sung, Cho, Bansal, CVPR 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.backbones.base import Backbone
from petlbench.method import Knob, Method, StackedConfig, train


class Bottleneck(nn.Module):
    """u = h + W_u gelu_t(W_d h + b_d) + b_u, with gelu_t the tanh approximation; (…, d) -> (…, d)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.02)  # BART's generic initialisation reaches the adapters
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return h + self.up(F.gelu(self.down(h), approximate="tanh"))


class VLAdapterConfig(StackedConfig):
    """Sizes and what trains besides; the defaults are those of the paper's single adapter on CLIP-BART."""

    reduction: int = Field(8, gt=0, description="bottleneck rank = width // reduction, at least 1")
    train_norms: bool = Field(True, description="norms of the adapted stacks train too, gains and biases")


class VLAdapter(Method):
    """A bottleneck after every sub-layer, before dropout and residual addition: u = h + W_u gelu(W_d h + b_d) + b_u.

    The `single` variant: one adapter per position for all tasks. All norms of the adapted stacks train. Nothing is
    zero-initialised, so training starts near the pre-trained function, not at it. The released code leaves T5's norms
    frozen by a class mismatch; `train_norms: false` gives that. On backbones whose image encoder is a transformer with
    sites, that stack is adapted as well; the authors' own image encoder offers none.
    """

    Config = VLAdapterConfig
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}
    knob = Knob("reduction", (48, 24, 12, 8, 4, 2))

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.freeze()
        for stack in self.stacks(backbone):
            for layer in stack:
                for _, sublayer in layer.items():
                    rank = max(1, sublayer.width // self.config.reduction)
                    like = next(sublayer.parameters())
                    module = Bottleneck(sublayer.width, rank).to(like.device, like.dtype)
                    sublayer.insert("output", module)
            if self.config.train_norms:
                train(*stack.norms())
        return backbone
