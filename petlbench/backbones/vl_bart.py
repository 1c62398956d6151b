"""`vl_bart`: a transformer image encoder, a visual projection, and transformers' BART; `tiny` is its small instance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig, BartModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from petlbench.backbones.base import Backbone, BackboneConfig, Images, Texts, Tokens
from petlbench.backbones.sites import IMAGE, TEXT, Pass, Stack
from petlbench.backbones.transformers_parts import bart_decoder_layer, bart_encoder_layer
from petlbench.backbones.vision import ImageTokenizer, additive, preprocess, vision_stack
from petlbench.errors import UserError

ASSETS = Path(__file__).parents[1] / "assets"


class VLBartConfig(BackboneConfig):
    """Sizes of both halves. The defaults are the sizes of `tiny`."""

    image_size: int = Field(48, gt=0, description="pixels of an image's short side")
    vision_width: int = Field(96, gt=0)
    vision_layers: int = Field(3, gt=0)
    vision_heads: int = Field(4, gt=0)
    vision_ffn: int = Field(384, gt=0)
    width: int = Field(96, gt=0, description="BART's d_model")
    encoder_layers: int = Field(3, gt=0)
    decoder_layers: int = Field(2, gt=0)
    heads: int = Field(4, gt=0)
    ffn: int = Field(384, gt=0)
    max_positions: int = Field(128, gt=0, description="longest text in tokens")
    dropout: float = Field(0.1, ge=0, lt=1)
    attention: str = Field("sdpa", pattern="^(sdpa|eager)$", description="fused or unfused attention")
    tokenizer: str = Field("tiny/tokenizer.json", description="tokenizers file, in the package's assets or on disk")
    weights: str = Field("none", description="`none`, or a safetensors file in the package's assets or on disk")


def _asset(name: str) -> Path:
    path = ASSETS / name if (ASSETS / name).exists() else Path(name)
    if not path.is_file():
        raise UserError(f"backbone file '{name}' does not exist: give a path, or a name in the package's assets")
    return path


class VisualProjection(nn.Module):
    """Image features to the width of the language model: Linear and norm. Trained by every method."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(features, width), nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.linear(features))


