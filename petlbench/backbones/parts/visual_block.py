"""Image features as tokens after text, for `vl_bart` and `vl_t5` (VL-T5, Cho et al., ICML 2021; VL-Adapter)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from PIL.Image import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.backbone import BackboneConfig
from petlbench.api.sites import IMAGE
from petlbench.api.tokens import Images, Tokens, plain_tokens
from petlbench.backbones.parts.encoder_decoder import EncoderDecoder
from petlbench.backbones.parts.grid_features import GridFeatures
from petlbench.backbones.weights.library_models import (
    PUBLISHED,
    DeferredCodec,
    library_codec,
    model_files,
    tokenizer_files,
)
from petlbench.backbones.weights.tensors import asset, load_into, read_tensors

IMAGES = 2  # the largest number of images in one sample (NLVR2)
TINY: dict[str, Any] = {  # the test size of both families
    "cnn": "tiny",
    "image_size": 128,
    "fit": "squash",
    "cells": 3,
    "sentinels": 16,
    "width": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "heads": 4,
    "ffn": 128,
    "vocabulary": 210,
    "added_rows": 32,
    "tokenizer": "tiny/tokenizer.json",
    "weights": "none",
}


class GridTextConfig(BackboneConfig):
    """Options of both families; the defaults are the published values where both families have the same."""

    cnn: str = Field("RN101", description="the CLIP ResNet that computes grid features: an open_clip name, or `tiny`")
    image_size: int = Field(224, gt=0, description="pixels of an image's side")
    fit: Literal["crop", "squash"] = Field(
        "crop",
        description="crop: short side to `image_size`, then the centre; squash: both sides, which cuts off nothing",
    )
    features: Literal["live", "cached"] = Field(
        "live", description="run the CNN in every step, or once per image and store its features as float16"
    )
    cells: int = Field(6, gt=0, description="visual tokens along each side, pooled from the CNN's grid")
    sentinels: int = Field(
        100, ge=0, description="how many tokens <extra_id_N>, and as many <vis_extra_id_N>, the tokenizer has"
    )
    dropout: float = Field(
        0.1, ge=0, lt=1, description="rate for states, attention maps and inside feed-forward networks"
    )
    tokenizer: str | None = Field(
        None,
        description="a tokenizers file (in the package's assets or on disk), folder or hub name; null: the model's",
    )
    weights: str = Field(
        "pretrained", description="`pretrained` (CLIP and the language model), `none`, or a file of the whole backbone"
    )
    vision_weights: str | None = Field(
        None, description="for the CNN: `pretrained`, `none`, or a file in open_clip's layout; null: as `weights`"
    )
    language_weights: str | None = Field(
        None, description="for the language model: `pretrained`, `none`, a hub name or a folder; null: as `weights`"
    )

    language: str
    vocabulary: int
    added_rows: int

    def part(self, own: str | None) -> str:
        """Return the source of a part's weights: `own` if given; `none` if a file of the whole backbone holds them."""
        return own or (self.weights if self.weights in PUBLISHED else "none")

    def text_source(self) -> str:
        """Return the source of the language model's weights: `none`, a hub name or a folder."""
        source = self.part(self.language_weights)
        return self.language if source == "pretrained" else source

    def tokenizer_source(self) -> str:
        """Return the source of the tokenizer: as given, or the language model, even if its weights are `none`."""
        own = self.language_weights not in (None, *PUBLISHED)
        return self.tokenizer or (self.text_source() if own else self.language)

    def whole(self) -> Path | None:
        """Return the file of the whole backbone; None if `weights` names none."""
        return None if self.weights in PUBLISHED else asset(self.weights)


def pooled(grid: Tensor, cells: int) -> Tensor:
    """Map (…, G * G, C) to (…, cells * cells, C): maxima over windows, which overlap if `cells` does not divide G.

    Along each side, window i is floor(G i / cells) up to ceil(G (i + 1) / cells).
    """
    *batch, places, channels = grid.shape
    side = round(places**0.5)
    square = grid.reshape(-1, side, side, channels).permute(0, 3, 1, 2)
    return F.adaptive_max_pool2d(square, cells).flatten(2).mT.reshape(*batch, cells * cells, channels)


def centres(side: int, cells: int) -> Tensor:
    """Return the centres (cells * cells, 2), as (x, y), of the windows of `pooled`, in units of the image's side."""
    index = torch.arange(cells)
    start, stop = side * index // cells, -(-side * (index + 1) // cells)
    along = (start + stop) / (2 * side)
    y, x = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


