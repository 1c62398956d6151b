"""Bottlenecks behind a sub-layer, in any order with the host's residual addition and norm: Houlsby's, Pfeiffer's."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, model_validator
from torch import Tensor

from petlbench.api.sites import Place, SubLayer

from .bottlenecks import BottleneckConfig, BottleneckMethod, HubLayer

NormBefore = Annotated[bool, Field(description="the bottleneck reads what the host's norm makes of the residual sum")]
NormAfter = Annotated[bool, Field(description="the host's addition and norm come after the adapter, as they would")]
Residual = Annotated[
    Literal["before", "post_add", "after"],
    Field(description="what the branch is added to: the value before addition and norm, their sum, or that after both"),
]


class SerialConfig(BottleneckConfig):
    """How the bottleneck stands to the host's residual addition and norm, besides."""

    norm_before: NormBefore = False
    norm_after: NormAfter = True
    residual: Residual = "before"
    residual_before_norm: bool = Field(False, description="with `norm_out`: it takes in the adapter's residual too")

    @model_validator(mode="after")
    def _can_be_computed(self) -> Self:
        if self.residual == "post_add" and not self.norm_before:
            raise ValueError("residual 'post_add' is the sum that norm_before computes: set norm_before too")
        if not self.norm_after and (not self.norm_before or self.residual != "after"):
            raise ValueError("norm_after: false needs norm_before: true and residual 'after', or the stream is lost")
        if self.residual_before_norm and not self.norm_out:
            raise ValueError("residual_before_norm says where norm_out stands: set norm_out too")
        return self


class SumLayer(HubLayer):
    """The same with q = norm(x + value), by the host's own norm, or q = x + value in a pre-norm host."""

    def __init__(self, host: SubLayer, options: SerialConfig) -> None:
        super().__init__(host.width, options, norm_takes_residual=options.residual_before_norm)
        self._host = (host,)  # in a tuple, so that the host's parameters keep their one name
        self.residual = options.residual

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        (host,) = self._host
        total = x + value
        q = total if host.pre_norm else host.norm(total)
        if self.residual == "before":
            return self.add(q, value)
        return self.add(q, total if self.residual == "post_add" else q)


S = TypeVar("S", bound=SerialConfig)


class SerialAdapter(BottleneckMethod[S]):
    """A bottleneck after a sub-layer, in any order with the host's residual addition and norm."""

    def __init__(self, config: S | None = None) -> None:
        super().__init__(config)
        c = self.config
        unmoved = not self._sums() or c.residual == "before"  # the branch's residual is the site's own value
        self.identity = c.init == "zero" and unmoved and not c.residual_before_norm

    def _sums(self) -> bool:
        return bool(self.config.norm_before and self.config.norm_after)

    def site(self) -> Place:
        return "branch" if self.config.norm_after else "normed"

    def layer(self, sublayer: SubLayer) -> HubLayer:
        # With norm_before and without norm_after, what is read is the value at the place `normed` itself.
        c = self.config
        if self._sums():
            return SumLayer(sublayer, c)
        return HubLayer(sublayer.width, c, norm_takes_residual=c.residual_before_norm)
