"""`vl_bart`: BART on CLIP's grid features, the model of VL-Adapter (CVPR 2022) and VL-PET (ICCV 2023).

Also called CLIP-BART: VL-BART (Cho et al., ICML 2021) with grid features in place of region features.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from petlbench.backbones.parts.language import BartHost, BartSizes, initialise_bart
from petlbench.backbones.parts.visual_block import TINY, GridTextConfig, GridVision


class VLBartConfig(GridTextConfig):
    """BART-base as published, and one more row of the token table for each added token."""

    width: int = Field(768, gt=0, description="BART's d_model")
    encoder_layers: int = Field(6, gt=0)
    decoder_layers: int = Field(6, gt=0)
    heads: int = Field(12, gt=0)
    ffn: int = Field(3072, gt=0)
    max_positions: int = Field(1024, gt=0, description="longest text in tokens")
    vocabulary: int = Field(50265, gt=0, description="rows of the language model's token table")
    added_rows: int = Field(200, ge=0, description="random rows added to the token table, N(0, 0.02^2)")
    language: str = Field("facebook/bart-base", description="hub name of the published language model")


class VLBart(GridVision[VLBartConfig], BartHost[VLBartConfig]):
    """Text has learned positions and the embedding norm; visual tokens follow without both; layers are post-norm."""

    Config = VLBartConfig
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "base": {},
        "large": {
            "width": 1024,
            "encoder_layers": 12,
            "decoder_layers": 12,
            "heads": 16,
            "ffn": 4096,
            "language": "facebook/bart-large",
        },
        "tiny": TINY | {"max_positions": 128},
    }

    def __init__(self, config: VLBartConfig) -> None:
        super().__init__()
        self.config = c = config
        self.build_bart(
            BartSizes(
                vocabulary=c.vocabulary,
                width=c.width,
                encoder_layers=c.encoder_layers,
                decoder_layers=c.decoder_layers,
                heads=c.heads,
                ffn=c.ffn,
                positions=c.max_positions,
                dropout=c.dropout,
            ).config(),
            source=c.text_source(),
            added_rows=c.added_rows,
        )
        self.build_vision(nn.LayerNorm)
        self.visual.apply(initialise_bart)
        self.load_whole()