class VLBart(Backbone):
    """Encoder input is text tokens, then visual tokens; the decoder attends to all of them."""

    Config = VLBartConfig
    abilities: ClassVar[frozenset[str]] = frozenset({"embed", "fuse", "decode", "ground"})

    def __init__(self, config: VLBartConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = _load_tokenizer(_asset(config.tokenizer))
        self.width = config.width
        self.pad_id, self.eos_id, self.start_id = 1, 2, 2  # BART's: decoding starts from </s>
        bart = BartModel(self._bart_config())
        self.image_tokenizer = ImageTokenizer(config.vision_width)
        self.visual = VisualProjection(config.vision_width, config.width)
        self.token_embedding = bart.shared
        self.encoder_positions = bart.encoder.embed_positions
        self.decoder_positions = bart.decoder.embed_positions
        encoder = [bart_encoder_layer(layer) for layer in bart.encoder.layers]
        decoder = [bart_decoder_layer(layer) for layer in bart.decoder.layers]
        self.stacks["vision"] = vision_stack(
            config.vision_width,
            config.vision_layers,
            config.vision_heads,
            config.vision_ffn,
            config.dropout,
            config.attention,
        )
        self.stacks["encoder"] = Stack(encoder, width=config.width, embedding_norm=bart.encoder.layernorm_embedding)
        self.stacks["decoder"] = Stack(decoder, width=config.width, embedding_norm=bart.decoder.layernorm_embedding)
        self.heads: dict[str, dict[str, Tensor]] = {}
        if config.weights != "none":
            self._load(_asset(config.weights))

    @classmethod
    def files(cls, config: VLBartConfig) -> list[Path]:
        return [_asset(name) for name in (config.tokenizer, config.weights) if name != "none"]

    def _bart_config(self) -> BartConfig:
        c = self.config
        return BartConfig(
            vocab_size=len(self.tokenizer),
            d_model=c.width,
            encoder_layers=c.encoder_layers,
            decoder_layers=c.decoder_layers,
            encoder_attention_heads=c.heads,
            decoder_attention_heads=c.heads,
            encoder_ffn_dim=c.ffn,
            decoder_ffn_dim=c.ffn,
            max_position_embeddings=c.max_positions,
            dropout=c.dropout,
            attention_dropout=c.dropout,
            activation_dropout=c.dropout,
            attn_implementation=c.attention,
        )

    def _load(self, path: Path) -> None:
        """Backbone tensors, and under `head.<task>.` the heads it was pre-trained with."""
        try:
            tensors = load_file(path)
        except Exception as error:
            raise UserError(f"weights {path.name} cannot be read ({error}): fetch or make the file again") from error
        for key in [k for k in tensors if k.startswith("head.")]:
            _, task, name = key.split(".", 2)
            self.heads.setdefault(task, {})[name] = tensors.pop(key)
        missing, unexpected = self.load_state_dict(tensors, strict=False)
        if missing or unexpected:
            raise UserError(f"weights {path.name} do not fit this configuration: {(missing + unexpected)[0]} differs")

    def pretrained_head(self, task: str) -> dict[str, Tensor]:
        return self.heads.get(task, {})

    def host_parameters(self) -> set[str]:
        return {f"visual.{name}" for name, _ in self.visual.named_parameters()}

    def images(self, images: Sequence[Image]) -> Images:
        return preprocess(images, self.config.image_size)

    def texts(self, texts: Sequence[str], max_length: int) -> Texts:
        longest = min(max_length, self.config.max_positions)
        encoded = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return Texts(encoded["input_ids"], encoded["attention_mask"].bool())

    def text_of(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def embed_image(self, images: Images) -> Tokens:
        features, mask, centres = self.image_tokenizer(images)
        types = torch.full_like(mask, IMAGE, dtype=torch.long)
        context = Pass(types=types, mask=mask, bias=additive(mask, features.dtype))
        features, _ = self.stack("vision").run(features, context)
        return Tokens(self.visual(features), mask, types, centres / self.config.image_size)

    def embed_text(self, texts: Texts) -> Tokens:
        x = self.token_embedding(texts.ids) + self.encoder_positions(texts.ids)
        norm = self.stack("encoder").embedding_norm
        assert norm is not None
        types = torch.full_like(texts.ids, TEXT)
        return Tokens(norm(x), texts.mask, types, x.new_zeros(*texts.ids.shape, 2))

    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        states, mask, types, positions = (
            torch.cat([getattr(part, name) for part in parts], dim=1)
            for name in ("states", "mask", "types", "positions")
        )
        context = Pass(types=types, mask=mask, task=task, bias=additive(mask, states.dtype))
        states = F.dropout(states, self.config.dropout, self.training)
        states, _ = self.stack("encoder").run(states, context)
        return Tokens(states, mask, types, positions)

    def new_cache(self) -> EncoderDecoderCache:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def reorder_cache(self, cache: EncoderDecoderCache, index: Tensor) -> EncoderDecoderCache:
        cache.reorder_cache(index)
        return cache

    def embed_decoder(self, ids: Tensor, step: int) -> Tensor:
        """(B, T) -> (B, T, width): the decoder's input states for ids that follow `step` earlier ones."""
        norm = self.stack("decoder").embedding_norm
        assert norm is not None
        x = norm(self.token_embedding(ids) + self.decoder_positions(ids, past_key_values_length=step))
        return F.dropout(x, self.config.dropout, self.training)

    def logits(self, states: Tensor) -> Tensor:
        """(…, width) -> (…, vocabulary): the output head is the embedding table."""
        return F.linear(states, self.token_embedding.weight)

    def decode(self, memory: Tokens, ids: Tensor, cache: Any = None, *, task: str) -> tuple[Tensor, Any]:
        step = 0 if cache is None else int(cache.get_seq_length())
        context = Pass(
            types=torch.full_like(ids, TEXT),
            task=task,
            step=step,
            bias=_causal(ids, step, memory.states.dtype),
            memory=memory.states,
            memory_mask=memory.mask,
            memory_bias=additive(memory.mask, memory.states.dtype),
            cache=cache,
        )
        states, _ = self.stack("decoder").run(self.embed_decoder(ids, step), context)
        return self.logits(states), cache


def _causal(ids: Tensor, step: int, dtype: torch.dtype) -> Tensor | None:
    length = ids.shape[1]
    if length == 1:
        return None  # one new token sees everything before it
    blocked = torch.ones(length, step + length, dtype=torch.bool, device=ids.device).triu(step + 1)
    return blocked[None, None].to(dtype) * torch.finfo(dtype).min


def _load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    json.loads(path.read_text(encoding="utf-8"))  # a broken file fails here, with its position
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


class TinyConfig(VLBartConfig):
    """The embedded default: `vl_bart` at its default sizes with the packaged weights."""

    dropout: float = Field(0.0, ge=0, lt=1, description="none, as in its pre-training: it is too small to overfit")
    weights: str = "tiny/model.safetensors"


class Tiny(VLBart):
    """A laboratory animal of a million parameters, pre-trained on scenes of shapes; no claim about the real world."""

    Config = TinyConfig
    note = "tiny is a laboratory animal, pre-trained on drawn shapes: its scores say nothing about real-world models"
