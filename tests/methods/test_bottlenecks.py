"""The classical bottleneck adapters and AdaptFormer: formulas, order, sizes, initial values, claims, refusals."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from petlbench.methods.adaptformer import AdaptFormer
from petlbench.methods.bottlenecks import BottleneckMethod
from petlbench.methods.houlsby import Houlsby
from petlbench.methods.parallel import ParallelAdapter
from petlbench.methods.pfeiffer import Pfeiffer
from pydantic import ValidationError
from torch import Tensor, nn

from petlbench.api.backbone import Backbone
from petlbench.api.method import adapt
from petlbench.api.sites import IMAGE, Layer, Pass, Stack, SubLayer
from petlbench.api.snapshot import Snapshot, inserted
from petlbench.api.tokens import plain_tokens
from petlbench.backbones.clip import Clip
from petlbench.backbones.transvg import TransVG
from petlbench.backbones.vl_bart import VLBart
from petlbench.backbones.vl_t5 import VLT5
from petlbench.core.recipe import Recipe
from tests.backbone_factory import Bare, draw, randomise, small_tiny
from tests.golden.arrays import differences
from tests.golden.checks.bottleneck import KINDS

ALL: dict[str, type[BottleneckMethod]] = {
    "houlsby": Houlsby,
    "pfeiffer": Pfeiffer,
    "parallel": ParallelAdapter,
    "adaptformer": AdaptFormer,
}
VARIANTS = [f"{name}:{variant}" for name, cls in ALL.items() for variant in cls.variants]
D, R = 8, 3
Named = dict[str, Tensor]


def method(name: str, **options: Any) -> BottleneckMethod:
    """Make a method or `method:variant` with further options."""
    kind, _, variant = name.partition(":")
    cls = ALL[kind]
    return cls(cls.Config(**{**cls.variants.get(variant, {}), **options}))


# A second implementation of the adapters library's formulas, written from the specification.


def norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gain + bias


def phi(name: str, z: Tensor) -> Tensor:
    return {
        "relu": lambda: z * (z > 0),
        "swish": lambda: z / (1 + (-z).exp()),
        "gelu": lambda: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    }[name]()


def formula(kind: str, p: Named, x: Tensor, z: Tensor, activation: str, scale: float) -> Tensor:
    """Compute y at one position."""
    host = (lambda v: norm(v, p["host_ln_gamma"], p["host_ln_beta"], 1e-12)) if "host_ln_gamma" in p else (lambda v: v)
    before = kind.startswith(("pfeiffer", "adapterplus"))
    q = x if kind.startswith("parallel") else host(z + x) if before else z
    read = norm(q, p["ln_in_gamma"], p["ln_in_beta"], 1e-5) if "ln_in_gamma" in p else q
    o = p.get("s", scale) * (phi(activation, read @ p["D"].T + p["bD"]) @ p["U"].T + p["bU"])
    if "gate_W" in p:
        o = o * torch.sigmoid(q @ p["gate_W"].T + p["gate_b"]).mean(1, keepdim=True)
    if "ln_out_gamma" in p:
        o = norm(o, p["ln_out_gamma"], p["ln_out_beta"], 1e-5)
    if kind == "adapterplus":
        return o + q
    residual = {"pfeiffer_post_add": z + x, "pfeiffer_res_after_ln": q}.get(kind, z)
    return host(o + residual + x)


def file_of(kind: str, order: str, folder: Path) -> Path:
    """Write a golden file of this kind with values of the formulas above."""
    draws = map(lambda seed: lambda *shape: draw(*shape, seed=seed), itertools.count(1))
    activation = "swish" if "houlsby" in kind else "gelu" if kind == "adapterplus" else "relu"
    scale = 4.0 if kind == "parallel" else 1.0
    arrays: Named = {"w_loss": next(draws)(2, 5, D)}
    for index, part in itertools.product(range(2), ("attn", "ffn") if "houlsby" in kind else ("ffn",)):
        p = {"D": next(draws)(R, D), "bD": next(draws)(R), "U": next(draws)(D, R), "bU": next(draws)(D)}
        norms = ["host_ln"] * (order == "postln") + ["ln_in", "ln_out"] * ("ln_in_out" in kind)
        p |= {f"{name}_{which}": next(draws)(D) for name in norms for which in ("gamma", "beta")}
        p |= {"gate_W": next(draws)(1, D), "gate_b": next(draws)(1)} if "gated" in kind else {}
        p |= {"s": next(draws)(D)} if kind == "adapterplus" else {"s": next(draws)(1)} if "learned" in kind else {}
        leaves = {**p, "x": next(draws)(2, 5, D), "h": next(draws)(2, 5, D)}
        for value in leaves.values():
            value.requires_grad_()
        y = formula(kind, leaves, leaves["x"], leaves["h"], activation, scale)
        gradients = torch.autograd.grad((y * arrays["w_loss"]).sum(), list(leaves.values()))
        found = leaves | {"y": y} | {f"grad_{n}": g for n, g in zip(leaves, gradients, strict=True)}
        arrays |= {f"layer{index}.{part}.{name}": value for name, value in found.items()}
    last = y.detach()
    arrays["final"] = last if order == "postln" else norm(last, next(draws)(D), next(draws)(D), 1e-12)
    meta = {"activation": activation, "scaling": scale if "s" not in p else "learned", "host": "a host, LN eps 1e-12"}
    path = folder / f"bottleneck_{kind}_{order}.npz"
    np.savez(path, hparams_json=json.dumps(meta), **{n: v.detach().numpy() for n, v in arrays.items()})
    return path


@pytest.mark.parametrize("order", ["postln", "preln"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_the_librarys_layer_is_its_formula(kind: str, order: str, tmp_path: Path) -> None:
    found = differences(file_of(kind, order, tmp_path))
    assert [f"{item.name} {item.gap:.2g}" for item in found if not item.agrees] == []
    positions = 4 if "houlsby" in kind else 2
    gradients = 6 + 2 * (order == "postln") + {"houlsby_gated": 2, "houlsby_ln_in_out": 4}.get(kind, 0)
    assert len(found) == 1 + positions * (1 + gradients + (kind in ("adapterplus", "parallel_learned")))


@pytest.mark.parametrize("name", ["layer1.ffn.y", "layer0.ffn.grad_D", "layer0.ffn.grad_host_ln_gamma", "final"])
def test_a_wrong_number_in_a_file_is_found(name: str, tmp_path: Path) -> None:
    path = file_of("pfeiffer", "postln", tmp_path)
    arrays = dict(np.load(path))
    arrays[name] = arrays[name] + 1e-7
    np.savez(path, **arrays)
    assert [item.name for item in differences(path) if not item.agrees] == [name]


def test_a_parameter_too_many_in_a_file_is_an_error(tmp_path: Path) -> None:
    path = file_of("houlsby", "preln", tmp_path)
    np.savez(path, **dict(np.load(path)), **{"layer0.ffn.gate_W": np.zeros((1, D))})
    with pytest.raises(ValueError, match=r"only in the file.*gate_W"):
        differences(path)


# The adapter's position relative to the host's dropout, and its input.


class Times(nn.Module):
    """Stands for the host's dropout, or for its core."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, context: Pass | None = None) -> Tensor:
        return self.factor * x


