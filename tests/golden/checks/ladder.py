"""Ladder side-tuning: a whole tiny T5 with images, a single stream of BERT layers, importance and pruning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from petlbench.methods.lst.method import LST, LadderStack, LSTConfig, SideTuned
from petlbench.methods.lst.pruning import fisher, parts, pruned
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.t5.modeling_t5 import T5LayerNorm

from petlbench.api.decoding import token_losses
from petlbench.api.sites import IMAGE, Layer, Stack
from petlbench.api.tokens import Images, Texts, Tokens, plain_tokens
from petlbench.backbones.parts.bert import bert_layer
from petlbench.backbones.parts.t5 import T5Host, T5Sizes
from petlbench.backbones.parts.visual_block import VisualBlock
from tests.backbone_factory import Bare
from tests.golden.arrays import Arrays, Difference, difference
from tests.golden.checks.library_loops import beam, greedy

Named = dict[str, nn.Parameter]
SIDES = {"enc": "encoder", "dec": "decoder"}
SUBLAYERS = {
    "enc": {"attention": "attn", "ffn": "ffn"},
    "dec": {"attention": "self", "cross_attention": "cross", "ffn": "ffn"},
}
LEAVES = {"weight": "W", "bias": "b"}
GAINS = {"weight": "gain", "bias": "bias"}


def check(arrays: Arrays) -> Iterator[Difference]:
    """Compare a file of any of the three kinds."""
    with double_norm():
        if "base" in arrays.meta:
            yield from check_model(arrays)
        elif "cfg" in arrays.meta:
            yield from check_pruning(arrays)
        else:
            yield from check_single_stream(arrays)


@contextmanager
def double_norm() -> Iterator[None]:
    """Let T5's norm compute in the input's precision, as for the authors' numbers; the library's uses float32."""

    def forward(self: Any, x: Tensor) -> Tensor:
        found: Tensor = self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return found

    kept = T5LayerNorm.forward
    T5LayerNorm.forward = forward
    try:
        yield
    finally:
        T5LayerNorm.forward = kept


class Special:
    """Stands for a codec; it has only the special ids."""

    def __init__(self, pad_id: int, start_id: int, eos_id: int) -> None:
        self.pad_id, self.start_id, self.eos_id = pad_id, start_id, eos_id


class Host(T5Host):
    """T5 of a file's sizes, with the visual block if the file has image features."""

    abilities = frozenset({"embed", "fuse", "decode"})

    def __init__(self, sizes: Mapping[str, Any], meta: Mapping[str, Any], features: int, cells: int) -> None:
        super().__init__()
        config = T5Sizes(
            vocabulary=sizes["vocab_size"],
            width=sizes["d_model"],
            encoder_layers=sizes["num_layers"],
            decoder_layers=sizes.get("num_decoder_layers", sizes["num_layers"]),
            heads=sizes["num_heads"],
            head_width=sizes["d_kv"],
            ffn=sizes["d_ff"],
            dropout=0.0,
            buckets=sizes["relative_attention_num_buckets"],
            max_distance=meta.get("rel_max_distance", 128),
        ).config()
        self.build_t5(config, longest=512)
        start = meta.get("decoder_start_id", sizes.get("decoder_start_token_id", 0))
        self.codec = Special(meta.get("pad_id", 0), start, meta.get("eos_id", 1))  # type: ignore[assignment]
        self.visual = VisualBlock(features, self.width, cells, T5LayerNorm) if features else None

    def host_parameters(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.startswith("visual.")}

    def images(self, images: Any) -> Images:
        raise NotImplementedError

    def embed_image(self, images: Any, *, task: str | None = None) -> Tokens:
        """Embed grids (B, M, cells of the CNN, channels) and boxes, which stand for images here."""
        assert self.visual is not None
        grids, boxes = images
        states = self.visual(grids, self.token_embedding.weight, boxes)
        return plain_tokens(states, torch.ones(states.shape[:2], dtype=torch.bool), IMAGE)


def named(module: nn.Module, prefix: str, leaves: Mapping[str, str] = LEAVES) -> Named:
    return {f"{prefix}.{leaves[name]}": parameter for name, parameter in module.named_parameters()}


def layer_names(layer: Layer, prefix: str, names: Mapping[str, str]) -> Named:
    found: Named = {}
    for ours, theirs in names.items():
        found |= named(layer[ours].norm, f"{prefix}.{theirs}_ln", GAINS)
        for role, projection in layer[ours].projections.items():
            found |= named(projection.singles()[0].linear, f"{prefix}.{theirs}.{role}")
    return found


def t5_names(host: T5Host) -> Named:
    """Return the language model's parameters by the files' names."""
    found: Named = {"tok_emb": host.token_embedding.weight}
    for short, role in SIDES.items():
        stack = host.stack(role)
        attention: Any = next(iter(stack))["attention"].core
        found[f"{short}.rel_bias"] = attention.attention.relative_attention_bias.weight
        assert stack.final_norm is not None
        found |= named(stack.final_norm, f"{short}.final_ln", GAINS)
        for index, layer in enumerate(stack):
            found |= layer_names(layer, f"{short}.{index}", SUBLAYERS[short])
    return found