class VisualBlock(nn.Module):
    """Token i of image m: Norm(W_f f_i + b_f) + Norm(W_b [x1, x2, y1, y2, area] + b_b) + E_img[m] + E_tok[V - 1 - i].

    f is the pooled grid, E_tok the language model's token table, whose last rows mark places. Every method trains this
    block, but not the table. `norm` builds a norm of the family.
    """

    def __init__(self, channels: int, width: int, cells: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.cells = cells
        self.feature, self.feature_norm = nn.Linear(channels, width), norm(width)
        self.box, self.box_norm = nn.Linear(5, width), norm(width)
        self.image = nn.Embedding(IMAGES, width)

    def forward(self, grids: Tensor, table: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Map grids (B, M, G * G, C) of M images per sample and the table (V, width) to (B, M * cells * cells, width).

        `boxes` (B, M, at least cells * cells, 4): x1, x2, y1, y2 in units of the image; None: all zero, since grid
        features have no boxes.
        """
        features = pooled(grids, self.cells)
        length = features.shape[2]
        if boxes is None:
            boxes = features.new_zeros(1, 1, 1, 4)
        boxes = boxes[:, :, :length]
        x1, x2, y1, y2 = boxes.unbind(-1)
        geometry = torch.cat([boxes, ((y2 - y1) * (x2 - x1)).unsqueeze(-1)], dim=-1)
        states = self.feature_norm(self.feature(features)) + self.box_norm(self.box(geometry))
        which = self.image.weight[: grids.shape[1]].unsqueeze(1)
        order = table[len(table) - length :].flip(0)
        return (states + which + order).flatten(1, 2)


G = TypeVar("G", bound=GridTextConfig)


class GridVision(EncoderDecoder[G]):
    """An encoder-decoder that reads images as grid features; a subclass sets the language model."""

    abilities = frozenset({"embed", "fuse", "decode", "ground", "pair"})
    starts_from_pad: ClassVar[bool] = False  # whether decoding starts from the padding token, else from the end token

    def build_vision(self, norm: Callable[[int], nn.Module]) -> None:
        """Build the frozen CNN, the visual block with torch's initial values, and the codec."""
        c = self.config
        rows = self.token_embedding.num_embeddings
        source, from_pad = c.tokenizer_source(), self.starts_from_pad
        self.codec = DeferredCodec(partial(library_codec, source, c.sentinels, rows, from_pad=from_pad), rows)
        self.grid = GridFeatures(
            c.cnn, c.image_size, c.part(c.vision_weights), cached=c.features == "cached", fit=c.fit
        )
        self.note = self.grid.note
        self.visual = VisualBlock(self.grid.channels, self.width, c.cells, norm)

    def load_whole(self) -> None:
        """Load the file of the whole backbone, if there is one; the CNN may be absent if it has a source of its own."""
        path = self.config.whole()
        if path is not None:
            elsewhere = ("grid.",) if self.config.vision_weights else ()
            load_into(self, read_tensors(path), path.name, optional=elsewhere)

    @classmethod
    def files(cls, config: G) -> list[Path]:
        whole = config.whole()
        paths = GridFeatures.files(config.cnn, config.part(config.vision_weights))
        paths += [*model_files(config.text_source()), *tokenizer_files(config.tokenizer_source())]
        return paths if whole is None else [whole, *paths]

    def host_parameters(self) -> set[str]:
        return {f"visual.{name}" for name, _ in self.visual.named_parameters()}

    def images(self, images: Sequence[Image]) -> Images:
        return self.grid.images(images)

    def embed_image(self, images: Images, *, task: str | None = None) -> Tokens:
        states = self.visual(self.grid(images).unsqueeze(1), self.token_embedding.weight)
        return self._placed(states)

    def embed_pair(self, images: Images, *, task: str | None = None) -> tuple[Tokens, Tokens]:
        """Return the tokens of two images per sample; VL-T5's E_img distinguishes them."""
        grids = torch.stack(self.grid(images).chunk(2), dim=1)
        first, second = self.visual(grids, self.token_embedding.weight).chunk(2, dim=1)
        return self._placed(first), self._placed(second)

    def _placed(self, states: Tensor) -> Tokens:
        """Return the tokens of one image, from `states` (B, cells * cells, width)."""
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        places = centres(self.grid.grid, self.config.cells).to(states)
        return plain_tokens(states, mask, IMAGE, positions=places.expand(len(states), -1, -1))