def doubling(pre_norm: bool) -> tuple[Bare, SubLayer]:
    """Return a host with one sub-layer: h = 3 x, drop(h) = 2 h."""
    sublayer = SubLayer(Times(3.0), nn.LayerNorm(D), Times(2.0), width=D, pre_norm=pre_norm, projections={})
    backbone = Bare(encoder=Stack([Layer(ffn=sublayer)], width=D))
    randomise(backbone, seed=3)
    return backbone.eval(), sublayer


def bn(module: nn.Module, q: Tensor) -> Tensor:
    found: Tensor = module.bottleneck(q)  # type: ignore[operator]
    return found


SERIAL = {"attention": False}
ORDERS: dict[str, tuple[str, dict[str, Any], Callable[[Tensor, Tensor, Any, Any], Tensor]]] = {
    "houlsby": ("houlsby", SERIAL, lambda x, z, m, n: z + bn(m, z)),
    "pfeiffer": ("pfeiffer", {}, lambda x, z, m, n: z + bn(m, n(x + z))),
    "parallel": ("parallel", {}, lambda x, z, m, n: z + 4 * bn(m, x)),
    "adaptformer": ("adaptformer", {}, lambda x, z, m, n: z + 0.1 * bn(m, x)),
    "sequential": ("adaptformer:sequential", {}, lambda x, z, m, n: z + 0.1 * bn(m, z)),
    "the gate reads what the bottleneck reads": (
        "pfeiffer",
        {"gate": True},
        lambda x, z, m, n: z + bn(m, n(x + z)) * torch.sigmoid(m.gate(n(x + z))).mean(1, keepdim=True),
    ),
    "own norm takes the residual in": (
        "houlsby",
        SERIAL | {"norm_out": True, "residual_before_norm": True},
        lambda x, z, m, n: m.norm_out(z + bn(m, z)),
    ),
}


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("case", ORDERS)
def test_the_branch_stands_behind_host_dropout_and_before_the_norm(case: str, pre_norm: bool) -> None:
    name, options, expected = ORDERS[case]
    backbone, sublayer = doubling(pre_norm)
    method(name, init="normal", init_std=0.5, rank=R, **options).adapt(backbone)
    backbone.double().eval()
    module, x = next(inserted(backbone)), draw(2, 5, D)
    z = 6 * (sublayer.norm(x) if pre_norm else x)
    u = expected(x, z, module, (lambda v: v) if pre_norm else sublayer.norm)
    y, _ = sublayer(x, Pass())
    torch.testing.assert_close(y, x + u if pre_norm else sublayer.norm(x + u), rtol=0, atol=1e-12)


