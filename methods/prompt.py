"""Prompt tuning (Lester et al., EMNLP 2021) with a bottleneck, as in VL-Adapter's repository."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from petlbench.api.backbone import Backbone
from petlbench.api.method import About, SizeOption, place
from petlbench.api.sites import TEXT
from petlbench.api.tokens import Tokens, plain_tokens
from petlbench.api.wrapper import Wrapper

from .layers import draw_like_bart
from .per_task import PerTask, Tasked, TaskedConfig


class PromptTokens(nn.Module):
    """P = W_2 tanh(W_1 E + b_1) + b_2 (length, width); E (length, width), W_1 (mid, width), W_2 (width, mid)."""

    is_side_module = True  # it is not inserted at a site

    def __init__(self, length: int, width: int, mid: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width))
        self.enter, self.leave = nn.Linear(width, mid), nn.Linear(mid, width)

    def forward(self) -> Tensor:
        tokens: Tensor = self.leave(torch.tanh(self.enter(self.embedding)))
        return tokens


@dataclass(frozen=True)
class AfterPrompts(Tokens):
    """Tokens, the first `prompts` of which are prompts: attention sees them, a mean over the input leaves them out."""

    prompts: int = 0

    def mean(self) -> Tensor:
        mask = self.mask.clone()
        mask[:, : self.prompts] = False
        return Tokens(self.states, mask, self.types, self.positions).mean()


class Prompted(Wrapper):
    """A backbone that puts prompt tokens before the text, or before a lone image, in every joint or unimodal pass."""

    def __init__(self, inner: Backbone, prompts: nn.Module) -> None:
        super().__init__(inner)
        self.prompts = prompts

    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        prompts = self.prompts.of(task) if isinstance(self.prompts, PerTask) else self.prompts
        states = prompts()
        norm = self.stack("encoder").embedding_norm
        if norm is not None:
            states = norm(states)
        states = states.expand(len(parts[0].states), -1, -1)
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        fused = self.inner.fuse(plain_tokens(states, mask, TEXT), *parts, task=task)
        return AfterPrompts(**vars(fused), prompts=states.shape[1])


class PromptConfig(TaskedConfig):
    """Sizes; the defaults are those of VL-Adapter's scripts."""

    length: int = Field(40, gt=0, description="prompt tokens")
    mid: int | None = Field(
        None, gt=0, description="width of the bottleneck that makes prompts; null: 25/24 of the width, 800 at 768"
    )
    sharing: Literal["single", "multiple"] = Field(
        "single", description="the same prompts for all tasks, or own prompts for each"
    )


class Prompt(Tasked[PromptConfig]):
    """Tokens P = W_2 tanh(W_1 E + b_1) + b_2 before the encoder's input; they and the host parts train, no norm does.

    Prompts are real tokens of type text: the mask includes them, the decoder's cross-attention sees them, BART's
    embedding norm applies to them, T5's relative distances count them as text; they have no positions. They also stand
    before a lone image or text, as in retrieval; a mark keeps its token, and a mean over tokens leaves prompts out (the
    authors have no such task). Linear layers and E take the host's generic initialisation: N(0, 0.02^2) and 0 on BART
    and elsewhere; on T5 torch's default, and N(0, 1) for E. The repository fixes the width at 768; no script uses its
    prompts for the decoder, and they are absent here. The rate on T5 is Ladder Side-Tuning's.
    """

    Config = PromptConfig
    about = About(
        paper="Lester et al., EMNLP 2021; VL-Adapter",
        trains="prompt tokens and the bottleneck that makes them",
        verified="authors' code: module, counts",
    )
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"single": {}, "multiple": {"sharing": "multiple"}}
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {"vl_t5": {"lr": 3e-3}}
    size_option = SizeOption("length", (1, 5, 10, 20, 40, 80))
    own = "*prompts.tasks.{task}.*"

    def shares_all(self) -> bool:
        return self.config.sharing == "single"

    def adapt(self, backbone: Backbone) -> Backbone:
        if "fusion" in backbone.roles():
            raise ValueError("its fusion encoder has a learned place for every token, and none for prompts")
        if "fuse" not in backbone.abilities or "encoder" not in backbone.roles():
            raise ValueError(
                "prompts stand before the tokens of an encoder, and it has two towers: a causal text tower like CLIP's "
                "has a learned place for every token, and none for prompts"
            )
        self.start(backbone)
        stack, t5 = backbone.stack("encoder"), backbone.initialisation == "t5"
        mid = self.config.mid or max(1, stack.width * 25 // 24)

        def tokens() -> nn.Module:
            made = PromptTokens(self.config.length, stack.width, mid)
            if not t5:
                nn.init.normal_(made.embedding, std=0.02)
                draw_like_bart(made)
            return made

        return Prompted(backbone, place(self.per_task(tokens, shared=self.shares_all()), stack))
