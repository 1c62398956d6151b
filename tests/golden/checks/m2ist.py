"""Golden files of M2IST and TransVG: adapters, layers, a whole model, and helpers for referring expressions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from petlbench.methods.m2ist.method import M2IST, M2ISTConfig
from petlbench.methods.m2ist.side import Adapters, SideStack, paired_layers
from petlbench.tasks.rec import corners, generalised_iou
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertLayer

from petlbench.api.backbone import Backbone
from petlbench.api.sites import IMAGE, TEXT, Pass, Stack
from petlbench.api.tokens import Tokens, plain_tokens
from petlbench.backbones.parts.bert import bert_config, bert_layer
from petlbench.backbones.parts.detr import detr_sine_positions, detr_stack
from petlbench.backbones.parts.masks import additive
from petlbench.backbones.transvg import BoxHead, TransVG, TransVGConfig
from petlbench.metrics.boxes import acc_at, iou_cxcywh
from tests.backbone_factory import Bare
from tests.golden.arrays import SINGLE, TOLERANCE, Arrays, Difference, difference

Values = Mapping[str, Tensor]
BY_ROLE = {"Wq": "q", "bq": "q", "Wk": "k", "bk": "k", "Wv": "v", "bv": "v", "Wo": "o", "bo": "o"}


class Names(dict[str, nn.Parameter]):
    """Our parameters by their golden names."""

    def linear(self, name: str, module: Any) -> None:
        self[f"{name}.W"], self[f"{name}.b"] = module.weight, module.bias

    def norm(self, name: str, module: Any) -> None:
        self[f"{name}.gamma"], self[f"{name}.beta"] = module.weight, module.bias

    @torch.no_grad()
    def fill(self, values: Values) -> None:
        """Fill every parameter from its array. Raises KeyError if an array is missing."""
        for name, parameter in self.items():
            if parameter.shape != values[name].shape:
                raise ValueError(f"{name} is {tuple(values[name].shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(values[name])


def layers_of(stack: Stack, prefix: str = "{i}.") -> Names:
    """Return the frozen parameters of a stack's layers."""
    names = Names()
    for i, layer in enumerate(stack):
        at, attention, ffn = prefix.format(i=i), layer["attention"], layer["ffn"]
        linears: dict[str, Any] = {f"attn.{key}": attention.projections[role] for key, role in BY_ROLE.items()}
        linears |= {f"ffn.{kind}{n}": ffn.projections[role] for kind in "Wb" for n, role in ((1, "in"), (2, "out"))}
        for key, projection in linears.items():
            linear = projection.linear
            names[at + key] = linear.weight if key.split(".")[1][0] == "W" else linear.bias
        names.norm(at + "ln1", attention.norm), names.norm(at + "ln2", ffn.norm)
    return names


def fill(stack: Stack, values: Values, prefix: str = "{i}.") -> dict[str, nn.Parameter]:
    """Copy golden values into a stack's layers; return the parameters by their golden names."""
    names = layers_of(stack, prefix)
    names.fill(values)
    return names


def adapters_of(adapters: Adapters, letter: str, at: str = "") -> Names:
    """Return the parameters of VEA (`v`) or LEA (`l`), and of IEA without its shared part."""
    names, intra, inter = Names(), f"{at}{'VEA' if letter == 'v' else 'LEA'}", f"{at}IEA_{letter}"
    names.norm(f"{intra}.ln", adapters.intra.norm)
    names.linear(f"{intra}.down", adapters.intra.bottleneck.down)
    names.linear(f"{intra}.up", adapters.intra.bottleneck.up)
    names.linear(f"{inter}.down", adapters.inter.down)
    if adapters.inter.unique is not None:
        names.linear(f"{inter}.unique_up", adapters.inter.unique)
    return names


def bert_layers(width: int, heads: int, ffn: int, layers: int, twice: int) -> Stack:
    sizes = bert_config(vocabulary=5, width=width, layers=1, heads=heads, ffn=ffn, positions=5, dropout=0.1)
    built = [bert_layer(BertLayer(sizes), twice=i < twice) for i in range(layers)]
    return Stack(built, width=width)


