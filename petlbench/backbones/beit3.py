"""`beit3`: one multiway transformer that embeds images, texts or both (Wang et al., CVPR 2023, arXiv 2208.10442).

MultiWay-Adapter was published on this model. An image or a text alone passes only through the modules of its own
modality, so retrieval works as in a dual encoder; in a fused pass attention is joint, and all other modules route by
token type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from PIL.Image import Image, Resampling
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.backbone import Backbone, BackboneConfig
from petlbench.api.codec import Codec
from petlbench.api.heads import Aligner
from petlbench.api.sites import IMAGE, TEXT
from petlbench.api.tokens import Images, Texts, Tokens, join, plain_tokens
from petlbench.backbones.beit3_weights import (
    HEADS,
    IMAGE_POSITIONS,
    UNUSED,
    own_layout,
    resized_positions,
    tokenizer_file,
    weights_file,
)
from petlbench.backbones.parts.grids import whole_and_cells
from petlbench.backbones.parts.masks import additive
from petlbench.backbones.parts.multiway import multiway_stack
from petlbench.backbones.weights.library_codec import file_codec
from petlbench.backbones.weights.sentencepiece_codec import SentencePieceCodec
from petlbench.backbones.weights.tensors import asset, load_into, on_meta, read_tensors
from petlbench.core.errors import UserError


class BEiT3Config(BackboneConfig):
    """Sizes; the defaults are those of the published base model at 224 pixels."""

    image_size: int = Field(224, gt=0, description="pixels of both sides of an image; the aspect ratio is not kept")
    patch: int = Field(16, gt=0, description="pixels of a patch's sides")
    width: int = Field(768, gt=0)
    layers: int = Field(12, gt=0)
    attention_heads: int = Field(12, gt=0)
    ffn: int = Field(3072, gt=0, description="width of the feed-forward networks")
    vocabulary: int = Field(64_010, gt=0, description="rows of the token table")
    text_positions: int = Field(1024, gt=UNUSED, description="rows of the text position table; two of them are unused")
    max_text: int = Field(64, gt=2, description="longest text in tokens, special tokens included")
    drop_path: float = Field(0.1, ge=0, lt=1, description="rate of the last layer; the published recipes use 0.2")
    heads: Literal["trained", "frozen"] = Field(
        "trained",
        description="whether retrieval heads and temperature train with every method; MultiWay-Adapter's release "
        "freezes those that a checkpoint holds",
    )
    tokenizer: str = Field(
        "pretrained",
        description="`pretrained` (beit3.spm), or the path of a SentencePiece model or a tokenizers JSON file",
    )
    weights: str = Field(
        "pretrained",
        description="`pretrained` (the published checkpoint of this width and depth), `none`, or the path of a "
        "safetensors or torch file that uses our names or the published ones",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch {self.patch}")
        if self.width % self.attention_heads:
            raise ValueError(f"width {self.width} is not a multiple of attention_heads {self.attention_heads}")
        if self.max_text > self.text_positions - UNUSED:
            raise ValueError(f"max_text {self.max_text} exceeds text_positions {self.text_positions} less {UNUSED}")
        return self


class ImageEmbedding(nn.Module):
    """Cut patches by a convolution, put CLS first, add learned positions. Only pre-training uses the mask token."""

    def __init__(self, side: int, patch: int, width: int) -> None:
        super().__init__()
        self.grid = side // patch
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Embedding(UNUSED + 1 + self.grid**2, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1 + grid^2, width), patches row by row."""
        patches = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(patches), -1, -1), patches], dim=1)
        return x + self.positions.weight[UNUSED:]


class TextEmbedding(nn.Module):
    """Embed tokens and add learned positions."""

    def __init__(self, vocabulary: int, positions: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, N) -> (B, N, width)."""
        return self.tokens(ids) + self.positions.weight[UNUSED : UNUSED + ids.shape[1]]


class RetrievalHeads(Aligner):
    """A projection without bias for the first token of each modality, and a temperature without a bound."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def of_image(self, tokens: Tokens) -> Tensor:
        return F.normalize(self.image(tokens.pooled()), dim=-1)

    def of_text(self, tokens: Tokens) -> Tensor:
        return F.normalize(self.text(tokens.pooled()), dim=-1)

    def scale(self) -> Tensor:
        return self.log_scale.exp()


