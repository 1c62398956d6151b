"""Methods reproduce, through the sites, what their authors' own code computed (see tests/golden/vl_pet_family)."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from petlbench.methods.lora import LoRA, LoRAConfig
from petlbench.methods.vl_adapter import Bottleneck, VLAdapter, VLAdapterConfig
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer

from petlbench.backbones.base import Texts, Tokens
from petlbench.backbones.sites import IMAGE, Layer, Pass, Projection, Stack, SubLayer
from petlbench.backbones.tiny import Tiny
from petlbench.backbones.transformers_parts import bart_decoder_layer, bart_encoder_layer
from petlbench.backbones.vision import additive
from petlbench.generation import generate
from petlbench.losses import token_losses
from tests.backbone_factory import Bare, bart_config, draw, small_tiny
from tests.golden import FOLDER

Named = dict[str, Tensor]
ENCODER = {"attention": "attn", "ffn": "ffn"}  # our sub-layers' names to the golden files'
DECODER = {"attention": "self", "cross_attention": "cross", "ffn": "ffn"}
TEXT_STACKS = ("encoder", "decoder")


def golden(name: str) -> tuple[Named, dict[str, object]]:
    with np.load(FOLDER / "vl_pet_family" / f"{name}.npz", allow_pickle=False) as file:
        tensors = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta_json"}
        return tensors, json.loads(str(file["meta_json"]))


def load(parameters: dict[str, nn.Parameter], tensors: Named) -> None:
    """Put every `p/` tensor in its place; none may be missing or left over."""
    stored = {key[2:]: value for key, value in tensors.items() if key.startswith("p/")}
    assert stored.keys() == parameters.keys()
    for name, parameter in parameters.items():
        parameter.requires_grad_(True).data.copy_(stored[name])


def named(layer: Layer, names: dict[str, str], prefix: str = "") -> dict[str, nn.Parameter]:
    """The golden names of an adapted BART layer's parameters."""
    found: dict[str, nn.Parameter] = {}
    for ours, theirs in names.items():
        sublayer = layer[ours]
        adapter = sublayer.sites["output"][0]
        linears = {f"{theirs}.{role}": projection.linear for role, projection in sublayer.projections.items()}
        linears |= {f"adapter_{theirs}.down": adapter.down, f"adapter_{theirs}.up": adapter.up}
        for name, linear in linears.items():
            found |= {f"{prefix}{name}.W": linear.weight, f"{prefix}{name}.b": linear.bias}
        found |= norm_names(sublayer.norm, f"{prefix}{theirs}_ln")
    return found


def norm_names(norm: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return {f"{name}.gain": norm.weight, f"{name}.bias": norm.bias}


class Formulas:
    """The specification's formulas on golden parameters: an independent second implementation."""

    def __init__(self, tensors: Named, heads: int = 4) -> None:
        self.p = {key[2:]: value.clone().requires_grad_() for key, value in tensors.items() if key.startswith("p/")}
        self.heads = heads

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.p[f"{name}.W"].T + self.p[f"{name}.b"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.p[f"{name}.gain"] + self.p[f"{name}.bias"]

    def adapter(self, prefix: str, h: Tensor) -> Tensor:
        z = self.linear(f"{prefix}down", h)
        gelu = 0.5 * z * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh())
        return h + self.linear(f"{prefix}up", gelu)

    def attend(self, name: str, x: Tensor, memory: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (
            self.linear(f"{name}.{role}", of).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for role, of in (("q", x), ("k", memory), ("v", memory))
        )
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
        maps = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return self.linear(f"{name}.o", (maps @ v).transpose(1, 2).flatten(2))

    def feed(self, x: Tensor) -> Tensor:
        z = self.linear("ffn.in", x)
        return self.linear("ffn.out", 0.5 * z * (1 + torch.erf(z / math.sqrt(2))))

    def layer(self, x: Tensor, attentions: dict[str, tuple[Tensor | None, Tensor]]) -> Tensor:
        for name, (memory, visible) in attentions.items():
            h = self.attend(name, x, x if memory is None else memory, visible)
            x = self.norm(f"{name}_ln", x + self.adapter(f"adapter_{name}.", h))
        return self.norm("ffn_ln", x + self.adapter("adapter_ffn.", self.feed(x)))


def agree(ours: Tensor, expected: Tensor, formula: Tensor, sides: tuple[Named, Named]) -> None:
    """Both outputs equal the golden one, and all gradients of a random functional of them are equal."""
    for output in (ours, formula):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)
    weight = draw(*expected.shape, seed=9)
    first, second = (
        dict(zip(side, torch.autograd.grad((output * weight).sum(), list(side.values())), strict=True))
        for output, side in zip((ours, formula), sides, strict=True)
    )
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], rtol=0, atol=1e-9, msg=name)


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_()


