"""MultiWay-Adapter: its formula at every site, sharing, refusals, counts and initial values.

`test_golden.py` compares modules, layers and model with the authors' files; a second implementation of the
specification below covers further compositions in the same formats.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from petlbench.methods.multiway_adapter import (
    Beside,
    Enhanced,
    FeedForwardEnhancer,
    KnowledgeExtractor,
    MultiWayAdapter,
)
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.backbone import Backbone
from petlbench.api.method import adapt
from petlbench.api.sites import IMAGE, TEXT, Layer, Pass
from petlbench.backbones.beit3 import BEiT3
from petlbench.backbones.clip import Clip
from petlbench.backbones.parts.multiway import Routed
from petlbench.backbones.parts.vision import vision_stack
from petlbench.backbones.transvg import TransVG
from petlbench.backbones.vl_bart import VLBart
from petlbench.backbones.vl_t5 import VLT5
from petlbench.core.recipe import Recipe
from petlbench.training.optimizers import optimizer
from tests.backbone_factory import Bare, draw, randomise, small_tiny
from tests.backbones.test_beit3 import a_batch
from tests.beit3_factory import error, golden_json, random_tiny, tiny
from tests.golden.arrays import differences
from tests.golden.checks.multiway import names_of_model

KINDS = {TEXT: "text", IMAGE: "image"}


def method(**options: Any) -> MultiWayAdapter:
    return MultiWayAdapter(MultiWayAdapter.Config(**options))


def trained(backbone: Backbone) -> dict[str, nn.Parameter]:
    return {name: p for name, p in backbone.named_parameters() if p.requires_grad}


def shaken(backbone: Backbone) -> Backbone:
    """Draw inserted parameters anew, so that none is zero; set evaluation mode."""
    with torch.no_grad():
        for p in trained(backbone).values():
            p.copy_(torch.randn_like(p) * 0.3)
    return backbone.eval()


def branch(layer: Layer) -> list[nn.Module]:
    return list(layer["ffn"].sites["branch"].children())


# ---- a second implementation of the specification (sections 1.1 to 1.8)


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * w[f"{name}_g"] + w[f"{name}_b"]


def linear(x: Tensor, w: dict[str, Tensor], name: str, role: str) -> Tensor:
    return x @ w[f"{name}w{role}"].T + w[f"{name}b{role}"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def spec_block(h: Tensor, w: dict[str, Tensor], b: str, split: int, pad: Tensor, heads: int, s: float,
               masks: dict[str, Tensor] | None = None) -> Tensor:  # fmt: skip
    """Compute one block; `b` is the prefix of its arrays; in training, `masks` are divided by the kept share."""
    masks = masks or {}
    first = {-1: h.shape[1], 0: 0}.get(split, split)

    def each(f: Any, *x: Tensor) -> Tensor:
        sides = (("v", slice(None, first)), ("t", slice(first, None)))
        return torch.cat([f(f"{b}{m}.", *(t[:, at] for t in x)) for m, at in sides if h[:, at].shape[1]], dim=1)

    x = each(lambda m, t: norm(t, w, f"{m}ln1"), h)
    q, k, v = (each(lambda m, t, r=r: linear(t, w, m, r), x).unflatten(-1, (heads, -1)).transpose(1, 2) for r in "qkv")
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    mixed = scores.masked_fill(pad[:, None, None].bool(), -torch.inf).softmax(-1) @ v
    r = each(lambda m, t: linear(norm(t, w, f"{m}lni"), w, m, "o"), mixed.transpose(1, 2).flatten(2))
    a = h + r * masks.get("path_mask_attn", 1.0)
    hidden = each(lambda m, t: norm(gelu(linear(norm(t, w, f"{m}ln2"), w, m, "1")), w, f"{m}lnf"), a)
    z = a + each(lambda m, t: linear(t, w, m, "2"), hidden) * masks.get("path_mask_ffn", 1.0)
    if f"{b}v.nke_down_w" in w and split <= 0:  # as released, none in fused passes
        m = f"{b}{'v' if split else 't'}.nke_"
        low = (a @ w[f"{m}down_w"].T + w[f"{m}down_b"]).relu() * masks.get("nke_dropout_mask", 1.0)
        z = z + s * (low @ w[f"{m}up_w"].T + w[f"{m}up_b"])
    if f"{b}ae_w1" in w:
        inner = norm(gelu(linear(z, w, f"{b}ae_", "1")), w, f"{b}ae_ln")
        z = z + linear(inner, w, f"{b}ae_", "2") * masks.get("path_mask_ae", 1.0)
    return z


def block_arrays(b: str, d: int, f: int, m: int, parts: str) -> dict[str, Tensor]:
    """Draw values for one block with these parts (`plain`, `nke`, `ae`, `nke_ae`)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for mu in "vt":
        shapes |= {f"{mu}.{name}_{part}": (d,) for name in ("ln1", "lni", "ln2") for part in "gb"}
        shapes |= {f"{mu}.w{role}": (d, d) for role in "qkvo"} | {f"{mu}.b{role}": (d,) for role in "qkvo"}
        shapes |= {f"{mu}.w1": (f, d), f"{mu}.b1": (f,), f"{mu}.w2": (d, f), f"{mu}.b2": (d,)}
        shapes |= {f"{mu}.lnf_g": (f,), f"{mu}.lnf_b": (f,)}
        if "nke" in parts:
            own = {"down_w": (m, d), "down_b": (m,), "up_w": (d, m), "up_b": (d,)}
            shapes |= {f"{mu}.nke_{name}": shape for name, shape in own.items()}
    if "ae" in parts:
        shapes |= {"ae_w1": (f, d), "ae_b1": (f,), "ae_w2": (d, f), "ae_b2": (d,), "ae_ln_g": (f,), "ae_ln_b": (f,)}
    return {b + name: drawn(*shape) for name, shape in shapes.items()}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * 0.5


