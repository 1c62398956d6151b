"""The base class of backbones: stacks with sites, and the operations that tasks use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

from PIL.Image import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from petlbench.api.codec import Codec
from petlbench.api.sites import Stack
from petlbench.api.snapshot import inserted
from petlbench.api.tokens import Images, Placement, Texts, Tokens
from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean


class BackboneConfig(BaseModel):
    """Options of a backbone family; they include its dimensions, so every size is a configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=BackboneConfig)
_ENCODING = Lock()  # the libraries' tokenizers keep state between calls, and several workers may call at once
Initialisation = Literal["bart", "t5"]
SUPPLIED = frozenset({"fuse", "decode", "pair"})  # abilities that the suite's trained parts can add to any backbone


class Backbone(nn.Module, ABC, Generic[C]):
    """A vision-language model, described by its stacks; a task names the `abilities` that it needs.

    Abilities: `embed` (an image or a text alone, to be compared), `fuse` (a joint pass over both), `ground` (image
    tokens know their place), `decode` (text from states), `pair` (a joint pass over a text and two images that
    distinguishes the first from the second). The suite adds abilities in SUPPLIED that a family lacks, unless
    `refusals` gives a reason against it.
    """

    Config: ClassVar[type[BackboneConfig]] = BackboneConfig
    config: C
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # options by size, for `family:size`
    abilities: frozenset[str]
    refusals: ClassVar[Mapping[str, str]] = {}  # missing ability that cannot be supplied: the reason
    note: str = ""  # a caveat for readers of results on it
    width: int  # of image tokens and of fused states
    codec: Codec  # text to token ids and back
    max_text: int  # longest text in tokens
    fused_attention: bool = True  # its attention calls torch's fused kernels if the recipe allows it
    trains_heads: bool = True  # its own heads train with every method
    # Traits by which some methods choose. A family declares them; nothing guesses them from its modules.
    initialisation: Initialisation = "bart"  # of inserted modules: N(0, 0.02^2) and 0; t5: as torch does
    norm_bias: bool = True  # its norms are layer norms, with a bias besides the gain
    pooled_mark: bool = False  # in each tower alone, a marked token stands for the whole image or text
    stacked_decoder: bool = False  # its decoder attends to an encoder and can be re-entered (`EncoderDecoder`)
    pretrained_hosts: bool = False  # its host parts have pre-trained values, as a visual projection rarely has

    def __init__(self) -> None:
        super().__init__()
        self.stacks: nn.ModuleDict = nn.ModuleDict()
        # The heads published with the family, by task; tasks that share a head are joined with +.
        self.own_heads: nn.ModuleDict = nn.ModuleDict()

    @classmethod
    def options_of(cls, size: str) -> Mapping[str, Any]:
        """Return the options of `family:size`. Raises UserError if the size does not exist."""
        if not size:
            return {}
        if size not in cls.sizes:
            hint = did_you_mean(size, cls.sizes) or f": there are {', '.join(cls.sizes) or 'none'}"
            raise UserError(f"{cls.__name__} has no size '{size}'{hint}")
        return cls.sizes[size]

    @classmethod
    def configured(cls, name: str, options: Mapping[str, Any]) -> C:
        """Return the configuration of `name` (`family` or `family:size`) with further options."""
        return cast(C, cls.Config(**{**cls.options_of(name.partition(":")[2]), **options}))

    @classmethod
    def abilities_of(cls, config: C) -> frozenset[str]:
        """Return the abilities of a backbone with this configuration."""
        return cls.abilities

    @classmethod
    def files(cls, config: C) -> list[Path]:
        """Return the files that a backbone of this configuration reads (weights, tokenizer).

        Results depend on their content. The suite calls this before anything runs; missing published files are fetched.
        Raises UserError if a file does not exist or cannot be fetched.
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
        """The id with which decoding starts."""
        return self.codec.start_id

    @property
    def text_width(self) -> int:
        """The width of text tokens before any fusion."""
        return self.width

    def roles(self) -> tuple[str, ...]:
        return tuple(self.stacks)

    def stack(self, role: str) -> Stack:
        stack = self.stacks[role]
        assert isinstance(stack, Stack)
        return stack

    def freeze(self) -> None:
        """Freeze all parameters except host parts, which every method trains (such as a visual projection).

        Raises ValueError if a method was applied before, because this would freeze the modules that it inserted.
        """
        if any(p.requires_grad for module in inserted(self) for p in module.parameters()):
            raise ValueError("another method is in this backbone already, and this one would freeze it: apply one")
        hosts = self.host_parameters()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in hosts)

    def unfreeze(self) -> None:
        """Let all parameters train except the fixed ones."""
        fixed = self.fixed_parameters()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in fixed)

    def pretrained_roles(self) -> tuple[str, ...]:
        """Return the stacks that a method can adapt: all except those that every method trains whole, from scratch."""
        hosts = self.host_parameters()
        whole = {
            role
            for role in self.roles()
            if hosts.issuperset(f"stacks.{role}.{name}" for name, _ in self.stack(role).named_parameters())
        }
        return tuple(role for role in self.roles() if role not in whole)

    def own_head(self, task: str) -> nn.Module | None:
        """Return the head published with the family for this task, or None."""
        return next((head for tasks, head in self.own_heads.items() if task in tasks.split("+")), None)

    def pretrained_head(self, task: str) -> dict[str, Tensor]:
        """Return pre-trained values for the task's head; empty if the backbone has none."""
        return {}

    def word_table(self) -> Tensor:
        """Return the token embeddings (V, text_width); a supplied decoder reads and predicts words with them."""
        raise NotImplementedError(f"{type(self).__name__} has no token embeddings for a supplied decoder")

    @abstractmethod
    def host_parameters(self) -> set[str]:
        """Return the names of the parameters that every method trains."""

    def fixed_parameters(self) -> set[str]:
        """Return the names of the parameters that no method trains, not even full fine-tuning."""
        return set()

    def undecayed_parameters(self) -> set[str]:
        """Return the names of parameters without weight decay, besides all one-dimensional ones."""
        return set()

    def head_parameters(self) -> set[str]:
        """Return the names of supplied parameters, which count as the task's head."""
        return set()

    @abstractmethod
    def images(self, images: Sequence[Image]) -> Images:
        """Return a batch of images, prepared with the backbone's own preprocessing."""

    def images_placed(self, images: Sequence[Image], placements: Sequence[Placement]) -> Images:
        """Return the batch with each image sized and placed on its canvas by its entry in `placements`.

        A backbone without a larger canvas ignores `placements`.
        """
        return self.images(images)

    def texts(self, texts: Sequence[str], max_length: int) -> Texts:
        """Return token ids with special tokens, truncated to `max_length`, padded to the longest."""
        with _ENCODING:
            return Texts(*self.codec.encode(texts, min(max_length, self.max_text)))

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, without special tokens."""
        return self.codec.decode(ids)

    @abstractmethod
    def embed_image(self, images: Images, *, task: str | None = None) -> Tokens:
        """Return image tokens at `width`: before the fusing stack, or, in a dual encoder, after its tower.

        Modules in a tower can read `task` from the pass, as in `fuse`.
        """

    def embed_pair(self, images: Images, *, task: str | None = None) -> tuple[Tokens, Tokens]:
        """Return image tokens, as from `embed_image`, of two images per sample, with the first and second marked apart.

        `images` holds 2B: all first images, then the second ones in the same order. Equal rows of the two results are
        one sample, and `fuse` takes them as two parts. A family that can `pair` overrides this; the suite supplies the
        order to others. A wrapper calls the backbone inside, as `Wrapper` does; two calls of `embed_image` would give
        every image the place of the first.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot distinguish two images")

    @abstractmethod
    def embed_text(self, texts: Texts, *, task: str | None = None) -> Tokens:
        """Return text tokens at `text_width`: before the fusing stack, or, in a dual encoder, after its tower."""

    @abstractmethod
    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        """Run one joint pass over the parts (text first); one part alone takes the unimodal pass that retrieval pools.

        A dual encoder returns a single part unchanged.
        """

    def new_cache(self) -> Any:
        """Return an empty decoding cache. Only for backbones that can `decode`."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")

    def reorder_cache(self, cache: Any, index: Tensor) -> Any:
        """Return the cache with the batch rows at `index` (B',)."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")

    def decode(self, memory: Tokens, ids: Tensor, cache: Any = None, *, task: str) -> tuple[Tensor, Any]:
        """Return logits (B, T, V) for `ids` (B, T), which follow the ids in the cache, and the cache (or None)."""
        raise NotImplementedError(f"{type(self).__name__} does not decode")
