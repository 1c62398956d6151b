"""Bottlenecks after a sub-layer, in any order with the host's addition and norm: Houlsby's and Pfeiffer's."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, model_validator
from torch import Tensor

from petlbench.api.sites import Place, SubLayer

from .bottlenecks import BottleneckConfig, BottleneckMethod, HubLayer

NormBefore = Annotated[bool, Field(description="the bottleneck reads the residual sum after the host's norm")]
NormAfter = Annotated[bool, Field(description="the host's addition and norm follow the adapter")]
Residual = Annotated[
    Literal["before", "post_add", "after"],
    Field(description="the branch adds to: the value (before), the residual sum (post_add), the normed sum (after)"),
]


class SerialConfig(BottleneckConfig):
    """Options that also order the bottleneck among the host's residual addition and norm."""

    norm_before: NormBefore = False
    norm_after: NormAfter = True
    residual: Residual = "before"
    residual_before_norm: bool = Field(False, description="`norm_out` also normalises the adapter's residual")

    @model_validator(mode="after")
    def _can_be_computed(self) -> Self:
        if self.residual == "post_add" and not self.norm_before:
            raise ValueError("residual 'post_add' is the sum that norm_before computes: set norm_before too")
        if not self.norm_after and (not self.norm_before or self.residual != "after"):
            raise ValueError("norm_after: false needs norm_before: true and residual 'after', or the stream is lost")
        if self.residual_before_norm and not self.norm_out:
            raise ValueError("residual_before_norm concerns norm_out: set norm_out too")
        return self


class SumLayer(HubLayer):
    """A HubLayer with q = norm(x + value), by the host's own norm, or q = x + value in a pre-norm host."""

    def __init__(self, host: SubLayer, options: SerialConfig) -> None:
        super().__init__(host.width, options, norm_takes_residual=options.residual_before_norm)
        self._host = (host,)  # a tuple hides the host from torch, so its parameters keep one name
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
        # With norm_before and without norm_after, the layer reads the value at the place `normed` itself.
        c = self.config
        if self._sums():
            return SumLayer(sublayer, c)
        return HubLayer(sublayer.width, c, norm_takes_residual=c.residual_before_norm)