def written(path: Path, weights: dict[str, Tensor], rest: dict[str, Any]) -> Path:
    """Write a golden file with the weights' gradients."""
    grads = {f"grad_{name}": w.grad for name, w in weights.items() if w.grad is not None}
    arrays = {**weights, **grads, **rest}
    np.savez(path, **{name: np.asarray(a.detach() if isinstance(a, Tensor) else a) for name, a in arrays.items()})
    return path


def largest(path: Path) -> float:
    found = differences(path)
    assert len(found) > 4
    return max(item.gap for item in found)


@pytest.mark.parametrize(("parts", "split"), product(("nke", "ae", "nke_ae"), (-1, 0, 2)))
def test_a_file_of_any_released_layer_agrees(tmp_path: Path, parts: str, split: int) -> None:
    torch.manual_seed(0)
    d, f, m, shape = 8, 10, 3, (2, 5)
    w = {name: t.requires_grad_() for name, t in block_arrays("", d, f, m, parts).items()}
    h, gy, pad = drawn(*shape, d).requires_grad_(), drawn(*shape, d), torch.zeros(shape, dtype=torch.long)
    pad[1, 3] = 1
    kept = {f"path_mask_{name}": torch.tensor([[[1.0]], [[0.0]]]).double() for name in ("attn", "ffn", "ae")}
    kept["nke_dropout_mask"] = (torch.rand(*shape, m) > 0.3).double()
    scaled = {name: t / (0.9 if name.startswith("nke") else 0.75) for name, t in kept.items()}
    y = spec_block(h, w, "", split, pad, 2, 0.7)
    (y * gy).sum().backward()
    train = spec_block(h, w, "", split, pad, 2, 0.7, scaled)
    rest = {"h": h, "gy": gy, "grad_h": h.grad, "pad": pad, "split": split, "out": y, "out_train": train, **kept}
    rest |= {"heads": 2, "s": 0.7, "p_path": 0.25, "p_drop": 0.1}
    name = {-1: "vision", 0: "text", 2: "fused2"}[split]
    assert largest(written(tmp_path / f"g3_block_{parts}_{name}.npz", w, rest)) < 1e-12


