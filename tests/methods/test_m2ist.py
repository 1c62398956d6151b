"""M2IST: its formulas, initial values, saved activations of the backbone, and refusals.

`test_golden.py` compares it with the authors' code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from petlbench.methods.m2ist.ladder import Crossing, Ladder, SideTokens
from petlbench.methods.m2ist.method import M2IST, M2ISTConfig
from petlbench.methods.m2ist.side import SideStack, paired_layers
from torch import Tensor
from torch.nn import functional as F
from transformers.models.bart.modeling_bart import BartEncoderLayer

from petlbench.api.backbone import Backbone
from petlbench.api.decoding import generate
from petlbench.api.method import adapt
from petlbench.api.sites import IMAGE, TEXT, Pass, Stack
from petlbench.api.tokens import Tokens, join, plain_tokens
from petlbench.backbones.clip import Clip
from petlbench.backbones.parts.detr import detr_stack
from petlbench.backbones.parts.transformers_parts import bart_encoder_layer
from petlbench.backbones.tiny import Tiny, TinyConfig
from petlbench.backbones.transvg import TransVG
from petlbench.backbones.vl_t5 import VLT5
from petlbench.measure.canonical import canonical
from petlbench.measure.memory import SavedTensors
from tests.backbone_factory import Bare, bart_config, draw, randomise, small_tiny
from tests.golden import FOLDER
from tests.golden.arrays import Arrays, differences
from tests.golden.checks.m2ist import bert_layers

pytest.importorskip("timm")
QUESTIONS = ["is there a red circle", "two", "what stands on the left of the two blue squares below"]


def config(**options: Any) -> M2ISTConfig:
    return M2ISTConfig(**options)


def transvg(**options: Any) -> TransVG:
    return TransVG(TransVG.configured("transvg:tiny", {"released": True} | options))


def adapted(backbone: Backbone, **options: Any) -> Backbone:
    return M2IST(config(**options)).adapt(backbone)


def side(backbone: Backbone, role: str) -> SideStack:
    stack = backbone.stack(role)
    assert isinstance(stack, SideStack)
    return stack


def shaken(backbone: Backbone, std: float = 0.3) -> Backbone:
    """Draw all trainable values at random, so that none is zero."""
    generator = torch.Generator().manual_seed(1)
    for p in backbone.parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p.data.add_(std * noise)
    return backbone


# A second implementation of the formulas, from the specification, on arrays.


def norm(v: Arrays, name: str, x: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * v[f"{name}.gamma"] + v[f"{name}.beta"]


def linear(v: Arrays, name: str, x: Tensor) -> Tensor:
    return x @ v[f"{name}.W"].T + v[f"{name}.b"]


def attention(v: Arrays, at: str, x: Tensor, positions: Tensor | float, hidden: Tensor, heads: int) -> Tensor:
    q, k, val = ((x + (positions if n in "qk" else 0)) @ v[f"{at}.W{n}"].T + v[f"{at}.b{n}"] for n in "qkv")
    q, k, val = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, val))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    return (weights @ val).transpose(1, 2).flatten(2) @ v[f"{at}.Wo"].T + v[f"{at}.bo"]


def ffn(v: Arrays, at: str, x: Tensor, activation: Any) -> Tensor:
    return activation(x @ v[f"{at}.W1"].T + v[f"{at}.b1"]) @ v[f"{at}.W2"].T + v[f"{at}.b2"]


def bottleneck(v: Arrays, at: str, z: Tensor) -> Tensor:
    z = norm(v, f"{at}.ln", z, 1e-5)
    return v.meta["scale"] * linear(v, f"{at}.up", linear(v, f"{at}.down", z).relu())


def towers(v: Arrays, twice: bool) -> tuple[Tensor, Tensor]:
    """Compute f + s of both encoders, (B, N, d) and (B, L, d)."""
    pairs = [tuple(pair) for pair in v.meta["pairs"]]
    of_vision, of_text = ({pair[i]: k for k, pair in enumerate(pairs)} for i in (0, 1))
    x, positions = (v[name].flatten(2).transpose(1, 2) for name in ("feature_map", "feature_pos"))
    s, hidden = x, v["feature_mask"].flatten(1)
    for i in range(v.meta["v_layers"]):
        a = attention(v, f"V.{i}.attn", x, positions, hidden, v.meta["v_heads"])
        y = norm(v, f"V.{i}.ln1", x + a, 1e-5)
        f = ffn(v, f"V.{i}.ffn", y, torch.relu)
        x = norm(v, f"V.{i}.ln2", y + f, 1e-5)
        if i in of_vision:
            u = linear(v, f"V.{i}.IEA_v.down", a).relu()
            s = s + linear(v, f"pair.{of_vision[i]}.IEA.shared_up", u) + bottleneck(v, f"V.{i}.VEA", f)
    t = v["E.word"][v["token_ids"]] + v["E.position"][: v["token_ids"].shape[1]]
    t = norm(v, "E.ln", t, 1e-12)
    r, hidden = t, v["token_mask"] == 0
    for i in range(v.meta["l_layers"]):
        a = norm(v, f"T.{i}.ln1", t + attention(v, f"T.{i}.attn", t, 0.0, hidden, v.meta["l_heads"]), 1e-12)
        g = norm(v, f"T.{i}.ln1", a + t, 1e-12) if twice and i in of_text else a
        f = ffn(v, f"T.{i}.ffn", g, F.gelu)
        t = norm(v, f"T.{i}.ln2", g + f, 1e-12)
        if i in of_text:
            u = linear(v, f"T.{i}.IEA_l.down", a).relu()
            parts = linear(v, f"T.{i}.IEA_l.unique_up", u), linear(v, f"pair.{of_text[i]}.IEA.shared_up", u)
            r = r + norm(v, f"T.{i}.ln1", torch.cat(parts, -1), 1e-12)
            r = r + norm(v, f"T.{i}.ln2", bottleneck(v, f"T.{i}.LEA", f), 1e-12)
    return x + s, t + r


def loss(v: Arrays, image: Tensor, text: Tensor) -> dict[str, Tensor]:
    z_l, z_v = linear(v, "VL.text_proj", text), linear(v, "VL.visu_proj", image)
    x = torch.cat([v["VL.reg"].expand(len(image), 1, -1), z_l, z_v], dim=1)
    seen = torch.zeros(len(x), 1, dtype=torch.bool)
    hidden = torch.cat([seen, v["token_mask"] == 0, v["feature_mask"].flatten(1)], dim=1)
    for i in range(v.meta["vl_layers"]):
        x = norm(v, f"VL.{i}.ln1", x + attention(v, f"VL.{i}.attn", x, v["VL.pos"], hidden, v.meta["vl_heads"]), 1e-5)
        x = norm(v, f"VL.{i}.ln2", x + ffn(v, f"VL.{i}.ffn", x, torch.relu), 1e-5)
    box = x[:, 0]
    for i in range(3):
        box = linear(v, f"VL.box.{i}", box)
        box = box.relu() if i < 2 else box.sigmoid()
    target = v["target_cxcywh"]
    (a, b), (c, d) = ((t[:, :2] - t[:, 2:] / 2, t[:, :2] + t[:, 2:] / 2) for t in (box, target))
    inner = (torch.minimum(b, d) - torch.maximum(a, c)).clamp_min(0).prod(-1)
    union = (b - a).prod(-1) + (d - c).prod(-1) - inner
    hull = (torch.maximum(b, d) - torch.minimum(a, c)).prod(-1)
    giou = inner / union - (hull - union) / hull
    l1 = (box - target).abs().sum() / len(box)
    return {"box_cxcywh": box, "loss_l1": l1, "loss_giou": (1 - giou).mean(), "z_l": z_l, "z_v": z_v.transpose(0, 1)}


def computed(v: Arrays, twice: bool) -> dict[str, Tensor]:
    """Compute outputs and gradients of a file's model by the formulas."""
    trained = [name.removeprefix("grad.") for name in v if name.startswith("grad.")]
    for name in trained:
        v[name] = v[name].clone().requires_grad_()
    image, text = towers(v, twice)
    found = loss(v, image, text)
    (found["loss_l1"] + found["loss_giou"]).backward()
    found |= {"z_v_before_proj": image.transpose(0, 1), "z_l_before_proj": text}
    return {k: t.detach() for k, t in found.items()} | {f"grad.{name}": v[name].grad for name in trained}  # type: ignore[dict-item]


