"""Compacter (Karimi Mahabadi, Henderson, Ruder, NeurIPS 2021), as the vision-language PETL papers configure it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from petlbench.api.backbone import Backbone, Initialisation
from petlbench.api.method import About, SizeOption

from .layers import gelu_tanh, reduced
from .vl_adapter import Adapter, AfterSubLayers, AfterSubLayersConfig


def drawn_rule(n: int) -> nn.Parameter:
    """Draw A (n, n, n) from N(0, 0.01^2)."""
    return nn.Parameter(torch.randn(n, n, n) * 0.01)


class PHMLinear(nn.Module):
    """y = z M + b, M = sum_i kron(A_i, S_i) (in, out); A (n, n, n), S (n, in / n, out / n). (…, in) -> (…, out).

    With a `factor_rank` k, S_i = L_i R_i with L (n, in / n, k) and R (n, k, out / n). `rule` is an A that several
    layers share. Every S_i (or L_i and R_i) is drawn Xavier-uniform with gain sqrt 2; b starts at 0. Raises ValueError
    if n does not divide both sides.
    """

    def __init__(
        self, d_in: int, d_out: int, n: int = 2, *, factor_rank: int | None = None, rule: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        if d_in % n or d_out % n:
            raise ValueError(f"n = {n} must divide both sides of a projection from {d_in} to {d_out}")
        self.A = drawn_rule(n) if rule is None else rule
        rows, columns = d_in // n, d_out // n
        self.S: nn.Parameter | None = None
        if factor_rank is None:
            self.S = _drawn(n, rows, columns)
        else:
            self.S_left, self.S_right = _drawn(n, rows, factor_rank), _drawn(n, factor_rank, columns)
        self.b = nn.Parameter(torch.zeros(d_out))

    def matrix(self) -> Tensor:
        """Compute M (in, out)."""
        blocks = self.S_left @ self.S_right if self.S is None else self.S
        return torch.einsum("iab,icd->acbd", self.A, blocks).flatten(2).flatten(0, 1)

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.matrix() + self.b


def _drawn(n: int, rows: int, columns: int) -> nn.Parameter:
    blocks = torch.empty(n, rows, columns)
    for block in blocks:
        nn.init.xavier_uniform_(block, gain=math.sqrt(2))
    return nn.Parameter(blocks)


class PHMBottleneck(nn.Module):
    """W_u gelu_t(W_d z + b_d) + b_u with both projections PHM layers, without a residual; (…, width) -> (…, out)."""

    def __init__(
        self,
        width: int,
        rank: int,
        n: int = 2,
        *,
        out: int | None = None,
        factor_rank: int | None = None,
        rule: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.down = PHMLinear(width, rank, n, factor_rank=factor_rank, rule=rule)
        self.up = PHMLinear(rank, width if out is None else out, n, factor_rank=factor_rank, rule=rule)

    def forward(self, z: Tensor) -> Tensor:
        delta: Tensor = self.up(gelu_tanh(self.down(z)))
        return delta


class CompacterConfig(AfterSubLayersConfig):
    """Sizes and sharing; the defaults are those of VL-Adapter's and VL-PET's repositories."""

    reduction: int = Field(8, gt=0, description="bottleneck rank = width // reduction; a multiple of n")
    n: int = Field(2, gt=0, description="number of Kronecker products in a matrix's sum; divides width and rank")
    factor_rank: int | None = Field(
        None,
        gt=0,
        description="rank of the factors of every S_i; null: S_i is not factorised, as in the scripts; the paper: 1",
    )
    shared_rule: bool = Field(False, description="all layers and positions share one A, as in the paper")
    sharing: Literal["single", "multiple"] = Field("single", description="one adapter for all tasks, or one per task")


class Compacter(AfterSubLayers[CompacterConfig]):
    """VL-Adapter's bottlenecks with matrices M = sum_i kron(A_i, S_i): u = h + gelu(h M_d + b_d) M_u + b_u.

    Positions, trained norms and adapters per task are VL-Adapter's. The repositories neither factorise S nor share A;
    the paper does both (rank 1), and so does `factorized`. Initial values are the repositories', on BART and on T5: S
    Xavier-uniform with gain sqrt 2, A N(0, 0.01^2), b 0. The rate is VL-Adapter's, since VL-PET leaves it to an
    argument.
    """

    Config = CompacterConfig
    about = About(
        paper="Karimi Mahabadi et al., NeurIPS 2021; VL-Adapter",
        trains="Kronecker factors; norms (not T5's)",
        verified="authors' code: modules, a whole model with gradients, counts",
    )
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "single": {},
        "multiple": {"sharing": "multiple"},
        "factorized": {"n": 4, "factor_rank": 1, "shared_rule": True},
    }
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}
    size_option = SizeOption("reduction", (48, 24, 12, 8, 4, 2))

    def __init__(self, config: CompacterConfig | None = None) -> None:
        super().__init__(config)
        self._rule: nn.Parameter | None = None

    def adapt(self, backbone: Backbone) -> Backbone:
        if self.config.shared_rule:
            like = next(backbone.parameters())
            self._rule = nn.Parameter(drawn_rule(self.config.n).detach().to(like.device, like.dtype))
        return super().adapt(backbone)

    def adapter(self, width: int, initialisation: Initialisation) -> nn.Module:
        shared, rank = self.shares_all(), reduced(width, self.config.reduction)
        down = self.per_task(lambda: self._projection(width, rank), shared=shared)
        return Adapter(down, self.per_task(lambda: self._projection(rank, width), shared=shared))

    def _projection(self, d_in: int, d_out: int) -> PHMLinear:
        return PHMLinear(d_in, d_out, self.config.n, factor_rank=self.config.factor_rank, rule=self._rule)