def spec_model(w: dict[str, Tensor], image: Tensor, ids: Tensor, pad: Tensor, layers: int) -> dict[str, Tensor]:
    """Compute all outputs of a g4 file."""
    patches = F.conv2d(image, w["patch_w"], w["patch_b"], stride=16).flatten(2).transpose(1, 2)
    v = torch.cat([w["cls"].expand(len(image), -1, -1), patches], dim=1) + w["pos_v"][2:]
    t = (w["tok_emb"][ids] + w["pos_t"][2 : 2 + ids.shape[1]]) * (1 - pad)[..., None]
    seen = torch.zeros(v.shape[:2], dtype=torch.long)
    out: dict[str, Tensor] = {"hid_v_0": v, "hid_t_0": t}
    x, n = torch.cat([v, t], dim=1), v.shape[1]
    for i in range(layers):
        v, t = spec_block(v, w, f"b{i}.", -1, seen, 2, 0.7), spec_block(t, w, f"b{i}.", 0, pad, 2, 0.7)
        x = spec_block(x, w, f"b{i}.", n, torch.cat([seen, pad], dim=1), 2, 0.7)
        out |= {f"hid_v_{i + 1}": v, f"hid_t_{i + 1}": t}
    out |= {"enc_v": norm(v, w, "v.lnF"), "enc_t": norm(t, w, "t.lnF")}
    out["enc_fused"] = torch.cat([norm(x[:, :n], w, "v.lnF"), norm(x[:, n:], w, "t.lnF")], dim=1)
    for m in "vt":
        feature = out[f"enc_{m}"][:, 0] @ w[f"head_{m}"].T
        out[f"feat_{m}"] = feature / feature.norm(dim=-1, keepdim=True)
    logits = w["log_scale"].exp() * out["feat_v"] @ out["feat_t"].T
    out["logits_image_to_text"] = logits
    out["loss"] = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    return out


@pytest.mark.parametrize("parts", ["nke_ae", "nke"])
def test_a_file_of_any_released_model_agrees(tmp_path: Path, parts: str) -> None:
    torch.manual_seed(0)
    d, layers = 8, 3
    w = {"tok_emb": drawn(20, d), "patch_w": drawn(d, 3, 16, 16) / 8, "patch_b": drawn(d), "cls": drawn(1, 1, d)}
    w |= {"mask_tok": drawn(1, 1, d), "pos_v": drawn(12, d), "pos_t": drawn(10, d), "log_scale": drawn()}
    w |= {f"{m}.lnF_{part}": drawn(d) for m in "vt" for part in "gb"} | {f"head_{m}": drawn(d, d) for m in "vt"}
    for i in range(layers):
        w |= block_arrays(f"b{i}.", d, 10, 3, parts)
    for t in w.values():
        t.requires_grad_()
    image, ids = drawn(3, 3, 48, 48), torch.randint(20, (3, 6))
    pad = torch.zeros(3, 6, dtype=torch.long)
    pad[1, 4:] = 1
    out = spec_model(w, image, ids, pad, layers)
    out["loss"].backward()
    rest = {"image": image, "token_ids": ids, "pad": pad, "heads": 2, "s": 0.7, "patch": 16, **out}
    assert largest(written(tmp_path / f"g4_model_{parts}.npz", w, rest)) < 1e-12


@pytest.mark.parametrize(("place", "s"), product(("none", "in", "out"), ("0.1", "0.6", "1", "learn")))
def test_a_file_of_any_extractor_agrees(tmp_path: Path, place: str, s: str) -> None:
    torch.manual_seed(0)
    d, m = 6, 4
    w = {"down_w": drawn(m, d), "down_b": drawn(m), "up_w": drawn(d, m), "up_b": drawn(d)}
    if place != "none":
        w |= {"ln_g": drawn(d), "ln_b": drawn(d)}
    if s == "learn":
        w["s_param"] = drawn(1)
    x, gy, kept = drawn(2, 3, d).requires_grad_(), drawn(2, 3, d), (torch.rand(2, 3, m) > 0.3).double()
    for t in w.values():
        t.requires_grad_()
    scale = w["s_param"] if s == "learn" else torch.tensor(float(s), dtype=torch.float64)

    def spec(drop: Tensor | float) -> Tensor:
        low = (norm(x, w, "ln") if place == "in" else x) @ w["down_w"].T + w["down_b"]
        out = scale * (low.relu() * drop @ w["up_w"].T + w["up_b"])
        return norm(out, w, "ln") if place == "out" else out

    y = spec(1.0)
    (y * gy).sum().backward()
    rest = {"x": x, "gy": gy, "grad_x": x.grad, "s": scale, "p_drop": 0.1, "dropout_mask": kept, "y": y}
    rest |= {"y_plus_x": y + x, "y_train": spec(kept / 0.9)}
    assert largest(written(tmp_path / f"g1_nke_ln-{place}_s-{s}.npz", w, rest)) < 1e-12


# ---- initial values and counts