def test_the_clean_model_is_the_specifications(tmp_path: Path) -> None:
    """No file of the authors' lacks the double residual and norm; the formulas reproduce the file that has it."""
    path = FOLDER / "m2ist" / "tiny_model.npz"
    for name, value in computed(Arrays(path), twice=True).items():
        torch.testing.assert_close(value, Arrays(path)[name], rtol=0, atol=1e-10)
    ours = computed(Arrays(path), twice=False)
    assert not torch.allclose(ours["z_l"], Arrays(path)["z_l"], atol=1e-3)
    dropped = ("l_", "v_", "vl_")
    kept = {k: t for k, t in Arrays(path).items() if not k.startswith(dropped)} | ours
    meta = Arrays(path).meta | {"bert_double_ln_in_paired_layers": False}
    file = tmp_path / "tiny_model_clean.npz"
    np.savez(file, hparams_json=json.dumps(meta), **{k: t.numpy() for k, t in kept.items()})
    found = differences(file)
    assert {item.name for item in found} >= set(ours) and all(item.agrees for item in found)


def test_which_layers_are_paired() -> None:
    assert paired_layers("first", 3, 7) == [0, 1, 2]
    assert paired_layers("last", 3, 7) == [4, 5, 6]
    assert paired_layers("spread", 3, 7) == [2, 4, 6]  # ceil(7/3), ceil(14/3), 7, less one
    assert paired_layers("spread", 6, 12) == [1, 3, 5, 7, 9, 11]


