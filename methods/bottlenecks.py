"""The classical bottleneck adapters, on one general layer: Houlsby, Pfeiffer, and the parallel adapter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.backbones.base import Backbone
from petlbench.backbones.sites import Place, SubLayer, current_pass, mean_of_real
from petlbench.method import About, Knob, Method, StackedConfig, place, train

from .layers import REC_RECIPE, Bottleneck, draw_like_bart, draw_like_lora, reduced

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
}

# The options' meaning and range stand here once; each method has its own defaults.
Reduction = Annotated[int, Field(gt=0, description="bottleneck rank = width // reduction, at least 1")]
Phi = Annotated[Literal["relu", "silu", "gelu", "gelu_tanh"], Field(description="the bottleneck's activation")]
Scale = Annotated[
    Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["learned", "learned_vector"],
    Field(description="of the branch: a number, or learned from 1 on as one number or as one for each channel"),
]
Init = Annotated[
    Literal["normal", "truncated", "zero"],
    Field(
        description="both weights normal, or normal and cut at two standard deviations; or down Kaiming-uniform and up "
        "0, so that the branch starts at 0. Biases start at 0"
    ),
]
Deviation = Annotated[float, Field(gt=0, description="standard deviation of init `normal` and `truncated`")]
Rate = Annotated[float, Field(ge=0, lt=1)]
InAttention = Annotated[bool, Field(description="adapters at self-attention")]
NormBefore = Annotated[bool, Field(description="the bottleneck reads what the host's norm makes of the residual sum")]
NormAfter = Annotated[bool, Field(description="the host's addition and norm come after the adapter, as they would")]
Residual = Annotated[
    Literal["before", "post_add", "after"],
    Field(description="what the branch is added to: the value before addition and norm, their sum, or that after both"),
]


class BottleneckConfig(StackedConfig):
    """What every bottleneck of this kind can have; the defaults are those of the adapters library."""

    reduction: Reduction = 16
    rank: int | None = Field(None, gt=0, description="the same rank at every width, in place of `reduction`")
    activation: Phi = "relu"
    scale: Scale = 1.0
    norm_in: bool = Field(False, description="a norm of its own on what the bottleneck reads")
    norm_out: bool = Field(False, description="a norm of its own on the scaled branch")
    gate: bool = Field(False, description="the branch times mean over tokens of sigmoid(w q + b); not in decoders")
    mask_gate: bool = Field(
        True, description="that mean leaves padding out; the library's counts it, so that scores depend on the batch"
    )
    inner_dropout: Rate = Field(0.0, description="on the bottleneck's activation")
    dropout: Rate = Field(0.0, description="on the scaled branch")
    drop_path: Rate = Field(0.0, description="chance that a sample goes without the branch, in training")
    init: Init = "normal"
    init_std: Deviation = 0.02
    attention: InAttention = False
    cross_attention: bool = Field(False, description="adapters at cross-attention")
    ffn: bool = Field(True, description="adapters at the feed-forward network")
    train_norms: bool = Field(False, description="norms of the adapted stacks train too, gains and biases")

    @model_validator(mode="after")
    def _goes_somewhere(self) -> Self:
        if not self.positions():
            raise ValueError("of attention, cross_attention and ffn at least one must be true")
        return self

    def positions(self) -> tuple[str, ...]:
        """The sub-layers it goes into."""
        return tuple(name for name in ("attention", "cross_attention", "ffn") if getattr(self, name))


class SerialConfig(BottleneckConfig):
    """How the bottleneck stands to the host's residual addition and norm, besides."""

    norm_before: NormBefore = False
    norm_after: NormAfter = True
    residual: Residual = "before"
    residual_before_norm: bool = Field(False, description="with `norm_out`: it takes in the adapter's residual too")

    @model_validator(mode="after")
    def _can_be_computed(self) -> Self:
        if self.residual == "post_add" and not self.norm_before:
            raise ValueError("residual 'post_add' is the sum that norm_before computes: set norm_before too")
        if not self.norm_after and (not self.norm_before or self.residual != "after"):
            raise ValueError("norm_after: false needs norm_before: true and residual 'after', or the stream is lost")
        if self.residual_before_norm and not self.norm_out:
            raise ValueError("residual_before_norm says where norm_out stands: set norm_out too")
        return self