def test_adaptformer_drops_its_activation_and_nothing_else() -> None:
    """With every weight 1 and every bias 0, a token's branch counts the units that dropout keeps."""
    backbone, _ = doubling(True)
    method("adaptformer", rank=1000, scale=1.0).adapt(backbone)
    (module,) = inserted(backbone)
    for parameter in module.parameters():
        nn.init.constant_(parameter, float(parameter.ndim == 2))
    x = torch.ones(1, 4, D, dtype=torch.float64)
    branch = module.train()(x, torch.zeros_like(x)) / D
    kept = branch[..., 0] * 0.9 / 1000
    assert torch.equal(branch[..., :1].expand_as(branch), branch), "the output was dropped"
    assert ((kept - 0.9).abs() < 0.05).all() and kept.unique().numel() > 1
    torch.testing.assert_close(module.eval()(x, torch.zeros_like(x)), torch.full_like(x, 1000.0 * D))


def test_dropout_is_on_the_scaled_branch_and_not_on_what_it_is_added_to() -> None:
    backbone, _ = doubling(True)
    method("parallel", attention=False, rank=R, dropout=0.25, init="normal").adapt(backbone)
    (module,) = inserted(backbone)
    torch.manual_seed(0)
    x, value = draw(100, 10, D), draw(100, 10, D, seed=1)
    whole = module.eval()(x, value) - value
    dropped = module.train()(x, value) - value
    kept = dropped != 0
    alive = whole.abs() > 1e-9  # a token for which every unit is 0 has no branch to drop
    assert kept[alive].double().mean() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75, rtol=1e-9, atol=1e-12)


def test_adapter_plus_leaves_whole_samples_without_the_branch() -> None:
    backbone, _ = doubling(True)
    method("pfeiffer:plus", drop_path=0.25).adapt(backbone)
    (module,) = inserted(backbone)
    torch.manual_seed(0)
    q = torch.ones(4000, 2, D, dtype=torch.float64)
    moved = module.train()(q, q) - q
    untouched = (moved == 0).flatten(1).all(1)
    assert untouched.double().mean() == pytest.approx(0.25, abs=0.03)
    whole = module.eval()(q[:1], q[:1]) - q[:1]
    torch.testing.assert_close(moved[~untouched], (whole / 0.75).expand_as(moved[~untouched]), rtol=1e-9, atol=1e-12)


