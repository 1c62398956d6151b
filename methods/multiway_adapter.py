"""MultiWay-Adapter (Long, Killick, McCreadie, Aragon Camarasa, ICASSP 2024, arXiv 2309.01516)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.backbone import Backbone
from petlbench.api.method import About, Method, SizeOption, StackedConfig, place, train
from petlbench.api.sites import IMAGE, TEXT, Layer, Stack, SubLayer, current_pass
from petlbench.api.snapshot import inserted
from petlbench.backbones.parts.multiway import Routed

from .layers import Bottleneck, draw_like_lora, reduced, start_at_zero

SMALLEST = 8  # with fewer relus, all of a bottleneck's may be 0 for a token such as CLS
LARGEST = 64  # the authors' bottleneck, in base and large models
BOTH: tuple[int, ...] = (TEXT, IMAGE)
KINDS = {"vision": (IMAGE,), "text": (TEXT,), "decoder": (TEXT,)}  # token types by stack; other stacks have BOTH
Site = tuple[Layer, tuple[int, ...]]  # a layer and the token types that pass through it


class KnowledgeExtractor(nn.Module):
    """NKE(a) = s (U drop(relu(D a + b_D)) + b_U), which starts at 0; (…, width) -> (…, width).

    `norm` is before D (in), after the scale (out), or absent (none).
    """

    def __init__(
        self, width: int, rank: int, *, scale: float | Literal["learned"], norm: str = "none", dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.bottleneck = Bottleneck(width, rank, nn.Sequential(nn.ReLU(), nn.Dropout(dropout)))
        draw_like_lora(self.bottleneck)
        self.scale = nn.Parameter(torch.ones(1)) if scale == "learned" else scale
        self.before = nn.LayerNorm(width) if norm == "in" else nn.Identity()
        self.after = nn.LayerNorm(width) if norm == "out" else nn.Identity()

    def forward(self, a: Tensor) -> Tensor:
        out: Tensor = self.after(self.scale * self.bottleneck(self.before(a)))
        return out


class Nothing(nn.Module):
    """Gives 0, for the token type that has no extractor."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Beside(nn.Module):
    """value + extractor(x), beside a feed-forward network and outside of its drop-path."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        out: Tensor = value + self.extractor(x)
        return out


class BesideAlone(Beside):
    """A Beside that acts only in passes over one token type and skips fused passes, as released."""

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        fused = len({kind for kind, _ in current_pass().segments}) > 1
        return value if fused else super().forward(x, value)


class FeedForwardEnhancer(nn.Module):
    """AE(z) = W2 LN(gelu(W1 z + b1)) + b2, as released; (…, width) -> (…, width); it does not start at 0."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(width, ffn), nn.LayerNorm(ffn), nn.Linear(ffn, width)
        for linear in (self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02, a=-0.02, b=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.norm(F.gelu(self.fc1(z))))
        return out


class CoreEnhancer(nn.Module):
    """AE(z) = U gelu(C gelu(D z)) with biases, starts at 0; both modalities share `core` C, each has its D and U."""

    def __init__(self, width: int, core: nn.Linear) -> None:
        super().__init__()
        self.down, self.core, self.up = nn.Linear(width, core.in_features), core, nn.Linear(core.out_features, width)
        start_at_zero(self.up)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.up(F.gelu(self.core(F.gelu(self.down(z)))))
        return out


class Enhanced(nn.Module):
    """o = z + drop(AE(z)), after a layer; `drop` is the layer's own drop-path."""

    def __init__(self, enhancer: nn.Module, drop: nn.Module) -> None:
        super().__init__()
        self.enhancer, self.drop = enhancer, drop

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = z + self.drop(self.enhancer(z))
        return out


