"""VL-PET's modules in single layers of BART and T5."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from petlbench.methods.vl_pet import VLPET, GranularityControl, VLPETConfig
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer
from transformers.models.t5.modeling_t5 import T5Block

from petlbench.api.sites import Layer, Pass, Stack, Taps
from petlbench.backbones.parts.masks import additive, causal
from petlbench.backbones.parts.t5 import T5Sizes
from petlbench.backbones.parts.transformers_parts import (
    bart_decoder_layer,
    bart_encoder_layer,
    t5_decoder_layer,
    t5_encoder_layer,
)
from tests.backbone_factory import Bare, bart_config
from tests.golden.arrays import Arrays, Difference, difference
from tests.golden.checks.vl_pet_models import (
    PARTS,
    Parts,
    control_names,
    double_norm,
    fill,
    parts_of,
    sublayer_names,
    value_names,
)

Named = dict[str, Tensor]
DEFINED = re.compile(r"mid/((h|delta|gate_logits|u|sum|x)_(attn|ffn)|value_frozen|value|cross_out)")


def check(arrays: Arrays) -> Iterator[Difference]:
    """Compare outputs and intermediate values of an encoder layer, a decoder layer or T5's cross-attention alone."""
    with torch.no_grad():
        ours, _ = values(arrays)
    for name, theirs in arrays.items():
        if name.startswith("out/") or DEFINED.fullmatch(name):
            yield difference(name, ours.get(name), theirs)


def values(arrays: Arrays) -> tuple[Named, Parts]:
    """Return our values by their names in the files, and their parameters. Raises ValueError for other files."""
    run = next((function for kind, function in KINDS.items() if kind in arrays.name), None)
    if run is None:
        raise ValueError(f"no layer of this kind: there are {', '.join(KINDS)}")
    with double_norm():
        return run(arrays)


def _t5(arrays: Arrays, decoder: bool) -> T5Block:
    width, heads = arrays.meta["d"], arrays.meta["heads_attn"]
    query = next(value for key, value in arrays.items() if key.endswith("q.W"))
    ffn = len(arrays["p/ffn.in.W"]) if "p/ffn.in.W" in arrays else 1
    config = T5Sizes(
        vocabulary=3, width=width, encoder_layers=1, decoder_layers=1, heads=heads, head_width=len(query) // heads,
        ffn=ffn, dropout=0.0,
    ).config()  # fmt: skip
    config.is_decoder = decoder
    return T5Block(config, has_relative_attention_bias=False, layer_idx=0)


def _adapted(layer: Layer, arrays: Arrays) -> Stack:
    """Build a stack of one layer with VL-PET, at the file's sizes."""
    meta = arrays.meta
    encoder = "variant" in meta
    config = VLPETConfig(
        variant=meta.get("variant", "large"),
        rank=meta["r"],
        value_rank=meta["r"],
        gate_rank=meta.get("r_gate"),
        heads=meta["N_h"] if encoder else 1,
        scale=meta["s"] if encoder else 1.0,
        mask_gate=False,
    )
    backbone = Bare(encoder=Stack([layer], width=meta["d"])).double().eval()
    VLPET(config).adapt(backbone)
    return backbone.double().requires_grad_(True).stack("encoder")  # the checks need gradients of everything


def _watch(module: nn.Module, seen: dict[str, Any], name: str) -> None:
    """Record the module's input and output."""
    module.register_forward_hook(lambda _, given, made: seen.update({name: (given, made)}))


