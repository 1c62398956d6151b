"""Adapted layers compute the specification's formulas: outputs, and all gradients.

The authors' files (`test_golden.py`) hold no gradients of single layers, and not every variant on every family; these
tests write files of the same format from the formulas, at other sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from petlbench.methods.lora import LoRA, LoRAConfig
from petlbench.methods.vl_adapter import VLAdapter, VLAdapterConfig
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer

from petlbench.api.sites import Layer, Pass, Projection, Stack, SubLayer
from petlbench.backbones.parts.masks import additive, causal
from petlbench.backbones.parts.transformers_parts import bart_decoder_layer, bart_encoder_layer
from tests.backbone_factory import Bare, bart_config, draw
from tests.golden import FOLDER
from tests.golden.arrays import Arrays, differences
from tests.golden.checks.vl_pet_layers import values
from tests.golden.checks.vl_pet_models import PARTS, Parts, fill, linear_names, parts_of, sublayer_names

Named = dict[str, Tensor]


class Formulas:
    """The specification's formulas on given parameters: an independent second implementation."""

    def __init__(self, parameters: Named, heads: int = 4, *, t5: bool = False) -> None:
        self.p = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        self.heads, self.t5 = heads, t5
        self.seen: Named = {}  # intermediate values by golden name

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.p[f"{name}.W"].T
        return y + self.p[f"{name}.b"] if f"{name}.b" in self.p else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        if self.t5:
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.p[f"{name}.gain"]
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.p[f"{name}.gain"] + self.p[f"{name}.bias"]

    def bottleneck(self, z: Tensor, down: list[str], up: str) -> Tensor:
        a = torch.cat([self.linear(name, z) for name in down], dim=-1)
        gelu = 0.5 * a * (1 + (math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)).tanh())
        return self.linear(up, gelu)

    def adapter(self, prefix: str, h: Tensor) -> Tensor:
        return h + self.bottleneck(h, [f"{prefix}down"], f"{prefix}up")

    def control(self, name: str, x: Tensor, h: Tensor, variant: str, heads: int, scale: float) -> Tensor:
        """Compute VL-PET's u = s G (h + dH)."""
        pet = f"pet_{name}."
        delta = self.bottleneck(h, [f"{pet}down{k}" for k in range(heads)], f"{pet}up")
        m = h + delta
        if variant == "middleY":
            gate = 1 + self.p[f"{pet}gate_vec"]
        elif variant == "large":
            logits = self.bottleneck(x, [f"{pet}gate_down"], f"{pet}gate_up")
        else:
            logits = self.linear(f"{pet}gate", x + m if variant == "middleX" else torch.cat([x, m], dim=-1))
        if variant != "middleY":
            gate = 1 / (1 + (-logits).exp())
            self.seen[f"mid/gate_logits_{name}"] = logits
        u = scale * (gate.sum(1, keepdim=True) / gate.shape[1] if variant == "small" else gate) * m
        self.seen |= {f"mid/h_{name}": h, f"mid/delta_{name}": delta, f"mid/u_{name}": u, f"mid/sum_{name}": x + u}
        return u

    def attend(self, name: str, x: Tensor, memory: Tensor, bias: Tensor, value_adapter: bool = False) -> Tensor:
        value = self.linear(f"{name}.v", memory)
        if value_adapter:
            self.seen["mid/value_frozen"] = value
            value = value + self.bottleneck(memory, ["value_adapter.down"], "value_adapter.up")
            self.seen["mid/value"] = value
        q, k, v = (
            of.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for of in (self.linear(f"{name}.q", x), self.linear(f"{name}.k", memory), value)
        )
        scores = (q if self.t5 else q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
        return self.linear(f"{name}.o", ((scores + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))

    def feed(self, x: Tensor) -> Tensor:
        z = self.linear("ffn.in", x)
        return self.linear("ffn.out", z.clamp_min(0) if self.t5 else 0.5 * z * (1 + torch.erf(z / math.sqrt(2))))

    def residual(self, name: str, x: Tensor, core: Callable[[Tensor], Tensor], change: Callable[..., Tensor]) -> Tensor:
        """Run a sub-layer whose output h becomes change(x, h)."""
        if self.t5:
            return x + change(x, core(self.norm(f"{name}_ln", x)))
        return self.norm(f"{name}_ln", x + change(x, core(x)))


def hidden(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)


def agree(ours: Tensor, formula: Tensor, sides: tuple[Named, Named], parts: Parts) -> None:
    """Check equal outputs, and all gradients of a random functional of them; `sides` holds leaves by name."""
    torch.testing.assert_close(ours, formula, rtol=0, atol=1e-9)
    weight = draw(*formula.shape, seed=9)
    first, second = (
        dict(zip(side, torch.autograd.grad((output * weight).sum(), list(side.values())), strict=True))
        for output, side in zip((ours, formula), sides, strict=True)
    )
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        mine = parts[name].of(gradient) if name in parts else gradient
        torch.testing.assert_close(mine, second[name], rtol=0, atol=1e-9, msg=name)


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


# VL-PET


WIDTH, HEADS, N_H, RANK, GATE_RANK, FFN = 12, 3, 2, 6, 5, 10
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 1]], dtype=torch.bool)  # padding in the middle
BIAS = hidden(MASK)[:, None, None]


