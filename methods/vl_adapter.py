"""VL-Adapter (Sung, Cho, Bansal, CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field
from torch import Tensor, nn

from petlbench.api.backbone import Backbone, Initialisation
from petlbench.api.method import About, SizeOption, place, train

from .layers import draw_like_bart, gelu_tanh, reduced
from .per_task import Tasked, TaskedConfig


class Adapter(nn.Module):
    """u = h + W_u gelu_t(W_d h + b_d) + b_u, with gelu_t the tanh approximation; (…, d) -> (…, d)."""

    def __init__(self, down: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        u: Tensor = h + self.up(gelu_tanh(self.down(h)))
        return u


class AfterSubLayersConfig(TaskedConfig):
    """Options for sharing between tasks and for training norms."""

    sharing: str = Field("single", description="what tasks share; single: everything")
    train_norms: bool | None = Field(
        None,
        description="also train norms of the adapted stacks, gains and biases; null: only norms with a bias, as "
        "released, which excludes T5's",
    )


C = TypeVar("C", bound=AfterSubLayersConfig)


class AfterSubLayers(Tasked[C]):
    """An adapter of the same kind after every sub-layer, before dropout and residual addition."""

    def shares_all(self) -> bool:
        return self.config.sharing == "single"

    def adapter(self, width: int, initialisation: Initialisation) -> nn.Module:
        """Return a new adapter for one sub-layer."""
        raise NotImplementedError

    def adapt(self, backbone: Backbone) -> Backbone:
        self.start(backbone)
        for stack in self.stacks(backbone):
            for layer in stack:
                for _, sublayer in layer.items():
                    sublayer.insert("output", place(self.adapter(sublayer.width, backbone.initialisation), sublayer))
            if backbone.norm_bias if self.config.train_norms is None else self.config.train_norms:
                train(*stack.norms())
        return backbone


class VLAdapterConfig(AfterSubLayersConfig):
    """Sizes, sharing between tasks and trained norms; the defaults are those of the paper's single adapter."""

    reduction: int | None = Field(
        None,
        gt=0,
        description="bottleneck rank = width // reduction, at least 1; null: 8, the paper's on CLIP-BART; on T5 4, "
        "from Ladder Side-Tuning's scripts",
    )
    sharing: Literal["single", "multiple", "half_shared_up", "half_shared_down"] = Field(
        "single", description="one adapter for all tasks; one per task; or one per task that shares one projection"
    )


class VLAdapter(AfterSubLayers[VLAdapterConfig]):
    """A bottleneck after every sub-layer, before dropout and residual addition: u = h + W_u gelu(W_d h + b_d) + b_u.

    `single` has one adapter per position for all tasks. `multiple` has one per task; the pass chooses.
    `half_shared_up` and `half_shared_down` have one per task too, but all tasks share the named projection; the paper's
    count (8.36 %) is that of `half_shared_up`.

    All norms of the adapted stacks train. The released code misses T5's by a class mismatch, and the published count on
    T5 leaves them out, so they stay frozen there by default; `train_norms: true` trains them. Nothing starts at zero:
    BART's generic initialisation, N(0, 0.02^2) and 0, reaches the adapters, and T5's start as torch draws linear
    layers. Training starts near the pre-trained function, not at it.

    Here an image encoder that is a transformer with sites gets adapters as well, drawn as BART's; the authors' image
    encoder has no sites. Half-shared adapters, which have no script, take the rate of `multiple`.
    """

    Config = VLAdapterConfig
    about = About(
        paper="Sung, Cho, Bansal, CVPR 2022",
        trains="adapters; norms (not T5's)",
        verified="authors' code: modules, layers, whole models with gradients, counts",
    )
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "single": {},
        "multiple": {"sharing": "multiple"},
        "half_shared_up": {"sharing": "half_shared_up"},
        "half_shared_down": {"sharing": "half_shared_down"},
    }
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {"vl_t5": {"lr": 3e-4}}
    size_option = SizeOption("reduction", (48, 24, 12, 8, 4, 2))

    def default_recipe(self, family: str) -> dict[str, Any]:
        recipe = super().default_recipe(family)
        return recipe if self.config.sharing == "single" else {**recipe, "lr": 3e-4}

    def adapter(self, width: int, initialisation: Initialisation) -> nn.Module:
        t5 = initialisation == "t5"
        rank = reduced(width, self.config.reduction or (4 if t5 else 8))
        sharing = self.config.sharing
        down = self.per_task(lambda: nn.Linear(width, rank), shared=sharing in ("single", "half_shared_down"))
        up = self.per_task(lambda: nn.Linear(rank, width), shared=sharing in ("single", "half_shared_up"))
        adapter = Adapter(down, up)
        if not t5:
            draw_like_bart(adapter)
        return adapter