def test_first_values_are_the_originals() -> None:
    torch.manual_seed(0)
    stats = golden_json("g11_init_stats")
    extractor = KnowledgeExtractor(768, 64, scale=0.1)
    enhancer = FeedForwardEnhancer(768, 3072)
    tensors = {"nke_down_w": extractor.bottleneck.down, "ae_w1": enhancer.fc1, "ae_w2": enhancer.fc2}
    for name, layer in tensors.items():
        values, expected = layer.weight.detach(), stats[name]
        assert float(values.std()) == pytest.approx(expected["std"], rel=0.01)
        assert float(values.min()) == pytest.approx(expected["min"], rel=1e-3)
        assert float(values.max()) == pytest.approx(expected["max"], rel=1e-3)
        assert abs(float(values.mean())) < 5e-4 and not layer.bias.any()
    assert not extractor.bottleneck.up.weight.any() and not extractor.bottleneck.up.bias.any()
    assert bool((enhancer.norm.weight == 1).all()) and not enhancer.norm.bias.any()
    out = enhancer(torch.randn(500, 768))
    assert float(out.detach().std()) == pytest.approx(stats["ae_out_std_for_unit_input"], rel=0.05)
    learned = KnowledgeExtractor(8, 2, scale="learned")
    assert isinstance(learned.scale, nn.Parameter) and learned.scale.tolist() == [1.0]


NKE, BOTTLENECK, CORE = {"enhancer": "none"}, {"enhancer": "bottleneck"}, {"enhancer": "shared_core"}
R128 = {**BOTTLENECK, "enhancer_bottleneck": 128}
M64 = {"bottleneck": 64}


@pytest.mark.parametrize(
    ("family", "name", "options", "count"),
    [
        (BEiT3, "base-224", NKE, 2_379_264),
        (BEiT3, "large-224", NKE, 6_343_680),
        (BEiT3, "base-224", {}, 59_122_176),
        (BEiT3, "large-224", {}, 207_989_760),
        (BEiT3, "base-224", BOTTLENECK, 5_929_728),
        (BEiT3, "large-224", BOTTLENECK, 15_810_048),
        (Clip, "ViT-B-16", NKE | M64, 1_982_976),
        (Clip, "ViT-B-16", CORE | M64, 4_015_872),
        (Clip, "ViT-L-14", NKE | M64, 4_361_472),
        (VLBart, "", NKE, 1_784_448),
        (VLBart, "", R128, 2_969_472),
        (VLBart, "", R128 | {"decoder_enhancer": True}, 4_154_496),
        (VLT5, "", NKE, 3_568_896),
        (VLT5, "", R128, 5_938_944),
        (TransVG, "", NKE | M64, 198_528 + 1_189_632),
        (TransVG, "", CORE | M64, 198_528 + 1_189_632 + 818_304),
        (TransVG, "", NKE | M64 | {"stacks": ("fusion",)}, 397_056),
    ],
)
def test_published_sizes_have_the_specified_parameters(
    family: type[Backbone], name: str, options: dict[str, Any], count: int
) -> None:
    with torch.device("meta"):
        backbone = family(family.configured(f"x:{name}", {}))  # type: ignore[call-arg]
        hosts = backbone.host_parameters()
        method(**options).adapt(backbone)
    assert sum(p.numel() for key, p in trained(backbone).items() if key not in hosts) == count


def test_an_extractor_is_a_twelfth_of_the_width_between_8_and_64() -> None:
    ranks = [MultiWayAdapter.Config().rank(width) for width in (8, 96, 256, 768, 1024)]
    assert ranks == [8, 8, 21, 64, 64]
    assert MultiWayAdapter.Config(reduction=4).rank(1024) == 256
    assert MultiWayAdapter.Config(bottleneck=7).rank(1024) == 7


# ---- the formula at its sites


def outputs(backbone: Backbone) -> list[Tensor]:
    """Return the states of passes over a text, an image, and both."""
    text, image = a_batch(backbone)  # type: ignore[arg-type]
    passes = (text,), (image,), (text, image)
    return [backbone.fuse(*parts, task="rec").states for parts in passes]


def flat(backbone: Backbone) -> Tensor:
    return torch.cat([states.flatten() for states in outputs(backbone)])


@pytest.mark.parametrize("enhancer", ["none", "bottleneck", "shared_core", "ffn"])
def test_all_but_the_released_enhancer_start_as_the_plain_model(enhancer: str) -> None:
    backbone = random_tiny()
    plain = flat(backbone)
    chosen = method(enhancer=enhancer)
    chosen.adapt(backbone)
    backbone.double().eval()
    same = error(flat(backbone), plain) < 1e-12
    assert same == chosen.identity == (enhancer != "ffn")


