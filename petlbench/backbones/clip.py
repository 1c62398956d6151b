"""`clip`: dual encoders of open_clip (Radford et al., ICML 2021; Ilharco et al., 2021), under open_clip's names.

`clip:NAME` is any model of `open_clip.list_models()` whose towers are plain transformers: CLIP and its successors
(`ViT-…`, including CLIPA and multilingual models), SigLIP (`…SigLIP…`), MobileCLIP's transformers, and CoCa, which can
also caption. Refused are convolutional image towers, the rotary ones of EVA and PE, and text towers from transformers.

Two things differ from a direct call of open_clip. The activation follows the weights: `ViT-B-16` with OpenAI's weights
is the model that open_clip calls `ViT-B-16-quickgelu`. And retrieval trains every model with the same softmax loss, in
which SigLIP's `logit_bias` cancels out: it is counted but never trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL.Image import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.backbone import Backbone, BackboneConfig
from petlbench.api.heads import Aligner
from petlbench.api.sites import IMAGE, TEXT
from petlbench.api.tokens import Images, Texts, Tokens, decoding_pass, plain_tokens
from petlbench.backbones.parts.grids import whole_and_cells
from petlbench.backbones.parts.masks import additive, causal
from petlbench.backbones.parts.open_clip_towers import (
    ImageTower,
    TextTower,
    TokenPooler,
    caption_decoder,
    image_tower,
    text_tower,
)
from petlbench.backbones.weights import open_clip_models as models
from petlbench.backbones.weights.tensors import asset, load_into, on_meta, read_tensors
from petlbench.core.errors import UserError
from petlbench.core.messages import did_you_mean

CAP = math.log(100.0)  # upper bound of the logarithm of the scale, as in the training of CLIP and open_clip


class ClipConfig(BackboneConfig):
    """The open_clip model, and its weights."""

    model: str = Field("ViT-B-16", description="an open_clip model name; or tiny or coca-tiny, for tests")
    tag: str | None = Field(
        None, description="name of the published weights, which set activation and preprocessing; null: the first"
    )
    weights: str = Field(
        "pretrained", description="`pretrained` (those of `tag`), `none`, or a file in open_clip's layout or ours"
    )
    tokenizer: str | None = Field(
        None, description="a folder in transformers' layout or a tokenizers file; null: the model's own"
    )
    heads: Literal["trained", "frozen"] = Field(
        "trained", description="whether the projections and the scale train with every method, in retrieval"
    )

    @model_validator(mode="after")
    def _exists(self) -> ClipConfig:
        problem = models.unsupported_reason(self.model, self.tag, self.weights)
        if problem:
            raise ValueError(problem)
        return self


class ClipAligner(Aligner):
    """The model's own projections of its pooled tokens, and its scale with the upper bound 100 of CLIP's training."""

    def __init__(self, image: TokenPooler, text: TokenPooler, logit_scale: nn.Parameter) -> None:
        super().__init__()
        self.image, self.text, self.logit_scale = image, text, logit_scale

    def of_image(self, tokens: Tokens) -> Tensor:
        return self.image(tokens)

    def of_text(self, tokens: Tokens) -> Tensor:
        return self.text(tokens)

    def scale(self) -> Tensor:
        return self.logit_scale.clamp_max(CAP).exp().squeeze()


@dataclass
class History:
    """A decoding cache of the ids so far (B, T): CoCa computes all their states again in each step."""

    ids: Tensor | None = None


class Clip(Backbone[ClipConfig]):
    """Two towers. Image tokens are the outputs of the image tower: the class token (marked, at the image's centre),
    then patches. For CoCa they are the token that retrieval compares (marked, masked), then those that captions attend
    to.

    Texts of CoCa and of towers that are not causal are padded to the full context, since padding changes the token that
    they pool. Layer scale is part of the cores, and so of the value at `output`.
    """

    Config = ClipConfig
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"model": name} for name in ("ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-B-16-SigLIP", "coca_ViT-B-32")
    } | {name: {"model": name, "weights": "none", "tokenizer": "tiny/tokenizer.json"} for name in models.TINY}
    abilities = frozenset({"embed", "ground"})
    refusals: ClassVar[Mapping[str, str]] = {"ground": "CoCa's image tokens have no place"}

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.abilities = self.abilities_of(config)
        self.trains_heads = config.heads == "trained"
        self.codec = models.codec_of(config.model, config.tokenizer)
        self.preprocessing = models.Preprocessing.of(config.model, config.tag)
        model: Any = models.build(config.model, config.tag)
        own = self._load(model)
        fixed = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
        self._take_apart(model)
        self.fixed = {name for name, parameter in self.named_parameters() if id(parameter) in fixed}
        if own is not None:
            load_into(self, own, Path(config.weights).name)

    @classmethod
    def options_of(cls, size: str) -> Mapping[str, Any]:
        if not size or size in cls.sizes:
            return super().options_of(size)
        if models.architecture(size) is None:
            hint = did_you_mean(size, models.model_names()) or ": see open_clip.list_models()"
            raise UserError(f"open_clip has no model '{size}'{hint}")
        return {"model": size}

    @classmethod
    def abilities_of(cls, config: ClipConfig) -> frozenset[str]:
        coca = "multimodal_cfg" in (models.architecture(config.model) or {})
        return frozenset({"embed", "decode"}) if coca else cls.abilities

    @classmethod
    def files(cls, config: ClipConfig) -> list[Path]:
        paths: list[Path] = []
        if config.weights == "pretrained":
            paths.append(models.published_file(config.model, config.tag))
        elif config.weights != "none":
            paths.append(asset(config.weights))
        if config.tokenizer is None:
            return paths + models.published_tokenizer(config.model)
        folder = Path(config.tokenizer)
        files = (path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else [asset(config.tokenizer)]
        return paths + sorted(files)

    def _load(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Load the weights into the library's model; for a file in our own layout, return its tensors instead."""
        weights = self.config.weights
        if on_meta() or weights == "none":
            return None
        if weights == "pretrained":
            models.load_published(model, models.published_file(self.config.model, self.config.tag))
            return None
        path = asset(weights)
        if path.suffix != ".npz":
            tensors = read_tensors(path)
            if any(name.startswith("stacks.") for name in tensors):
                return tensors
        models.load_published(model, path)
        return None

    def _take_apart(self, model: Any) -> None:
        image: ImageTower = image_tower(model.visual)
        text: TextTower = text_tower(model)
        self.image_stem, self.text_stem = image.stem, text.stem
        self.stacks["vision"], self.stacks["text"] = image.stack, text.stack
        self.resampler = image.resampler
        self.own_heads["retrieval"] = ClipAligner(image.reader, text.reader, model.logit_scale)
        self.logit_bias = model.logit_bias
        if "decode" in self.abilities:
            self.stacks["decoder"], self.own_heads["captioning+vqa+pairs"] = caption_decoder(model.text_decoder)
        self.width, self.pooled_mark, self.drop = image.width, image.marked, image.drop
        self.pooling, self.causal = text.pooling, text.causal
        self.tower_eos, self.tower_pad = text.eos_id, text.pad_id
        self.max_text = int(model.context_length)
        rows, columns = image.stem.grid
        self.centres: Tensor
        self.register_buffer("centres", whole_and_cells(rows, columns, image.stem.prefix), persistent=False)

    @property
    def text_width(self) -> int:
        return self.stack("text").width

    def word_table(self) -> Tensor:
        return self.text_stem.token_embedding.weight

    def host_parameters(self) -> set[str]:
        return set()

    def fixed_parameters(self) -> set[str]:
        """Return what the library keeps fixed (tables of sines), and `logit_bias`, which changes no loss here."""
        return self.fixed if self.logit_bias is None else self.fixed | {"logit_bias"}

    def images(self, images: Sequence[Image]) -> Images:
        ready = [self.preprocessing(image) for image in images]
        return Images(*(torch.stack(parts) for parts in zip(*ready, strict=True)))

    def embed_image(self, images: Images, *, task: str | None = None) -> Tokens:
        stack, x = self.stack("vision"), self.image_stem(images.pixels)
        centres = self.centres.to(x.dtype).expand(len(x), -1, -1)
        if stack.embedding_norm is not None:
            x = stack.embedding_norm(x)
        entering = plain_tokens(x, torch.ones_like(x[..., 0], dtype=torch.bool), IMAGE)
        mark = torch.zeros_like(entering.mask[:, 0], dtype=torch.long) if self.pooled_mark else None
        context = entering.context(task=task, mark=mark)
        x, _ = stack.run(x, context)
        x, centres = x[:, self.drop :], centres[:, self.drop :]
        if self.resampler is not None:
            x = self.resampler(x)
            centres = torch.full_like(x[..., :2], 0.5)
        mask = torch.ones_like(x[..., 0], dtype=torch.bool)
        if self.resampler is not None:
            mask[:, 0] = False  # captions attend to all tokens except the one that retrieval compares
        mark = torch.zeros_like(mask[:, 0], dtype=torch.long) if self.pooled_mark else None
        return plain_tokens(x, mask, IMAGE, positions=centres, mark=mark)

    def embed_text(self, texts: Texts, *, task: str | None = None) -> Tokens:
        ids, mask = texts.ids, texts.mask
        classed = self.text_stem.class_embedding is not None
        if classed or not self.causal:
            missing = self.max_text - ids.shape[1]
            ids = F.pad(ids, (0, missing), value=self.codec.pad_id)
            mask = F.pad(mask, (0, missing), value=False)
        if classed:
            mask = F.pad(mask, (0, 1), value=True)
        x = self.text_stem(ids)
        entering = plain_tokens(x, mask, TEXT)
        mark = self._mark(ids, mask)
        context = entering.context(task=task, mark=mark, bias=self._text_bias(ids, mask, x.dtype))
        x, _ = self.stack("text").run(x, context)
        return plain_tokens(x, mask, TEXT, mark=mark)

    def _text_bias(self, ids: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return (1 or B, 1, N, N). CoCa's padding mask is one place too far to the right, as in its training."""
        bias = causal(mask, 0, dtype) if self.causal else None
        if self.text_stem.class_embedding is None:
            return bias
        seen = additive(F.pad(ids != self.tower_pad, (1, 0), value=True), dtype)
        return bias if seen is None else seen if bias is None else bias + seen

    def _mark(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the position (B,) of the token that the tower pools."""
        if self.pooling == "argmax":
            return ids.argmax(-1)
        if self.pooling == "eos":
            return (ids == self.tower_eos).int().argmax(-1)
        return torch.full_like(ids[:, 0], mask.shape[1] - 1 if self.pooling == "last" else 0)

    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        if len(parts) > 1:
            raise NotImplementedError("clip has no joint pass: supply one")
        return parts[0]

    def new_cache(self) -> History:
        return History()

    def reorder_cache(self, cache: History, index: Tensor) -> History:
        return History(None if cache.ids is None else cache.ids[index])

    def decode(self, memory: Tokens, ids: Tensor, cache: Any = None, *, task: str) -> tuple[Tensor, Any]:
        """Decode with CoCa: words pass through the text tower, then through layers that attend to the memory."""
        if "decode" not in self.abilities:
            raise NotImplementedError("clip decodes with CoCa models only")
        new = ids.shape[1]
        if cache is not None:
            ids = ids if cache.ids is None else torch.cat([cache.ids, ids], dim=1)
            cache = History(ids)
        dtype = memory.states.dtype
        across = additive(memory.mask, dtype)
        context = decoding_pass(ids, memory, task=task, bias=causal(ids, 0, dtype), memory_bias=across)
        x, _ = self.stack("text").run(self.text_stem.words(ids), context)
        x, _ = self.stack("decoder").run(x, context)
        words = self.own_heads["captioning+vqa+pairs"]
        return words(x[:, -new:]), cache
