"""LoRA (Hu et al., ICLR 2022), as the vision-language PETL papers configure it, and plain."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from petlbench.backbones.base import Backbone
from petlbench.backbones.sites import Projection
from petlbench.method import Knob, Method, StackedConfig, train_biases


class LowRank(nn.Module):
    """(alpha / r) (drop(x) A^T) B^T; A (r, d_in), B (d_out, r); (…, d_in) -> (…, d_out)."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(rank, d_in)), nn.Parameter(torch.zeros(d_out, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale, self.drop = alpha / rank, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (self.drop(x) @ self.A.T) @ self.B.T

    def delta(self) -> Tensor:
        """(d_out, d_in): what the path adds to the weight, dropout aside."""
        return self.scale * self.B @ self.A


class LoRAConfig(StackedConfig):
    """Sizes and places; the defaults are those of the VL-Adapter and VL-PET repositories, but for the rank."""

    rank: int = Field(8, gt=0, description="r; the VL papers use 128 at width 768, one sixth of the width")
    alpha: float | None = Field(
        None, gt=0, description="numerator of the scale alpha / r; null: r / 4, the papers' 0.25"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="on the path's input, in training only")
    targets: tuple[str, ...] = Field(("q", "v"), min_length=1, description="projections among q, k, v, o, in, out")
    train_biases: bool = Field(True, description="all biases of the backbone train too, as in the VL papers")


class LoRA(Method):
    """y = x W^T + b + (alpha / r) (drop(x) A^T) B^T on query and value of every attention; identity at the start.

    The VL-Adapter and VL-PET repositories train every bias besides, and count it; `train_biases: false` is plain LoRA.
    """

    Config = LoRAConfig
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}
    knob = Knob("rank", (1, 2, 4, 8, 16, 32))
    identity = True
    mergeable = True

    def __init__(self, config: LoRAConfig | None = None) -> None:
        super().__init__(config)
        self._paths: list[tuple[Projection, LowRank]] = []

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.freeze()
        if self.config.train_biases:
            train_biases(backbone)
        for stack in self.stacks(backbone):
            for layer in stack:
                for _, sublayer in layer.items():
                    for target in self.config.targets:
                        if target in sublayer.projections:
                            for single in sublayer.projections[target].singles():
                                self._insert(single)
        if not self._paths:
            raise ValueError(f"no projection called {' or '.join(self.config.targets)} in the chosen stacks")
        return backbone

    def _insert(self, projection: Projection) -> None:
        rank = self.config.rank
        alpha = rank / 4 if self.config.alpha is None else self.config.alpha
        path = LowRank(projection.in_features, projection.out_features, rank, alpha, self.config.dropout)
        weight = projection.linear.weight
        projection.add(path.to(weight.device, weight.dtype))
        self._paths.append((projection, path))

    def merge(self) -> None:
        """Fold every path into its weight, and take it out."""
        for projection, path in self._paths:
            projection.fold(path.delta().detach())
            projection.remove(path)
        self._paths.clear()