@pytest.mark.parametrize("parts", [(TEXT,), (IMAGE,), (TEXT, IMAGE)])
def test_every_token_goes_through_the_extractor_of_its_type(parts: tuple[int, ...]) -> None:
    """This holds in fused passes too; all token types share one enhancer."""
    backbone = random_tiny()
    layer = backbone.stack("encoder").layers[1]
    method(scale=0.7, norm="in").adapt(backbone)
    shaken(backbone)
    (beside,), (tail,) = branch(layer), layer.tail
    chosen = [a_batch(backbone)[kind] for kind in parts]
    x = torch.cat([part.states for part in chosen], dim=1)
    context = Pass(segments=tuple((kind, part.states.shape[1]) for kind, part in zip(parts, chosen, strict=True)))
    ours, taps = layer(x, context, {"attention": frozenset({"normed"}), "ffn": frozenset({"output"})})
    a, h = taps["attention", "normed"], taps["ffn", "output"]
    out, start = [], 0
    for kind, part in zip(parts, chosen, strict=True):
        run = slice(start, start + part.states.shape[1])
        nke = getattr(beside.extractor, KINDS[kind])
        low = F.layer_norm(a[:, run], (32,), nke.before.weight, nke.before.bias)
        down, up = nke.bottleneck.down, nke.bottleneck.up
        low = torch.relu(low @ down.weight.T + down.bias)
        out.append(a[:, run] + h[:, run] + 0.7 * (low @ up.weight.T + up.bias))
        start = run.stop
    z = torch.cat(out, dim=1)
    ae = tail.enhancer
    inner = F.layer_norm(gelu(z @ ae.fc1.weight.T + ae.fc1.bias), (64,), ae.norm.weight, ae.norm.bias)
    assert error(ours, z + inner @ ae.fc2.weight.T + ae.fc2.bias) < 1e-12


def test_as_released_a_fused_pass_has_no_extractor() -> None:
    plain = outputs(random_tiny())
    backbone = random_tiny()
    method(enhancer="none", released_fused=True).adapt(backbone)
    text, image, fused = outputs(shaken(backbone.double()))  # type: ignore[arg-type]
    assert error(fused, plain[2]) < 1e-12
    assert error(text, plain[0]) > 0.01 and error(image, plain[1]) > 0.01


def test_only_the_enhancer_is_used_by_both_passes_of_retrieval() -> None:
    backbone = random_tiny()
    method().adapt(backbone)
    shaken(backbone.double())  # type: ignore[arg-type]
    backbone.requires_grad_(True)
    used = []
    for part in a_batch(backbone):
        backbone.zero_grad()
        backbone.fuse(part, task="retrieval").states.pow(3).sum().backward()
        used.append({name for name, p in backbone.named_parameters() if p.grad is not None and p.grad.any()})
    enhancers = {name for name, _ in backbone.named_parameters() if ".tail." in name}
    assert used[0] & used[1] == enhancers and len(enhancers) == 2 * 6
    own = {name for name in used[0] ^ used[1] if ".sites." in name}
    assert len(own) == 2 * 2 * 4 and all((".text." in name) == (name in used[TEXT]) for name in own)


def test_on_post_norm_layers_the_extractor_is_inside_the_norm_and_the_enhancer_behind() -> None:
    backbone = small_tiny()
    method(enhancer="bottleneck", scale=0.5).adapt(backbone)
    shaken(backbone)
    for role, kind in (("encoder", IMAGE), ("decoder", TEXT)):
        layer = backbone.stack(role).layers[0]
        ffn = layer["ffn"]
        a = draw(2, 3, 32)
        context = Pass(segments=((kind, 3),))
        (beside,) = branch(layer)
        nke = getattr(beside.extractor, KINDS[kind], beside.extractor).bottleneck
        low = torch.relu(a @ nke.down.weight.T + nke.down.bias)
        z = ffn.norm(a + ffn.core(a, context) + 0.5 * (low @ nke.up.weight.T + nke.up.bias))
        assert error(ffn(a, context)[0], z) < 1e-12
        if role == "encoder":
            ae = layer.tail[0].enhancer
            expected = z + gelu(z @ ae.down.weight.T + ae.down.bias) @ ae.up.weight.T + ae.up.bias
            assert error(layer.tail[0](z), expected) < 1e-12