def count(backbone: Backbone, pattern: str = "") -> int:
    hosts = backbone.host_parameters()
    return sum(p.numel() for n, p in backbone.named_parameters() if p.requires_grad and n not in hosts and pattern in n)


def test_published_counts() -> None:
    with torch.device("meta"):
        released, plain = (
            TransVG(TransVG.configured("transvg", {"released": on, "weights": "none"})) for on in (True, False)
        )
    backbone = adapted(released)
    assert count(backbone) == 3_185_794 and count(backbone, ".unused.") == 210_562
    assert count(adapted(plain)) == 3_185_794 - 210_562 + 2  # a gate in each tower


def test_clean_on_clip_has_the_prototypes_size() -> None:
    """It has 7.5 million parameters for r = 128 on ViT-B/16 (specification, section 7.5)."""
    with torch.device("meta"):
        backbone = Clip(Clip.configured("clip:ViT-B-16", {"weights": "none", "tokenizer": "tiny/tokenizer.json"}))
    own = sum(p.numel() for n, p in adapted(backbone).named_parameters() if ".side." in n)
    assert round(own / 1e6, 1) == 7.5


def towers_of(width: int, text_width: int) -> Bare:
    bare = Bare(vision=detr_stack(width, 2, 2, 8, 0.1), text=bert_layers(text_width, 2, 8, 3, twice=2))
    bare.abilities = frozenset({"fuse"})
    return bare


def test_released_initialisation() -> None:
    torch.manual_seed(0)
    backbone = adapted(towers_of(240, 360), rank=200, shared=200)
    own = [(r, n, p.detach()) for r in ("vision", "text") for n, p in side(backbone, r).side.named_parameters()]
    assert sum(".norm." in name for _, name, _ in own) == 8
    for role, name, p in own:
        if "unused" in name:
            continue
        if ".norm." in name:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight"))))
        elif ".shared." in name or role == "text":
            assert not p.any() if p.ndim == 1 else abs(float(p.std()) - 0.02) < 3e-4 and abs(float(p.mean())) < 3e-4
        elif p.ndim == 1:
            assert float(p.min()) >= 0 and float(p.max()) <= 1 and abs(float(p.mean()) - 0.5) < 0.15, name
        else:
            bound = (6 / sum(p.shape)) ** 0.5
            assert 0.99 * bound < float(p.abs().max()) <= bound and abs(float(p.std()) - bound / 3**0.5) < 0.02 * bound


def test_released_dead_parameters_are_declared_and_get_no_gradient() -> None:
    method, backbone = M2IST(), transvg()
    method.adapt(backbone)
    tokens = tokens_for(backbone, "text")
    side(backbone, "text").run(tokens.states, tokens.context())[0].sum().backward()
    silent = {n for n, p in side(backbone, "text").named_parameters() if p.requires_grad and p.grad is None}
    assert silent and all(".unused." in f".{name}" for name in silent)
    assert (
        list(method.unused_parameters) == ["*.side.unused.*"] and not M2IST(config(variant="clean")).unused_parameters
    )