class BEiT3(Backbone[BEiT3Config]):
    """One stack, `encoder`, for both modalities: it takes a text, an image, or both in one pass."""

    Config = BEiT3Config
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "base-224": {},
        "base-384": {"image_size": 384},
        "large-224": {"width": 1024, "layers": 24, "attention_heads": 16, "ffn": 4096},
        "large-384": {"width": 1024, "layers": 24, "attention_heads": 16, "ffn": 4096, "image_size": 384},
        "tiny": {
            "image_size": 32,
            "patch": 8,
            "width": 32,
            "layers": 2,
            "attention_heads": 2,
            "ffn": 64,
            "vocabulary": 210,
            "text_positions": 66,
            "tokenizer": "tiny/tokenizer.json",
            "weights": "none",
        },
    }
    abilities = frozenset({"embed", "fuse", "ground"})
    pooled_mark = True

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__()
        self.config = config
        c = config
        self.width, self.max_text, self.trains_heads = c.width, c.max_text, c.heads == "trained"
        self.codec = _codec(c)
        source = None if c.weights == "none" or on_meta() else weights_file(c.weights, c.width, c.layers)
        self.image_embedding = ImageEmbedding(c.image_size, c.patch, c.width)
        self.text_embedding = TextEmbedding(c.vocabulary, c.text_positions, c.width)
        self.stacks["encoder"] = multiway_stack(
            width=c.width, layers=c.layers, heads=c.attention_heads, ffn=c.ffn, drop_path=c.drop_path
        )
        self.own_heads["retrieval"] = RetrievalHeads(c.width).apply(_initialise)
        if source is None:
            self.stacks.apply(_initialise)
            nn.init.normal_(self.text_embedding.tokens.weight, std=c.width**-0.5)
        else:
            self._load(source)

    @classmethod
    def files(cls, config: BEiT3Config) -> list[Path]:
        weights = [] if config.weights == "none" else [weights_file(config.weights, config.width, config.layers)]
        return [*weights, tokenizer_file(config.tokenizer)]

    def _load(self, path: Path) -> None:
        """Load the backbone, and the retrieval heads if the file has them: a pre-training checkpoint has none."""
        tensors = own_layout(read_tensors(path), self.config.layers)
        table = tensors.get(IMAGE_POSITIONS)
        if table is not None:
            tensors[IMAGE_POSITIONS] = resized_positions(table, len(self.image_embedding.positions.weight))
        headless = not any(name.startswith(HEADS) for name in tensors)
        load_into(self, tensors, path.name, optional=(HEADS,) if headless else ())
        if headless and not self.trains_heads:
            raise UserError(f"weights {path.name} have no retrieval heads to freeze: set heads to trained")
        if headless:
            self.note = f"beit3's retrieval heads start untrained: {path.name} has none"

    def host_parameters(self) -> set[str]:
        return set()

    def undecayed_parameters(self) -> set[str]:
        return {"image_embedding.cls", IMAGE_POSITIONS}

    def word_table(self) -> Tensor:
        return self.text_embedding.tokens.weight

    def images(self, images: Sequence[Image]) -> Images:
        side = self.config.image_size
        resized = (image.convert("RGB").resize((side, side), Resampling.BICUBIC) for image in images)
        arrays = np.stack([np.asarray(image, dtype=np.float32) for image in resized])
        pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous() / 127.5 - 1
        scale = torch.tensor([[1 / image.width, 1 / image.height] for image in images])
        mask = torch.ones(len(images), side, side, dtype=torch.bool)
        return Images(pixels, mask, scale, torch.zeros_like(scale))

    def embed_image(self, images: Images, *, task: str | None = None) -> Tokens:
        """Return CLS, then patches; CLS is marked."""
        x = self.image_embedding(images.pixels)
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        side = self.image_embedding.grid
        centres = whole_and_cells(side, side, device=x.device).to(x.dtype).expand(len(x), -1, -1)
        return plain_tokens(x, mask, IMAGE, positions=centres, mark=_mark(x))

    def embed_text(self, texts: Texts, *, task: str | None = None) -> Tokens:
        """Return text tokens with padding set to zero, which is done only here; <s> is marked."""
        x = self.text_embedding(texts.ids) * texts.mask.unsqueeze(-1)
        return plain_tokens(x, texts.mask, TEXT, mark=_mark(x))

    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        """Run one pass over all parts; the CLS of the first image is marked, or <s> if there is no image."""
        tokens = join(parts)
        kinds = [kind for kind, _ in tokens.segments]
        context = tokens.context(
            task=task,
            bias=additive(tokens.mask, tokens.states.dtype) if TEXT in kinds else None,
        )
        states, _ = self.stack("encoder").run(tokens.states, context)
        return replace(tokens, states=states, mark=_first_mark(parts))


def _mark(x: Tensor) -> Tensor:
    """Return the mark (B,) of the first token in every row of x (B, N, d)."""
    return torch.zeros(len(x), dtype=torch.long, device=x.device)


def _first_mark(parts: Sequence[Tokens]) -> Tensor | None:
    """Return the position (B,) in the joined parts of the first image's mark, or else of the first text's mark."""
    starts = accumulate((part.mask.shape[1] for part in parts), initial=0)
    starts_and_parts = zip(starts, parts, strict=False)  # `starts` has one entry more: the end of the last part
    marked = [(start + part.mark, part.segments[0][0]) for start, part in starts_and_parts if part.mark is not None]
    return next((mark for mark, kind in marked if kind == IMAGE), marked[0][0] if marked else None)


def _initialise(module: nn.Module) -> None:
    """Initialise as BEiT-3: linear weights normal, cut off at one standard deviation; all else as torch does."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _codec(config: BEiT3Config) -> Codec:
    """Return the tokenizer. Raise UserError if it has more ids than the token table has rows."""
    name = config.tokenizer
    if name == "pretrained":
        codec: Codec = SentencePieceCodec(lambda: tokenizer_file(name))
    else:
        path = asset(name)
        codec = file_codec(path) if path.suffix == ".json" else SentencePieceCodec(lambda: path)
    if len(codec) > config.vocabulary:
        raise UserError(f"tokenizer '{name}' has {len(codec)} ids, vocabulary only {config.vocabulary} rows: raise it")
    return codec