def test_a_stack_has_extractors_for_what_comes_through_it() -> None:
    backbone = small_tiny()
    method().adapt(backbone)
    found = {role: [type(branch(layer)[0].extractor) for layer in backbone.stack(role)] for role in backbone.roles()}
    assert found == {"vision": [KnowledgeExtractor] * 2, "encoder": [Routed] * 2, "decoder": [KnowledgeExtractor] * 2}
    tails = {role: [len(layer.tail) for layer in backbone.stack(role)] for role in backbone.roles()}
    assert tails == {"vision": [0, 0], "encoder": [1, 1], "decoder": [0, 0]}
    assert set(trained(backbone)) - backbone.host_parameters() == {
        name for name in trained(backbone) if ".sites.branch." in name or ".tail." in name
    }


@pytest.mark.parametrize(("extractors", "moved"), [("text", [True, False]), ("image", [False, True])])
def test_one_modality_alone_is_the_one_that_its_name_says(extractors: str, moved: list[bool]) -> None:
    plain = outputs(random_tiny())
    backbone = random_tiny()
    method(extractors=extractors, enhancer="none").adapt(backbone)
    ours = outputs(shaken(backbone.double()))  # type: ignore[arg-type]
    assert [error(a, b) > 1e-6 for a, b in zip(ours, plain, strict=True)] == [*moved, True]
    clip = clip_tiny()
    method(extractors=extractors, enhancer="none").adapt(clip)
    assert [bool(branch(clip.stack(role).layers[0])) for role in ("text", "vision")] == moved


def test_checkpointing_recomputes_the_routing() -> None:
    backbone = random_tiny()
    method().adapt(backbone)
    shaken(backbone.double())  # type: ignore[arg-type]
    found = []
    for backbone.stack("encoder").checkpointing in (False, True):
        backbone.zero_grad()
        flat(backbone).square().sum().backward()
        found.append([p.grad.clone() for p in trained(backbone).values()])
    assert found[0] and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- dropout and drop-path


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_the_extractors_hidden_values_drop_out_in_training(rate: float) -> None:
    backbone = random_tiny()
    method(dropout=rate, bottleneck=2000).adapt(backbone)
    extractor = branch(backbone.stack("encoder").layers[0])[0].extractor.text.train()
    hidden = extractor.bottleneck.activation(torch.ones(5, 2000))
    assert float((hidden == 0).double().mean()) == pytest.approx(rate, abs=0.02)
    assert float(hidden.max()) == pytest.approx(1 / (1 - rate))


