"""MultiWay-Adapter's files: its modules, BEiT-3's layers and model with and without it, and their training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from petlbench.methods.multiway_adapter import (
    Beside,
    Enhanced,
    FeedForwardEnhancer,
    KnowledgeExtractor,
    MultiWayAdapter,
)
from petlbench.tasks.retrieval import contrastive_loss
from torch import Tensor, nn

from petlbench.api.backbone import Backbone
from petlbench.api.sites import IMAGE, TEXT, Layer, Pass, Segments
from petlbench.api.tokens import Images, Texts, Tokens
from petlbench.backbones.beit3 import BEiT3
from petlbench.backbones.beit3_weights import UNUSED, resized_positions
from petlbench.backbones.parts.masks import additive
from petlbench.backbones.parts.multiway import multiway_stack
from petlbench.core.recipe import Recipe
from petlbench.metrics.recall import recall
from petlbench.training.optimizers import rate
from tests.backbone_factory import Bare
from tests.golden.arrays import SINGLE, Arrays, Difference, difference

KINDS = {"v": "image", "t": "text"}
RELEASED = "_as_released"  # values computed with softmax and activation in single precision
Names = dict[str, list[str]]  # golden names by our parameter, which stacks their rows


def check(arrays: Arrays) -> Iterator[Difference]:
    return FILES[arrays.name.partition("_")[0]](arrays)


# ---- modules alone


def check_extractor(arrays: Arrays) -> Iterator[Difference]:
    """Compare g1: NKE in evaluation and in training, and its gradients in evaluation."""
    rank, width = arrays["down_w"].shape
    norm = re.search(r"_ln-(\w+?)_", arrays.name)
    assert norm is not None
    scale: Any = "learned" if "s_param" in arrays else float(arrays["s"])
    p = float(arrays["p_drop"])
    module = KnowledgeExtractor(width, rank, scale=scale, norm=norm[1], dropout=p).double()
    names = {f"bottleneck.{way}.{value}": [f"{way}_{value[0]}"] for way in ("down", "up") for value in VALUES}
    if norm[1] != "none":
        place = "before" if norm[1] == "in" else "after"
        names |= {f"{place}.weight": ["ln_g"], f"{place}.bias": ["ln_b"]}
    if "s_param" in arrays:
        names["scale"] = ["s_param"]
    fill(module, names, arrays)
    x = arrays["x"].clone().requires_grad_()
    y = module.eval()(x)
    yield difference("y", y, arrays["y"])
    yield difference("y_plus_x", Beside(module)(x, x), arrays["y_plus_x"])
    (y * arrays["gy"]).sum().backward()
    yield difference("grad_x", x.grad, arrays["grad_x"])
    yield from gradients(module, names, arrays)
    record_dropout(module, arrays["dropout_mask"], p)
    yield difference("y_train", module.train()(x), arrays["y_train"])


def check_enhancer(arrays: Arrays) -> Iterator[Difference]:
    """Compare g2: AE, and its sum with its input."""
    ffn, width = arrays["ae_w1"].shape
    enhancer = FeedForwardEnhancer(width, ffn)
    module = Enhanced(enhancer, nn.Identity())
    names = names_of_enhancer("enhancer.")
    fill(module, names, arrays)
    z = arrays["z"].clone().requires_grad_()
    yield from both("u", enhancer(z), arrays)
    o = module(z)
    yield difference("o", o, arrays["o"])
    (o * arrays["gy"]).sum().backward()
    yield difference("grad_z", z.grad, arrays["grad_z"])
    yield from gradients(module, names, arrays)


# ---- layers and models


def adapted(backbone: Backbone, arrays: Mapping[str, Tensor], block: str = "") -> Backbone:
    """Adapt with the parts that the file has, as released; every parameter requires a gradient."""
    extractor, enhancer = f"{block}v.nke_down_w", f"{block}ae_w1"
    if extractor in arrays or enhancer in arrays:
        config = MultiWayAdapter.Config(
            extractors="both" if extractor in arrays else "none",
            bottleneck=len(arrays[extractor]) if extractor in arrays else None,
            scale=float(arrays["s"]),
            enhancer="ffn" if enhancer in arrays else "none",
            released_fused=True,
        )
        MultiWayAdapter(config).adapt(backbone)
    return backbone.requires_grad_(True)


def check_block(arrays: Arrays) -> Iterator[Difference]:
    """Compare g3: a layer in evaluation, its gradients, and the layer in training with the original's masks."""
    h = arrays["h"].clone().requires_grad_()
    split, length = int(arrays["split"]), h.shape[1]
    stack = multiway_stack(
        width=h.shape[-1], layers=1, heads=int(arrays["heads"]), ffn=len(arrays["v.w1"]), drop_path=0.0
    )
    stack.final_norm = None
    backbone = adapted(Bare(encoder=stack), arrays)
    layer, names = next(iter(stack)), names_of_layer("stacks.encoder.layers.0.", "", arrays)
    fill(backbone, names, arrays)
    mask = arrays["pad"] == 0
    context = Pass(mask=mask, segments=segments_of(split, length), bias=additive(mask, torch.float64))
    y, _ = layer.eval()(h, context)
    yield from both("out", y, arrays)
    (y * arrays["gy"]).sum().backward()
    yield difference("grad_h", h.grad, arrays["grad_h"])
    yield from gradients(backbone, names, arrays)
    record(layer, arrays)
    yield difference("out_train", layer.train()(h, context)[0], arrays["out_train"])