class HubLayer(nn.Module):
    """u = q + LN_out( g(q) drop( s bn( LN_in(q) ) ) ), q the value at the site; (B, N, width) -> (B, N, width).

    bn is a bottleneck, g(q) = mean over tokens of sigmoid(w q + b), in (0, 1), one for each sample. s, g, both norms
    and the dropouts are there where asked for. This is the general layer of the adapters library.
    """

    def __init__(self, width: int, options: BottleneckConfig, *, norm_takes_residual: bool = False) -> None:
        super().__init__()
        rank = options.rank or reduced(width, options.reduction)
        phi = ACTIVATIONS[options.activation]()
        if options.inner_dropout:
            phi = nn.Sequential(phi, nn.Dropout(options.inner_dropout))
        self.bottleneck = Bottleneck(width, rank, phi)
        draw(self.bottleneck, options.init, options.init_std)
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
        """The branch that reads q, and the residual."""
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
        """(B, N, 1) -> (B, 1, 1): their mean over tokens."""
        mask = current_pass().mask if self.mask_gate else None
        if mask is None:
            return gates.mean(1, keepdim=True)
        return mean_of_real(gates, mask).unsqueeze(1)


class ParallelLayer(HubLayer):
    """The same with q = x, the sub-layer's residual input: u = value + LN_out(...)."""

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        return self.add(x, value)


class SumLayer(HubLayer):
    """The same with q = norm(x + value), by the host's own norm, or q = x + value in a pre-norm host."""

    def __init__(self, host: SubLayer, options: SerialConfig) -> None:
        super().__init__(host.width, options, norm_takes_residual=options.residual_before_norm)
        self._host = (host,)  # in a tuple, so that the host's parameters keep their one name
        self.residual = options.residual

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        (host,) = self._host
        total = x + value
        q = total if host.pre_norm else host.norm(total)
        if self.residual == "before":
            return self.add(q, value)
        return self.add(q, total if self.residual == "post_add" else q)


def draw(bottleneck: Bottleneck, init: str, std: float) -> None:
    """Both weights as `init` says, see its description; biases 0."""
    if init == "zero":
        draw_like_lora(bottleneck)
        return
    for linear in (bottleneck.down, bottleneck.up):
        if init == "normal":
            nn.init.normal_(linear.weight, std=std)
        else:
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(linear.bias)


class BottleneckMethod(Method):
    """A layer of its own at each of the chosen sub-layers, after the host's dropout or drop-path."""

    recipe: ClassVar[dict[str, Any]] = {"lr": 1e-3}
    recipes: ClassVar[dict[str, dict[str, Any]]] = {"vl_t5": {"lr": 3e-4}, "transvg": REC_RECIPE}

    def layer(self, sublayer: SubLayer) -> HubLayer:
        """What goes into `sublayer`."""
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
                "a gate that averages over tokens would see words yet to be decoded: leave the decoder out, by `stacks`"
            )
        for sublayer in chosen:
            sublayer.insert(self.site(), place(self.layer(sublayer), sublayer))
        if self.config.train_norms:
            for stack in stacks:
                train(*stack.norms())
        return backbone


class SerialAdapter(BottleneckMethod):
    """A bottleneck after a sub-layer, in any order with the host's residual addition and norm."""

    def __init__(self, config: SerialConfig | None = None) -> None:
        super().__init__(config)
        c = self.config
        unmoved = not self._sums() or c.residual == "before"  # the branch's residual is the site's own value
        self.identity = c.init == "zero" and unmoved and not c.residual_before_norm

    def _sums(self) -> bool:
        return bool(self.config.norm_before and self.config.norm_after)

    def site(self) -> Place:
        return "branch" if self.config.norm_after else "normed"

    def layer(self, sublayer: SubLayer) -> HubLayer:
        # With norm_before and without norm_after, what is read is the value at the place `normed` itself.
        c = self.config
        if self._sums():
            return SumLayer(sublayer, c)
        return HubLayer(sublayer.width, c, norm_takes_residual=c.residual_before_norm)


class HoulsbyConfig(SerialConfig):
    """Sizes, initial values and order; the defaults are the adapters library's `double_seq_bn`."""

    activation: Phi = "silu"
    attention: InAttention = True


