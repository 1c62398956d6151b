"""What a backbone is: stacks with sites, and what a task may ask of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from petlbench.backbones.sites import Stack


@dataclass(frozen=True)
class Tokens:
    """States (B, N, d) with mask (B, N) (True: real), types (B, N) and, for image tokens, grid positions (B, N, 2).

    Positions are token centres as (x, y) in units of the backbone's image side; zero for text.
    """

    states: Tensor
    mask: Tensor
    types: Tensor
    positions: Tensor

    def of_type(self, kind: int) -> Tokens:
        """Only the real tokens of one type stay unmasked; heads select by this, never by position."""
        return replace(self, mask=self.mask & (self.types == kind))

    def mean(self) -> Tensor:
        """(B, d): the mean over real tokens."""
        weight = self.mask.unsqueeze(-1).to(self.states.dtype)
        return (self.states * weight).sum(1) / weight.sum(1).clamp_min(1)


@dataclass(frozen=True)
class Images:
    """Pixels (B, 3, H, W) on a padded canvas, the mask (B, H, W) of real ones, and each image's pixel scale.

    A box in pixels of the stored image times `scale` (B,) is a box in units of the backbone's image side.
    """

    pixels: Tensor
    mask: Tensor
    scale: Tensor

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.mask.to(device), self.scale.to(device))


@dataclass(frozen=True)
class Texts:
    """Token ids (B, N), padded, and their mask (True: real)."""

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Texts:
        return Texts(self.ids.to(device), self.mask.to(device))


class BackboneConfig(BaseModel):
    """Options of a backbone family; its sizes are here, so every size is a configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Backbone(nn.Module, ABC):
    """A vision-language model described once, by its stacks; a task asks for what it needs of `abilities`."""

    Config: ClassVar[type[BackboneConfig]] = BackboneConfig
    abilities: ClassVar[frozenset[str]]
    note: ClassVar[str] = ""  # what a reader of any result on it must know
    width: int
    pad_id: int
    eos_id: int
    start_id: int

    def __init__(self) -> None:
        super().__init__()
        self.stacks: nn.ModuleDict = nn.ModuleDict()

    @classmethod
    def files(cls, config: Any) -> list[Path]:
        """The files that a backbone of this configuration reads (weights, tokenizer): results depend on their content.

        Raises UserError for one that does not exist.
        """
        return []

    def roles(self) -> tuple[str, ...]:
        return tuple(self.stacks)

    def stack(self, role: str) -> Stack:
        stack = self.stacks[role]
        assert isinstance(stack, Stack)
        return stack

    def freeze(self) -> None:
        """Nothing trains but the host parts that every method trains (a visual projection, say)."""
        hosts = self.host_parameters()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in hosts)

    def pretrained_head(self, task: str) -> dict[str, Tensor]:
        """The task head this backbone was pre-trained with; empty where it has none."""
        return {}

    @abstractmethod
    def host_parameters(self) -> set[str]:
        """Names of the parameters that every method trains."""

    @abstractmethod
    def images(self, images: Sequence[Image]) -> Images:
        """The backbone's own preprocessing, batched."""

    @abstractmethod
    def texts(self, texts: Sequence[str], max_length: int) -> Texts:
        """Tokenised with special tokens, truncated to `max_length`, padded to the longest."""

    @abstractmethod
    def text_of(self, ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens dropped."""

    @abstractmethod
    def embed_image(self, images: Images) -> Tokens:
        """Image tokens at the width of the fusing stack."""

    @abstractmethod
    def embed_text(self, texts: Texts) -> Tokens:
        """Text tokens at the width of the fusing stack, before it."""

    @abstractmethod
    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        """One joint pass over the parts (text first); with one part, the unimodal pass that retrieval pools."""

    def new_cache(self) -> Any:
        """An empty decoding cache. Only for backbones that can `decode`."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")

    def reorder_cache(self, cache: Any, index: Tensor) -> Any:
        """The cache with its batch rows picked by `index` (B',)."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")

    def decode(self, memory: Tokens, ids: Tensor, cache: Any = None, *, task: str) -> tuple[Tensor, Any]:
        """Logits (B, T, V) for `ids` (B, T), which follow what is in the cache, and the cache (None without one)."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")
