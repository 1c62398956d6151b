"""`transvg`: DETR's image encoder, BERT, a fusion encoder over both, and a box head (Deng et al., ICCV 2021).

M2IST was published on this model; `released: true` is its authors' variant of BERT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image, Resampling
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, BertModel, DetrModel

from petlbench.api.backbone import Backbone, BackboneConfig
from petlbench.api.heads import Grounder
from petlbench.api.sites import IMAGE, TEXT, Pass
from petlbench.api.tokens import Images, Placement, Texts, Tokens, join, plain_tokens
from petlbench.backbones.parts.bert import bert_config, build_bert, from_bert
from petlbench.backbones.parts.detr import FIXED, STRIDE, detr_sine_positions, detr_stack, from_detr, grid_mask, resnet
from petlbench.backbones.parts.grids import cell_centres
from petlbench.backbones.parts.masks import additive
from petlbench.backbones.transvg_weights import BERT_SIZES, DETR_SIZES, encoder_tensors, from_transvg
from petlbench.backbones.weights.library_codec import LibraryCodec, file_codec
from petlbench.backbones.weights.library_models import (
    DeferredCodec,
    model_files,
    model_location,
    quiet,
    readable,
    tokenizer_files,
)
from petlbench.backbones.weights.tensors import asset, load_into, on_meta, read_tensors
from petlbench.core.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
BERT = "google-bert/bert-base-uncased"


class TransVGConfig(BackboneConfig):
    """Sizes of the four parts, and the sources of their weights."""

    image_size: int = Field(640, gt=0, description="pixels of the square canvas that an image is padded to")
    resnet_blocks: tuple[int, ...] = Field((3, 4, 6, 3), min_length=4, max_length=4, description="blocks per stage")
    resnet_channels: int = Field(
        64, gt=0, description="channels of the first stage's bottlenecks; each stage doubles them"
    )
    width: int = Field(256, gt=0, multiple_of=4, description="width of both encoders over image tokens")
    vision_layers: int = Field(6, gt=0)
    fusion_layers: int = Field(6, gt=0)
    heads: int = Field(8, gt=0, description="attention heads of vision and fusion layers")
    ffn: int = Field(2048, gt=0, description="feed-forward width of vision and fusion layers")
    bert_width: int = Field(768, gt=0)
    bert_layers: int = Field(12, gt=0)
    bert_heads: int = Field(12, gt=0)
    bert_ffn: int = Field(3072, gt=0)
    vocabulary: int = Field(30522, gt=0, description="word pieces")
    max_positions: int = Field(512, gt=0, description="rows of BERT's own position table")
    text_length: int = Field(20, gt=2, description="tokens to which a text is cut or padded; RefCOCO 20, RefCOCOg 40")
    dropout: float = Field(0.1, ge=0, lt=1)
    released: bool = Field(
        False, description="use M2IST's BERT: no token types, residual and norm twice in the first layers"
    )
    weights: str = Field(
        "pretrained", description="`pretrained` or `none`, for both encoders; or a file of the whole backbone"
    )
    vision_weights: str | None = Field(
        None,
        description="for ResNet and image encoder: `pretrained`, `none`, or the hub name, folder or file of a DETR",
    )
    text_weights: str | None = Field(
        None, description="for BERT: `pretrained`, `none`, a hub name, or a folder or file in transformers' layout"
    )
    tokenizer: str | None = Field(
        None, description="a hub name, a folder, or a tokenizers file with BART's special tokens; null: BERT's own"
    )

    @model_validator(mode="after")
    def _check(self) -> TransVGConfig:
        for width, heads in (("width", "heads"), ("bert_width", "bert_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} {getattr(self, width)} is not a multiple of {heads} {getattr(self, heads)}")
        if self.text_length > self.max_positions:
            raise ValueError(f"text_length {self.text_length} exceeds max_positions {self.max_positions}")
        return self

    @property
    def side(self) -> int:
        """Return the number of image tokens along each axis."""
        return -(-self.image_size // STRIDE)

    def sources(self) -> dict[str, str]:
        """Return, by option, the sources of the parts' weights besides a file of the whole; `none` is left out."""
        detr: dict[tuple[int, ...], str] = {
            (3, 4, 6, 3): "facebook/detr-resnet-50",
            (3, 4, 23, 3): "facebook/detr-resnet-101",
        }
        common = self.weights if self.weights in ("pretrained", "none") else "none"
        chosen = {"vision_weights": self.vision_weights or common, "text_weights": self.text_weights or common}
        published = {"vision_weights": detr.get(self.resnet_blocks, ""), "text_weights": BERT}
        places = {option: published[option] if source == "pretrained" else source for option, source in chosen.items()}
        if not places["vision_weights"]:
            raise UserError(f"no DETR is published for resnet_blocks {list(self.resnet_blocks)}: set vision_weights")
        return {option: source for option, source in places.items() if source != "none"}

    def words_source(self) -> str:
        """Return the source of the tokenizer."""
        text = self.sources().get("text_weights", BERT)
        return self.tokenizer or (BERT if Path(text).is_file() else text)


