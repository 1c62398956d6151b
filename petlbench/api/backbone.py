"""What a backbone is: stacks with sites, and what a task may ask of them."""

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
    """Options of a backbone family; its sizes are here, so every size is a configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=BackboneConfig)
_ENCODING = Lock()  # the libraries' tokenizers keep what they are asked for, and workers may ask at the same time
Initialisation = Literal["bart", "t5"]
SUPPLIED = frozenset({"fuse", "decode", "pair"})  # abilities that trained parts can lend to any backbone, see `lent.py`


class Backbone(nn.Module, ABC, Generic[C]):
    """A vision-language model described once, by its stacks; a task asks for what it needs of `abilities`.

    Abilities: `embed` (an image or a text alone, to be compared), `fuse` (a joint pass over both), `ground` (image
    tokens know their place), `decode` (text from states), `pair` (a joint pass over a text and two images, with the
    first told from the second). What of LENT a family lacks is lent to it; `refusals` says why the rest cannot be.
    """

    Config: ClassVar[type[BackboneConfig]] = BackboneConfig
    config: C
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # `family:size`: the options that it stands for
    abilities: frozenset[str]
    refusals: ClassVar[Mapping[str, str]] = {}  # an ability that is not there and cannot be lent: the reason
    note: str = ""  # what a reader of any result on it must know
    width: int  # of image tokens and of fused states
    codec: Codec  # text to token ids and back
    max_text: int  # longest text in tokens
    fused_attention: bool = True  # its attention calls torch's fused kernels where the recipe lets it
    trains_heads: bool = True  # its own heads train with every method
    # Traits: what some methods choose by. A family declares them, and nobody guesses them from its modules.
    initialisation: Initialisation = "bart"  # how authors draw what they insert: N(0, 0.02^2) and 0; t5: as torch does
    norm_bias: bool = True  # its norms are layer norms, with a bias besides the gain
    pooled_mark: bool = False  # in each tower alone, a marked token stands for the whole image or text
    stacked_decoder: bool = False  # its decoder attends to an encoder: it is an `EncoderDecoder`, to be re-entered
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
    def configured(cls, name: str, options: Mapping[str, Any]) -> C:
        """The configuration that `name` (`family` or `family:size`) and further options make."""
        return cast(C, cls.Config(**{**cls.options_of(name.partition(":")[2]), **options}))

    @classmethod
    def abilities_of(cls, config: C) -> frozenset[str]:
        """The abilities of a backbone of this configuration."""
        return cls.abilities

    @classmethod
    def files(cls, config: C) -> list[Path]:
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
        wrapper asks the backbone inside, as `Wrapper` does: it never makes a pair of two `embed_image`, which would
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
