"""M2IST (Liu et al., arXiv 2407.01131, 2024): side adapters for two frozen encoders that share their up-projections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from petlbench.api.backbone import Backbone
from petlbench.api.method import About, Method, MethodConfig, SizeOption, place
from petlbench.api.sites import Stack
from petlbench.backbones.parts.encoder_decoder import encodes_and_decodes

from ..layers import REC_RECIPE, draw_like_bart, reduced, start_at_zero
from .ladder import Crossing, Ladder
from .side import Kind, Pairing, Side, SideSizes, SideStack, paired_layers

ROLES: dict[str, tuple[Kind, ...]] = {  # kinds of tokens by stack, for all stacks that can be paired
    "vision": ("image",),
    "text": ("text",),
    "encoder": ("text", "image"),
    "decoder": ("text",),
}
HOME = "transvg"
VIDEO_REDUCTION = 12  # of the released code's two adapters for video, 768 -> 64 -> 768


class M2ISTConfig(MethodConfig):
    """Sizes, places, and the differences between the release and its correction."""

    variant: Literal["released", "clean"] | None = Field(
        None, description="the authors' code (transvg only), or without its faults; null: released there, else clean"
    )
    pairing: Pairing = Field("first", description="which layers of deeper stacks form pairs; released: the first")
    pairs: int | None = Field(
        None, gt=0, description="P, number of pairs; null: the depth of the shallowest stack (paper: 6)"
    )
    reduction: int = Field(6, gt=0, description="r = the widest stack's width // reduction; paper: 768 / 6 = 128")
    rank: int | None = Field(None, gt=0, description="r itself, in place of the reduction")
    shared: int | None = Field(
        None, gt=0, description="c_s, width of the shared part; null: a third of the widest (paper: 256 of 768)"
    )
    scale: float = Field(0.1, description="constant factor of the adapters at the FFN; paper: 0.1")
    start: Literal["embedding", "gated", "zero"] | None = Field(
        None,
        description="s^0: the embeddings (as released), the embeddings times a learned number that starts at 0, or "
        "zero; null: embedding if released, zero on dual encoders, else gated",
    )
    text_norms: bool | None = Field(
        None, description="terms of a post-norm text tower pass through its frozen norms; null: only if released"
    )
    below: Literal["train", "freeze"] | None = Field(
        None,
        description="host parts below the encoder of an encoder-decoder (a visual projection): train, through s^0 "
        "alone, which changes the frozen layers' input; or freeze, with no side on a stack below; null: freeze "
        "pre-trained ones",
    )
    generation: Literal["strict", "relaxed"] = Field(
        "strict",
        description="on encoder-decoders: a side ladder over the frozen decoder (strict); or the frozen decoder reads "
        "the adapted encoder output, and the gradient runs through it (relaxed)",
    )
    crossings: int = Field(1, gt=0, description="number of side cross-attentions of width r in the strict ladder")
    tokens: Literal["all", "pooled"] = Field(
        "all", description="tokens of a dual encoder that have side features; pooled is enough for retrieval"
    )


class M2IST(Method[M2ISTConfig]):
    """Side adapters that read attention and FFN of frozen layers in P pairs and never feed them (M3ISA blocks).

    With taps A (attention) and F (FFN) of the k-th paired layer of stack m, taken without gradient:

        IEA = [U_m u] + [S u] joined, u = relu(D_m A + b)      S (c_s, r) is one matrix for all layers of the pair
        VEA, LEA = scale (U relu(D LN(F) + b) + b')            scale 0.1
        s^k = s^(k-1) + IEA + VEA or LEA,  s^0 = f^0           y = N(f^L + s^P), N the final norm of pre-norm stacks

    Paper and `released` code (on `transvg` with its own `released`) pair 6 DETR layers with BERT's first 6. The
    released code also does things that the paper does not say. Paired layers apply BERT's attention residual and norm
    twice; token types are missing; the language tap lies after norm and residual, the visual one before; only language
    terms pass through BERT's frozen norms, which cancels their scale; dropout stays on in the frozen encoders; biases
    of visual adapters start in U(0, 1), so training does not start from the pre-trained model; 210,562 parameters train
    but nothing reads them (`unused`: a second norm in each adapter, two adapters for video).

    `clean` corrects all of that: it has token types, frozen layers in evaluation mode (dropout between a host's modules
    stays, except in the strict ladder), up-projections of zero and a gated s^0, so that training starts at the
    pre-trained function. Its terms pass through no norm, since a norm has no useful derivative at zero.

    Other backbones follow the same idea, without code of the authors. Single-stream encoders take the token type as the
    modality. Modules that train below a stack feed s^0 alone; pre-trained ones there stay frozen. Encoder-decoders
    generate by a ladder over the frozen decoder with a small cross-attention to LN(f^0 + terms) of the encoder's side
    (`strict`), or from the adapted encoder output (`relaxed`). Dual encoders add to every token, or only to the
    `pooled` one, from s^0 = 0. A CoCa's decoder stays frozen, and the gradient runs through it. Gradients pass through
    frozen norms and output heads as functions of the side's sum.
    """

    Config = M2ISTConfig
    about = About(
        paper="M2IST (Liu et al., arXiv 2407.01131, 2024)",
        trains="adapters beside the frozen encoders",
        verified="authors' code: layers and a whole model with gradients, counts, bytes",
        home="transvg",
        task="rec",
    )
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": {"variant": "released"},
        "clean": {"variant": "clean"},
        "strict": {},
        "relaxed": {"generation": "relaxed"},
        "pooled": {"tokens": "pooled"},
        "last": {"pairing": "last"},
        "spread": {"pairing": "spread"},
    }
    recipe: ClassVar[Mapping[str, Any]] = {"lr": 1e-3}
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {HOME: {**REC_RECIPE, "eps": 1e-8, "batch_size": 64}}
    conditional: Mapping[str, str] = {
        "*.side.rungs.*.text.*": "beside words: no gradient from heads that read image tokens alone",
        "*stacks.decoder.side.*": "beside a decoder: no gradient where nothing is decoded",
        "*.crossings.*": "beside a decoder: no gradient where nothing is decoded",
        "*.side.gate": "in the adapted output of an encoder: no gradient where a decoder's side reads it alone",
    }
    size_option = SizeOption("reduction", (48, 24, 12, 6, 3))

    def __init__(self, config: M2ISTConfig | None = None) -> None:
        super().__init__(config)
        relaxed = self.config.generation == "relaxed"
        self._claim(self.config.variant == "released", self.config.start, traversed=relaxed)

    def _claim(self, released: bool, start: str | None, *, traversed: bool) -> None:
        """Set the method's claims; `adapt` sets them again, since some depend on the backbone."""
        self.identity = not released and start != "embedding" and not self.config.text_norms
        self.no_backbone_gradient = not traversed
        self.unused_parameters = (
            {"*.side.unused.*": "the released code instantiates it and reads it nowhere"} if released else {}
        )

    def host_options(self, family: str) -> dict[str, Any]:
        return {"released": self.config.variant != "clean"} if family == HOME else {}

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.freeze()
        plan = self._plan(backbone)
        if self._freezes_below(backbone):
            backbone.requires_grad_(False)
        shared = [nn.Linear(plan.rank, plan.shared) for _ in range(plan.pairs)]
        sides = {
            role: Side(stack.width, ROLES[role], shared, self._sizes(role, plan)) for role, stack in plan.stacks.items()
        }
        _draw(sides, shared, plan.released)
        if plan.released:
            _add_unused(sides, plan)
        else:
            _quieten(backbone)
        for role, stack in plan.stacks.items():
            backbone.stacks[role] = self._beside(role, stack, sides[role], plan)
        self._claim(plan.released, plan.start, traversed="decoder" in backbone.roles() and not plan.strict)
        if not plan.strict:
            return backbone
        assert encodes_and_decodes(backbone)
        encoder, decoder = plan.stacks["encoder"], plan.stacks["decoder"]
        crossings = [Crossing(decoder.width, encoder.width, plan.rank) for _ in range(self.config.crossings)]
        for crossing in crossings:
            place(crossing, decoder)
        return Ladder(backbone, crossings)

    def _plan(self, backbone: Backbone) -> Plan:
        """Return the sizes for this backbone. Raises ValueError, with the reason, if they do not fit."""
        c, pretrained = self.config, backbone.pretrained_roles()
        strict = backbone.stacked_decoder and c.generation == "strict"
        roles = [role for role in ROLES if role in pretrained and (role != "decoder" or strict)]
        if self._freezes_below(backbone):
            roles = [role for role in roles if role != "vision"]  # through frozen parts no gradient reaches it
        if {kind for role in roles for kind in ROLES[role]} != {"text", "image"}:
            raise ValueError("it pairs layers of an image and a text encoder, or of one for both: there are none")
        stacks = {role: backbone.stack(role) for role in roles}
        widths = [stack.width for stack in stacks.values()]
        shallowest = min(stacks, key=lambda role: len(stacks[role].layers))
        depth = len(stacks[shallowest].layers)
        if (c.pairs or 0) > depth:
            raise ValueError(f"pairs {c.pairs} exceeds the {depth} layers of its stack '{shallowest}'")
        if (c.shared or 0) > min(widths):
            raise ValueError(f"shared {c.shared} exceeds the width {min(widths)} of its narrowest stack")
        released, dual = self._released(stacks), "fuse" not in backbone.abilities
        if c.tokens == "pooled" and not (dual and backbone.pooled_mark):
            raise ValueError("tokens: pooled needs a dual encoder that compares one token of each tower")
        if c.text_norms and not _post_norm_text(stacks):
            raise ValueError("text_norms needs a backbone with a post-norm text tower")
        return Plan(
            stacks=stacks,
            released=released,
            strict=strict,
            pairs=c.pairs or depth,
            rank=c.rank or reduced(max(widths), c.reduction),
            shared=c.shared or max(1, min(*widths, max(widths) // 3)),
            start=c.start or ("embedding" if released else "zero" if dual else "gated"),
        )

    def _freezes_below(self, backbone: Backbone) -> bool:
        asked = "freeze" if self.config.below is None and backbone.pretrained_hosts else self.config.below
        return backbone.stacked_decoder and asked == "freeze"

    def _released(self, stacks: dict[str, Stack]) -> bool:
        """Return whether BERT is the authors' (its norm applies twice). Raises ValueError if the variant differs."""
        text = stacks.get("text")
        twice = text is not None and any(layer["attention"].norm_twice for layer in text)
        if self.config.variant == "released" and not twice:
            raise ValueError("variant released needs the authors' model, which is only transvg with released: true")
        if self.config.variant == "clean" and twice:
            raise ValueError("variant clean needs transvg with released: false")
        return twice

    def _sizes(self, role: str, plan: Plan) -> SideSizes:
        c, tower = self.config, role == "text" and _post_norm_text(plan.stacks)
        norms = tower and (plan.released if c.text_norms is None else c.text_norms)
        return SideSizes(plan.rank, c.scale, plan.start, "normed" if tower else "output", norms)

    def _beside(self, role: str, stack: Stack, side: Side, plan: Plan) -> SideStack:
        layers = paired_layers(self.config.pairing, plan.pairs, len(stack.layers))
        place(side, stack)
        pooled, asleep = self.config.tokens == "pooled", not plan.released
        return SideStack(stack, side, layers, asleep=asleep, pooled=pooled)


@dataclass(frozen=True)
class Plan:
    """The sizes that a configuration gives on one backbone."""

    stacks: dict[str, Stack]
    released: bool
    strict: bool
    pairs: int
    rank: int
    shared: int
    start: str


def _post_norm_text(stacks: dict[str, Stack]) -> bool:
    return "text" in stacks and not next(iter(stacks["text"]))["attention"].pre_norm


def _draw(sides: dict[str, Side], shared: Sequence[nn.Linear], released: bool) -> None:
    """Set up-projections to zero; or draw as the released code: visual weights Xavier-uniform with biases from U(0, 1),
    all others, the shared ones too, N(0, 0.02^2) with biases 0."""
    for module in shared:
        draw_like_bart(module) if released else start_at_zero(module)
    for role, side in sides.items():
        for adapters in side.adapters():
            downs, ups = adapters.linears()
            if not released:
                start_at_zero(*ups)
                for linear in downs:
                    nn.init.zeros_(linear.bias)
                continue
            for linear in (*downs, *ups):
                if role == "text":
                    draw_like_bart(linear)
                else:
                    nn.init.xavier_uniform_(linear.weight)
                    nn.init.uniform_(linear.bias)


def _add_unused(sides: dict[str, Side], plan: Plan) -> None:
    """Add the modules that the released code trains and never reads, since its published count includes them."""
    for role, side in sides.items():
        width = plan.stacks[role].width
        side.unused.extend(nn.LayerNorm(width) for _ in range(plan.pairs))
    width = plan.stacks["text"].width
    sides["text"].unused.extend(VideoAdapter(width) for _ in range(2))


class VideoAdapter(nn.Module):
    """Two linear layers and a factor, part of the released code's default configuration."""

    def __init__(self, width: int) -> None:
        super().__init__()
        rank = reduced(width, VIDEO_REDUCTION)
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        self.factor = nn.Parameter(torch.ones(1))


def _quieten(backbone: Backbone) -> None:
    """Remove dropout from frozen modules outside stacks, such as BERT's embeddings."""
    for name, part in backbone.named_children():
        if name == "stacks" or any(p.requires_grad for p in part.parameters()):
            continue
        for module in part.modules():
            for key, child in module.named_children():
                if isinstance(child, nn.Dropout):
                    setattr(module, key, nn.Identity())