class BoxHead(Grounder):
    """TransVG's head: three linear layers on the [REG] token, and a sigmoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)])

    def forward(self, tokens: Tokens) -> Tensor:
        x = tokens.pooled()
        for layer in list(self.layers)[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x).sigmoid()


class TransVG(Backbone[TransVGConfig]):
    """An encoder for the image, one for the text, then a fusion encoder over both and a [REG] token.

    Images lie in the middle of a square canvas, whose side is the unit of boxes.
    """

    Config = TransVGConfig
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "r50": {},
        "r101": {"resnet_blocks": (3, 4, 23, 3)},
        "tiny": {
            "image_size": 64,
            "resnet_blocks": (1, 1, 1, 1),
            "resnet_channels": 8,
            "width": 32,
            "vision_layers": 2,
            "fusion_layers": 2,
            "heads": 4,
            "ffn": 64,
            "bert_width": 32,
            "bert_layers": 2,
            "bert_heads": 4,
            "bert_ffn": 64,
            "vocabulary": 210,
            "max_positions": 64,
            "text_length": 32,
            "weights": "none",
            "tokenizer": "tiny/tokenizer.json",
        },
    }
    abilities = frozenset({"fuse", "ground"})
    refusals: ClassVar[Mapping[str, str]] = {
        "embed": "image and text meet in its fusion encoder alone: it has no space to compare them in one by one",
        "pair": "its fusion encoder has a learned place for every token, and none for those of a second image",
    }

    def __init__(self, config: TransVGConfig) -> None:
        super().__init__()
        self.config = c = config
        self.width, self.max_text = c.width, c.text_length
        self.codec = DeferredCodec(lambda: _codec(c), c.vocabulary)
        self.resnet = resnet(c.resnet_blocks, c.resnet_channels)
        self.input_projection = nn.Conv2d(32 * c.resnet_channels, c.width, kernel_size=1)
        self.stacks["vision"] = detr_stack(c.width, c.vision_layers, c.heads, c.ffn, c.dropout)
        self.bert, self.stacks["text"] = build_bert(_bert_sizes(c), released=c.released, paired=c.vision_layers)
        self.image_projection, self.text_projection = nn.Linear(c.width, c.width), nn.Linear(c.bert_width, c.width)
        self.reg = nn.Parameter(torch.randn(1, c.width))
        self.positions = nn.Parameter(torch.randn(1 + c.text_length + c.side**2, c.width))
        self.stacks["fusion"] = detr_stack(c.width, c.fusion_layers, c.heads, c.ffn, c.dropout)
        self.own_heads["rec"] = BoxHead(c.width)
        if not on_meta():
            self._load()

    @classmethod
    def files(cls, config: TransVGConfig) -> list[Path]:
        whole = [] if config.weights in ("pretrained", "none") else [asset(config.weights)]
        parts = [path for source in config.sources().values() for path in _files(source)]
        return [*whole, *parts, *tokenizer_files(config.words_source())]

    def _load(self) -> None:
        """Load a file of the whole backbone first, then the parts that have sources of their own."""
        c, sources = self.config, self.config.sources()
        if c.weights not in ("pretrained", "none"):
            path = asset(c.weights)
            load_into(self, from_transvg(read_tensors(path), released=c.released), path.name)
        if source := sources.get("vision_weights"):
            vision = ("resnet", "input_projection", "stacks.vision")
            tensors = encoder_tensors(DetrModel, source, c, DETR_SIZES)
            self._load_part(from_detr(tensors, *vision), vision, source)
        if source := sources.get("text_weights"):
            tensors = encoder_tensors(BertModel, source, c, BERT_SIZES)
            renamed = from_bert(tensors, "bert", "stacks.text", released=c.released)
            self._load_part(renamed, ("bert", "stacks.text"), source, optional=["bert.pooler."])

    def _load_part(
        self, tensors: dict[str, Tensor], prefixes: Iterable[str], source: str, optional: Iterable[str] = ()
    ) -> None:
        """Load the tensors whose names start with `prefixes`; all others stay unchanged."""
        starts = tuple(f"{prefix}." for prefix in prefixes)
        rest = {name: value for name, value in self.state_dict().items() if not name.startswith(starts)}
        load_into(self, rest | tensors, source, optional=optional)

    def host_parameters(self) -> set[str]:
        own = ("image_projection.", "text_projection.", "stacks.fusion.", "own_heads.")
        return {"reg", "positions"} | {name for name, _ in self.named_parameters() if name.startswith(own)}

    def fixed_parameters(self) -> set[str]:
        fixed = tuple(f"resnet.{prefix}" for prefix in FIXED)
        return {name for name, _ in self.named_parameters() if name.startswith(fixed)}

    def word_table(self) -> Tensor:
        return self.bert.words.words.weight

    def images(self, images: Sequence[Image]) -> Images:
        """Resize the long side to `image_size`, in the middle of a square canvas that is zero after normalisation."""
        return self.images_placed(images, [Placement()] * len(images))

    def images_placed(self, images: Sequence[Image], placements: Sequence[Placement]) -> Images:
        """Do the same with the sizes and places of `placements`; every image is resampled only here."""
        side = self.config.image_size
        pixels = torch.zeros(len(images), 3, side, side)
        mask = torch.zeros(len(images), side, side, dtype=torch.bool)
        scale, offset = torch.zeros(len(images), 2), torch.zeros(len(images), 2)
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        for i, (image, placement) in enumerate(zip(images, placements, strict=True)):
            ratio = placement.ratio(image.size, side)
            width, height = (max(1, round(length * ratio)) for length in image.size)
            left, top = placement.corner((width, height), side)
            rgb = image.convert("RGB")
            rgb = rgb if rgb.size == (width, height) else rgb.resize((width, height), Resampling.BILINEAR)
            values = torch.from_numpy(np.asarray(rgb, dtype=np.float32)).permute(2, 0, 1) / 255
            pixels[i, :, top : top + height, left : left + width] = (values - mean) / std
            mask[i, top : top + height, left : left + width] = True
            scale[i] = ratio / side  # of both axes, as in the original: rounding moves a box by half a pixel
            offset[i] = torch.tensor([left, top]) / side
        return Images(pixels, mask, scale, offset)

    def image_input(self, images: Images, task: str | None = None) -> tuple[Tokens, Pass]:
        """Return the input of the image encoder, and its pass."""
        grid = self.input_projection(self.resnet.forward_features(images.pixels))
        rows, columns = grid.shape[-2:]
        mask = grid_mask(images.mask, rows, columns)
        places = cell_centres(rows, columns).to(grid) * STRIDE / self.config.image_size
        tokens = plain_tokens(
            grid.flatten(2).transpose(1, 2),
            mask.flatten(1),
            IMAGE,
            positions=places.expand(len(mask), -1, -1),
        )
        return tokens, _pass(tokens, positions=detr_sine_positions(mask, self.width).to(grid), task=task)

    def text_input(self, texts: Texts, task: str | None = None) -> tuple[Tokens, Pass]:
        """Return the input of BERT's layers, padded to `text_length`, and their pass."""
        missing = self.config.text_length - texts.ids.shape[1]
        ids, mask = F.pad(texts.ids, (0, missing)), F.pad(texts.mask, (0, missing))
        norm = self.stack("text").embedding_norm
        assert norm is not None
        tokens = plain_tokens(self.bert(ids, norm), mask, TEXT)
        return tokens, _pass(tokens, task=task)

    def embed_image(self, images: Images, *, task: str | None = None) -> Tokens:
        tokens, context = self.image_input(images, task)
        states, _ = self.stack("vision").run(tokens.states, context)
        return self.project(tokens, states)

    def embed_text(self, texts: Texts, *, task: str | None = None) -> Tokens:
        tokens, context = self.text_input(texts, task)
        states, _ = self.stack("text").run(tokens.states, context)
        return self.project(tokens, states)

    def project(self, tokens: Tokens, states: Tensor) -> Tokens:
        """Return `tokens` of one encoder with its final states projected to the fusion encoder's width."""
        layer = self.text_projection if tokens.segments[0][0] == TEXT else self.image_projection
        return plain_tokens(layer(states), tokens.mask, tokens.segments[0][0], positions=tokens.positions)

    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        batch, first = len(parts[0].states), parts[0]
        seen = torch.ones_like(first.mask[:, :1])
        reg = plain_tokens(self.reg.to(first.states).expand(batch, 1, -1), seen, TEXT)
        tokens = join([reg, *parts])
        context = _pass(tokens, positions=self._table(parts).to(first.states), task=task)
        states, _ = self.stack("fusion").run(tokens.states, context)
        mark = torch.zeros(batch, dtype=torch.long, device=states.device)
        return Tokens(states, tokens.mask, tokens.types, tokens.positions, tokens.segments, mark)

    def _table(self, parts: Sequence[Tokens]) -> Tensor:
        """Return the position rows (1, 1 + n, width) of [REG] and of the n tokens in `parts`."""
        starts = {TEXT: 1, IMAGE: 1 + self.config.text_length}
        rows = [self.positions[:1]]
        for kind, length in (segment for part in parts for segment in part.segments):
            rows.append(self.positions[starts[kind] : starts[kind] + length])
            starts[kind] += length
        return torch.cat(rows)[None]


