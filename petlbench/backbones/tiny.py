"""`tiny`, the packaged default: a small transformer image encoder, a visual projection, and a small BART."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image
from pydantic import Field
from torch import Tensor, nn

from petlbench.api.backbone import BackboneConfig
from petlbench.api.sites import IMAGE
from petlbench.api.tokens import Images, Tokens, plain_tokens
from petlbench.backbones.parts.language import BartHost, BartSizes
from petlbench.backbones.parts.masks import additive
from petlbench.backbones.parts.vision import ImageTokenizer, preprocess, vision_stack
from petlbench.backbones.weights.library_codec import file_codec
from petlbench.backbones.weights.tensors import asset, load_into, read_tensors


class TinyConfig(BackboneConfig):
    """Sizes of the image encoder and of BART; the packaged weights fit the defaults."""

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
    dropout: float = Field(
        0.0, ge=0, lt=1, description="zero, as in its pre-training: the model is too small to overfit"
    )
    attention: str = Field("sdpa", pattern="^(sdpa|eager)$", description="fused or unfused attention")
    tokenizer: str = Field("tiny/tokenizer.json", description="a tokenizers file, in the package's assets or on disk")
    weights: str = Field(
        "tiny/model.safetensors", description="`none`, or a safetensors file in the package's assets or on disk"
    )


class VisualProjection(nn.Module):
    """Map image features to the width of the language model by Linear and norm. Every method trains it."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(features, width), nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.linear(features))


class Tiny(BartHost[TinyConfig]):
    """A test model of a million parameters, pre-trained on drawn shapes; its scores say nothing about real models."""

    Config = TinyConfig
    abilities = frozenset({"embed", "fuse", "decode", "ground"})
    note = "tiny is a laboratory animal, pre-trained on drawn shapes: its scores say nothing about real-world models"

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.codec = file_codec(asset(config.tokenizer))
        c = config
        self.image_tokenizer = ImageTokenizer(c.vision_width)
        self.visual = VisualProjection(c.vision_width, c.width)
        self.stacks["vision"] = vision_stack(
            c.vision_width, c.vision_layers, c.vision_heads, c.vision_ffn, c.dropout, c.attention
        )
        self.build_bart(
            BartSizes(
                vocabulary=len(self.codec),
                width=c.width,
                encoder_layers=c.encoder_layers,
                decoder_layers=c.decoder_layers,
                heads=c.heads,
                ffn=c.ffn,
                positions=c.max_positions,
                dropout=c.dropout,
                attention=c.attention,
            ).config()
        )
        self.pretrained_heads: dict[str, dict[str, Tensor]] = {}
        self.fused_attention = config.attention == "sdpa"
        self.pretrained_hosts = config.weights != "none"
        if self.pretrained_hosts:
            self._load(asset(config.weights))

    @classmethod
    def files(cls, config: TinyConfig) -> list[Path]:
        return [asset(name) for name in (config.tokenizer, config.weights) if name != "none"]

    def _load(self, path: Path) -> None:
        """Load the backbone, and keep the pre-trained heads, whose names start with `head.<task>.`."""
        tensors = read_tensors(path)
        for key in [k for k in tensors if k.startswith("head.")]:
            _, task, name = key.split(".", 2)
            self.pretrained_heads.setdefault(task, {})[name] = tensors.pop(key)
        load_into(self, tensors, path.name)

    def pretrained_head(self, task: str) -> dict[str, Tensor]:
        return self.pretrained_heads.get(task, {})

    def host_parameters(self) -> set[str]:
        return {f"visual.{name}" for name, _ in self.visual.named_parameters()}

    def images(self, images: Sequence[Image]) -> Images:
        return preprocess(images, self.config.image_size)

    def embed_image(self, images: Images, *, task: str | None = None) -> Tokens:
        features, mask, centres = self.image_tokenizer(images)
        tokens = plain_tokens(features, mask, IMAGE)
        context = tokens.context(task=task, bias=additive(mask, features.dtype))
        features, _ = self.stack("vision").run(features, context)
        return plain_tokens(self.visual(features), mask, IMAGE, positions=centres / self.config.image_size)