class Houlsby(SerialAdapter):
    """After self-attention and feed-forward network, z = drop(h): u = z + U phi(D z + b_D) + b_U; then x + u, norm.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (ICML 2019). `hub`, the default, is what the
    adapters library calls by this name: phi = SiLU, rank d/16, weights N(0, 0.02^2), nothing else trains. `paper` is
    the authors' code: phi = GELU (tanh form), rank 64 at width 768, weights normal with std 1e-3 cut at two of them
    (their paper says 1e-2), and all norms train, that of the embeddings included.

    Host dropout comes before the adapter; VL-Adapter has it after. Neither starts at the pre-trained function. Here:
    no adapter at cross-attention, as in the library, unless asked for; the gate's mean leaves padding out. There are
    no vision-language settings of the authors': rates are VL-Adapter's, and TransVG's where it is the host.
    """

    Config = HoulsbyConfig
    about = About(
        paper="Houlsby et al., ICML 2019",
        trains="bottlenecks after self-attention and FFN; paper: norms too",
        verified="adapters library: layers, gradients, counts",
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "hub": {},
        "paper": {
            "activation": "gelu_tanh",
            "reduction": 12,
            "init": "truncated",
            "init_std": 0.001,
            "train_norms": True,
        },
    }
    knob = Knob("reduction", (48, 24, 16, 8, 4, 2))


class PfeifferConfig(SerialConfig):
    """Sizes, initial values and order; the defaults are the adapters library's `seq_bn`."""

    norm_before: NormBefore = True


class Pfeiffer(SerialAdapter):
    """After the feed-forward network, z = drop(h): u = z + U relu(D q + b_D) + b_U, q = norm(x + z); then x + u, norm.

    Pfeiffer et al., "AdapterFusion" (EACL 2021), as the adapters library has it: the host's norm is applied twice, and
    a pre-norm host, which has none in that place, gives q = x + z, the raw stream. `plus` is Adapter+ (Steitz and
    Roth, CVPR 2024): y = q + s bn(q) after the norm, s one number for each channel, GELU, rank 8 at width 768, weights
    normal with std 0.01 cut at two of them, drop-path 0.1 on the branch. Neither starts at the pre-trained function.

    Here residual `post_add` works in a pre-norm host too, where the library fails; it counts x twice, as it does
    anywhere. Rates as for `houlsby`.
    """

    Config = PfeifferConfig
    about = About(
        paper="Pfeiffer et al., EACL 2021",
        trains="bottlenecks after FFN, behind the host's norm",
        verified="adapters library: layers, gradients, counts",
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "seq": {},
        "plus": {
            "norm_after": False,
            "residual": "after",
            "activation": "gelu",
            "reduction": 96,
            "scale": "learned_vector",
            "drop_path": 0.1,
            "init": "truncated",
            "init_std": 0.01,
        },
    }
    knob = Knob("reduction", (96, 48, 24, 16, 8, 4, 2))


class ParallelConfig(BottleneckConfig):
    """Sizes, scale and initial values; the defaults are the adapters library's `par_bn`."""

    reduction: Reduction = 2
    scale: Scale = 4.0
    init: Init = "zero"


class ParallelAdapter(BottleneckMethod):
    """Beside the feed-forward network, z = drop(h): u = z + s (U relu(D x + b_D) + b_U), x its residual input.

    He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning" (ICLR 2022), as the adapters library
    has it: s = 4, rank d/2; identity at the start. `scaled`: s is one number that is learned, from 1 on. Rates as for
    `houlsby`.
    """

    Config = ParallelConfig
    about = About(
        paper="He et al., ICLR 2022",
        trains="bottlenecks beside FFN; scaled: one scale each",
        verified="adapters library: layers, gradients, counts",
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {"fixed": {}, "scaled": {"scale": "learned"}}
    knob = Knob("reduction", (48, 24, 12, 8, 4, 2))

    def __init__(self, config: ParallelConfig | None = None) -> None:
        super().__init__(config)
        self.identity = self.config.init == "zero"

    def layer(self, sublayer: SubLayer) -> HubLayer:
        return ParallelLayer(sublayer.width, self.config)