def check(arrays: Arrays) -> Iterator[Difference]:
    """Compare every output and gradient of one file."""
    kinds = {"adapters": _adapters, "vision_layer": _vision_layer, "text_layer": _text_layer, "rec_utils": _rec_utils}
    named = next((kind for name, kind in kinds.items() if arrays.name.startswith(name)), _model)
    yield from named(arrays)


def _loaded(names: Names, arrays: Arrays, others: set[str]) -> None:
    """Check that every array is a parameter, or one of `others` (inputs, outputs and gradients)."""
    names.fill(arrays)
    if left := [name for name in arrays if name not in names and name not in others and not name.startswith("grad.")]:
        raise ValueError(f"arrays that nothing here is: {', '.join(left)}")


def _options(meta: Mapping[str, Any], **more: Any) -> M2ISTConfig:
    return M2ISTConfig(rank=meta["r"], shared=meta["c_s"], scale=meta["scale"], **more)


def _side(backbone: Backbone, role: str) -> SideStack:
    stack = backbone.stack(role)
    assert isinstance(stack, SideStack)
    return stack


def _adapted(vision: Stack, text: Stack, meta: Mapping[str, Any]) -> Backbone:
    """Build the released method on two towers of one layer."""
    bare = Bare(vision=vision, text=text)
    bare.abilities = frozenset({"fuse"})
    return M2IST(_options(meta)).adapt(bare).double().eval()


def _kind(adapted: Backbone, role: str) -> Adapters:
    return next(_side(adapted, role).side.adapters())


def _adapters(arrays: Arrays) -> Iterator[Difference]:
    meta = arrays.meta
    vision, text = detr_stack(meta["d_v"], 1, 1, 4, 0.0), bert_layers(meta["d_l"], 1, 4, 1, twice=1)
    adapted = _adapted(vision, text, meta)
    image, words = _kind(adapted, "vision"), _kind(adapted, "text")
    names = Names()
    for letter, adapters in (("v", image), ("l", words)):
        names |= {k: p for k, p in adapters_of(adapters, letter).items() if not k.startswith("IEA")}
    names.linear("IEA.shared_up", image.inter.shared)
    _loaded(names, arrays, {"x_v", "x_l", "u", "VEA_out", "LEA_out", "shared_up_out"})
    found = {
        "VEA_out": image.intra(arrays["x_v"]),
        "LEA_out": words.intra(arrays["x_l"]),
        "shared_up_out": words.inter.shared(arrays["u"]),
    }
    for name, value in found.items():
        yield difference(name, value, arrays[name])


def _vision_layer(arrays: Arrays) -> Iterator[Difference]:
    meta = arrays.meta
    width = meta["d_v"]
    stack = detr_stack(width, 1, meta["heads"], meta["d_ff"], 0.1)
    adapted = _adapted(stack, bert_layers(width, 1, 4, 1, twice=1), meta)
    adapters = _kind(adapted, "vision")
    names = Names({**layers_of(stack, ""), **adapters_of(adapters, "v")})
    names.linear("IEA.shared_up", adapters.inter.shared)
    outputs = {"tap_attn", "tap_ffn", "layer_out", "IEA_v_out", "VEA_out"}
    _loaded(names, arrays, outputs | {"x", "pos", "key_padding"})
    x, positions = (arrays[name].transpose(0, 1) for name in ("x", "pos"))
    tokens = plain_tokens(x, ~arrays["key_padding"], IMAGE)
    context = tokens.context(bias=additive(tokens.mask, x.dtype), positions=positions)
    found = _layer(adapted, "vision", x, context, "output", ("IEA_v_out", "VEA_out"))
    for name, value in found.items():
        yield difference(name, value.transpose(0, 1), arrays[name])