def drawn_layer(attentions: tuple[str, ...], ffn: bool, t5: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's own parameters."""
    shapes: dict[str, tuple[int, ...]] = {f"{a}.{p}.W": (WIDTH, WIDTH) for a in attentions for p in "qkvo"}
    shapes |= {"ffn.in.W": (FFN, WIDTH), "ffn.out.W": (WIDTH, FFN)} if ffn else {}
    if not t5:
        shapes |= {f"{name[:-1]}b": shape[:1] for name, shape in shapes.items()}
    norms = [*attentions, *(["ffn"] if ffn else [])]
    return shapes | {f"{n}_ln.{kind}": (WIDTH,) for n in norms for kind in (("gain",) if t5 else ("gain", "bias"))}


def drawn_control(prefix: str, variant: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an encoder module's parameters."""
    linears = {f"down{k}": (RANK // N_H, WIDTH) for k in range(N_H)} | {"up": (WIDTH, RANK)}
    if variant == "large":
        linears |= {"gate_down": (GATE_RANK, WIDTH), "gate_up": (WIDTH, GATE_RANK)}
    elif variant != "middleY":
        linears["gate"] = (1, WIDTH * (2 if variant == "small" else 1))
    shapes = linear_shapes(prefix, linears)
    return shapes | ({f"{prefix}gate_vec": (WIDTH,)} if variant == "middleY" else {})


def linear_shapes(prefix: str, linears: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    weights: dict[str, tuple[int, ...]] = {f"{prefix}{name}.W": shape for name, shape in linears.items()}
    return weights | {f"{prefix}{name}.b": shape[:1] for name, shape in linears.items()}


def drawn(shapes: dict[str, tuple[int, ...]]) -> Named:
    return {name: 0.5 * draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def written(path: Path, meta: dict[str, Any], formulas: Formulas, inputs: Named, y: Tensor) -> Arrays:
    """Write a file in the authors' format, check that ours agrees, and read it with inputs that need gradients."""
    tensors = {f"p/{name}": value for name, value in formulas.p.items()} | inputs | {"out/y": y} | formulas.seen
    plain = {name: value.detach().numpy() for name, value in tensors.items()}
    np.savez(path, meta_json=np.array(json.dumps(meta)), **plain)  # type: ignore[arg-type]
    found = differences(path)
    assert {item.name for item in found} == {"out/y", *formulas.seen}
    assert [f"{item.name} {item.gap:.3g}" for item in found if not item.agrees] == []
    arrays = Arrays(path)
    for name in inputs:
        if name in ("in/x", "in/y", "in/memory"):
            arrays[name] = leaf(arrays[name])
    return arrays


def gradients_agree(arrays: Arrays, formulas: Formulas, inputs: Named, y: Tensor) -> None:
    ours, parts = values(arrays)
    leaves = {name: value for name, value in inputs.items() if value.requires_grad}
    mine = {name: part.parameter for name, part in parts.items()} | {name: arrays[name] for name in leaves}
    agree(ours["out/y"], y, (mine, {**formulas.p, **leaves}), parts)


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("variant", ["large", "middleX", "middleY", "small"])
def test_vl_pet_in_encoder_layers_is_the_formula(variant: str, family: str, tmp_path: Path) -> None:
    t5, scale = family == "t5", 0.3 if family == "t5" else 1.0
    controls = drawn_control("pet_attn.", variant) | drawn_control("pet_ffn.", variant)
    formulas = Formulas(drawn(drawn_layer(("attn",), True, t5) | controls), HEADS, t5=t5)
    inputs = {"in/x": leaf(draw(2, 5, WIDTH, seed=50)), "in/mask": MASK.double()}
    bias = BIAS
    if t5:
        bias = inputs["in/attn_bias"] = draw(2, HEADS, 5, 5, seed=51) + BIAS.clamp_min(-1e4)
    cores = {"attn": lambda z: formulas.attend("attn", z, z, bias), "ffn": formulas.feed}
    x = inputs["in/x"]
    for name, core in cores.items():
        formulas.seen[f"mid/x_{name}"] = x
        change = lambda x, h, name=name: formulas.control(name, x, h, variant, N_H, scale)  # noqa: E731
        x = formulas.residual(name, x, core, change)
    sizes = {"d": WIDTH, "heads_attn": HEADS, "N_h": N_H, "r": RANK, "r_gate": GATE_RANK, "s": scale}
    path = tmp_path / f"vlpet_{variant}_{'t5_block' if t5 else 'bart_layer'}.npz"
    arrays = written(path, {"variant": variant} | sizes, formulas, inputs, x)
    gradients_agree(arrays, formulas, inputs, x)


def unchanged(x: Tensor, h: Tensor) -> Tensor:
    return h


@pytest.mark.parametrize("kind", ["bart_declayer", "t5_crosslayer"])
def test_vl_pets_value_adapter_is_the_formula(kind: str, tmp_path: Path) -> None:
    """Runs a whole decoder layer of BART, and T5's cross-attention alone."""
    t5 = kind == "t5_crosslayer"
    shapes = drawn_layer(("cross",) if t5 else ("self", "cross"), not t5, t5)
    shapes |= linear_shapes("value_adapter.", {"down": (RANK, WIDTH), "up": (WIDTH, RANK)})
    formulas = Formulas(drawn(shapes), HEADS, t5=t5)
    y = leaf(draw(2, 3, WIDTH, seed=50))
    inputs = {"in/y": y, "in/memory": leaf(draw(2, 5, WIDTH, seed=51)), "in/memory_mask": MASK.double()}
    past = hidden(torch.ones(3, 3, dtype=torch.bool).tril())
    if not t5:
        y = formulas.residual("self", y, lambda z: formulas.attend("self", z, z, past), unchanged)

    def across(z: Tensor) -> Tensor:
        h = formulas.attend("cross", z, inputs["in/memory"], BIAS, value_adapter=True)
        formulas.seen["mid/cross_out"] = h
        return h

    y = formulas.residual("cross", y, across, unchanged)
    if not t5:
        y = formulas.residual("ffn", y, formulas.feed, unchanged)
    meta = {"d": WIDTH, "heads_attn": HEADS, "r": RANK, "scale": 1.0}
    arrays = written(tmp_path / f"vlpet_value_adapter_{kind}.npz", meta, formulas, inputs, y)
    gradients_agree(arrays, formulas, inputs, y)


# VL-Adapter and LoRA, on the authors' values


def golden(name: str) -> Arrays:
    return Arrays(FOLDER / "vl_pet_family" / f"{name}.npz")


@pytest.mark.parametrize("kind", ["enclayer", "declayer"])
def test_vl_adapter_in_bart_layers_is_the_formula(kind: str) -> None:
    arrays, encoder = golden(f"vladapter_single_bart_{kind}"), kind == "enclayer"
    width, heads = arrays.meta["d"], arrays.meta["heads_attn"]
    config = bart_config(width, heads, ffn=len(arrays["p/ffn.in.W"]))
    layer = bart_encoder_layer(BartEncoderLayer(config)) if encoder else bart_decoder_layer(BartDecoderLayer(config, 0))
    backbone = Bare(encoder=Stack([layer], width=width)).double().eval()
    VLAdapter(VLAdapterConfig(reduction=width // arrays.meta["r"])).adapt(backbone)
    backbone.requires_grad_(True)
    names: dict[str, nn.Parameter] = {}
    for ours, theirs in PARTS["enc" if encoder else "dec"].items():
        adapter: Any = next(layer[ours].sites["output"].children())
        names |= sublayer_names(layer[ours], theirs)
        for side in ("down", "up"):
            names |= linear_names(getattr(adapter, side), f"adapter_{theirs}.{side}")
    parts, formulas = parts_of(names), Formulas(arrays.under("p/"), heads)
    fill(parts, arrays.under("p/"))
    inputs = [name for name in arrays if name in ("in/x", "in/y", "in/memory")]
    own, other = ({name: leaf(arrays[name]) for name in inputs} for _ in range(2))
    seen = arrays["in/mask" if encoder else "in/memory_mask"].bool()
    bias, y = hidden(seen)[:, None, None], other[inputs[0]]
    past = hidden(torch.ones(y.shape[1], y.shape[1], dtype=torch.bool).tril())
    context = Pass(bias=additive(seen, torch.float64))
    cores: dict[str, Callable[[Tensor], Tensor]] = {"attn": lambda z: formulas.attend("attn", z, z, bias)}
    if not encoder:
        ids = torch.zeros(y.shape[:2])
        looking = {"memory": own["in/memory"], "memory_bias": additive(seen, torch.float64)}
        context = Pass(bias=causal(ids, 0, torch.float64), **looking)  # type: ignore[arg-type]
        cores = {
            "self": lambda z: formulas.attend("self", z, z, past),
            "cross": lambda z: formulas.attend("cross", z, other["in/memory"], bias),
        }
    for name, core in {**cores, "ffn": formulas.feed}.items():
        y = formulas.residual(name, y, core, lambda _, h, name=name: formulas.adapter(f"adapter_{name}.", h))
    torch.testing.assert_close(y, arrays["out/y"], rtol=0, atol=1e-9)
    ours_y, _ = backbone.stack("encoder").run(own[inputs[0]], context)
    agree(ours_y, y, ({**names, **own}, {**formulas.p, **other}), parts)


class Query(nn.Module):
    """A core of one projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        return self.q(x)


def test_lora_is_the_formula() -> None:
    arrays = golden("lora_single_linear")
    meta, width = arrays.meta, arrays["p/W"].shape[1]
    core = Query(width)
    projections = {"q": Projection(core, "q")}
    sublayer = SubLayer(core, nn.Identity(), nn.Identity(), width=width, pre_norm=True, projections=projections)
    backbone = Bare(encoder=Stack([Layer(attention=sublayer)], width=width)).double()
    LoRA(LoRAConfig(rank=meta["r"], alpha=meta["alpha"], dropout=meta["dropout"])).adapt(backbone)
    backbone.eval().requires_grad_(True)
    beside: Any = core.q
    names = {"W": beside.base.weight, "b": beside.base.bias, "A": beside.path.A, "B": beside.path.B}
    parts, p = parts_of(names), Formulas(arrays.under("p/")).p
    fill(parts, arrays.under("p/"))
    x, again = leaf(arrays["in/x"]), leaf(arrays["in/x"])
    site = (0, "attention", "output")
    taps = backbone.stack("encoder").run(x, Pass(), taps=[site])[1]
    formula = again @ p["W"].T + p["b"] + meta["scaling"] * (again @ p["A"].T) @ p["B"].T
    agree(taps[site], formula, ({**names, "x": x}, {**p, "x": again}), parts)