def side_names(tuned: SideTuned) -> Named:
    found = named(tuned.side.up, "side.up")
    for short, role in SIDES.items():
        stack = getattr(tuned.side, role)
        prefix = f"side.{short}"
        found |= named(stack.enter, f"{prefix}.down_in") | named(stack.final_norm, f"{prefix}.final_ln", GAINS)
        found[f"{prefix}.rel_bias"] = stack.relative.table.weight
        found |= {f"{prefix}.{index}.alpha": gate for index, gate in enumerate(stack.gates)}
        for index, ladder, layer in zip(stack.kept, stack.ladders.values(), stack.layers.values(), strict=True):
            found |= named(ladder, f"{prefix}.{index}.down") | layer_names(layer, f"{prefix}.{index}", SUBLAYERS[short])
    return found


def visual_names(block: VisualBlock) -> Named:
    found: Named = {"vis.img_emb": block.image.weight}
    for ours, theirs in (("feature", "feat"), ("box", "box")):
        found |= named(getattr(block, ours), f"vis.{theirs}")
        found |= named(getattr(block, f"{ours}_norm"), f"vis.{theirs}_ln", GAINS)
    return found


def load(mine: Named, stored: Mapping[str, Tensor]) -> None:
    """Fill every parameter from the file. Raises ValueError if one is missing or left over."""
    if odd := mine.keys() ^ stored.keys():
        raise ValueError(f"parameters of only one side: {', '.join(sorted(odd)[:5])}")
    for name, parameter in mine.items():
        if parameter.shape != stored[name].shape:
            raise ValueError(f"{name} is {tuple(parameter.shape)}, not {tuple(stored[name].shape)}")
        parameter.data.copy_(stored[name])


