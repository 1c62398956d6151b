"""The base of the classical bottleneck adapters: one general layer, and the sites that receive it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method, StackedConfig, place, train
from petlbench.api.sites import Place, SubLayer, current_pass, mean_of_real

from .layers import REC_RECIPE, Bottleneck, draw_like_bart, draw_like_lora, reduced

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}

# Methods share these meanings and ranges of options; each method has its own defaults.
Reduction = Annotated[int, Field(gt=0, description="bottleneck rank = width // reduction, at least 1")]
Phi = Annotated[Literal["relu", "silu", "gelu", "gelu_tanh"], Field(description="the bottleneck's activation")]
Scale = Annotated[
    Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["learned", "learned_vector"],
    Field(description="factor of the branch: fixed, or learned (it starts at 1) as one number or one per channel"),
]
Init = Annotated[
    Literal["normal", "truncated", "zero"],
    Field(
        description="normal: both weights normal; truncated: normal, cut at two standard deviations; zero: down "
        "Kaiming-uniform and up 0, so that the branch starts at 0. Biases start at 0"
    ),
]
Deviation = Annotated[float, Field(gt=0, description="standard deviation of init `normal` and `truncated`")]
Rate = Annotated[float, Field(ge=0, lt=1)]
InAttention = Annotated[bool, Field(description="adapters at self-attention")]


class BottleneckConfig(StackedConfig):
    """Options of every bottleneck of this kind; the defaults are those of the adapters library."""

    reduction: Reduction = 16
    rank: int | None = Field(None, gt=0, description="the same rank at every width, in place of `reduction`")
    activation: Phi = "relu"
    scale: Scale = 1.0
    norm_in: bool = Field(False, description="a new norm on the bottleneck's input")
    norm_out: bool = Field(False, description="a new norm on the scaled branch")
    gate: bool = Field(
        False, description="multiply the branch by the mean over tokens of sigmoid(w q + b); not in decoders"
    )
    mask_gate: bool = Field(
        True, description="that mean leaves padding out; the library counts it, which makes scores depend on the batch"
    )
    inner_dropout: Rate = Field(0.0, description="on the bottleneck's activation")
    dropout: Rate = Field(0.0, description="on the scaled branch")
    drop_path: Rate = Field(0.0, description="chance that a training sample skips the branch")
    init: Init = "normal"
    init_std: Deviation = 0.02
    attention: InAttention = False
    cross_attention: bool = Field(False, description="adapters at cross-attention")
    ffn: bool = Field(True, description="adapters at the feed-forward network")
    train_norms: bool = Field(False, description="also train norms of the adapted stacks, gains and biases")

    @model_validator(mode="after")
    def _goes_somewhere(self) -> Self:
        if not self.positions():
            raise ValueError("at least one of attention, cross_attention and ffn must be true")
        return self

    def positions(self) -> tuple[str, ...]:
        """Return the names of the sub-layers that get a bottleneck."""
        return tuple(name for name in ("attention", "cross_attention", "ffn") if getattr(self, name))


class HubLayer(nn.Module):
    """u = q + LN_out( g(q) drop( s bn( LN_in(q) ) ) ), q is the value at the site; (B, N, width) -> (B, N, width).

    bn is a bottleneck, g(q) = mean over tokens of sigmoid(w q + b), in (0, 1), one for each sample. The options switch
    on s, g, both norms and the dropouts. This is the general layer of the adapters library.
    """

    def __init__(self, width: int, options: BottleneckConfig, *, norm_takes_residual: bool = False) -> None:
        super().__init__()
        rank = options.rank or reduced(width, options.reduction)
        phi = ACTIVATIONS[options.activation]()
        if options.inner_dropout:
            phi = nn.Sequential(phi, nn.Dropout(options.inner_dropout))
        self.bottleneck = Bottleneck(width, rank, phi)
        initialise(self.bottleneck, options.init, options.init_std)
        self.norm_in = nn.LayerNorm(width) if options.norm_in else None
        self.norm_out = nn.LayerNorm(width) if options.norm_out else None
        self.gate = nn.Linear(width, 1) if options.gate else None
        if self.gate is not None:
            draw_like_bart(self.gate)
        self.scale: float | nn.Parameter
        if isinstance(options.scale, float):
            self.scale = options.scale
        else:
            self.scale = nn.Parameter(torch.ones(width if options.scale == "learned_vector" else 1))
        self.drop = nn.Dropout(options.dropout) if options.dropout else None
        self.mask_gate, self.drop_path = options.mask_gate, options.drop_path
        self.norm_takes_residual = norm_takes_residual

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        return self.add(value, value)

    def add(self, q: Tensor, residual: Tensor) -> Tensor:
        """Return the sum of the branch, which reads q, and the residual."""
        o: Tensor = self.bottleneck(q if self.norm_in is None else self.norm_in(q))
        if not isinstance(self.scale, float) or self.scale != 1:
            o = o * self.scale
        if self.drop is not None:
            o = self.drop(o)
        if self.drop_path and self.training:
            o = o * F.dropout(o.new_ones(len(o), 1, 1), self.drop_path)
        if self.gate is not None:
            o = o * self._opening(torch.sigmoid(self.gate(q)))
        if self.norm_out is None:
            return o + residual
        normed: Tensor = self.norm_out(o + residual) if self.norm_takes_residual else self.norm_out(o) + residual
        return normed

    def _opening(self, gates: Tensor) -> Tensor:
        """Average the gates over tokens, (B, N, 1) -> (B, 1, 1)."""
        mask = current_pass().mask if self.mask_gate else None
        if mask is None:
            return gates.mean(1, keepdim=True)
        return mean_of_real(gates, mask).unsqueeze(1)


class ParallelLayer(HubLayer):
    """A HubLayer with q = x, the sub-layer's residual input: u = value + LN_out(...)."""

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        return self.add(x, value)


def initialise(bottleneck: Bottleneck, init: str, std: float) -> None:
    """Draw both weights as option `init` describes; set biases to 0."""
    if init == "zero":
        draw_like_lora(bottleneck)
        return
    for linear in (bottleneck.down, bottleneck.up):
        if init == "normal":
            nn.init.normal_(linear.weight, std=std)
        else:
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(linear.bias)


B = TypeVar("B", bound=BottleneckConfig)


class BottleneckMethod(Method[B]):
    """One layer at each chosen sub-layer, after the host's dropout or drop-path."""

    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}
    recipes: ClassVar[dict[str, dict[str, Any]]] = {"vl_t5": {"lr": 3e-4}, "transvg": REC_RECIPE}

    def layer(self, sublayer: SubLayer) -> HubLayer:
        """Return a new layer for `sublayer`."""
        raise NotImplementedError

    def site(self) -> Place:
        return "branch"

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.freeze()
        positions, stacks = self.config.positions(), self.stacks(backbone)
        layers = [layer for stack in stacks for layer in stack]
        chosen = [sublayer for layer in layers for name, sublayer in layer.items() if name in positions]
        if not chosen:
            raise ValueError(f"no sub-layer called {' or '.join(positions)} in the chosen stacks")
        if self.config.gate and any("cross_attention" in layer.sublayers for layer in layers):
            raise ValueError(
                "a gate that averages over tokens would see words of the future: leave the decoder out with `stacks`"
            )
        for sublayer in chosen:
            sublayer.insert(self.site(), place(self.layer(sublayer), sublayer))
        if self.config.train_norms:
            for stack in stacks:
                train(*stack.norms())
        return backbone