def tokens_for(backbone: Backbone, role: str, length: int = 5) -> Tokens:
    width, dtype = backbone.stack(role).width, next(backbone.parameters()).dtype
    x = draw(2, length, width).to(dtype)
    return plain_tokens(x, torch.ones(2, length, dtype=torch.bool), IMAGE if role == "vision" else TEXT)


def test_only_the_clean_variant_puts_frozen_layers_to_sleep() -> None:
    for variant, awake in (("released", True), ("clean", False)):
        backbone = adapted(transvg(released=variant == "released", dropout=0.5), variant=variant).train()
        assert backbone.training and side(backbone, "text").side.training
        for role in ("vision", "text"):
            assert all(m.training == awake for m in side(backbone, role).layers.modules())
            assert not any(m.training for m in side(backbone.eval(), role).modules())
            backbone.train()
        ids = torch.ones(1, 5, dtype=torch.long)
        embedding = backbone.stack("text").embedding_norm
        assert embedding is not None
        twice = [backbone.bert(ids, embedding) for _ in range(2)]  # type: ignore[operator]
        assert torch.equal(*twice) != awake
        assert backbone.stack("fusion").training


def frozen_state(backbone: Backbone) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in backbone.state_dict().items()}


def test_restoring_leaves_nothing() -> None:
    for backbone in (small_tiny(), transvg().double().eval()):
        before, classes = frozen_state(backbone), [type(m) for m in backbone.modules()]
        found, handle = adapt(M2IST(), backbone)
        shaken(found).train()
        handle.restore()
        assert [type(m) for m in backbone.modules()] == classes
        assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def encoder_input(backbone: Backbone, texts: list[str] = QUESTIONS) -> tuple[Tokens, Tokens]:
    batch = backbone.texts(texts, 64)
    image = draw(len(texts), 4, backbone.width)
    mask = torch.ones(len(texts), 4, dtype=torch.bool)
    return backbone.embed_text(batch), plain_tokens(image, mask, IMAGE)


def small_t5() -> VLT5:
    sizes = {"width": 32, "heads": 4, "ffn": 64, "cells": 2, "sentinels": 4, "added_rows": 8}
    backbone = VLT5(VLT5.configured("vl_t5:tiny", sizes))
    randomise(backbone, std=0.1)
    return backbone.eval()


@pytest.mark.parametrize("build", [small_tiny, small_t5])
@pytest.mark.parametrize("crossings", [1, 2])
def test_a_cache_changes_no_logit_of_the_ladder(build: Any, crossings: int) -> None:
    backbone = shaken(adapted(build(), crossings=crossings))
    assert isinstance(backbone, Ladder)
    memory = backbone.fuse(*encoder_input(backbone), task="vqa")
    ids = torch.tensor([[2, 7, 9, 11], [2, 5, 5, 8], [2, 30, 4, 6]])
    with torch.no_grad():
        whole, none = backbone.decode(memory, ids, task="vqa")
        cache, steps = backbone.new_cache(), []
        for place in range(ids.shape[1]):
            logits, cache = backbone.decode(memory, ids[:, place : place + 1], cache, task="vqa")
            steps.append(logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-5 if build is small_t5 else 1e-10)
        order = torch.tensor([2, 0, 0])
        cache = backbone.reorder_cache(cache, order)
        after, _ = backbone.decode(memory.rows(order), ids[order, -1:], cache, task="vqa")
        alone = torch.cat([ids[order], ids[order, -1:]], dim=1)
        direct, _ = backbone.decode(memory.rows(order), alone, task="vqa")
    assert none is None
    torch.testing.assert_close(after[:, 0], direct[:, -1], rtol=0, atol=1e-5 if build is small_t5 else 1e-10)


def test_the_ladder_searches_with_beams() -> None:
    backbone = shaken(adapted(small_tiny()))
    memory = backbone.fuse(*encoder_input(backbone), task="captioning")
    one, three = (generate(backbone, memory, task="captioning", max_length=6, beams=n) for n in (1, 3))
    assert len(one) == len(three) == len(QUESTIONS)
    single = generate(backbone, memory.rows(torch.tensor([1])), task="captioning", max_length=6, beams=3)
    assert single == three[1:2]


