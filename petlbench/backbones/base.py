"""What a backbone is: stacks with sites, and what a task may ask of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Self

import torch
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from petlbench.backbones.grids import Placement
from petlbench.backbones.sites import TEXT, Pass, Segments, Stack, inserted, mean_of_real
from petlbench.backbones.text import Codec
from petlbench.errors import UserError
from petlbench.registry import did_you_mean


@dataclass(frozen=True)
class Tokens:
    """States (B, N, d) with mask (B, N) (True: real), types (B, N) and, for image tokens, grid positions (B, N, 2).

    Positions are token centres as (x, y) in units of the backbone's image side; zero for text. `segments` says the
    types once more, as runs that all rows share. `mark` (B,) is the index of the token that stands for all, if any.
    """

    states: Tensor
    mask: Tensor
    types: Tensor
    positions: Tensor
    segments: Segments = ()
    mark: Tensor | None = None

    def of_type(self, kind: int) -> Tokens:
        """Only the real tokens of one type stay unmasked; heads select by this, never by position."""
        return replace(self, mask=self.mask & (self.types == kind))

    def mean(self) -> Tensor:
        """(B, d): the mean over real tokens."""
        return mean_of_real(self.states, self.mask)

    def rows(self, index: Tensor) -> Self:
        """Of every tensor the rows at `index` (B',), whatever a subclass adds."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        picked: dict[str, Any] = {name: value[index] for name, value in tensors.items()}
        return replace(self, **picked)

    def context(self, **more: Any) -> Pass:
        """A pass over these tokens; `more` are its other fields."""
        return Pass(types=self.types, mask=self.mask, segments=self.segments, **more)

    def pooled(self) -> Tensor:
        """(B, d): the marked token, or the mean over real tokens where none is marked."""
        if self.mark is None:
            return self.mean()
        return self.states[torch.arange(len(self.states), device=self.states.device), self.mark]


def plain_tokens(states: Tensor, mask: Tensor, kind: int, **more: Any) -> Tokens:
    """Tokens of one type; without a place, unless `positions` are given."""
    types = torch.full_like(mask, kind, dtype=torch.long)
    positions = more.pop("positions", None)
    positions = states.new_zeros(*mask.shape, 2) if positions is None else positions
    return Tokens(states, mask, types, positions, ((kind, mask.shape[1]),), **more)


def decoding_pass(ids: Tensor, memory: Tokens, **more: Any) -> Pass:
    """A pass over decoded `ids` (B, T), which look at `memory` too; `more` are its other fields."""
    types, segments = torch.full_like(ids, TEXT), ((TEXT, ids.shape[1]),)
    return Pass(types=types, segments=segments, memory=memory.states, memory_mask=memory.mask, **more)


def join(parts: Sequence[Tokens]) -> Tokens:
    """One sequence of all parts, in their order; marks are dropped."""
    states, mask, types, positions = (
        torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("states", "mask", "types", "positions")
    )
    return Tokens(states, mask, types, positions, tuple(segment for part in parts for segment in part.segments))


def halves(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """Tokens of 2B images -> those of the first and of the second images, B rows each."""
    rows = torch.arange(len(tokens.states), device=tokens.states.device)
    first, second = rows.chunk(2)
    return tokens.rows(first), tokens.rows(second)


@dataclass(frozen=True)
class Images:
    """Pixels (B, 3, H, W) on a padded canvas, the mask (B, H, W) of real ones, and where each image lies.

    A point (x, y) in pixels of the stored image, times `scale` (B, 2) plus `offset` (B, 2), is a point in units of the
    backbone's image side. `features` stands for the pixels where a backbone has computed them before.
    """

    pixels: Tensor
    mask: Tensor
    scale: Tensor
    offset: Tensor
    features: Tensor | None = None

    def to(self, device: torch.device) -> Images:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Images:
        return self._each(lambda tensor: tensor.pin_memory())

    def to_dtype(self, dtype: torch.dtype) -> Images:
        """Real numbers in another precision."""
        return self._each(lambda tensor: tensor if tensor.dtype == torch.bool else tensor.to(dtype))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Images:
        return replace(self, **{name: change(tensor) for name, tensor in vars(self).items() if tensor is not None})

    def place(self, boxes: Tensor) -> Tensor:
        """(B, 4) cx, cy, w, h in pixels of the stored images -> the same in units of the backbone's image side."""
        centre, size = boxes.split(2, dim=-1)
        return torch.cat([centre * self.scale + self.offset, size * self.scale], dim=-1)

    def unplace(self, boxes: Tensor) -> Tensor:
        """The inverse of `place`."""
        centre, size = boxes.split(2, dim=-1)
        return torch.cat([(centre - self.offset) / self.scale, size / self.scale], dim=-1)


@dataclass(frozen=True)
class Texts:
    """Token ids (B, N), padded, and their mask (True: real)."""

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Texts:
        return Texts(self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True))

    def pinned(self) -> Texts:
        return Texts(self.ids.pin_memory(), self.mask.pin_memory())


class BackboneConfig(BaseModel):
    """Options of a backbone family; its sizes are here, so every size is a configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_ENCODING = Lock()  # the libraries' tokenizers keep what they are asked for, and workers may ask at the same time
LENT = frozenset({"fuse", "decode", "pair"})  # abilities that trained parts can lend to any backbone, see `lent.py`


class Backbone(nn.Module, ABC):
    """A vision-language model described once, by its stacks; a task asks for what it needs of `abilities`.

    Abilities: `embed` (an image or a text alone, to be compared), `fuse` (a joint pass over both), `ground` (image
    tokens know their place), `decode` (text from states), `pair` (a joint pass over a text and two images, with the
    first told from the second). What of LENT a family lacks is lent to it; `refusals` says why the rest cannot be.
    """

    Config: ClassVar[type[BackboneConfig]] = BackboneConfig
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # `family:size`: the options that it stands for
    abilities: frozenset[str]
    refusals: ClassVar[Mapping[str, str]] = {}  # an ability that is not there and cannot be lent: the reason
    note: str = ""  # what a reader of any result on it must know
    width: int  # of image tokens and of fused states
    codec: Codec  # text to token ids and back
    max_text: int  # longest text in tokens
    fused_attention: bool = True  # its attention calls torch's fused kernels where the recipe lets it
    trains_heads: bool = True  # its own heads train with every method
    pretrained_hosts: bool = False  # its host parts come with pre-trained values, as a visual projection rarely does

    def __init__(self) -> None:
        super().__init__()
        self.stacks: nn.ModuleDict = nn.ModuleDict()
        # The heads that the family was published with, by task; by tasks joined with + where several share one.
        self.own_heads: nn.ModuleDict = nn.ModuleDict()

    @classmethod
    def options_of(cls, size: str) -> Mapping[str, Any]:
        """The options that `family:size` stands for. Raises UserError for a size that does not exist."""
        if not size:
            return {}
        if size not in cls.sizes:
            hint = did_you_mean(size, cls.sizes) or f": there are {', '.join(cls.sizes) or 'none'}"
            raise UserError(f"{cls.__name__} has no size '{size}'{hint}")
        return cls.sizes[size]

    @classmethod
    def configured(cls, name: str, options: Mapping[str, Any]) -> Any:
        """The configuration that `name` (`family` or `family:size`) and further options make."""
        return cls.Config(**{**cls.options_of(name.partition(":")[2]), **options})

    @classmethod
    def abilities_of(cls, config: Any) -> frozenset[str]:
        """The abilities of a backbone of this configuration."""
        return cls.abilities

    @classmethod
    def files(cls, config: Any) -> list[Path]:
        """The files that a backbone of this configuration reads (weights, tokenizer): results depend on their content.

        Asked before anything runs: published ones are fetched where they are not here. Raises UserError for one that
        does not exist, or cannot be fetched.
        """
        return []

    @property
    def pad_id(self) -> int:
        return self.codec.pad_id

    @property
    def eos_id(self) -> int:
        return self.codec.eos_id

    @property
    def start_id(self) -> int:
        """What decoding starts from."""
        return self.codec.start_id

    @property
    def text_width(self) -> int:
        """Of text tokens before any fusion."""
        return self.width

    def roles(self) -> tuple[str, ...]:
        return tuple(self.stacks)

    def stack(self, role: str) -> Stack:
        stack = self.stacks[role]
        assert isinstance(stack, Stack)
        return stack

    def freeze(self) -> None:
        """Nothing trains but the host parts that every method trains (a visual projection, say).

        Raises ValueError where a method has been applied before, for this would freeze what it inserted.
        """
        if any(p.requires_grad for module in inserted(self) for p in module.parameters()):
            raise ValueError("another method is in this backbone already, and this one would freeze it: apply one")
        hosts = self.host_parameters()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in hosts)

    def unfreeze(self) -> None:
        """Everything trains but the fixed parts."""
        fixed = self.fixed_parameters()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in fixed)

    def pretrained_roles(self) -> tuple[str, ...]:
        """The stacks that a method can adapt: all but those that every method trains whole, from scratch."""
        hosts = self.host_parameters()
        whole = {
            role
            for role in self.roles()
            if hosts.issuperset(f"stacks.{role}.{name}" for name, _ in self.stack(role).named_parameters())
        }
        return tuple(role for role in self.roles() if role not in whole)

    def own_head(self, task: str) -> nn.Module | None:
        """The head that the family was published with for this task."""
        return next((head for tasks, head in self.own_heads.items() if task in tasks.split("+")), None)

    def pretrained_head(self, task: str) -> dict[str, Tensor]:
        """The values of the task's head that this backbone was pre-trained with; empty where it has none."""
        return {}

    def word_table(self) -> Tensor:
        """(V, text_width): the backbone's token embeddings, which a lent decoder reads and predicts words with."""
        raise NotImplementedError(f"{type(self).__name__} has no words to lend a decoder")

    @abstractmethod
    def host_parameters(self) -> set[str]:
        """Names of the parameters that every method trains."""

    def fixed_parameters(self) -> set[str]:
        """Names of the parameters that no method trains, full fine-tuning included."""
        return set()

    def undecayed_parameters(self) -> set[str]:
        """Names of the parameters that weight decay spares, besides all one-dimensional ones."""
        return set()

    def head_parameters(self) -> set[str]:
        """Names of the parameters that were lent for a task, and count as its head."""
        return set()

    @abstractmethod
    def images(self, images: Sequence[Image]) -> Images:
        """The backbone's own preprocessing, batched."""

    def images_placed(self, images: Sequence[Image], placements: Sequence[Placement]) -> Images:
        """The same, with sizes and places on the canvas as `placements` say, one for each image.

        A backbone that does not lay images on a larger canvas sizes and places them as ever.
        """
        return self.images(images)

    def texts(self, texts: Sequence[str], max_length: int) -> Texts:
        """Tokenised with special tokens, truncated to `max_length`, padded to the longest."""
        with _ENCODING:
            return Texts(*self.codec.encode(texts, min(max_length, self.max_text)))

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens dropped."""
        return self.codec.decode(ids)

    @abstractmethod
    def embed_image(self, images: Images, *, task: str | None = None) -> Tokens:
        """Image tokens at `width`: of the fusing stack, before it; of a dual encoder, all through its tower.

        `task` is what modules in a tower may ask of the pass, as in `fuse`.
        """

    def embed_pair(self, images: Images, *, task: str | None = None) -> tuple[Tokens, Tokens]:
        """Image tokens, as `embed_image` gives them, of two images per sample, the first told from the second.

        `images`: 2B, first images, then second ones in the same order; a row of both results is one sample, and `fuse`
        takes them as two parts. A family that can `pair` says here how; any other is lent its order in `lent.py`. A
        wrapper asks the backbone inside, as `Extended` does: it never makes a pair of two `embed_image`, which would
        give every image the place of the first.
        """
        raise NotImplementedError(f"{type(self).__name__} does not tell two images apart")

    @abstractmethod
    def embed_text(self, texts: Texts, *, task: str | None = None) -> Tokens:
        """Text tokens at `text_width`: of the fusing stack, before it; of a dual encoder, all through its tower."""

    @abstractmethod
    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        """One joint pass over the parts (text first); with one part, the unimodal pass that retrieval pools.

        A dual encoder gives a single part back as it is.
        """

    def new_cache(self) -> Any:
        """An empty decoding cache. Only for backbones that can `decode`."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")

    def reorder_cache(self, cache: Any, index: Tensor) -> Any:
        """The cache with its batch rows picked by `index` (B',)."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")

    def decode(self, memory: Tokens, ids: Tensor, cache: Any = None, *, task: str) -> tuple[Tensor, Any]:
        """Logits (B, T, V) for `ids` (B, T), which follow what is in the cache, and the cache (None without one)."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")