# Sizes.


@pytest.fixture(scope="module")
def hosts() -> dict[str, Backbone]:
    with torch.device("meta"):
        return {
            name: cls(cls.configured(name, options))
            for name, cls, options in (
                ("vl_bart", VLBart, {}),
                ("vl_t5", VLT5, {}),
                ("clip:ViT-B-16", Clip, {"weights": "none", "tokenizer": "tiny/tokenizer.json"}),
                ("transvg:r50", TransVG, {}),
            )
        }


VISION, TEXT = {"stacks": ("vision",)}, {"stacks": ("text",)}
COUNTS: list[tuple[str, str, dict[str, Any], int]] = [
    *[("adaptformer", "clip:ViT-B-16", VISION | {"rank": r}, n) for r, n in (
        (1, 27_660), (4, 82_992), (16, 304_320), (32, 599_424), (64, 1_189_632), (256, 4_730_880))],
    ("adaptformer", "clip:ViT-B-16", TEXT | {"rank": 64}, 793_344),
    ("adaptformer", "vl_bart", {}, 1_189_632),
    ("adaptformer", "vl_t5", {}, 2_379_264),
    ("adaptformer", "transvg:r50", {"rank": 64}, 1_388_160),
    ("adaptformer", "transvg:r50", {"rank": 128}, 395_520 + 2_370_048),
    *[(name, "clip:ViT-B-16", VISION | options, n) for name, options, n in (
        ("houlsby", {}, 1_789_056),
        ("houlsby", {"rank": 64}, 2_379_264),
        ("houlsby", {"rank": 96}, 3_559_680),
        ("pfeiffer", {}, 894_528),
        ("pfeiffer", {"rank": 64}, 1_189_632),
        ("pfeiffer", {"rank": 96}, 1_779_840),
        ("parallel", {}, 7_091_712),
        ("parallel", {"rank": 64}, 1_189_632),
        ("parallel:scaled", {}, 7_091_724),
        ("pfeiffer:plus", {}, 165_984))],
    ("houlsby", "vl_bart", {}, 1_789_056),
    ("houlsby", "vl_bart", {"rank": 64}, 2_379_264),
    ("houlsby", "vl_bart", {"rank": 96, "cross_attention": True}, 4_449_600),
    ("houlsby", "vl_bart", {"rank": 64, "cross_attention": True}, 2_974_080),
    ("pfeiffer", "vl_bart", {}, 894_528),
    ("pfeiffer", "vl_bart", {"rank": 64}, 1_189_632),
    ("houlsby:paper", "transvg:r50", TEXT, 2_417_664),
    ("houlsby", "transvg:r50", {"rank": 64}, 2_776_320),
    ("houlsby", "transvg:r50", {"rank": 128}, 5_531_136),
    ("pfeiffer", "transvg:r50", {"rank": 64}, 1_388_160),
]  # fmt: skip


@pytest.mark.parametrize(("name", "host", "options", "expected"), COUNTS)
def test_counts_are_the_published_ones(
    name: str, host: str, options: dict[str, Any], expected: int, hosts: dict[str, Backbone]
) -> None:
    """Counts on the meta device, without host parts; removal restores the backbone."""
    backbone = hosts[host]
    names, own = list(backbone.state_dict()), backbone.host_parameters()
    with torch.device("meta"):
        _, handle = adapt(method(name, **options), backbone)
    found = {n: p.numel() for n, p in backbone.named_parameters() if p.requires_grad and n not in own}
    handle.restore()
    assert sum(found.values()) == expected
    assert list(backbone.state_dict()) == names and not list(inserted(backbone))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_method_trains_its_bottlenecks_and_norms_where_it_says_so(name: str) -> None:
    backbone = small_tiny()
    mine = method(name, reduction=4)
    mine.adapt(backbone)
    modules = [p for module in inserted(backbone) for p in module.parameters()]
    norms = [p for role in backbone.roles() for n in backbone.stack(role).norms() for p in n.parameters()]
    own = backbone.host_parameters()
    expected = {id(p) for p in (modules + norms if name == "houlsby:paper" else modules)}
    trained = {id(p) for n, p in backbone.named_parameters() if p.requires_grad and n not in own}
    assert trained == expected
    sublayers = {"attention", "ffn"} if name.startswith("houlsby") else {"ffn"}
    where = {
        n.split(".sublayers.")[1].split(".")[0] for n, _ in backbone.named_parameters() if ".bottleneck.down." in n
    }
    assert where == sublayers


