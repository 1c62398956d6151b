"""The parallel adapter (He et al., ICLR 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

from petlbench.api.method import About, SizeOption
from petlbench.api.sites import SubLayer

from .bottlenecks import BottleneckConfig, BottleneckMethod, HubLayer, Init, ParallelLayer, Reduction, Scale


class ParallelConfig(BottleneckConfig):
    """Sizes, scale and initial values; the defaults are the adapters library's `par_bn`."""

    reduction: Reduction = 2
    scale: Scale = 4.0
    init: Init = "zero"


class ParallelAdapter(BottleneckMethod[ParallelConfig]):
    """Beside the feed-forward network, z = drop(h): u = z + s (U relu(D x + b_D) + b_U), x is its residual input.

    He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning" (ICLR 2022), as the adapters library
    builds it: s = 4, rank d/2; identity at the start. In `scaled`, s is one learned number that starts at 1. Rates are
    those of `houlsby`.
    """

    Config = ParallelConfig
    about = About(
        paper="He et al., ICLR 2022",
        trains="bottlenecks beside FFN; scaled: one scale each",
        verified="adapters library: layers, gradients, counts",
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {"fixed": {}, "scaled": {"scale": "learned"}}
    size_option = SizeOption("reduction", (48, 24, 12, 8, 4, 2))

    def __init__(self, config: ParallelConfig | None = None) -> None:
        super().__init__(config)
        self.identity = self.config.init == "zero"

    def layer(self, sublayer: SubLayer) -> HubLayer:
        return ParallelLayer(sublayer.width, self.config)