def segments_of(split: int, length: int) -> Segments:
    """Return segments; -1 means an image, 0 a text, n an image of n tokens and then text."""
    if split <= 0:
        return ((TEXT if split == 0 else IMAGE, length),)
    return ((IMAGE, split), (TEXT, length - split))


def record(layer: Layer, arrays: Mapping[str, Tensor]) -> None:
    """Let training drop the values that the original dropped."""
    path = float(arrays["p_path"])
    for name, short in (("attention", "attn"), ("ffn", "ffn")):
        layer[name].drop = Recorded(arrays[f"path_mask_{short}"], path)
    for module in layer.tail:
        module.drop = Recorded(arrays["path_mask_ae"], path)
    if "nke_dropout_mask" in arrays:
        record_dropout(layer, arrays["nke_dropout_mask"], float(arrays["p_drop"]))


def record_dropout(module: nn.Module, kept: Tensor, p: float) -> None:
    """Give every knowledge extractor the original's dropout mask."""
    for child in module.modules():
        if isinstance(child, KnowledgeExtractor):
            child.bottleneck.activation[1] = Recorded(kept, p)  # type: ignore[index]


class Recorded(nn.Module):
    """Dropout, or drop-path, with the mask that the original drew."""

    def __init__(self, kept: Tensor, p: float) -> None:
        super().__init__()
        self.kept, self.p = kept, p

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept / (1 - self.p) if self.training else x


def model_of(arrays: Mapping[str, Tensor]) -> tuple[BEiT3, Names]:
    """Build BEiT-3 of the file's sizes and values, with the file's adaptation."""
    layers = len({key.split(".")[0] for key in arrays if re.match(r"b\d+\.", key)})
    options = {
        "image_size": arrays["image"].shape[-1],
        "patch": int(arrays["patch"]),
        "width": arrays["tok_emb"].shape[1],
        "layers": layers,
        "attention_heads": int(arrays["heads"]),
        "ffn": len(arrays["b0.v.w1"]),
        "vocabulary": max(
            len(arrays["tok_emb"]), BEiT3.sizes["tiny"]["vocabulary"]
        ),  # the tokenizer needs it, the check does not
        "text_positions": len(arrays["pos_t"]),
        "max_text": len(arrays["pos_t"]) - UNUSED,
    }
    backbone = BEiT3(BEiT3.configured("beit3:tiny", options))
    adapted(backbone, arrays, "b0.")
    names = names_of_model(arrays, layers)
    fill(backbone, names, arrays)
    return backbone.eval(), names


def inputs_of(backbone: BEiT3, arrays: Mapping[str, Tensor]) -> tuple[Tokens, Tokens]:
    """Embed the image and the text."""
    pixels = arrays["image"]
    real = torch.ones(len(pixels), *pixels.shape[2:], dtype=torch.bool)
    images = Images(pixels, real, *torch.ones(2, len(pixels), 2).double())
    texts = Texts(arrays["token_ids"], arrays["pad"] == 0)
    return backbone.embed_image(images), backbone.embed_text(texts)


def check_model(arrays: Arrays) -> Iterator[Difference]:
    """Compare g4: states after every layer of both passes and a fused one, features, logits, loss, gradients."""
    backbone, names = model_of(arrays)
    image, text = inputs_of(backbone, arrays)
    head = backbone.own_heads["retrieval"]
    yield from hidden("v", backbone, image, arrays)
    yield from hidden("t", backbone, text, arrays)
    fused = backbone.fuse(image, text, task="vqa")
    yield difference("enc_fused", fused.states, arrays["enc_fused"])
    image, text = (backbone.fuse(part, task="retrieval") for part in (image, text))
    yield difference("enc_v", image.states, arrays["enc_v"])
    yield difference("enc_t", text.states, arrays["enc_t"])
    v, t = head.of_image(image), head.of_text(text)
    yield from both("feat_v", v, arrays)
    yield from both("feat_t", t, arrays)
    logits = head.similarity(v, t)
    yield difference("logits_image_to_text", logits, arrays["logits_image_to_text"])
    loss = contrastive_loss(logits, torch.eye(len(logits), dtype=torch.bool))
    yield difference("loss", loss, arrays["loss"])
    loss.backward()
    yield from gradients(backbone, names, arrays)


