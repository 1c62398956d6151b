"""LoRA (Hu et al., ICLR 2022), as the vision-language PETL papers configure it, and plain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from petlbench.api.backbone import Backbone
from petlbench.api.method import About, SizeOption, train_biases
from petlbench.api.sites import Projection

from .per_task import PerTask, Tasked, TaskedConfig


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
        """Return the matrix (d_out, d_in) that the path adds to the weight, dropout aside."""
        return self.scale * self.B @ self.A


class LoRAConfig(TaskedConfig):
    """Sizes and places; the defaults are those of the VL-Adapter and VL-PET repositories."""

    rank: int | None = Field(
        None,
        gt=0,
        description="r; null: a sixth of the width, as the papers' 128 at width 768; on T5 Ladder Side-Tuning's 150",
    )
    alpha: float | None = Field(
        None, gt=0, description="numerator of the scale alpha / r; null: r / 4, the papers' 32 at rank 128"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the path's input, in training only")
    targets: tuple[str, ...] = Field(("q", "v"), min_length=1, description="projections among q, k, v, o, in, out")
    train_biases: bool = Field(True, description="also train all biases of the backbone, as in the VL papers")
    sharing: Literal["single", "multiple"] = Field("single", description="one (A, B) for all tasks, or one per task")


class LoRA(Tasked[LoRAConfig]):
    """y = x W^T + b + (alpha / r) (drop(x) A^T) B^T on query and value of every attention; identity at the start.

    In `single`, as in the VL-Adapter and VL-PET repositories, every bias also trains and counts, but no gain does.
    `multiple` has an (A, B) for each task. `plain` is LoRA alone, with peft's defaults. peft's own layers go beside
    modules and not beside rows of a packed matrix, so these layers are ours, and a test compares them with peft's. A is
    Kaiming-uniform with a = sqrt 5, B is 0. The repositories build no LoRA on T5; rank and rate there are Ladder
    Side-Tuning's.
    """

    Config = LoRAConfig
    about = About(
        paper="Hu et al., ICLR 2022; VL-Adapter",
        trains="low-rank paths; all biases",
        verified="authors' code: module, a whole model with gradients, counts; peft's layer",
    )
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "single": {},
        "plain": {"train_biases": False, "rank": 8, "alpha": 8.0, "dropout": 0.0},
        "multiple": {"sharing": "multiple"},
    }
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {"vl_t5": {"lr": 3e-4}}
    size_option = SizeOption("rank", (1, 2, 4, 8, 16, 32))
    own = "*.path.tasks.{task}.*"
    identity = True

    def __init__(self, config: LoRAConfig | None = None) -> None:
        super().__init__(config)
        self._paths: list[tuple[Projection, nn.Module]] = []
        self.mergeable = self.shares_all()

    def shares_all(self) -> bool:
        return self.config.sharing == "single"

    def adapt(self, backbone: Backbone) -> Backbone:
        self.start(backbone)
        # One weight cannot hold the paths of several tasks.
        self.mergeable = self.shares_all() or len(self.all_tasks()) == 1
        if self.config.train_biases:
            train_biases(backbone)
        t5 = backbone.initialisation == "t5"
        for stack in self.stacks(backbone):
            rank = self.config.rank or max(1, stack.width * 25 // 128 if t5 else stack.width // 6)
            for layer in stack:
                for _, sublayer in layer.items():
                    for target in self.config.targets:
                        if target in sublayer.projections:
                            for single in sublayer.projections[target].singles():
                                self._insert(single, rank)
        if not self._paths:
            raise ValueError(f"no projection called {' or '.join(self.config.targets)} in the chosen stacks")
        return backbone

    def _insert(self, projection: Projection, rank: int) -> None:
        alpha = rank / 4 if self.config.alpha is None else self.config.alpha
        sides = projection.in_features, projection.out_features

        def low_rank() -> nn.Module:
            return LowRank(*sides, rank, alpha, self.config.dropout)

        path = self.per_task(low_rank, shared=self.shares_all())
        weight = projection.linear.weight
        projection.add(path.to(weight.device, weight.dtype))
        self._paths.append((projection, path))

    def merge(self) -> None:
        """Fold every path into its weight and remove it. Raises NotImplementedError if tasks have separate paths."""
        if not self.mergeable:
            super().merge()
        for projection, path in self._paths:
            only = path.of(self.all_tasks()[0]) if isinstance(path, PerTask) else path
            assert isinstance(only, LowRank)
            projection.fold(only.delta().detach())
            projection.remove(path)
        self._paths.clear()