def _text_layer(arrays: Arrays) -> Iterator[Difference]:
    meta = arrays.meta
    width = meta["d_l"]
    stack = bert_layers(width, meta["heads"], meta["d_ff"], 1, twice=1)
    adapted = _adapted(detr_stack(meta["c_s"], 1, 1, 4, 0.0), stack, meta)
    adapters = _kind(adapted, "text")
    names = Names({**layers_of(stack, ""), **adapters_of(adapters, "l")})
    names.linear("IEA.shared_up", adapters.inter.shared)
    outputs = {"tap_attn", "tap_ffn", "ffn_in", "layer_out", "IEA_l_out", "LEA_out"}
    _loaded(names, arrays, outputs | {"x", "token_mask"})
    entered: list[Tensor] = []
    hook = next(iter(stack))["ffn"].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    tokens = plain_tokens(arrays["x"], arrays["token_mask"].bool(), TEXT)
    context = tokens.context(bias=additive(tokens.mask, torch.float64))
    found = _layer(adapted, "text", arrays["x"], context, "normed", ("IEA_l_out", "LEA_out"))
    hook.remove()
    for name, value in {**found, "ffn_in": entered[0]}.items():
        yield difference(name, value, arrays[name])


def _layer(
    adapted: Backbone, role: str, x: Tensor, context: Pass, tap: Any, terms: tuple[str, str]
) -> dict[str, Tensor]:
    """Return the outputs of one layer and of the adapters beside it, by golden name."""
    stack = _side(adapted, role)
    attention, ffn, out = (0, "attention", tap), (0, "ffn", "output"), (0, "ffn", "normed")
    _, taps = stack.run(x, context, taps=[attention, ffn, out])  # type: ignore[list-item]
    inter, intra = next(stack.terms(taps, context.segments))
    found = {"tap_attn": taps[attention], "tap_ffn": taps[ffn], "layer_out": taps[out]}  # type: ignore[index]
    return found | dict(zip(terms, (inter, intra), strict=True))


def _twice(arrays: Arrays) -> bool:
    """Return whether the file's BERT applies residual and norm twice; a `clean` file's never does."""
    return bool(arrays.meta.get("bert_double_ln_in_paired_layers", True)) and "clean" not in arrays.name


def transvg(arrays: Arrays) -> tuple[TransVG, Names]:
    """Build an unfilled TransVG of the file's sizes in double precision, and its parameters by golden name."""
    meta, fusion = arrays.meta, arrays["VL.pos"]
    config = TransVGConfig(
        image_size=64, resnet_blocks=(1, 1, 1, 1), resnet_channels=4, width=meta["d_v"],
        vision_layers=meta["v_layers"], fusion_layers=meta["vl_layers"], heads=meta["v_heads"], ffn=meta["ff_v"],
        bert_width=meta["d_l"], bert_layers=meta["l_layers"], bert_heads=meta["l_heads"], bert_ffn=meta["ff_l"],
        vocabulary=len(arrays["E.word"]), max_positions=len(arrays["E.position"]),
        text_length=arrays["token_ids"].shape[1], weights="none", released=_twice(arrays),
    )  # fmt: skip
    backbone = TransVG(config)
    backbone.stacks["fusion"] = detr_stack(meta["d_joint"], meta["vl_layers"], meta["vl_heads"], meta["ff_vl"], 0.1)
    if not meta.get("token_type_embeddings", False):
        backbone.bert.words.types = None
    backbone.positions = nn.Parameter(torch.empty_like(fusion))  # the golden grid is not square
    names = Names({"VL.pos": backbone.positions, "VL.reg": backbone.reg})
    for role, letter in (("vision", "V"), ("text", "T"), ("fusion", "VL")):
        names |= layers_of(backbone.stack(role), letter + ".{i}.")
    norm, words, head = backbone.stack("text").embedding_norm, backbone.bert.words, backbone.own_heads["rec"]
    assert isinstance(head, BoxHead)
    names |= {"E.word": words.words.weight, "E.position": words.positions.weight}
    if words.types is not None:
        names["E.token_type"] = words.types.weight
    names.norm("E.ln", norm)
    names.linear("VL.visu_proj", backbone.image_projection), names.linear("VL.text_proj", backbone.text_projection)
    for i, layer in enumerate(head.layers):
        names.linear(f"VL.box.{i}", layer)
    backbone.double().eval()
    return backbone, names