def hidden(short: str, backbone: BEiT3, tokens: Tokens, arrays: Arrays) -> Iterator[Difference]:
    """Compare the states of one modality alone, as embedded and after every layer."""
    x, context = tokens.states, tokens.context(bias=additive(tokens.mask, torch.float64))
    yield difference(f"hid_{short}_0", x, arrays[f"hid_{short}_0"])
    for depth, layer in enumerate(backbone.stack("encoder"), start=1):
        x, _ = layer(x, context)
        yield difference(f"hid_{short}_{depth}", x, arrays[f"hid_{short}_{depth}"])


# ---- loss, metric, schedule, positions


def check_loss(arrays: Arrays) -> Iterator[Difference]:
    """Compare g5: both directions of the contrastive loss, and their mean, which is our loss."""
    logits = arrays["log_scale"].exp() * arrays["feat_v"] @ arrays["feat_t"].T
    loss = contrastive_loss(logits, torch.eye(len(logits), dtype=torch.bool))
    by_image = -logits.log_softmax(1).diagonal().mean()
    yield difference("loss_both", loss, arrays["loss_both"])
    yield difference("loss_image_to_text", by_image, arrays["loss_image_to_text"])
    yield difference("loss_text_to_image", 2 * loss - by_image, arrays["loss_text_to_image"])


def check_recall(arrays: Arrays) -> Iterator[Difference]:
    """Compare g6: percentages, which the original averages in single precision."""
    ours = recall(*(arrays[name].numpy() for name in ("image_feat", "text_feat", "text_image_id")))
    for short, direction in (("tr", "i2t"), ("ir", "t2i")):
        for k in (1, 5, 10):
            yield difference(f"{short}_r{k}", 100 * ours[f"{direction}_r{k}"], arrays[f"{short}_r{k}"], SINGLE)
    yield difference("average_score", ours["rsum"] / 6, arrays["average_score"], SINGLE)


def check_schedule(arrays: Arrays) -> Iterator[Difference]:
    """Compare g7: each step's rate in units of its peak; warm-up is over epochs or (`lr_warmup_steps7`) steps."""
    peak, floor = float(arrays["lr_peak"]), float(arrays["lr_min"])
    for name, theirs in arrays.items():
        found = re.fullmatch(r"lr(?:_warmup_steps(\d+))?", name)
        if found is None:
            continue
        epochs = int(arrays["warmup_epochs"]) * int(arrays["steps_per_epoch"])
        warm, steps = int(found[1] or epochs), len(theirs)
        recipe = Recipe(
            steps=steps, warmup=warm / steps, warmup_from_zero=True, schedule="cosine", lr_floor=floor / peak
        )
        ours = torch.tensor([rate(recipe, step) for step in range(steps)], dtype=torch.float64)
        yield difference(name, ours, theirs / peak)


def check_positions(arrays: Arrays) -> Iterator[Difference]:
    """Compare g8: the image's position table for another grid, in single precision; the first rows stay."""
    theirs, kept = arrays["pos_v_dst"], int(arrays["n_extra"])
    ours = resized_positions(arrays["pos_v_src"], len(theirs))
    yield difference("pos_v_dst", ours, theirs, SINGLE)
    yield difference(f"pos_v_dst[:{kept}]", ours[:kept], theirs[:kept], 0.0)


FILES: dict[str, Callable[[Arrays], Iterator[Difference]]] = {
    "g1": check_extractor,
    "g2": check_enhancer,
    "g3": check_block,
    "g4": check_model,
    "g5": check_loss,
    "g6": check_recall,
    "g7": check_schedule,
    "g8": check_positions,
}


# ---- names and values

VALUES = ("weight", "bias")


