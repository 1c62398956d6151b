"""AdaptFormer (Chen et al., NeurIPS 2022)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from petlbench.api.method import About, SizeOption
from petlbench.api.sites import SubLayer

from .bottlenecks import (
    BottleneckConfig,
    BottleneckMethod,
    HubLayer,
    Init,
    ParallelLayer,
    Rate,
    Reduction,
    Scale,
)


class AdaptFormerConfig(BottleneckConfig):
    """Sizes, scale and form; the defaults are those of the authors' image code."""

    form: Literal["parallel", "sequential"] = Field(
        "parallel", description="the branch reads the FFN's residual input (parallel) or the FFN's output (sequential)"
    )
    reduction: Reduction = 12  # rank 64 at width 768
    scale: Scale = 0.1
    inner_dropout: Rate = Field(0.1, description="on the bottleneck's activation; 0 in the authors' video code")
    init: Init = "zero"


class AdaptFormer(BottleneckMethod[AdaptFormerConfig]):
    """y = x + drop(h) + s ( U drop_q( relu( D x + b_D ) ) + b_U ) beside every FFN; x is its residual input, un-normed.

    Host dropout and drop-path do not touch the branch; s = 0.1 multiplies b_U too; in a post-norm host the norm follows
    the sum. Variants: `image`, the default, starts with U = 0, which is the identity, and has q = 0.1. `video` draws D
    and U from N(0, 0.02^2), which is not the identity, and has q = 0. In `sequential` the branch reads drop(h) in place
    of x; no script of the authors uses it.

    In the paper's equation the branch reads LN(x), in the code it reads x; `norm_in` follows the paper. A learned scale
    starts at 1, not 0.1. The video code trains its final norm as well; that norm is new and so part of its head. The
    authors use SGD for recognition; the rates here are VL-Adapter's, and TransVG's on that host.
    """

    Config = AdaptFormerConfig
    about = About(
        paper="Chen et al., NeurIPS 2022",
        trains="bottlenecks beside FFN",
        verified="authors' code: module, block, gradients, counts",
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "image": {},
        "video": {"init": "normal", "init_std": 0.02, "inner_dropout": 0.0},
        "sequential": {"form": "sequential"},
    }
    size_option = SizeOption("reduction", (48, 24, 12, 8, 4, 2))

    def __init__(self, config: AdaptFormerConfig | None = None) -> None:
        super().__init__(config)
        self.identity = self.config.init == "zero"

    def layer(self, sublayer: SubLayer) -> HubLayer:
        cls = ParallelLayer if self.config.form == "parallel" else HubLayer
        return cls(sublayer.width, self.config)