# Initial values.


def drawn(name: str, **options: Any) -> nn.Module:
    sublayer = SubLayer(Times(1.0), nn.LayerNorm(512), Times(1.0), width=512, pre_norm=True, projections={})
    torch.manual_seed(0)
    method(name, rank=256, **options).adapt(Bare(encoder=Stack([Layer(attention=sublayer, ffn=sublayer)], width=512)))
    module: nn.Module = next(inserted(sublayer))
    return module


CUT = 0.87963  # standard deviation of a standard normal cut at two standard deviations
INITIAL: dict[str, tuple[float, float, float]] = {  # std of down and of up, largest |value| of both
    "houlsby:hub": (0.02, 0.02, math.inf),
    "houlsby:paper": (CUT * 1e-3, CUT * 1e-3, 2e-3),
    "pfeiffer:seq": (0.02, 0.02, math.inf),
    "pfeiffer:plus": (CUT * 0.01, CUT * 0.01, 0.02),
    "parallel:fixed": (1 / math.sqrt(3 * 512), 0.0, 1 / math.sqrt(512)),
    "parallel:scaled": (1 / math.sqrt(3 * 512), 0.0, 1 / math.sqrt(512)),
    "adaptformer:image": (1 / math.sqrt(3 * 512), 0.0, 1 / math.sqrt(512)),
    "adaptformer:video": (0.02, 0.02, math.inf),
    "adaptformer:sequential": (1 / math.sqrt(3 * 512), 0.0, 1 / math.sqrt(512)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_initial_values_have_the_specified_moments(name: str) -> None:
    """131,072 draws of each weight give its standard deviation to a few thousandths."""
    module: Any = drawn(name)
    bottleneck = module.bottleneck
    *deviations, bound = INITIAL[name]
    for linear, std in zip((bottleneck.down, bottleneck.up), deviations, strict=True):
        weight = linear.weight.detach()
        assert float(weight.std()) == pytest.approx(std, rel=0.01)
        assert abs(float(weight.mean())) <= std / 50
        assert 0.95 * min(bound, 3.5 * std) <= float(weight.abs().max()) <= bound or std == 0
        assert not linear.bias.any()
    if math.isinf(bound):
        assert float(bottleneck.up.weight.detach().abs().max()) > 3.5 * 0.02, "cut"


def test_scales_and_dropout_rates_are_the_authors_and_learned_scales_start_at_one() -> None:
    found: dict[str, Any] = {name: drawn(name) for name in VARIANTS}
    assert {name: m.scale for name, m in found.items() if isinstance(m.scale, float)} == {
        "houlsby:hub": 1.0, "houlsby:paper": 1.0, "pfeiffer:seq": 1.0, "parallel:fixed": 4.0,
        "adaptformer:image": 0.1, "adaptformer:video": 0.1, "adaptformer:sequential": 0.1,
    }  # fmt: skip
    assert torch.equal(found["pfeiffer:plus"].scale, torch.ones(512))
    assert torch.equal(found["parallel:scaled"].scale, torch.ones(1))
    rates = {name: [c.p for c in module.modules() if isinstance(c, nn.Dropout)] for name, module in found.items()}
    assert {name: rate for name, rate in rates.items() if rate} == {
        "adaptformer:image": [0.1], "adaptformer:sequential": [0.1]
    }  # fmt: skip
    gate: Any = drawn("houlsby", gate=True)
    assert float(gate.gate.weight.detach().std()) == pytest.approx(0.02, rel=0.15) and not gate.gate.bias.any()


# Claims.


def outputs(backbone: Backbone) -> Tensor:
    """Return the outputs of all three stacks on fixed states."""
    x, mask = draw(2, 4, 16), torch.ones(2, 4, dtype=torch.bool)
    seen, _ = backbone.stack("vision").run(x, Pass())
    memory = backbone.fuse(plain_tokens(draw(2, 4, 32), mask, IMAGE), task="vqa")
    logits, _ = backbone.decode(memory, torch.tensor([[2, 5], [2, 6]]), task="vqa")
    return torch.cat([seen.flatten(), logits.flatten()])


CLAIMS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in VARIANTS],
    ("houlsby", {"init": "zero"}),
    ("pfeiffer", {"init": "zero"}),
    ("pfeiffer", {"init": "zero", "residual": "post_add"}),
    ("pfeiffer", {"init": "zero", "residual": "after"}),
    ("pfeiffer:plus", {"init": "zero"}),
    ("houlsby", {"init": "zero", "norm_out": True}),
    ("houlsby", {"init": "zero", "norm_out": True, "residual_before_norm": True}),
    ("parallel", {"norm_in": True, "norm_out": True, "scale": "learned"}),
]


