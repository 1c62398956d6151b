"""`vl_t5`: T5 on CLIP's grid features, the second model of VL-Adapter (CVPR 2022) and VL-PET (ICCV 2023).

Also called CLIP-T5: VL-T5 (Cho et al., ICML 2021) with grid features in place of region features.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from transformers.models.t5.modeling_t5 import T5LayerNorm

from petlbench.backbones.parts.t5 import T5Host, T5Sizes
from petlbench.backbones.parts.visual_block import TINY, GridTextConfig, GridVision


class VLT5Config(GridTextConfig):
    """T5-base as published; its tokenizer already has <extra_id_N>, and its table has more rows than ids."""

    width: int = Field(768, gt=0, description="T5's d_model")
    encoder_layers: int = Field(12, gt=0)
    decoder_layers: int = Field(12, gt=0)
    heads: int = Field(12, gt=0)
    head_width: int = Field(64, gt=0, description="T5's d_kv: the width of one head")
    ffn: int = Field(3072, gt=0)
    buckets: int = Field(32, gt=0, description="number of buckets of relative distances")
    max_distance: int = Field(128, gt=0, description="all distances beyond it share one bucket")
    max_text: int = Field(512, gt=0, description="longest text in tokens; T5 itself has no limit")
    vocabulary: int = Field(32128, gt=0, description="rows of the language model's token table")
    added_rows: int = Field(72, ge=0, description="random rows added to the token table, N(0, 1)")
    language: str = Field("google-t5/t5-base", description="hub name of the published language model")


class VLT5(GridVision[VLT5Config], T5Host[VLT5Config]):
    """Text has relative positions between its own tokens; visual tokens follow without any; layers are pre-norm."""

    Config = VLT5Config
    starts_from_pad = True
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {},
        "small": {
            "width": 512,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "heads": 8,
            "ffn": 2048,
            "language": "google-t5/t5-small",
        },
        "large": {
            "width": 1024,
            "encoder_layers": 24,
            "decoder_layers": 24,
            "heads": 16,
            "ffn": 4096,
            "language": "google-t5/t5-large",
        },
        "tiny": TINY | {"head_width": 16, "max_text": 128},
    }

    def __init__(self, config: VLT5Config) -> None:
        super().__init__()
        self.config = c = config
        self.build_t5(
            T5Sizes(
                vocabulary=c.vocabulary,
                width=c.width,
                encoder_layers=c.encoder_layers,
                decoder_layers=c.decoder_layers,
                heads=c.heads,
                head_width=c.head_width,
                ffn=c.ffn,
                dropout=c.dropout,
                buckets=c.buckets,
                max_distance=c.max_distance,
            ).config(),
            source=c.text_source(),
            added_rows=c.added_rows,
            longest=c.max_text,
        )
        self.build_vision(T5LayerNorm)  # the visual block keeps torch's initial values
        self.load_whole()