def test_a_crossing_is_attention_of_one_head() -> None:
    crossing = Crossing(6, 8, 4).double()
    assert not crossing(draw(2, 3, 6), crossing.keys_values(draw(2, 5, 8)), None).any()
    randomise(crossing)
    state, memory, hidden = draw(2, 3, 6), draw(2, 5, 8, seed=1), torch.zeros(2, 5, dtype=torch.bool)
    hidden[1, 3:] = True
    z = F.layer_norm(memory, (8,), crossing.norm.weight, crossing.norm.bias)
    scores = crossing.q(state) @ crossing.k(z).mT / 2
    expected = crossing.o(scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1) @ crossing.v(z))
    bias = hidden[:, None, None].double() * torch.finfo(torch.float64).min
    found = crossing(state, crossing.keys_values(memory), bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def outputs(backbone: Backbone, task: str = "vqa") -> dict[str, Tensor]:
    memory = backbone.fuse(*encoder_input(backbone), task=task)
    logits, _ = backbone.decode(memory, torch.tensor([[2, 7], [2, 5], [2, 30]]), task=task)
    return {"states": memory.states, "logits": logits}


@pytest.mark.parametrize("generation", ["strict", "relaxed"])
@pytest.mark.parametrize("build", [small_tiny, small_t5])
def test_encoder_decoders_start_at_the_pretrained_function(build: Any, generation: str) -> None:
    with torch.no_grad():
        before = outputs(build())
        method = M2IST(config(generation=generation))
        backbone = method.adapt(build())
        after = outputs(backbone)
        moved = outputs(shaken(backbone))
    assert method.identity and method.no_backbone_gradient == (generation == "strict")
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-12)
        assert float((moved[name] - value).abs().max()) > 1e-3


def test_relaxed_generation_reads_the_adapted_encoder() -> None:
    """It decodes as the untouched backbone would from those states."""
    backbone = shaken(adapted(small_tiny(), generation="relaxed"))
    memory = backbone.fuse(*encoder_input(backbone), task="vqa")
    ids = torch.tensor([[2, 7], [2, 5], [2, 30]])
    found, _ = backbone.decode(memory, ids, task="vqa")
    expected, _ = small_tiny().decode(memory, ids, task="vqa")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not isinstance(backbone, Ladder) and type(backbone.stack("decoder")) is Stack


def test_the_strict_decoder_attends_to_the_frozen_encoder() -> None:
    """Frozen states equal those of the untouched backbone to the bit."""
    untouched, backbone = small_tiny(), shaken(adapted(small_tiny()))
    parts = encoder_input(untouched)
    memory = backbone.fuse(*parts, task="vqa")
    assert isinstance(memory, SideTokens) and memory.frozen is not None and memory.side is not None
    assert torch.equal(memory.frozen, untouched.fuse(*parts, task="vqa").states)
    assert not memory.frozen.requires_grad and memory.side.requires_grad
    ids = torch.tensor([[2, 7], [2, 5], [2, 30]])
    logits, _ = backbone.decode(memory, ids, task="vqa")
    logits.sum().backward()
    frozen = [n for n, p in backbone.named_parameters() if not p.requires_grad]
    assert all(backbone.get_parameter(name).grad is None for name in frozen)
    reached = {n for n, p in backbone.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("encoder.side" in name and ".image." in name for name in reached)
    assert any("decoder.side" in name for name in reached) and any("crossings" in name for name in reached)


def test_an_adapted_encoder_reaches_the_words_through_the_ladder_alone() -> None:
    """While the decoder's side is zero, no word changes, whatever the encoder's side is."""
    with torch.no_grad():
        before, backbone = outputs(small_tiny()), adapted(small_tiny())
        for name, p in backbone.named_parameters():
            if "encoder.side" in name:
                p.add_(draw(*p.shape) if p.ndim else 0.3)
        after = outputs(backbone)
    torch.testing.assert_close(after["logits"], before["logits"], rtol=0, atol=1e-12)
    assert float((after["states"] - before["states"]).abs().max()) > 1e-3


def test_what_trains_below_a_stack_feeds_the_side_alone() -> None:
    """The derivative to the embeddings is that of s^0, the gate's share; none passes through the frozen layers."""
    backbone = adapted(small_tiny())
    text, image = encoder_input(backbone)
    stack = side(backbone, "encoder")
    assert stack.side.gate is not None
    stack.side.gate.data.fill_(0.25)
    x = join([text, image]).states.detach().requires_grad_()
    y, _ = stack.run(x, join([text, image]).context())
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.25), rtol=0, atol=1e-12)