class MultiWayAdapterConfig(StackedConfig):
    """Sizes and composition; the defaults are the released code's flags with both parts switched on."""

    extractors: Literal["both", "text", "image", "none"] = Field(
        "both", description="token types that have a knowledge extractor (the authors' code swaps the two names)"
    )
    reduction: int | None = Field(
        None, gt=0, description="m = width // reduction in extractors; null: width // 12, from 8 to the authors' 64"
    )
    bottleneck: int | None = Field(None, gt=0, description="extractors: m itself, instead of a reduction")
    scale: PositiveFloat | Literal["learned"] = Field(
        0.1, description="s; 0.1 is the code's default, its README has 0.6, an older script 1; learned: starts at 1"
    )
    norm: Literal["none", "in", "out"] = Field(
        "none", description="a norm before the extractor's down-projection, or after its scale; the script has none"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="on the extractor's hidden values, in training; as released")
    enhancer: Literal["ffn", "bottleneck", "shared_core", "none"] = Field(
        "ffn",
        description="alignment enhancer: ffn (as released, as large as the layer's own FFN), bottleneck (the paper's "
        "2-3 %), shared_core (for towers of unequal width), none",
    )
    enhancer_bottleneck: int | None = Field(
        None,
        gt=0,
        description="r of bottleneck (null: width // 4, at most 192) and shared_core (null: the narrower tower's width "
        "// 4, at most 64); ffn has the layer's own width",
    )
    decoder_enhancer: bool = Field(False, description="also an enhancer in decoders, which have no second modality")
    pairing: Literal["spread", "last"] = Field(
        "spread",
        description="which layers of unequally deep towers share an enhancer: layer j of the shallower with layer "
        "(j + 1) ratio - 1 of the deeper (spread), or with the deeper tower's last layers (last)",
    )
    released_fused: bool = Field(
        False, description="passes over both token types skip extractors, as the released code silently does"
    )
    train_heads: bool = Field(
        True,
        description="train the retrieval heads of beit3 and clip, as with every other method, and as the code does if "
        "the checkpoint has none; false: freeze them, as the code does if the checkpoint has them (ITC)",
    )
    train_norms: bool = Field(False, description="also train norms of the adapted stacks")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.reduction is not None and self.bottleneck is not None:
            raise ValueError("reduction and bottleneck both set the size of an extractor: give one")
        if self.extractors == self.enhancer == "none":
            raise ValueError("extractors and enhancer are both none: set at least one of them")
        if self.enhancer_bottleneck is not None and self.enhancer in ("ffn", "none"):
            raise ValueError(f"enhancer {self.enhancer} has no bottleneck: leave enhancer_bottleneck out")
        if self.decoder_enhancer and self.enhancer == "none":
            raise ValueError("decoder_enhancer needs an enhancer, and enhancer is none: set another")
        return self

    def rank(self, width: int) -> int:
        """Return the extractors' rank m at this width."""
        if self.bottleneck is not None:
            return self.bottleneck
        if self.reduction is not None:
            return reduced(width, self.reduction)
        return min(max(SMALLEST, reduced(width, 12)), LARGEST)