def encoder_layer(arrays: Arrays) -> tuple[Named, Parts]:
    """Return all values around both encoder modules."""
    bart = "bart" in arrays.name
    sizes = (arrays.meta["d"], arrays.meta["heads_attn"], len(arrays["p/ffn.in.W"]))
    layer = bart_encoder_layer(BartEncoderLayer(bart_config(*sizes))) if bart else t5_encoder_layer(_t5(arrays, False))
    stack = _adapted(layer, arrays)
    parts, seen = parts_of({}), {}
    for ours, theirs in PARTS["enc"].items():
        parts |= parts_of(sublayer_names(layer[ours], theirs))
        parts |= control_names(layer[ours], f"pet_{theirs}", arrays.meta["N_h"])
        _watch(next(layer[ours].sites["output"].children()), seen, ours)
    fill(parts, arrays.under("p/"))
    mask = arrays["in/mask"].bool()
    bias = arrays.get("in/attn_bias", additive(mask, torch.float64))
    y, _ = stack.run(arrays["in/x"], Pass(mask=mask, bias=bias))
    found = {"out/y": y}
    for ours, theirs in PARTS["enc"].items():
        (x, h), u = seen[ours]
        (control,) = layer[ours].sites["output"].children()
        assert isinstance(control, GranularityControl)
        delta = control.change(h)
        values = {"x": x, "h": h, "delta": delta, "u": u, "sum": x + u}
        if hasattr(control.gate, "logits"):
            values["gate_logits"] = control.gate.logits(x, h + delta)  # type: ignore[operator]
        found |= {f"mid/{name}_{theirs}": value for name, value in values.items()}
    return found, parts


def _run_decoder(arrays: Arrays, layer: Layer, places: dict[str, str], context: Pass, x: Tensor) -> tuple[Named, Parts]:
    """Return the values around the value adapter; `places` maps our sub-layers to theirs."""
    stack = _adapted(layer, arrays)
    parts, seen = parts_of(value_names(layer["cross_attention"], "value_adapter")), {}
    for ours, theirs in places.items():
        parts |= parts_of(sublayer_names(layer[ours], theirs))
    fill(parts, arrays.under("p/"))
    (value,) = layer["cross_attention"].projections["v"].singles()
    beside: Any = getattr(value.owner, value.name)
    _watch(beside, seen, "value")
    _watch(beside.base, seen, "value_frozen")
    taps: Taps
    y, taps = stack.run(x, context, taps=[(0, "cross_attention", "output")])
    made = {f"mid/{name}": output for name, (_, output) in seen.items()}
    return made | {"out/y": y, "mid/cross_out": taps[0, "cross_attention", "output"]}, parts


def decoder_layer(arrays: Arrays) -> tuple[Named, Parts]:
    """Run BART's decoder layer, with causal self-attention."""
    sizes = (arrays.meta["d"], arrays.meta["heads_attn"], len(arrays["p/ffn.in.W"]))
    layer = bart_decoder_layer(BartDecoderLayer(bart_config(*sizes), 0))
    x = arrays["in/y"]
    return _run_decoder(arrays, layer, PARTS["dec"], _looking(arrays, bias=causal(x[..., 0], 0, x.dtype)), x)


def cross_layer(arrays: Arrays) -> tuple[Named, Parts]:
    """Run T5's cross-attention, norm and residual addition included."""
    layer = Layer(cross_attention=t5_decoder_layer(_t5(arrays, True))["cross_attention"])
    (prefix,) = (key.removeprefix("p/").removesuffix(".q.W") for key in arrays if key.endswith(".q.W"))
    others = ("memory", "mask", "bias")
    (x,) = (value for key, value in arrays.under("in/").items() if not any(word in key for word in others))
    return _run_decoder(arrays, layer, {"cross_attention": prefix}, _looking(arrays), x)


def _looking(arrays: Arrays, **more: Any) -> Pass:
    """Return a pass that attends to the file's memory."""
    memory, given = arrays["in/memory"], arrays.under("in/")
    bias = next((value for key, value in given.items() if "bias" in key), None)
    mask = next((value.bool() for key, value in given.items() if "mask" in key), None)
    if bias is None and mask is not None:
        bias = additive(mask, memory.dtype)
    return Pass(memory=memory, memory_mask=mask, memory_bias=bias, **more)


KINDS: dict[str, Callable[[Arrays], tuple[Named, Parts]]] = {
    "bart_layer": encoder_layer,
    "t5_block": encoder_layer,
    "bart_declayer": decoder_layer,
    "t5_crosslayer": cross_layer,
}
