"""A backbone around another one: it forwards to the inner one all that it does not override."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image
from torch import Tensor, nn

from petlbench.api.backbone import Backbone, BackboneConfig, Initialisation
from petlbench.api.codec import Codec
from petlbench.api.sites import Stack
from petlbench.api.tokens import Images, Placement, Texts, Tokens


class _OfInner:
    """An attribute that reads from the inner backbone, unless the wrapper sets its own."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, wrapper: Wrapper | None, owner: type) -> Any:
        return self if wrapper is None else getattr(wrapper.inner, self.name)


def _of_inner() -> Any:
    return _OfInner()


class Wrapper(Backbone[BackboneConfig]):
    """A backbone that forwards everything to `inner`, whose parameters get the prefix `inner.` here.

    It has its own `freeze` and `unfreeze`, because they also apply to parameters that a subclass adds. It has no other
    stacks and heads than those of `inner`, so that each keeps one name.
    """

    abilities: frozenset[str] = _of_inner()
    note: str = _of_inner()
    width: int = _of_inner()
    codec: Codec = _of_inner()
    max_text: int = _of_inner()
    trains_heads: bool = _of_inner()
    pretrained_hosts: bool = _of_inner()
    initialisation: Initialisation = _of_inner()
    norm_bias: bool = _of_inner()
    fused_attention: bool = _of_inner()
    pooled_mark: bool = _of_inner()
    stacked_decoder: bool = _of_inner()
    config: BackboneConfig = _of_inner()
    stacks: nn.ModuleDict = _of_inner()
    own_heads: nn.ModuleDict = _of_inner()

    def __init__(self, inner: Backbone) -> None:
        nn.Module.__init__(self)  # Backbone's own would make stacks and heads
        self.inner = inner

    @property
    def pad_id(self) -> int:
        return self.inner.pad_id

    @property
    def eos_id(self) -> int:
        return self.inner.eos_id

    @property
    def start_id(self) -> int:
        return self.inner.start_id

    @property
    def text_width(self) -> int:
        return self.inner.text_width

    def roles(self) -> tuple[str, ...]:
        return self.inner.roles()

    def stack(self, role: str) -> Stack:
        return self.inner.stack(role)

    def pretrained_roles(self) -> tuple[str, ...]:
        return self.inner.pretrained_roles()

    def own_head(self, task: str) -> nn.Module | None:
        return self.inner.own_head(task)

    def pretrained_head(self, task: str) -> dict[str, Tensor]:
        return self.inner.pretrained_head(task)

    def word_table(self) -> Tensor:
        return self.inner.word_table()

    def host_parameters(self) -> set[str]:
        return {f"inner.{name}" for name in self.inner.host_parameters()}

    def fixed_parameters(self) -> set[str]:
        return {f"inner.{name}" for name in self.inner.fixed_parameters()}

    def undecayed_parameters(self) -> set[str]:
        return {f"inner.{name}" for name in self.inner.undecayed_parameters()}

    def head_parameters(self) -> set[str]:
        return {f"inner.{name}" for name in self.inner.head_parameters()}

    def images(self, images: Sequence[Image]) -> Images:
        return self.inner.images(images)

    def images_placed(self, images: Sequence[Image], placements: Sequence[Placement]) -> Images:
        return self.inner.images_placed(images, placements)

    def texts(self, texts: Sequence[str], max_length: int) -> Texts:
        return self.inner.texts(texts, max_length)

    def text_of(self, ids: Sequence[int]) -> str:
        return self.inner.text_of(ids)

    def embed_image(self, images: Images, *, task: str | None = None) -> Tokens:
        return self.inner.embed_image(images, task=task)

    def embed_pair(self, images: Images, *, task: str | None = None) -> tuple[Tokens, Tokens]:
        return self.inner.embed_pair(images, task=task)

    def embed_text(self, texts: Texts, *, task: str | None = None) -> Tokens:
        return self.inner.embed_text(texts, task=task)

    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        return self.inner.fuse(*parts, task=task)

    def new_cache(self) -> Any:
        return self.inner.new_cache()

    def reorder_cache(self, cache: Any, index: Tensor) -> Any:
        return self.inner.reorder_cache(cache, index)

    def decode(self, memory: Tokens, ids: Tensor, cache: Any = None, *, task: str) -> tuple[Tensor, Any]:
        return self.inner.decode(memory, ids, cache, task=task)