class MultiWayAdapter(Method[MultiWayAdapterConfig]):
    """z = a + drop(ffn(a)) + NKE(a), then o = z + drop(AE(z)); one NKE per modality and layer, one AE for both.

    The New Knowledge Extractor NKE(a) = s (U relu(D a)) reads the stream that enters the feed-forward sub-layer, before
    its norm. Each token passes through the NKE of its type; a stack has NKEs only for the types it sees.
    The Alignment Enhancer follows the layer in stacks that see both modalities (`encoder`, `fusion`). A vision and a
    text tower share one AE for each pair of layers. A vision tower that feeds an encoder has none, a decoder only if
    `decoder_enhancer` is set. The layer's drop-path, if any, applies to the AE and not to the NKE.

    Paper and code differ. The abstract's 2-3 % of parameters fit only `bottleneck`, AE(z) = U gelu(D z) with U = 0 at
    the start; the released AE, which is the default, is a whole feed-forward network (27 % of BEiT-3 base) and does not
    start at 0. The code silently skips the NKE in a pass over both modalities; here it runs, except in `released`. The
    code swaps the names of the two modalities; ours name the tokens they act on. Its rates decay by 0.65 per layer
    downwards, for new modules too, most of which hardly move; ours have one rate.

    Additions of ours: `shared_core`, AE(z) = U gelu(C gelu(D z)) with only C shared, for towers of unequal width (CLIP,
    TransVG), which `ffn` and `bottleneck` refuse; and m = width // 12, from 8 to the authors' 64.
    """

    Config = MultiWayAdapterConfig
    about = About(
        paper="Long et al., ICASSP 2024",
        trains="bottlenecks beside FFN, one a modality; an FFN behind the layer for both",
        verified="authors' modules, layers and model: outputs and gradients; counts",
        home="beit3:base-224",
        task="retrieval",
    )
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ffn": {},
        "released": {"released_fused": True, "train_heads": False},
        "nke": {"enhancer": "none"},
        "bottleneck": {"enhancer": "bottleneck"},
        "shared_core": {"enhancer": "shared_core"},
    }
    # The README's command: peak 2e-4, floor 1e-6, 3 of 30 epochs of warm-up, no clipping.
    recipe: ClassVar[Mapping[str, Any]] = {
        "lr": 2e-4,
        "weight_decay": 0.05,
        "eps": 1e-8,
        "warmup": 0.1,
        "warmup_from_zero": True,
        "schedule": "cosine",
        "lr_floor": 5e-3,
        "clip_norm": None,
    }
    # Language models with visual tokens have the rate of their own adapter papers, and the same floor of 1e-6.
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {"lr": 1e-3, "lr_floor": 1e-3},
        "vl_bart": {"lr": 1e-3, "lr_floor": 1e-3},
        "vl_t5": {"lr": 1e-3, "lr_floor": 1e-3},
    }
    size_option = SizeOption("reduction", (48, 24, 12, 6, 3))

    def __init__(self, config: MultiWayAdapterConfig | None = None) -> None:
        super().__init__(config)
        self.identity = self.config.enhancer != "ffn"
        names = [f"*.{part}.{kind}.*" for part in ("extractor", "enhancer") for kind in ("text", "image")]
        self.conditional = dict.fromkeys(names, "not every task reads tokens of every type")
        if self.config.released_fused:
            self.conditional["*.extractor.*"] = "idle in passes over both modalities, as released"

    def host_options(self, family: str) -> dict[str, Any]:
        own_heads = family in ("beit3", "clip")
        return {"heads": "frozen"} if own_heads and not self.config.train_heads else {}

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.freeze()
        chosen = self.stacks(backbone)
        stacks = {role: backbone.stack(role) for role in backbone.roles() if backbone.stack(role) in chosen}
        for role, stack in stacks.items():
            self._extract(stack, KINDS.get(role, BOTH))
            if self.config.train_norms:
                train(*stack.norms())
        if self.config.enhancer != "none":
            groups = list(self._groups(stacks))
            if not groups:
                raise ValueError(
                    "an alignment enhancer needs a stack that sees both modalities, or one of vision and one of text, "
                    f"and there is only {', '.join(stacks)}: set enhancer to none"
                )
            for group in groups:
                self._enhance(group)
        if next(inserted(backbone), None) is None:
            raise ValueError(f"no {self.config.extractors} tokens pass through {', '.join(stacks)}: nothing to insert")
        return backbone

    def _extract(self, stack: Stack, kinds: tuple[int, ...]) -> None:
        for layer in stack:
            for name, sublayer in layer.items():
                if name.endswith("ffn"):
                    self._insert(sublayer, kinds)

    def _insert(self, sublayer: SubLayer, kinds: tuple[int, ...]) -> None:
        wanted = {"both": BOTH, "text": (TEXT,), "image": (IMAGE,), "none": ()}[self.config.extractors]
        extractors = {kind: self._extractor(sublayer.width) for kind in kinds if kind in wanted}
        if not extractors:
            return
        if len(kinds) == 1:
            module: nn.Module = Beside(extractors[kinds[0]])
        else:
            routed = Routed(text=extractors.get(TEXT, Nothing()), image=extractors.get(IMAGE, Nothing()))
            module = BesideAlone(routed) if self.config.released_fused else Beside(routed)
        sublayer.insert("branch", place(module, sublayer))

    def _extractor(self, width: int) -> KnowledgeExtractor:
        c = self.config
        return KnowledgeExtractor(width, c.rank(width), scale=c.scale, norm=c.norm, dropout=c.dropout)

    def _groups(self, stacks: Mapping[str, Stack]) -> Iterator[list[Site]]:
        """Yield each group of layers that share one enhancer."""
        for role, stack in stacks.items():
            kinds: tuple[int, ...] = KINDS.get(role, BOTH)
            if kinds == BOTH or (role == "decoder" and self.config.decoder_enhancer):
                yield from ([(layer, kinds)] for layer in stack)
        if "vision" in stacks and "text" in stacks:
            for vision, text in self._pairs(list(stacks["vision"]), list(stacks["text"])):
                yield [(vision, (IMAGE,)), (text, (TEXT,))]

    def _pairs(self, vision: list[Layer], text: list[Layer]) -> Iterator[tuple[Layer, Layer]]:
        """Yield as many pairs as the shallower tower has layers; further layers of the deeper have no partner."""
        count = min(len(vision), len(text))
        for j in range(count):
            yield self._partner(vision, j, count), self._partner(text, j, count)

    def _partner(self, layers: list[Layer], j: int, count: int) -> Layer:
        """Return the layer of pair j of `count`; every layer of the shallower tower has a pair."""
        if self.config.pairing == "last":
            return layers[len(layers) - count + j]
        return layers[(j + 1) * len(layers) // count - 1]

    def _enhance(self, group: list[Site]) -> None:
        enhancers = self._cored(group) if self.config.enhancer == "shared_core" else self._one(group)
        for (layer, _), enhancer in zip(group, enhancers, strict=True):
            ffn = layer["ffn"]
            # Drop-path drops whole branches (stochastic depth); dropout of single values is not part of the method.
            drop = nn.Identity() if isinstance(ffn.drop, nn.Dropout) else ffn.drop
            layer.tail.append(Enhanced(place(enhancer, ffn), drop))

    def _one(self, group: list[Site]) -> list[nn.Module]:
        """Return the same module for all layers of the group."""
        kind, widths = self.config.enhancer, {layer["ffn"].width for layer, _ in group}
        if len(widths) > 1:
            towers = " and ".join(str(layer["ffn"].width) for layer, _ in group)
            raise ValueError(
                f"one enhancer '{kind}' serves both towers, which are {towers} wide: take shared_core as the enhancer"
            )
        layer, width = group[0][0], widths.pop()
        if kind == "ffn":
            ffn = layer["ffn"].projections["in"].singles()[0].out_features
            return [FeedForwardEnhancer(width, ffn)] * len(group)
        rank = self.config.enhancer_bottleneck or min(192, reduced(width, 4))
        enhancer = Bottleneck(width, rank, F.gelu)
        start_at_zero(enhancer.up)
        return [enhancer] * len(group)

    def _cored(self, group: list[Site]) -> list[nn.Module]:
        """Return one module per layer of the group; all share one core."""
        width = min(layer["ffn"].width for layer, _ in group)
        rank = self.config.enhancer_bottleneck or min(64, reduced(width, 4))
        core = nn.Linear(rank, rank)
        made: list[nn.Module] = []
        for layer, kinds in group:
            each = [CoreEnhancer(layer["ffn"].width, core) for _ in kinds]
            made.append(each[0] if len(each) == 1 else Routed(text=each[0], image=each[1]))
        return made