def _pass(tokens: Tokens, **more: Any) -> Pass:
    bias = additive(tokens.mask, tokens.states.dtype)
    return tokens.context(bias=bias, **more)


def _bert_sizes(c: TransVGConfig) -> BertConfig:
    return bert_config(
        vocabulary=c.vocabulary,
        width=c.bert_width,
        layers=c.bert_layers,
        heads=c.bert_heads,
        ffn=c.bert_ffn,
        positions=c.max_positions,
        dropout=c.dropout,
    )


def _files(source: str) -> list[Path]:
    """Return the weight files of a part: the file itself, or those in a folder or a hub repository."""
    path = Path(source).expanduser()
    return [path] if path.is_file() else model_files(source)


def _codec(config: TransVGConfig) -> LibraryCodec:
    """Return the tokenizer. Decoding, by a supplied decoder, starts from [CLS] and ends with [SEP]."""
    source = config.words_source()
    if source.endswith(".json"):
        codec = file_codec(asset(source))
    else:
        place = model_location(source)
        with quiet(), readable(source, "a tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(place)
        codec = LibraryCodec(tokenizer, start_id=tokenizer.cls_token_id, eos_id=tokenizer.sep_token_id)
    if len(codec) > config.vocabulary:
        raise UserError(f"tokenizer '{source}' has {len(codec)} ids: set vocabulary={len(codec)}, or another tokenizer")
    return codec