@contextmanager
def watched(tuned: SideTuned) -> Iterator[dict[str, Tensor]]:
    """Record the values that the file calls `mid/...` while the model runs once."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, *, entering: str = "") -> Any:
        def look(_: nn.Module, given: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output
            if entering:
                seen[entering] = given[0]

        return module.register_forward_hook(look)

    hooks = []
    for short, role in SIDES.items():
        stack, side = tuned.inner.stack(role), getattr(tuned.side, role)
        hooks += [keep(f"{short}.side_0", side.enter), keep(f"{short}.side_final", side.final_norm)]
        hooks += [keep(f"{short}.backbone_h.{index}", layer) for index, layer in enumerate(stack)]
        for index, layer in zip(side.kept, side.layers.values(), strict=True):
            hooks.append(keep(f"{short}.side_out.{index}", layer, entering=f"{short}.side_in.{index}"))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def tuned_model(arrays: Arrays) -> tuple[SideTuned, Named]:
    """Return the host and its side network with the file's values, and all parameters by the file's names."""
    meta = arrays.meta
    cells = round(meta["n_visual_tokens"] ** 0.5)
    host = Host(meta["base"], meta, arrays["in/vis_feats"].shape[-1], cells).double()
    given = {role: meta[f"{role}_side_layers"] for role in SIDES.values()}
    layers = {role: tuple(kept) for role, kept in given.items() if kept is not None}
    tuned = LST(LSTConfig(reduction=meta["side_reduction"], layers=layers, init="random")).adapt(host).eval()
    assert isinstance(tuned, SideTuned) and host.visual is not None
    mine = t5_names(host) | side_names(tuned) | visual_names(host.visual)
    load(mine, arrays.under("p/"))
    trained = {name for name, parameter in mine.items() if parameter.requires_grad}
    if (odd := trained ^ set(meta.get("trainable", trained))) - set(meta["trainable_without_grad"]):
        raise ValueError(f"trains on one side only: {', '.join(sorted(odd)[:5])}")
    return tuned, mine


def check_model(arrays: Arrays) -> Iterator[Difference]:
    """Compare states, logits, losses, greedy ids and every gradient."""
    tuned, mine = tuned_model(arrays)
    pad = arrays.meta["pad_id"]
    ids, labels = arrays["in/input_ids"], arrays["in/labels"]
    target = Texts(labels.masked_fill(labels < 0, pad), labels >= 0)
    images: Any = (arrays["in/vis_feats"].unsqueeze(1), arrays["in/boxes"].unsqueeze(1))
    with watched(tuned) as seen:
        memory = tuned.fuse(tuned.embed_text(Texts(ids, ids != pad)), tuned.embed_image(images), task="vqa")
        start = torch.full_like(labels[:, :1], tuned.start_id)
        logits, _ = tuned.decode(memory, torch.cat([start, target.ids[:, :-1]], dim=1), task="vqa")
    seen["enc.backbone_final"] = memory.text.states
    final = tuned.inner.stack("decoder").final_norm
    assert final is not None
    seen["dec.backbone_final"] = final(seen[f"dec.backbone_h.{len(tuned.inner.stack('decoder').layers) - 1}"])
    losses = token_losses(tuned, memory, target, "vqa")
    means = losses.sum(1) / target.mask.sum(1)
    loss = (arrays["in/answer_scores"] * means).mean()
    ours: dict[str, Any] = {f"mid/{name}": value for name, value in seen.items()}
    ours |= {"out/logits": logits, "out/token_loss": losses, "out/vqa_loss": loss}
    longest = arrays["out/greedy_ids"].shape[1]
    ours["out/greedy_ids"] = greedy(tuned, memory, longest, "vqa")
    ours["out/beam3_ids"] = beam(tuned, memory, longest, 3, "vqa")
    loss.backward()
    yield from compared(ours, mine, arrays)


def compared(ours: Mapping[str, Any], mine: Named, arrays: Arrays) -> Iterator[Difference]:
    """Compare every output, intermediate value and gradient; one of ours that the file lacks must be zero."""
    for name, theirs in arrays.items():
        kind, _, rest = name.partition("/")
        if kind in ("out", "mid"):
            yield difference(name, ours.get(name), theirs)
        elif kind == "g":
            yield difference(name, mine[rest].grad if rest in mine else None, theirs)
    for name, parameter in mine.items():
        if f"g/{name}" not in arrays and parameter.grad is not None:
            yield difference(f"g/{name}", parameter.grad, torch.zeros_like(parameter))


def check_single_stream(arrays: Arrays) -> Iterator[Difference]:
    """Compare a side stack of BERT layers over given states, which stand for those of the frozen layers."""
    meta, stored = arrays.meta, arrays.under("p/")
    reduction = meta["d"] // meta["r"]
    config = BertConfig(
        hidden_size=meta["d"],
        num_attention_heads=meta["heads"],
        intermediate_size=len(stored["side.0.ffn.in.W"]) * reduction,
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        attn_implementation="eager",
    )
    host = Stack([bert_layer(BertLayer(config)) for _ in range(meta["layers"])], width=meta["d"])
    adapted = LST(LSTConfig(reduction=reduction)).adapt(Bare(fusion=host).double()).eval()
    stack = adapted.stack("fusion")
    assert isinstance(stack, LadderStack)
    side = stack.side
    mine = named(side.enter, "down_in") | named(stack.up, "up")
    mine |= {f"side.{index}.alpha": gate for index, gate in enumerate(side.gates)}
    for index, (ladder, layer) in enumerate(zip(side.ladders.values(), side.layers.values(), strict=True)):
        assert isinstance(layer, Layer)
        mine |= named(ladder, f"side.{index}.down") | layer_names(layer, f"side.{index}", SUBLAYERS["enc"])
    load(mine, stored)
    states = [arrays[f"in/state.{index}"] for index in range(meta["layers"] + 1)]
    mask = arrays["in/mask"] > 0
    tokens = plain_tokens(states[0], mask, IMAGE)
    context = tokens.context(bias=(~mask)[:, None, None, :].double() * -1e4)
    y = stack.climb(states[0], states[1:], context)
    loss = (y * arrays["in/out_cotangent"]).sum()
    loss.backward()
    yield from compared({"out/y": y, "out/loss": loss}, mine, arrays)


def check_pruning(arrays: Arrays) -> Iterator[Difference]:
    """Compare squared gradients over the samples, and the weights that each rule, ratio and importance keeps."""
    meta = arrays.meta
    sizes = {**meta["cfg"]}
    host = Host(sizes, meta, 0, 0).double().eval()
    theirs = t5_names(host)
    load(theirs, arrays.under("p/"))
    ours = {id(parameter): name for name, parameter in parts(host).items()}
    names = {name: ours[id(parameter)] for name, parameter in theirs.items()}
    labels, pad = arrays.under("in/fisher_labels."), 0
    samples = []
    for key, ids in arrays.under("in/fisher_ids.").items():
        target = Texts(labels[key].masked_fill(labels[key] < 0, pad), labels[key] >= 0)
        samples.append((Texts(ids, ids != pad), target))
    sums = fisher(host, samples, meta["n_fisher_samples_used"])
    values = {name: parameter.detach() for name, parameter in parts(host).items()}
    for name, stored in arrays.under("out/fisher/").items():
        yield difference(f"out/fisher/{name}", sums.get(names[name]), stored)
    given = {key: value for key, value in arrays.under("out/").items() if key.startswith("pruned_")}
    for rule in dict.fromkeys(key.partition("/")[0] for key in given):
        _, version, *importance, ratio = rule.split("_")
        by = values if importance else sums
        found = pruned(values, by, int(ratio.removeprefix("r")), 10 if version == "v5" else 1)
        for key, stored in arrays.under(f"out/{rule}/").items():
            yield difference(f"out/{rule}/{key}", found.get(names[key]), stored)
        yield from _whole(rule, found, names, arrays)


def _whole(rule: str, found: Mapping[str, Tensor], names: Mapping[str, str], arrays: Arrays) -> Iterator[Difference]:
    """Report values that ours has and the file lacks, which no other check would notice."""
    lacking = [theirs for theirs, mine in names.items() if mine in found and f"out/{rule}/{theirs}" not in arrays]
    for name in lacking:
        yield Difference(f"out/{rule}/{name}", float("inf"))