@pytest.mark.parametrize(("name", "options"), CLAIMS)
def test_identity_is_claimed_where_it_holds_and_only_there(name: str, options: dict[str, Any]) -> None:
    backbone = small_tiny()
    before = outputs(backbone)
    mine = method(name, **options)
    mine.adapt(backbone)
    backbone.double().eval()
    gap = float((outputs(backbone) - before).abs().max())
    assert (gap < 1e-12) == mine.identity, gap


@pytest.mark.parametrize("name", VARIANTS)
def test_recipes_are_valid_and_those_of_the_host(name: str) -> None:
    mine = method(name)
    bart, t5, rec = (Recipe(**mine.default_recipe(family)) for family in ("vl_bart", "vl_t5", "transvg"))
    assert (bart.lr, t5.lr, rec.lr, rec.method_lr) == (1e-3, 3e-4, 1e-4, 0.1)
    assert bart.clip_norm == 5 and rec.clip_norm is None and rec.schedule == "step"


@pytest.mark.parametrize("name", ALL)
def test_the_knob_runs_from_small_to_large(name: str) -> None:
    size_option = ALL[name].size_option
    assert size_option is not None

    def size(value: float) -> int:
        backbone = small_tiny()
        method(name, **{size_option.field: value}).adapt(backbone)
        return sum(p.numel() for module in inserted(backbone) for p in module.parameters())

    sizes = [size(value) for value in size_option.values if value <= 32]
    assert sizes == sorted(sizes) and len(set(sizes)) >= 5


# The host's own norm.


def test_pfeiffer_gives_no_parameter_a_second_name_and_can_be_taken_out() -> None:
    backbone = small_tiny()
    before, names = outputs(backbone), list(backbone.state_dict())
    _, handle = adapt(method("pfeiffer", reduction=4), backbone)
    backbone.double().eval()
    ours = [n for n in backbone.state_dict() if n not in names]
    assert {n.rpartition(".bottleneck.")[2] for n in ours} == {"down.weight", "down.bias", "up.weight", "up.bias"}
    assert len(list(backbone.named_parameters())) == len(list(backbone.named_parameters(remove_duplicate=False)))
    assert not torch.equal(outputs(backbone), before)
    handle.restore()
    assert list(backbone.state_dict()) == names and torch.equal(outputs(backbone), before)


def test_pfeiffer_in_a_copied_backbone_reads_the_copys_norm() -> None:
    backbone = small_tiny()
    method("pfeiffer", reduction=4).adapt(backbone)
    backbone.double().eval()
    twin = copy.deepcopy(backbone)
    expected = outputs(twin)
    for norms in backbone.stack("encoder").norms():
        nn.init.zeros_(norms.weight)  # type: ignore[arg-type]
    assert torch.equal(outputs(twin), expected)