def _method(arrays: Arrays) -> M2IST:
    """Build the method with the pairing whose pairs are the file's."""
    meta = arrays.meta
    pairs, depths = meta["pairs"], (meta["v_layers"], meta["l_layers"])
    for pairing in ("first", "last", "spread"):
        ours = zip(*(paired_layers(pairing, len(pairs), depth) for depth in depths), strict=True)  # type: ignore[arg-type]
        if [list(pair) for pair in ours] == [list(pair) for pair in pairs]:
            variant = "released" if _twice(arrays) else "clean"
            return M2IST(
                _options(
                    meta,
                    variant=variant,
                    pairing=pairing,
                    pairs=len(pairs),
                    start=meta.get("side_init", "embedding"),
                    text_norms=True,
                )
            )
    raise ValueError(f"pairs {pairs} are none of ours")


def _model(arrays: Arrays) -> Iterator[Difference]:
    meta = arrays.meta
    backbone, names = transvg(arrays)
    _method(arrays).adapt(backbone).double().eval()
    for k, (image, text) in enumerate(meta["pairs"]):
        for role, letter, layer in (("vision", "v", image), ("text", "l", text)):
            adapters = list(_side(backbone, role).side.adapters())[k]
            names |= adapters_of(adapters, letter, f"{'V' if letter == 'v' else 'T'}.{layer}.")
        names.linear(f"pair.{k}.IEA.shared_up", adapters.inter.shared)
    found = _forward(backbone, names, arrays)
    (found["loss_l1"] + found["loss_giou"]).backward()
    for name, value in found.items():
        if name in arrays:
            yield difference(name, value, arrays[name])
    for name, expected in arrays.under("grad.").items():
        yield difference(f"grad.{name}", names[name].grad if name in names else None, expected)
    # No parameter of the frozen towers may have a gradient.
    frozen = [p for name, p in names.items() if f"grad.{name}" not in arrays and name[0] in "VTE" and name[:2] != "VL"]
    yield difference(
        "gradients of frozen towers", torch.tensor(any(p.grad is not None for p in frozen)), torch.tensor(False)
    )


INPUTS = {"feature_map", "feature_mask", "feature_pos", "token_ids", "token_mask", "target_cxcywh"}


def _forward(backbone: TransVG, names: Names, arrays: Arrays) -> dict[str, Tensor]:
    """Return everything that the file holds of the forward pass, by golden name."""
    x, positions = (arrays[name].flatten(2).transpose(1, 2) for name in ("feature_map", "feature_pos"))
    image = plain_tokens(x, ~arrays["feature_mask"].flatten(1), IMAGE)
    norm = backbone.stack("text").embedding_norm
    assert norm is not None
    found, batch = {}, len(x)
    expected = {name for name in arrays if name[:2] in ("v_", "l_", "z_") or name.startswith("vl_")}
    _loaded(names, arrays, expected | INPUTS | {"box_cxcywh", "loss_l1", "loss_giou"})
    text = plain_tokens(backbone.bert(arrays["token_ids"], norm), arrays["token_mask"].bool(), TEXT)
    image_pass = image.context(bias=additive(image.mask, x.dtype), positions=positions)
    text_pass = text.context(bias=additive(text.mask, x.dtype))
    parts = []
    for letter, role, tokens, context in (("l", "text", text, text_pass), ("v", "vision", image, image_pass)):
        tower = _tower(backbone, role, tokens, context)
        projected = backbone.project(tokens, tower.pop("z"))
        found |= {f"z_{letter}_before_proj" if key == "sum" else f"{letter}_{key}": v for key, v in tower.items()}
        found[f"z_{letter}"] = projected.states
        parts.append(projected)
    # The original lays visual and fused tokens out as (N, B, d).
    entering: list[Tensor] = []
    hook = next(iter(backbone.stack("fusion"))).register_forward_pre_hook(lambda _, inputs: entering.append(inputs))
    fused = backbone.fuse(*parts, task="rec")
    hook.remove()
    seen, context = entering[0][:2]
    found |= {"vl_in": seen, "vl_out": fused.states, "vl_pos": context.positions.expand(batch, -1, -1)}
    found = {name: _their_layout(name, value) for name, value in found.items()}
    return found | {"vl_key_padding": ~fused.mask} | _losses(backbone, fused, arrays["target_cxcywh"])