class Traced(nn.Module):
    """Drop-path that drops everything, and records it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0


def test_the_enhancer_is_under_the_hosts_drop_path_and_the_extractor_is_not() -> None:
    backbone = random_tiny(drop_path=0.2)
    layer = backbone.stack("encoder").layers[1]
    assert layer["ffn"].drop.drop_prob == 0.2
    layer["ffn"].drop = Traced()
    method(enhancer="ffn").adapt(backbone)
    shaken(backbone.double())  # type: ignore[arg-type]
    assert layer.tail[0].drop is layer["ffn"].drop
    a = draw(1, 3, 32)
    y, taps = layer(a, Pass(segments=((TEXT, 3),)), {"attention": frozenset({"normed"})})
    a = taps["attention", "normed"]
    assert error(y, a + branch(layer)[0].extractor.text(a)) < 1e-12 and error(y, a) > 0.01


def test_dropout_of_single_values_does_not_reach_the_enhancer() -> None:
    backbone = small_tiny()
    method().adapt(backbone)
    layer = backbone.stack("encoder").layers[0]
    assert isinstance(layer["ffn"].drop, nn.Dropout) and layer["ffn"].drop.p == 0.1
    assert isinstance(layer.tail[0].drop, nn.Identity)


# ---- towers


def clip_tiny() -> Clip:
    backbone = Clip(Clip.configured("clip:tiny", {}))
    randomise(backbone, 0, 0.3)
    return backbone.eval()


def towers(vision: int, text: int, width: int = 16, text_width: int = 16) -> Bare:
    deep = [(vision, width), (text, text_width)]
    stacks = [vision_stack(size, layers, 2, 24, 0.0, "sdpa") for layers, size in deep]
    return Bare(vision=stacks[0], text=stacks[1])


def pairs(backbone: Backbone, part: str) -> list[tuple[int, int]]:
    """Return the (vision, text) layers whose enhancers are one `part`, or contain it."""
    of = {role: {i: layer.tail[0].enhancer for i, layer in enumerate(backbone.stack(role)) if len(layer.tail)}
          for role in ("vision", "text")}  # fmt: skip
    get = (lambda m: m) if part == "all" else (lambda m: getattr(m, part))
    return [(i, j) for i, a in of["vision"].items() for j, b in of["text"].items() if get(a) is get(b)]


@pytest.mark.parametrize("enhancer", ["ffn", "bottleneck"])
def test_towers_of_one_width_share_one_enhancer_which_is_saved_once(enhancer: str) -> None:
    backbone = towers(2, 2)
    method(enhancer=enhancer).adapt(backbone)
    assert pairs(backbone, "all") == [(0, 0), (1, 1)]
    names = [name for name in trained(backbone) if ".tail." in name]
    assert len(names) == 2 * (6 if enhancer == "ffn" else 4) and all("stacks.vision" in name for name in names)


@pytest.mark.parametrize(
    ("depths", "pairing", "expected"),
    [
        ((4, 2), "spread", [(1, 0), (3, 1)]),
        ((2, 4), "spread", [(0, 1), (1, 3)]),
        ((5, 2), "spread", [(1, 0), (4, 1)]),
        ((4, 2), "last", [(2, 0), (3, 1)]),
        ((2, 4), "last", [(0, 2), (1, 3)]),
    ],
)
def test_the_shallower_tower_decides_which_layers_are_paired(
    depths: tuple[int, int], pairing: str, expected: list[tuple[int, int]]
) -> None:
    backbone = towers(*depths, text_width=8)
    method(enhancer="shared_core", pairing=pairing).adapt(backbone)
    assert pairs(backbone, "core") == expected
    assert sum(len(layer.tail) for role in ("vision", "text") for layer in backbone.stack(role)) == 2 * len(expected)
    assert all(branch(layer) for role in ("vision", "text") for layer in backbone.stack(role))


def test_the_core_is_what_unequal_towers_share() -> None:
    backbone = clip_tiny()
    method(enhancer="shared_core", enhancer_bottleneck=5).adapt(backbone)
    shaken(backbone.double())  # type: ignore[arg-type]
    (vision,), (text,) = (backbone.stack(role).layers[1].tail for role in ("vision", "text"))
    assert vision.enhancer.core is text.enhancer.core and vision.enhancer.down is not text.enhancer.down
    for tail, width in ((vision, 32), (text, 24)):
        z, ae = draw(2, 3, width), tail.enhancer
        inner = gelu(gelu(z @ ae.down.weight.T + ae.down.bias) @ ae.core.weight.T + ae.core.bias)
        assert ae.core.weight.shape == (5, 5)
        assert error(tail(z), z + inner @ ae.up.weight.T + ae.up.bias) < 1e-12
    cores = [name for name in trained(backbone) if ".core.weight" in name]
    assert len(cores) == 2  # one per pair


def test_in_one_stack_the_core_is_what_both_types_share() -> None:
    backbone = random_tiny()
    method(enhancer="shared_core").adapt(backbone)
    routed = backbone.stack("encoder").layers[0].tail[0].enhancer
    assert routed.text.core is routed.image.core and routed.text.down is not routed.image.down
    plain = outputs(shaken(backbone.double()))  # type: ignore[arg-type]
    with torch.no_grad():
        for layer in backbone.stack("encoder"):
            layer.tail[0].enhancer.text.up.weight.mul_(2)
    moved = [not torch.equal(a, b) for a, b in zip(outputs(backbone), plain, strict=True)]
    assert moved == [True, False, True]


# ---- refusals, and unchanged parts


@pytest.mark.parametrize("enhancer", ["ffn", "bottleneck"])
def test_towers_of_unequal_width_ask_for_the_shared_core(enhancer: str) -> None:
    with pytest.raises(ValueError, match="32 and 24 wide: take shared_core"):
        method(enhancer=enhancer).adapt(clip_tiny())


def test_an_enhancer_without_a_second_modality_is_refused() -> None:
    with pytest.raises(ValueError, match="only vision, decoder: set enhancer to none"):
        method(stacks=("vision", "decoder")).adapt(small_tiny())
    backbone = small_tiny()
    method(stacks=("decoder",), decoder_enhancer=True).adapt(backbone)
    assert [len(layer.tail) for layer in backbone.stack("decoder")] == [1, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"bottleneck": 0},
        {"reduction": 0},
        {"reduction": 12, "bottleneck": 64},
        {"scale": 0},
        {"scale": "learnable_scalar"},
        {"norm": "before"},
        {"dropout": 1},
        {"extractors": "vision"},
        {"extractors": "none", "enhancer": "none"},
        {"enhancer": "sequential"},
        {"enhancer": "ffn", "enhancer_bottleneck": 8},
        {"enhancer": "none", "decoder_enhancer": True},
        {"pairing": "first"},
        {"option": "parallel"},
    ],
)
def test_options_that_mean_nothing_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MultiWayAdapter.Config(**options)


def test_a_modality_that_does_not_come_through_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image tokens pass through text"):
        method(extractors="image", enhancer="none", stacks=("text",)).adapt(clip_tiny())


def test_a_second_method_is_refused() -> None:
    backbone = small_tiny()
    method().adapt(backbone)
    with pytest.raises(ValueError, match="another method"):
        method().adapt(backbone)


def test_a_step_moves_what_was_inserted_and_nothing_else() -> None:
    backbone = random_tiny()
    adapted, handle = adapt(method(scale="learned", norm="out"), backbone)
    adapted.double()
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    moved = optimizer(trained(adapted), Recipe(weight_decay=0.1), 0.01, adapted)
    for _ in range(2):  # in the first step, weights behind zeros get no gradient
        flat(adapted.train()).pow(2).sum().backward()
        moved.step()
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trained(adapted)) and all(".sites." in name or ".tail." in name for name in changed)
    handle.restore()
    assert not any(isinstance(m, Beside | Enhanced) for m in backbone.modules())


def test_norms_train_on_demand() -> None:
    backbone = random_tiny()
    method(train_norms=True).adapt(backbone)
    stack = backbone.stack("encoder")
    assert all(p.requires_grad for module in stack.norms() for p in module.parameters())
    assert not stack.layers[0]["attention"].core.qkv.text.weight.requires_grad


# ---- claims and recipe


def test_variants_are_options_and_the_released_one_freezes_heads() -> None:
    for options in MultiWayAdapter.variants.values():
        MultiWayAdapter.Config(**options)
    released = method(**MultiWayAdapter.variants["released"])
    assert [released.host_options(family) for family in ("beit3", "clip", "tiny")] == [{"heads": "frozen"}] * 2 + [{}]
    assert method().host_options("beit3") == {}


@pytest.mark.parametrize(("family", "peak"), [("beit3", 2e-4), ("clip", 2e-4), ("vl_bart", 1e-3), ("tiny", 1e-3)])
def test_the_recipe_is_the_authors_command(family: str, peak: float) -> None:
    recipe = Recipe(**method().default_recipe(family))
    assert (recipe.lr, recipe.lr * recipe.lr_floor) == (peak, pytest.approx(1e-6))
    assert (recipe.weight_decay, recipe.eps, recipe.clip_norm, recipe.layer_decay) == (0.05, 1e-8, None, 1.0)
    assert (recipe.warmup, recipe.warmup_from_zero, recipe.schedule) == (0.1, True, "cosine")


def test_the_originals_parameter_groups_are_a_recipe() -> None:
    """The original's layer decay also slows inserted modules."""
    golden = golden_json("g7_param_groups")
    backbone = tiny()
    method().adapt(backbone)
    backbone.unfreeze()
    parts = dict.fromkeys([f"b{i}.{part}" for i in range(2) for part in ("v.nke_down_w", "ae_w1")], torch.empty(0))
    names = names_of_model(parts, golden["layers"])
    recipe = Recipe(layer_decay=golden["layer_decay"], weight_decay=golden["weight_decay"])
    parameters = {f"backbone.{name}": p for name, p in backbone.named_parameters()}
    groups = optimizer(parameters, recipe, 1.0, backbone).param_groups
    found = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    ours = {theirs: found[id(p)] for name, p in backbone.named_parameters() for theirs in names[name]}
    expected = {one["param"]: (one["lr_scale"], one["weight_decay"]) for one in golden["parameters"]}
    assert ours.keys() == expected.keys()
    assert all(values == pytest.approx(expected[name], abs=1e-12) for name, values in ours.items())