def test_pfeiffer_reads_the_norm_that_the_host_has_at_that_time() -> None:
    """A norm that replaces the host's is used too."""
    backbone, sublayer = doubling(False)
    method("pfeiffer", rank=R).adapt(backbone)
    backbone.double()
    x, expected = draw(2, 5, D), nn.LayerNorm(D).double()
    sublayer.norm = expected
    module = next(inserted(backbone))
    y, _ = sublayer(x, Pass())
    torch.testing.assert_close(y, expected(7 * x + bn(module, expected(7 * x))), rtol=0, atol=1e-12)


# The gate, and refusals.


def test_the_gate_leaves_padding_out_unless_told_otherwise() -> None:
    x, mask = draw(1, 5, D), torch.tensor([[True, True, False, True, False]])
    for mask_gate, tokens in ((True, x[:, mask[0]]), (False, x)):
        backbone, sublayer = doubling(True)
        method("houlsby", rank=R, attention=False, gate=True, mask_gate=mask_gate, init_std=0.5).adapt(backbone)
        randomise(backbone, seed=5)
        module: Any = next(inserted(backbone))
        z = 6 * sublayer.norm(x)
        opening = torch.sigmoid(module.gate(6 * sublayer.norm(tokens))).mean(1, keepdim=True)
        y, _ = sublayer(x, Pass(mask=mask))
        torch.testing.assert_close(y, x + z + bn(module, z) * opening, rtol=0, atol=1e-12)


def test_a_gate_over_tokens_is_refused_in_a_decoder() -> None:
    with pytest.raises(ValueError, match=r"words of the future.*`stacks`"):
        method("houlsby", gate=True).adapt(small_tiny())
    method("houlsby", gate=True, stacks=("vision", "encoder")).adapt(small_tiny())


WRONG: list[tuple[str, dict[str, Any], str]] = [
    *[(name, {"rank": 0}, "greater than 0") for name in ALL],
    *[(name, {"reduction": 0}, "greater than 0") for name in ALL],
    *[(name, {"activation": "tanh"}, "'relu', 'silu', 'gelu'") for name in ALL],
    *[(name, {"scale": 0.0}, "greater than 0") for name in ALL],
    ("adaptformer", {"scale": "learnt"}, "'learned' or 'learned_vector'"),
    ("adaptformer", {"form": "both"}, "'parallel' or 'sequential'"),
    ("adaptformer", {"residual": "after"}, "Extra inputs"),
    ("parallel", {"ffn": False}, "at least one of attention, cross_attention and ffn must be true"),
    ("houlsby", {"residual": "post_add"}, "set norm_before too"),
    ("houlsby", {"norm_after": False}, "needs norm_before: true and residual 'after'"),
    ("pfeiffer", {"norm_after": False}, "needs norm_before: true and residual 'after'"),
    ("houlsby", {"residual_before_norm": True}, "set norm_out too"),
    ("pfeiffer", {"dropout": 1.0}, "less than 1"),
]


@pytest.mark.parametrize(("name", "options", "reason"), WRONG)
def test_options_that_cannot_be_are_refused(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        method(name, **options)


def test_a_host_without_the_sub_layer_is_refused() -> None:
    backbone, _ = doubling(True)
    with pytest.raises(ValueError, match="no sub-layer called cross_attention in the chosen stacks"):
        method("houlsby", attention=False, ffn=False, cross_attention=True).adapt(backbone)


def test_a_rank_is_at_least_one() -> None:
    backbone = small_tiny()
    method("pfeiffer:plus").adapt(backbone)  # 16 // 96 and 32 // 96
    assert {module.bottleneck.down.out_features for module in inserted(backbone)} == {1}  # type: ignore[union-attr]


def modes(backbone: Backbone) -> Iterator[bool]:
    return (module.training for module in backbone.modules() if not isinstance(module, nn.ModuleList))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_method_can_be_taken_out_and_put_in_again(name: str) -> None:
    backbone = small_tiny()
    before, handle = outputs(backbone), Snapshot(backbone)
    for _ in range(2):
        method(name).adapt(backbone)
        handle.restore()
    assert torch.equal(outputs(backbone), before) and not any(modes(backbone))