# Values that the side saves for backward, per token and pair: closed forms of the specification, section 6.


def kept(stack: SideStack, tokens: Tokens, **more: Any) -> int:
    x = tokens.states.detach()
    with SavedTensors(stack) as saved:
        stack.run(x, tokens.context(**more))
    return saved.saved_bytes // x.element_size()


def meta_tokens(width: int, *segments: tuple[int, int]) -> Tokens:
    parts = [plain_tokens(torch.empty(1, n, width), torch.ones(1, n, dtype=torch.bool), kind) for kind, n in segments]
    return join(parts)


def test_the_released_side_keeps_the_published_bytes() -> None:
    with torch.device("meta"):
        config_ = TransVG.configured("transvg", {"released": True, "weights": "none"})
        backbone = adapted(TransVG(config_)).train()
        image = kept(side(backbone, "vision"), meta_tokens(256, (IMAGE, 400)), positions=torch.empty(1, 400, 256))
        text = kept(side(backbone, "text"), meta_tokens(768, (TEXT, 20)))
    assert image == 6 * 400 * (3 * 256 + 2 * 128 + 2)
    assert text == 6 * 20 * (5 * 768 + 2 * 128 + 6)
    assert round(4 * (image + text) / 2**20, 2) == 11.27


def bart_encoder(width: int, layers: int) -> Stack:
    options = bart_config(width, 12, 4 * width)
    return Stack([bart_encoder_layer(BartEncoderLayer(options)) for _ in range(layers)], width=width)


def test_a_single_stream_keeps_the_taps_and_its_embeddings() -> None:
    """Saves 3 d + 2 r + 2 per token and pair, whatever its type, and d for the gate, at BART-base's size."""
    with torch.device("meta"):
        backbone = adapted(Bare(encoder=bart_encoder(768, 6)), start="gated")
        found = kept(side(backbone, "encoder"), meta_tokens(768, (TEXT, 20), (IMAGE, 36)))
        alone = kept(side(backbone, "encoder"), meta_tokens(768, (IMAGE, 36)))
    assert found == 56 * (6 * (3 * 768 + 2 * 128 + 2) + 768)
    assert alone == 36 * (6 * (3 * 768 + 2 * 128 + 2) + 768)


def test_tiny_keeps_the_taps_and_what_its_final_norm_needs() -> None:
    backbone = adapted(small_tiny())
    tokens = tokens_for(backbone, "vision")
    # Pre-norm: d and two more statistics per token, for the input sum of the final norm.
    assert kept(side(backbone, "vision"), tokens) == 10 * (2 * (3 * 16 + 2 * 5 + 2) + 2 * 16 + 2)
    text, image = encoder_input(backbone)
    assert kept(side(backbone, "encoder"), join([text, image])) == len(QUESTIONS) * (text.states.shape[1] + 4) * (
        2 * (3 * 32 + 2 * 5 + 2) + 32
    )


def test_the_ladder_keeps_the_taps_and_one_small_attention() -> None:
    """Saves per target token its pairs and gate, query, state and answer; per source token LN's input and output, key
    and value; and one attention map. It saves nothing of the decoder or the output head."""
    backbone = adapted(small_tiny())
    memory = backbone.fuse(*encoder_input(backbone, QUESTIONS[:1]), task="vqa")
    ids = torch.tensor([[2, 7, 9, 11, 3]])
    with canonical(), SavedTensors(backbone) as saved:
        backbone.decode(memory, ids, task="vqa")
    d, r, pairs, targets, sources = 32, 5, 2, ids.shape[1], memory.states.shape[1]
    ladder = targets * (pairs * (3 * d + 2 * r + 2) + d)
    crossing = targets * (d + 2 * r) + sources * (2 * d + 2 + 2 * r) + targets * sources
    assert saved.saved_bytes // 8 == ladder + crossing


# Dual encoders.


def small_clip() -> Clip:
    torch.manual_seed(0)
    return Clip(Clip.configured("clip:tiny", {})).double().eval()