def names_of_layer(layer: str, block: str, arrays: Mapping[str, Tensor]) -> Names:
    """Name the parameters of BEiT-3's layer, and of the parts that the file inserts."""
    names: Names = {}
    for short, kind in KINDS.items():
        for value in VALUES:
            letter, gain = value[0], "g" if value == "weight" else "b"
            attention, ffn, theirs = f"{layer}sublayers.attention", f"{layer}sublayers.ffn", f"{block}{short}."
            mlp = f"{ffn}.core.module.{kind}"
            names |= {
                f"{attention}.norm.{kind}.{value}": [f"{theirs}ln1_{gain}"],
                f"{attention}.core.qkv.{kind}.{value}": [f"{theirs}{letter}{role}" for role in "qkv"],
                f"{attention}.core.norm.{kind}.{value}": [f"{theirs}lni_{gain}"],
                f"{attention}.core.proj.{kind}.{value}": [f"{theirs}{letter}o"],
                f"{ffn}.norm.{kind}.{value}": [f"{theirs}ln2_{gain}"],
                f"{mlp}.fc1.{value}": [f"{theirs}{letter}1"],
                f"{mlp}.norm.{value}": [f"{theirs}lnf_{gain}"],
                f"{mlp}.fc2.{value}": [f"{theirs}{letter}2"],
            }
            if f"{block}v.nke_down_w" in arrays:
                own = f"{ffn}.sites.branch.0.extractor.{kind}.bottleneck"
                names |= {f"{own}.{way}.{value}": [f"{theirs}nke_{way}_{letter}"] for way in ("down", "up")}
    if f"{block}ae_w1" in arrays:
        names |= names_of_enhancer(f"{layer}tail.0.enhancer.", f"{block}ae_")
    return names


def names_of_enhancer(ours: str, theirs: str = "ae_") -> Names:
    parts = {"fc1.weight": "w1", "fc1.bias": "b1", "fc2.weight": "w2", "fc2.bias": "b2"}
    parts |= {"norm.weight": "ln_g", "norm.bias": "ln_b"}
    return {ours + name: [theirs + golden] for name, golden in parts.items()}


def names_of_model(arrays: Mapping[str, Tensor], layers: int) -> Names:
    names: Names = {
        "own_heads.retrieval.log_scale": ["log_scale"],
        "own_heads.retrieval.image.weight": ["head_v"],
        "own_heads.retrieval.text.weight": ["head_t"],
        "image_embedding.cls": ["cls"],
        "image_embedding.mask_token": ["mask_tok"],
        "image_embedding.patches.weight": ["patch_w"],
        "image_embedding.patches.bias": ["patch_b"],
        "image_embedding.positions.weight": ["pos_v"],
        "text_embedding.tokens.weight": ["tok_emb"],  # of small vocabularies our table has more rows
        "text_embedding.positions.weight": ["pos_t"],
    }
    for index in range(layers):
        names |= names_of_layer(f"stacks.encoder.layers.{index}.", f"b{index}.", arrays)
    for short, kind in KINDS.items():
        names[f"stacks.encoder.final_norm.{kind}.weight"] = [f"{short}.lnF_g"]
        names[f"stacks.encoder.final_norm.{kind}.bias"] = [f"{short}.lnF_b"]
    return names


def stacked(arrays: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return arrays[names[0]] if len(names) == 1 else torch.cat([arrays[name] for name in names])


def fill(module: nn.Module, names: Names, arrays: Mapping[str, Tensor]) -> None:
    """Copy golden values into all parameters; golden tables with fewer rows than ours fill the top rows.

    Raises ValueError if names and parameters of ours do not match one to one, KeyError if an array is missing.
    """
    module.double()
    parameters = dict(module.named_parameters())
    if differing := parameters.keys() ^ names.keys():
        raise ValueError(f"no counterpart: {', '.join(sorted(differing))}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = stacked(arrays, names[name])
            (parameter[: len(value)] if value.ndim else parameter).copy_(value)


def gradients(module: nn.Module, names: Names, arrays: Mapping[str, Tensor]) -> Iterator[Difference]:
    """Compare every gradient; ours must have none that the original lacks."""
    for name, parameter in module.named_parameters():
        parts = [f"grad_{part}" for part in names[name]]
        label = ", ".join(parts)
        if parts[0] not in arrays:
            if parameter.grad is not None:
                yield Difference(f"{label} (none in the file)", float("inf"))
            continue
        theirs, ours = stacked(arrays, parts), parameter.grad
        if ours is not None and ours.ndim and len(ours) > len(theirs):
            yield difference(f"{label} (further rows)", ours[len(theirs) :], torch.zeros_like(ours[len(theirs) :]))
            ours = ours[: len(theirs)]
        yield difference(label, ours, theirs)


def both(name: str, ours: Tensor, arrays: Mapping[str, Tensor]) -> Iterator[Difference]:
    """Compare an output, and the same output as released."""
    yield difference(name, ours, arrays[name])
    if name + RELEASED in arrays:
        yield difference(name + RELEASED, ours, arrays[name + RELEASED], SINGLE)
