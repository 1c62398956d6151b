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
        "parallel", description="the branch reads the FFN's residual input, or what the FFN gives"
    )
    reduction: Reduction = 12  # rank 64 at width 768
    scale: Scale = 0.1
    inner_dropout: Rate = Field(0.1, description="on the bottleneck's activation; 0 in the authors' video code")
    init: Init = "zero"


class AdaptFormer(BottleneckMethod[AdaptFormerConfig]):
    """y = x + drop(h) + s ( U drop_q( relu( D x + b_D ) ) + b_U ) beside every FFN; x its residual input, not normed.

    The branch is outside host dropout and drop-path; s = 0.1 multiplies b_U too; in a post-norm host the norm follows
    the sum. `sequential`, which no script of the authors uses: the branch reads drop(h) in place of x. `image`, the
    default: U = 0, so identity at the start, and q = 0.1. `video`: D and U N(0, 0.02^2), so no identity, and q = 0.

    The paper's equation has the branch read LN(x), the code x: `norm_in` gives the former. A learned scale starts at
    1, not 0.1. The video code trains its final norm as well, which is new and so part of its head. Theirs is SGD for
    recognition; the rates here are VL-Adapter's, and TransVG's where it is the host.
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
        kind = ParallelLayer if self.config.form == "parallel" else HubLayer
        return kind(sublayer.width, self.config)
