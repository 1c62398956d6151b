"""VL-PET (Hu, Li, Lyu, Wang, ICCV 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.backbone import Backbone, Initialisation
from petlbench.api.method import About, Method, SizeOption, StackedConfig, place, train
from petlbench.api.sites import Projection, SubLayer, current_pass, mean_of_real

from .compacter import PHMBottleneck
from .layers import Bottleneck, draw_like_bart, reduced, start_at_zero


class LargeGate(nn.Module):
    """G (B, N, width) = sigma(W_gu gelu_t(W_gd x + b_gd) + b_gu), with x the residual input."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.bottleneck = Bottleneck(width, rank)

    def logits(self, x: Tensor, m: Tensor) -> Tensor:
        """Return the sigmoid's argument; `m` is h + dH."""
        logits: Tensor = self.bottleneck(x)
        return logits

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        return self.logits(x, m).sigmoid()


class MiddleXGate(nn.Module):
    """G (B, N, 1) = sigma(w . (x + m) + b), with m = h + dH."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def logits(self, x: Tensor, m: Tensor) -> Tensor:
        logits: Tensor = self.linear(x + m)
        return logits

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        return self.logits(x, m).sigmoid()


class MiddleYGate(nn.Module):
    """G (width) = 1 + z: no input, no sigmoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.empty(width).normal_(std=0.02))

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        return 1 + self.z


class SmallGate(nn.Module):
    """G (B, 1, 1) = the mean over tokens of sigma(w . [x; m] + b), with m = h + dH.

    `masked`: the mean is over real tokens. If a tower without cross-attention decodes (CoCa's), G (B, T, 1) is the mean
    over the tokens so far, since later tokens do not exist yet.
    """

    def __init__(self, width: int, masked: bool) -> None:
        super().__init__()
        self.linear, self.masked = nn.Linear(2 * width, 1), masked

    def logits(self, x: Tensor, m: Tensor) -> Tensor:
        """Return (B, N, 1); applying the two halves of w separately saves a copy of x and m."""
        for_x, for_m = self.linear.weight.chunk(2, dim=1)
        return F.linear(x, for_x, self.linear.bias) + F.linear(m, for_m)

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        gate, context = self.logits(x, m).sigmoid(), current_pass()
        if context.memory is not None:
            return gate.cumsum(1) / torch.arange(1, gate.shape[1] + 1, device=gate.device)[:, None]
        if context.mask is None or not self.masked:
            return gate.mean(1, keepdim=True)
        return mean_of_real(gate, context.mask).unsqueeze(1)


class GranularityControl(nn.Module):
    """u = s * G(x, h + dH) * (h + dH), with dH = change(h); x and h (B, N, width) -> u (B, N, width)."""

    def __init__(self, change: nn.Module, gate: nn.Module, scale: float) -> None:
        super().__init__()
        self.change, self.gate, self.scale = change, gate, scale

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        m = h + self.change(h)
        gate: Tensor = self.gate(x, m)
        return (gate if self.scale == 1 else self.scale * gate) * m


@dataclass(frozen=True)
class Authors:
    """The settings of the authors' scripts for one language model."""

    reduction: int
    value_reduction: int  # a multiple of `reduction`
    scale: float
    zero: bool  # whether last layers start at zero


AUTHORS: Mapping[Initialisation, Authors] = {
    "bart": Authors(8, 1, 1.0, zero=False),
    "t5": Authors(4, 2, 0.3, zero=True),
}


class VLPETConfig(StackedConfig):
    """Granularity and sizes; the defaults are the authors' (their scripts at width 768)."""

    variant: Literal["large", "middleX", "middleY", "small"] = Field("large", description="granularity of the gate")
    module: Literal["bottleneck", "compacter"] = Field(
        "bottleneck",
        description="layers of dH and of the value adapters; compacter: PHM layers, as in Table 9",
    )
    reduction: int | None = Field(
        None, gt=0, description="rank r of dH = width // reduction, at least 1; null: 8, on T5 4"
    )
    gate_reduction: int | None = Field(None, gt=0, description="same for the large gate's rank; null: as `reduction`")
    value_reduction: int | None = Field(
        None, gt=0, description="same for the decoder's value adapters; null: as `reduction`, on T5 twice that"
    )
    rank: int | None = Field(None, gt=0, description="r itself, in place of `reduction`")
    gate_rank: int | None = Field(None, gt=0, description="the large gate's rank, in place of `gate_reduction`")
    value_rank: int | None = Field(None, gt=0, description="the value adapters' rank, in place of `value_reduction`")
    heads: int | None = Field(
        None, gt=0, description="N_h of the down projection, a divisor of r; null: the authors' 4, equivalent to 1"
    )
    scale: float | None = Field(None, gt=0, description="s, the gate's factor; null: 1, on T5 0.3")
    mask_gate: bool = Field(
        True, description="the small gate averages over real tokens; false: over padding too, as released"
    )
    n: int = Field(
        2, gt=0, description="compacter: number of Kronecker products in a matrix's sum; divides widths and ranks"
    )


