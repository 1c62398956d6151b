"""Ladder side-tuning, LST (Sung, Cho, Bansal, NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.backbone import Backbone
from petlbench.api.method import About, Method, MethodConfig, SizeOption, place
from petlbench.api.sites import TEXT, Layer, Pass, Site, Stack, Taps
from petlbench.api.tokens import Texts, Tokens, decoding_pass, join
from petlbench.api.wrapper import Wrapper
from petlbench.backbones.parts.encoder_decoder import EncoderDecoder, encodes_and_decodes
from petlbench.backbones.parts.masks import HIDDEN, causal
from petlbench.backbones.weights.tensors import asset, read_tensors

from ..layers import draw_like_bart
from .network import LSTSideStack, SideCache, divided, frozen_states
from .pruning import ROLES, layer_parts, left, parts, pruned


class LSTConfig(MethodConfig):
    """Size and initialisation of the side network; the defaults are the authors' on CLIP-T5."""

    reduction: int = Field(
        4, gt=0, description="s: widths of side states, heads and FFN are the host's / s, which must divide them"
    )
    layers: dict[str, tuple[NonNegativeInt, ...]] = Field(
        {}, description="by stack: the layers (from 0) that have a side layer; a stack not named here has them all"
    )
    init: Literal["pruned", "random"] | None = Field(
        None,
        description="side layers start from pruned weights of the host, or random; null: pruned beside "
        "encoder-decoders",
    )
    importance: str = Field(
        "weights",
        description="pruning keeps the largest: `weights`, or a safetensors file of sums made by `pruning.fisher`",
    )
    pruning_steps: int = Field(1, gt=0, description="number of pruning steps: 1 as the authors' v2, 10 as their v5")

    @field_validator("layers")
    @classmethod
    def _some(cls, layers: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        if empty := [role for role, kept in layers.items() if not kept or len(set(kept)) < len(kept)]:
            raise ValueError(f"layers of '{empty[0]}' must be one or more, each once")
        return layers


class SideNetwork(nn.Module):
    """Two side stacks beside an encoder and a decoder, and the W_up that all their outputs pass through."""

    is_side_module = True

    def __init__(self, host: EncoderDecoder, config: LSTConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = (
            LSTSideStack(host.stack(role), role, config.reduction, config.layers.get(role), bias=True) for role in ROLES
        )
        self.up = nn.Linear(self.decoder.width, host.width)


@dataclass(frozen=True, kw_only=True)
class LadderMemory(Tokens):
    """A decoder's memory: side states (B, N, r) and the frozen encoder's text. `states` are for heads."""

    side: Tensor
    text: Tokens

    def rows(self, index: Tensor) -> Self:
        return replace(super().rows(index), text=self.text.rows(index))


@dataclass
class TwoCaches:
    """The frozen decoder's cache and the side decoder's."""

    frozen: Any
    side: SideCache


class SideTuned(Wrapper):
    """An encoder-decoder with a side network, whose result replaces the backbone's own.

    The frozen encoder sees only text; images reach only the side. An image without a text gets an empty text.
    """

    inner: EncoderDecoder

    def __init__(self, inner: EncoderDecoder, side: SideNetwork) -> None:
        super().__init__(inner)
        self.side = side

    def fuse(self, *parts: Tokens, task: str) -> LadderMemory:
        kinds = [part.segments[0][0] for part in parts]
        added = [] if TEXT in kinds else [self._empty(parts[0], task)]
        texts = [part for part, kind in zip(parts, kinds, strict=True) if kind == TEXT]
        text, tokens = join(added or texts), join([*added, *parts])
        states, final = self._frozen(text, task)
        bias = self.side.encoder.relative
        context = tokens.context(task=task, bias=bias.joint(tokens) if bias else self.inner.encoder_bias(tokens))
        side = self.side.encoder(self._dropped(tokens.states), states, context, text_only=True)
        side = self.inner.leave(side)[:, sum(part.mask.shape[1] for part in added) :]
        given = join(parts)
        frozen = replace(text, states=final)
        mask, types, positions, segments = given.mask, given.types, given.positions, given.segments
        return LadderMemory(self.side.up(side), mask, types, positions, segments, side=side, text=frozen)

    def _empty(self, like: Tokens, task: str) -> Tokens:
        """Embed the empty text (its special tokens) for each row of `like`."""
        texts = self.inner.texts([""], self.inner.max_text).to(like.states.device)
        rows = len(like.states)
        return self.inner.embed_text(Texts(texts.ids.expand(rows, -1), texts.mask.expand(rows, -1)), task=task)

    def _frozen(self, text: Tokens, task: str) -> tuple[list[Tensor], Tensor]:
        """Run the frozen encoder without gradient; return the states after each layer, and its output."""
        stack = self.inner.stack("encoder")
        with torch.no_grad():
            context = text.context(task=task, bias=self.inner.encoder_bias(text))
            states = frozen_states(stack, self._dropped(text.states), context)
            final, _ = stack.run(states[-1], context, start=len(stack.layers))
            return states, self.inner.leave(final)

    def _dropped(self, states: Tensor) -> Tensor:
        """Apply dropout to a stack's input; backbone and side each draw their own mask."""
        return F.dropout(states, self.inner.dropout, self.training)

    def new_cache(self) -> TwoCaches:
        return TwoCaches(self.inner.new_cache(), SideCache())

    def reorder_cache(self, cache: TwoCaches, index: Tensor) -> TwoCaches:
        return TwoCaches(self.inner.reorder_cache(cache.frozen, index), cache.side.reordered(index))

    def decode(self, memory: Tokens, ids: Tensor, cache: Any = None, *, task: str) -> tuple[Tensor, Any]:
        assert isinstance(memory, LadderMemory)
        host = self.inner
        step = 0 if cache is None else int(cache.frozen.get_seq_length())
        with torch.no_grad():
            bias = host.decoder_bias(ids, step, memory.states.dtype)
            entering = host.embed_decoder(ids, step)
            context = self._decoding(memory.text, ids, bias, task, step, None if cache is None else cache.frozen)
            states = frozen_states(host.stack("decoder"), entering, context)
            if self.training:
                entering = host.embed_decoder(ids, step)  # draws another dropout mask
        if self.side.decoder.relative is not None:
            bias = self._relative_bias(ids, step)
        across = replace(memory, states=memory.side)
        context = self._decoding(across, ids, bias, task, step, None if cache is None else cache.side)
        side = host.leave(self.side.decoder(entering, states, context))
        return host.logits(self.side.up(side)), cache

    def _decoding(self, memory: Tokens, ids: Tensor, bias: Tensor | None, task: str, step: int, cache: Any) -> Pass:
        across = self.inner.memory_bias(memory)
        return decoding_pass(ids, memory, task=task, step=step, cache=cache, bias=bias, memory_bias=across)

    def _relative_bias(self, ids: Tensor, step: int) -> Tensor:
        assert self.side.decoder.relative is not None
        bias: Tensor = self.side.decoder.relative(ids.shape[1], step + ids.shape[1], step)
        hidden = causal(ids, step, bias.dtype)
        return bias if hidden is None else bias + hidden.clamp_min(HIDDEN)


class LadderStack(Stack):
    """The frozen layers of a stack with a side stack along them; W_up of the side's result replaces the stack's."""

    def __init__(self, host: Stack, side: LSTSideStack, up: nn.Linear) -> None:
        around = {"embedding_norm": host.embedding_norm, "final_norm": host.final_norm}
        super().__init__(list(host), width=host.width, **around)
        self.side, self.up = side, up

    def run(
        self, x: Tensor, context: Pass, *, start: int = 0, stop: int | None = None, taps: Iterable[Site] = ()
    ) -> tuple[Tensor, Taps]:
        if start or stop not in (None, len(self.layers)) or tuple(taps):
            raise ValueError("a stack with a side network runs as a whole, without taps")
        states = frozen_states(self, x.detach(), context)
        return self.climb(x, states, context), {}

    def climb(self, entering: Tensor, states: Sequence[Tensor], context: Pass) -> Tensor:
        """Map E_0 to E_L (B, N, d) of the frozen layers to this stack's output (B, N, d)."""
        climbed: Tensor = self.up(self.side(entering, states, replace(context, positions=None)))
        return climbed


class LST(Method[LSTConfig]):
    """A side network of thin copies of the host's layers reads its frozen states, and alone gives the result:

        side_0 = D_in drop(E_0);   side = block_l(mu_l side + (1 - mu_l) D_l E_l), mu_l = sigma(alpha_l / 0.1);
        the result is W_up side

    Beside an encoder-decoder (the authors' CLIP-T5) the frozen encoder sees only text. The side encoder sees text and
    image; image rows get no ladder. The side decoder attends to the side encoder, the frozen one to the frozen one.
    The side has a final norm where the host has one; the head is the host's. D_in, D_l, W_up start as torch draws
    linear layers, alpha at 0, side layers from the host's pruned weights (`pruning`). No gradient enters the backbone.
    Beside any other stack (the authors' CLIP-ViL, one stream of post-norm layers) all tokens have ladders; D_in, D_l
    and W_up have no bias; all weights start N(0, 0.02^2).

    Paper and code: gates of layers without a side layer never act, but count (`layers`). The authors' optimizer decays
    gates and gains; by default ours does not. They prune by Fisher information of the text-only backbone, 1024 samples
    ("fisher-v2"); here the weights themselves are the importance ("t5-v2") unless a file of sums is given, since
    samples depend on the data. As in the code, `random` draws T5's side layers with the big layers' deviations.

    What differs here: a lone image (captioning, an image of retrieval) gets an empty text, where the authors have the
    prompt; the output leaves out its rows. The encoder's output for heads goes through the decoder's W_up. Where the
    authors have no code: BART's side layers are BART's; other stacks that end with a norm have one on the side instead,
    before W_up, since a gradient through the frozen norm would keep its activations; thin copies of multiway layers
    have one branch for both modalities and no inner norms; DETR's get only the positions in the states; gates above the
    last side layer do not train.
    """

    Config = LSTConfig
    about = About(
        paper="LST (Sung et al., NeurIPS 2022)",
        trains="a side network: thin layers, ladders, gates, an up-projection",
        verified="authors' code: whole tiny T5 with gradients, a BERT stack, Fisher sums and pruning, counts",
        home="vl_t5",
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {"pruned": {}, "random": {"init": "random"}}
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "vl_t5": {"lr": 3e-3, "weight_decay": 0.03, "released": True},
        "beit3": {"lr": 5e-4, "warmup": 0.05},
    }
    size_option = SizeOption("reduction", (8, 4, 2))
    no_backbone_gradient = True
    conditional: Mapping[str, str] = {
        "*side.decoder.*": "beside a decoder, which not every task runs",
        "*stacks.text.*": "beside a tower of words, which not every task runs",
    }

    def __init__(self, config: LSTConfig | None = None) -> None:
        super().__init__(config)
        self.unused_parameters = {
            f"*{role}*gates.{index}": "its layer has no side layer; the authors' code counts the gate"
            for role, kept in self.config.layers.items()
            for index in set(range(max(kept))) - set(kept)
        }

    def adapt(self, backbone: Backbone) -> Backbone:
        roles = ROLES if backbone.stacked_decoder else backbone.pretrained_roles()
        if unknown := set(self.config.layers) - set(roles):
            raise ValueError(f"no side network goes along a stack '{min(unknown)}' here, but along {', '.join(roles)}")
        if encodes_and_decodes(backbone):
            return self._beside_language(backbone)
        if "decoder" in backbone.roles():
            raise ValueError("its decoder attends through a frozen pooling, which a gradient would have to pass")
        if self.config.init == "pruned":
            raise ValueError("pruning starts from the words of an encoder-decoder; set init to random, or to null")
        backbone.freeze()
        for role in roles:
            backbone.stacks[role] = self._ladder(backbone.stack(role), role)
        return backbone

    def _ladder(self, host: Stack, role: str) -> LadderStack:
        with _creation_device(host):
            side = LSTSideStack(host, role, self.config.reduction, self.config.layers.get(role), bias=False)
            up = nn.Linear(side.width, host.width, bias=False)
            for module in (side, up):
                draw_like_bart(module)
        for module in (side, up):
            place(module, host)
        return LadderStack(host, side, up)

    def _beside_language(self, host: EncoderDecoder) -> Backbone:
        host.freeze()
        with _creation_device(host):
            side = SideNetwork(host, self.config)
            if self.config.init == "random":
                _draw(side, host)
        place(side, host.stack("encoder"))
        if self.config.init != "random":
            self._prune(side, host)
        return SideTuned(host, side)

    def _prune(self, side: SideNetwork, host: EncoderDecoder) -> None:
        """Copy the host's pruned weights into the side layers; on the meta device, only check that the sizes fit."""
        reduction, steps = self.config.reduction, self.config.pruning_steps
        values = {name: p.detach() for name, p in parts(host).items()}
        sizes = {size for name, value in values.items() if name.endswith(".weight") for size in value.shape}
        for size in sizes:
            if (kept := left(size, reduction, steps)) != divided(size, reduction, "width"):
                raise ValueError(f"pruning_steps {steps} leave {kept} of {size} rows, not {size // reduction}: set 1")
        path = None if self.config.importance == "weights" else asset(self.config.importance)
        if any(value.is_meta for value in values.values()):
            return
        importance = values if path is None else read_tensors(path)
        if missing := values.keys() - importance.keys():
            raise ValueError(f"importance {self.config.importance} has no {min(missing)}: make it with `fisher`")
        thin = pruned(values, {name: importance[name].to(values[name].device) for name in values}, reduction, steps)
        with torch.no_grad():
            for name, parameter in side_parts(side).items():
                parameter.copy_(thin[name])


def side_parts(side: SideNetwork) -> dict[str, nn.Parameter]:
    """Return the side parameters that come pruned or copied from the host, by the host's names in `parts`."""
    named: dict[str, nn.Parameter] = {}
    for role, stack in zip(ROLES, (side.encoder, side.decoder), strict=True):
        for index, layer in zip(stack.kept, stack.layers.values(), strict=True):
            assert isinstance(layer, Layer)
            named |= layer_parts(layer, f"{role}.{index}")
        if stack.final_norm is not None:
            named |= {f"{role}.final.norm.{name}": p for name, p in stack.final_norm.named_parameters()}
        if stack.relative is not None:
            named |= {f"{role}.relative": p for p in stack.relative.parameters()}
    return named


def _creation_device(host: nn.Module) -> AbstractContextManager[Any]:
    """Return the context that creates a side network: the meta device's for a meta host, else the default device's.

    The default device is the CPU, so that values are the same on every device.
    """
    return torch.device("meta") if next(host.parameters()).is_meta else nullcontext()


def _draw(side: SideNetwork, host: EncoderDecoder) -> None:
    """Draw the side layers as BART or T5 draws its own; T5's standard deviations are those of the big layers."""
    named, theirs = side_parts(side), parts(host)
    if host.initialisation != "t5":
        for stack in (side.encoder, side.decoder):
            draw_like_bart(stack.layers)
        return
    for name, parameter in named.items():
        fan_in = theirs[name].shape[-1] if parameter.ndim > 1 else 0
        if name.endswith(".relative"):
            nn.init.normal_(parameter, std=host.width**-0.5)
        elif name.endswith(".q.weight"):
            heads = theirs[name.split(".")[0] + ".relative"].shape[1]
            nn.init.normal_(parameter, std=(fan_in * theirs[name].shape[0] / heads) ** -0.5)
        elif fan_in:
            nn.init.normal_(parameter, std=fan_in**-0.5)