def test_a_pooled_side_is_the_whole_one_at_its_token() -> None:
    backbones = [shaken(adapted(small_clip(), tokens=tokens)) for tokens in ("all", "pooled")]
    tokens = tokens_for(backbones[0], "vision")
    mark = torch.tensor([3, 1])
    context = Pass(types=tokens.types, mask=tokens.mask, segments=tokens.segments, mark=mark)
    everywhere, pooled = (side(b, "vision").run(tokens.states, context)[0] for b in backbones)
    frozen = small_clip().stack("vision").run(tokens.states, context)[0]
    rows = torch.arange(2)
    torch.testing.assert_close(pooled[rows, mark], everywhere[rows, mark], rtol=0, atol=1e-12)
    others = torch.ones(2, 5, dtype=torch.bool)
    others[rows, mark] = False
    assert torch.equal(pooled[others], frozen[others])
    assert not torch.allclose(everywhere[others], frozen[others], atol=1e-3)


def test_a_pooled_side_keeps_one_token_alone() -> None:
    """A tap's slice is a copy; a view would keep the layer's whole activation."""
    backbone = adapted(small_clip(), tokens="pooled")
    stack, tokens = side(backbone, "vision"), tokens_for(backbone, "vision", 50)
    context = Pass(segments=tokens.segments, mark=torch.tensor([3, 1]))
    with SavedTensors(stack) as saved:
        stack.run(tokens.states, context)
    d, r, pairs = stack.width, stack.side.sizes.rank, len(stack.tapped)
    indices = 4  # two for each of the two tokens
    assert saved.saved_bytes // 8 == 2 * (pairs * (3 * d + 2 * r + 2) + d + 2) + indices


def test_dual_encoders_start_at_the_pretrained_function() -> None:
    method, backbone = M2IST(), small_clip()
    batch = backbone.texts(QUESTIONS, 64)
    with torch.no_grad():
        before = backbone.embed_text(batch).states
        after = method.adapt(backbone).embed_text(batch).states
    assert method.identity and method.no_backbone_gradient and torch.equal(before, after)
    assert side(backbone, "text").side.gate is None and side(backbone, "text").side.sizes.tap == "output"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pairs": 3}, "pairs 3 exceeds the 2 layers of its stack 'vision'"),
        ({"shared": 33}, "shared 33 exceeds the width 32 of its narrowest stack"),
        ({"variant": "clean"}, "variant clean needs transvg with released: false"),
        ({"tokens": "pooled"}, "pooled needs a dual encoder"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], reason: str) -> None:
    with torch.device("meta"):
        backbone = transvg()
    with pytest.raises(ValueError, match=reason):
        adapted(backbone, **options)


def test_a_backbone_without_its_stacks_is_refused() -> None:
    with pytest.raises(ValueError, match="an image and a text encoder, or of one for both"):
        adapted(Bare(text=bert_layers(8, 2, 8, 2, twice=0)))
    with pytest.raises(ValueError, match="only transvg with released: true"):
        adapted(small_tiny(), variant="released")
    with pytest.raises(ValueError, match="post-norm text tower"):
        adapted(small_tiny(), text_norms=True)
    with pytest.raises(ValueError, match="another method is in this backbone already"):
        adapted(adapted(small_tiny()))


@pytest.mark.parametrize("options", [{"rank": 0}, {"reduction": 0}, {"variant": "dirty"}, {"pairs": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        config(**options)


def test_its_home_is_in_the_released_state() -> None:
    assert M2IST().host_options("transvg") == {"released": True} and not M2IST().host_options("tiny")
    assert M2IST(config(variant="clean")).host_options("transvg") == {"released": False}
    home, other = (M2IST().default_recipe(family) for family in ("transvg", "tiny"))
    assert (home["lr"], home["method_lr"], home["schedule"], home["clip_norm"]) == (1e-4, 0.1, "step", None)
    assert other == {"lr": 1e-3}


def test_what_is_pretrained_below_a_frozen_encoder_stays_as_it_is() -> None:
    """If the visual projection changed, the frozen layers would lose what they learned."""
    backbones = {below: adapted(Tiny(TinyConfig()), below=below) for below in (None, "train", "freeze")}
    trained = {below: {n for n, p in b.named_parameters() if p.requires_grad} for below, b in backbones.items()}
    assert trained[None] == trained["freeze"] and not any("visual." in name for name in trained[None])
    assert not any("stacks.vision" in name for name in trained[None])
    assert any("visual." in name for name in trained["train"]) and any("stacks.vision" in n for n in trained["train"])
    assert any("visual." in n for n, p in adapted(small_tiny()).named_parameters() if p.requires_grad)