class VLPET(Method[VLPETConfig]):
    """A gated bottleneck after attention and FFN of every encoder layer, light adapters on the decoder's values.

    Encoder (every layer without cross-attention), with x the residual input and h the frozen sub-layer's output:

        dH = W_up gelu_t([D_1 h + b_1; ...; D_Nh h + b_Nh]) + b_up,      u = s G * (h + dH),      u replaces h

    and G one of `large` (B, N, d) = sigma(W_gu gelu_t(W_gd x)), `middleX` (B, N, 1) = sigma(w . (x + h + dH)),
    `middleY` (d) = 1 + z, `small` (B, 1, 1) = the mean over tokens of sigma(w . [x; h + dH]). Decoder (every layer with
    cross-attention): value(m) = W_v m + b_v + W_u gelu_t(W_d m + b_d) + b_u. All of the encoder's norms train.

    No variant starts from the pre-trained function: gates start near sigma(0). On BART all weights start N(0, 0.02^2)
    with biases 0; on T5 as torch draws, but the last layers of dH, gate and value adapter (and z) are 0, and s is 0.3.

    Paper and released code differ: the paper's figures give middleY a sigmoid, and feed h, not h + dH, to the gates of
    middleX and small; this follows the code. The heads D_k all read h and are concatenated, so one (r, d) matrix holds
    them; Table 9's "VL-Adapter + G + LW" (one head) is the same function with the same parameters and initial values.
    "Compacter + G + LW" (`compacter_*`) follows the paper's count, with PHM layers in dH and in the value adapters,
    drawn as Compacter draws them; the released code silently builds plain ones.

    What differs here: the released small gate averages over padding as well, so a sample's output depends on the other
    samples of its batch. `mask_gate` averages over real tokens; `small_released` does as released. An image or text
    encoder that is a transformer with sites counts as an encoder; a backbone without a decoder has only encoder
    modules.
    """

    Config = VLPETConfig
    about = About(
        paper="VL-PET (Hu et al., ICCV 2023)",
        trains="gated bottlenecks in the encoder, value adapters in the decoder, the encoder's norms",
        verified="authors' code: layers, whole models, gradients, six training steps, counts",
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "large": {},
        "middleX": {"variant": "middleX"},
        "middleY": {"variant": "middleY"},
        "small": {"variant": "small"},
        "small_released": {"variant": "small", "mask_gate": False},
        "compacter_large": {"module": "compacter"},
        "compacter_middleX": {"module": "compacter", "variant": "middleX"},
        "compacter_middleY": {"module": "compacter", "variant": "middleY"},
        "compacter_small": {"module": "compacter", "variant": "small"},
    }
    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}
    recipes: ClassVar[dict[str, dict[str, Any]]] = {"vl_t5": {"lr": 3e-4}}
    size_option = SizeOption("reduction", (24, 12, 8, 6, 4, 2))

    def __init__(self, config: VLPETConfig | None = None) -> None:
        super().__init__(config)
        if self.config.variant == "small" and not self.config.mask_gate:
            self.mixes_rows = "its gate averages over padding, of which the longest row of a batch decides, as released"

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.freeze()
        authors = AUTHORS[backbone.initialisation]
        for stack in self.stacks(backbone):
            crossing = False
            for layer in stack:
                if "cross_attention" in layer.sublayers:
                    crossing = True
                    for value in layer["cross_attention"].projections["v"].singles():
                        self._add_value_adapter(value, authors)
                else:
                    for _, sublayer in layer.items():
                        self._insert_control(sublayer, authors)
            if not crossing:
                train(*stack.norms())
        return backbone

    def _insert_control(self, sublayer: SubLayer, authors: Authors) -> None:
        c, width = self.config, sublayer.width
        reduction = c.reduction or authors.reduction
        rank = c.rank or reduced(width, reduction)
        if c.heads and rank % c.heads:
            raise ValueError(
                f"{c.heads} heads do not divide the rank {rank} at width {width}: change heads or the rank"
            )
        gate_rank = c.gate_rank or reduced(width, c.gate_reduction or reduction)
        change = self._change(width, width, rank, authors)
        gate = _gate(c.variant, width, gate_rank, c.mask_gate, authors.zero)
        scale = authors.scale if c.scale is None else c.scale
        sublayer.insert("output", place(GranularityControl(change, gate, scale), sublayer))

    def _add_value_adapter(self, value: Projection, authors: Authors) -> None:
        c, width = self.config, value.in_features
        reduction = c.value_reduction or (c.reduction or authors.reduction) * authors.value_reduction
        rank = c.value_rank or reduced(width, reduction)
        value.add(place(self._change(width, value.out_features, rank, authors), value.linear))

    def _change(self, width: int, out: int, rank: int, authors: Authors) -> nn.Module:
        if self.config.module == "compacter":
            return PHMBottleneck(width, rank, self.config.n, out=out)
        bottleneck = Bottleneck(width, rank, out=out)
        _draw(bottleneck, authors.zero, bottleneck.up)
        return bottleneck


def _gate(variant: str, width: int, rank: int, masked: bool, zero: bool) -> nn.Module:
    """Return the gate of a variant, drawn as the authors' scripts draw it for T5 (`zero`) or BART."""
    if variant == "middleY":
        vector = MiddleYGate(width)
        if zero:
            nn.init.zeros_(vector.z)
        return vector
    if variant == "large":
        large = LargeGate(width, rank)
        _draw(large, zero, large.bottleneck.up)
        return large
    gate = MiddleXGate(width) if variant == "middleX" else SmallGate(width, masked)
    _draw(gate, zero, gate.linear)
    return gate


def _draw(module: nn.Module, zero: bool, last: nn.Linear) -> None:
    """Draw as for T5 (torch's values, but `last` 0) if `zero`, else as for BART."""
    if zero:
        start_at_zero(last)
    else:
        draw_like_bart(module)