def test_the_bottleneck_is_the_authors() -> None:
    tensors, meta = golden("vladapter_single_adapter")
    module = Bottleneck(int(meta["d"]), int(meta["r"])).double()
    sides = {"down": module.down, "up": module.up}
    mine = {f"{n}.{short}": p for n, m in sides.items() for short, p in (("W", m.weight), ("b", m.bias))}
    load(mine, tensors)
    reference, h, again = Formulas(tensors), leaf(tensors["in/h"]), leaf(tensors["in/h"])
    ours = module(draw(*h.shape), h)  # x is not looked at
    agree(ours, tensors["out/vqa"], reference.adapter("", again), ({**mine, "h": h}, {**reference.p, "h": again}))


@pytest.mark.parametrize("kind", ["enclayer", "declayer"])
def test_vl_adapter_on_bart_layers_is_the_authors(kind: str) -> None:
    tensors, meta = golden(f"vladapter_single_bart_{kind}")
    width, encoder = int(meta["d"]), kind == "enclayer"
    config = bart_config(width, int(meta["heads_attn"]), ffn=24)
    layer = bart_encoder_layer(BartEncoderLayer(config)) if encoder else bart_decoder_layer(BartDecoderLayer(config, 0))
    backbone = Bare(encoder=Stack([layer], width=width)).double().eval()
    VLAdapter(VLAdapterConfig(reduction=width // int(meta["r"]))).adapt(backbone)
    mine, reference = named(layer, ENCODER if encoder else DECODER), Formulas(tensors)
    load(mine, tensors)
    inputs = [key for key in tensors if key in ("in/x", "in/y", "in/memory")]
    own, other = ({key: leaf(tensors[key]) for key in inputs} for _ in range(2))
    mask = tensors["in/mask" if encoder else "in/memory_mask"].bool()
    seen, hidden = mask[:, None, None], additive(mask, torch.float64)
    if encoder:
        context, attentions = Pass(bias=hidden), {"attn": (None, seen)}
    else:
        causal = torch.ones(3, 3, dtype=torch.bool).tril()
        bias = torch.zeros(1, 1, 3, 3, dtype=torch.float64).masked_fill(~causal, torch.finfo(torch.float64).min)
        context = Pass(bias=bias, memory=own["in/memory"], memory_bias=hidden)
        attentions = {"self": (None, causal), "cross": (other["in/memory"], seen)}
    ours, _ = backbone.stack("encoder").run(own[inputs[0]], context)
    sides = {**mine, **own}, {**reference.p, **other}
    agree(ours, tensors["out/y"], reference.layer(other[inputs[0]], attentions), sides)


class Query(nn.Module):
    """A core that is one projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Pass) -> Tensor:
        return self.q(x)


def test_lora_is_the_authors() -> None:
    tensors, meta = golden("lora_single_linear")
    core = Query(16)
    projections = {"q": Projection(core, "q")}
    sublayer = SubLayer(core, nn.Identity(), nn.Identity(), width=16, pre_norm=True, projections=projections)
    backbone = Bare(encoder=Stack([Layer(attention=sublayer)], width=16)).double()
    LoRA(LoRAConfig(rank=int(meta["r"]), alpha=float(meta["alpha"]))).adapt(backbone)
    backbone.eval()
    assert core.q.path.drop.p == meta["dropout"]
    mine = {"W": core.q.base.weight, "b": core.q.base.bias, "A": core.q.path.A, "B": core.q.path.B}
    load(mine, tensors)
    p, x, again = Formulas(tensors).p, leaf(tensors["in/x"]), leaf(tensors["in/x"])
    site = (0, "attention", "output")
    taps = backbone.stack("encoder").run(x, Pass(), taps=[site])[1]
    formula = again @ p["W"].T + p["b"] + float(meta["scaling"]) * (again @ p["A"].T) @ p["B"].T
    agree(taps[site], tensors["out/vqa"], formula, ({**mine, "x": x}, {**p, "x": again}))


def published_model() -> tuple[Tiny, Named, dict[str, nn.Parameter], list[str]]:
    """Tiny at the sizes of the authors' small model; its golden vectors, parameters by golden name, what trains."""
    tensors, meta = golden("tiny_bart_vl_adapter")
    backbone = small_tiny(ffn=64, max_positions=30)
    backbone.token_embedding = nn.Embedding(100, 32).double()
    VLAdapter(VLAdapterConfig(reduction=4, stacks=TEXT_STACKS)).adapt(backbone)
    mine = {"tok_emb": backbone.token_embedding.weight}
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    for role, short, names in (("encoder", "enc", ENCODER), ("decoder", "dec", DECODER)):
        stack = backbone.stack(role)
        mine[f"{short}.pos_emb"] = getattr(backbone, f"{role}_positions").weight
        mine |= norm_names(stack.embedding_norm, f"{short}.emb_ln")
        for index, layer in enumerate(stack):
            mine |= named(layer, names, f"{short}.{index}.")
    ids = {id(p): name for name, p in mine.items()}
    theirs = sorted(ids[id(p)] for name, p in backbone.named_parameters() if name in trained and id(p) in ids)
    assert theirs == sorted(name for name in meta["trainable"] if not name.startswith("vis."))  # type: ignore[attr-defined]
    return backbone, tensors, mine, theirs


def test_vl_adapter_on_a_whole_model_is_the_authors() -> None:
    """States, logits, the VQA loss, greedy decoding, what trains and the authors' own gradients."""
    backbone, tensors, mine, trained = published_model()
    visual = {key: value for key, value in tensors.items() if key.startswith("p/vis.")}
    load(mine, {key: value for key, value in tensors.items() if key not in visual})
    formulas = Formulas(visual)
    pooled = nn.functional.adaptive_max_pool2d(tensors["in/vis_feats"].mT.unflatten(-1, (3, 3)), 2).flatten(2).mT
    states = formulas.norm("vis.feat_ln", formulas.linear("vis.feat", pooled))
    states = states + formulas.norm("vis.box_ln", formulas.p["vis.box.b"]) + formulas.p["vis.img_emb"][0]
    states = states + backbone.token_embedding.weight[[99, 98, 97, 96]]
    image = Tokens(states, torch.ones(3, 4, dtype=torch.bool), torch.full((3, 4), IMAGE), torch.zeros(3, 4, 2))
    question = Texts(tensors["in/input_ids"], tensors["in/input_ids"] != 1)
    memory = backbone.fuse(backbone.embed_text(question), image, task="vqa")
    real = memory.mask  # what stands at padding is nobody's business
    torch.testing.assert_close(memory.states[real], tensors["out/encoder_hidden"][real], rtol=0, atol=1e-9)

    labels = tensors["in/labels"]
    target = Texts(labels.masked_fill(labels < 0, 1), labels >= 0)
    losses = token_losses(backbone, memory, target, "vqa")
    torch.testing.assert_close(losses, tensors["out/token_loss"], rtol=0, atol=1e-9)
    loss = (tensors["in/answer_scores"] * losses.sum(1) / target.mask.sum(1)).mean()
    torch.testing.assert_close(loss, tensors["out/vqa_loss"], rtol=0, atol=1e-9)
    greedy = generate(backbone, memory, task="vqa", max_length=7)
    assert greedy == tensors["out/greedy_ids"][:, 1:].tolist()

    wanted = {name: mine[name] for name in trained} | {n: p for n, p in formulas.p.items() if n != "vis.box.W"}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    for name, gradient in zip(wanted, gradients, strict=True):
        torch.testing.assert_close(gradient, tensors[f"g/{name}"], rtol=0, atol=1e-9, msg=name)