def _tower(backbone: TransVG, role: str, tokens: Tokens, context: Pass) -> dict[str, Tensor]:
    """Run one encoder and its side network; layers without adapters have terms of zero."""
    stack = _side(backbone, role)
    layers = range(len(stack.layers))
    sites: list[Any] = [(i, "ffn", "normed") for i in layers] + [site for pair in stack.tapped for site in pair]
    y, taps = stack.run(tokens.states, context, taps=sites)
    outs = torch.stack([taps[i, "ffn", "normed"] for i in layers])
    inter, intra = torch.zeros_like(outs), torch.zeros_like(outs)
    for ((i, _, _), _), (a, b) in zip(stack.tapped, stack.terms(taps, context.segments), strict=True):
        inter[i], intra[i] = a.detach(), b.detach()
    names = ("IEA", "VEA" if role == "vision" else "LEA")
    side = inter.sum(0) + intra.sum(0)
    return {
        "embed": tokens.states, "layer_out": outs, names[0]: inter, names[1]: intra, "side_sum": side,
        "final": outs[-1], "sum": y, "z": y,
    }  # fmt: skip


def _their_layout(name: str, value: Tensor) -> Tensor:
    visual = name.startswith(("v_", "z_v", "vl_"))
    return value.transpose(-3, -2) if visual else value


def _losses(backbone: TransVG, fused: Tokens, target: Tensor) -> dict[str, Tensor]:
    box = backbone.own_heads["rec"](fused)
    l1 = F.l1_loss(box, target, reduction="sum") / len(box)
    giou = (1 - generalised_iou(corners(box), corners(target))).mean()
    return {"box_cxcywh": box, "loss_l1": l1, "loss_giou": giou}


def _rec_utils(arrays: Arrays) -> Iterator[Difference]:
    mask, expected = ~arrays["pos_mask"], arrays["pos_encoding"]
    found = detr_sine_positions(mask, 2 * arrays.meta["num_pos_feats"]).transpose(1, 2).reshape(expected.shape)
    yield difference("pos_encoding", found, expected, SINGLE)
    predicted, target = arrays["pred_cxcywh"], arrays["gt_cxcywh"]
    giou = generalised_iou(corners(predicted), corners(target))
    iou = iou_cxcywh(predicted.numpy(), target.numpy())
    ours = {
        "loss_l1": F.l1_loss(predicted, target, reduction="sum") / len(target),
        "giou": giou,
        "loss_giou": (1 - giou).mean(),
        "iou": iou,
    }
    for name, value in ours.items():
        yield difference(name, torch.as_tensor(value), arrays[name], TOLERANCE)
    yield difference("acc_at_05", torch.tensor(acc_at(iou, 0.5)), arrays["acc_at_05"], SINGLE)
    yield difference(LETTERBOX, _letterbox(arrays), arrays[LETTERBOX])


LETTERBOX = "letterbox_content_x0y0x1y1_then_box_cxcywh"


def _letterbox(arrays: Arrays) -> Tensor:
    """Return (R, 8): the extents of each image on its canvas, and its box in units of the canvas."""
    options = TransVG.configured("transvg:tiny", {"image_size": arrays.meta["imsize"]})
    with torch.device("meta"):
        backbone = TransVG(options)
    rows = []
    for (width, height), box in zip(
        arrays["letterbox_image_wh"].tolist(), arrays["letterbox_box_xyxy"].double(), strict=True
    ):
        images = backbone.images([Image.fromarray(np.full((height, width, 3), 255, dtype=np.uint8))])
        real = images.mask[0].nonzero()
        (top, left), (bottom, right) = real.min(0).values.tolist(), (real.max(0).values + 1).tolist()
        first, last = box[None].split(2, dim=-1)
        placed = images.place(torch.cat([(first + last) / 2, last - first], dim=-1).float())
        rows.append([left, top, right, bottom, *placed[0].tolist()])
    return torch.tensor(rows, dtype=torch.float64)
