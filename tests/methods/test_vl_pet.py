"""VL-PET: inserted and trained modules, published counts, initial values, and its gate over padded batches.

`test_golden.py` compares its numbers with the authors', `test_methods_published.py` its gradients with the formulas.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from petlbench.methods.compacter import PHMBottleneck
from petlbench.methods.layers import Bottleneck
from petlbench.methods.vl_pet import VLPET, GranularityControl, MiddleYGate, SmallGate, VLPETConfig
from pydantic import ValidationError
from torch import Tensor, nn

from petlbench.api.backbone import Backbone
from petlbench.api.sites import IMAGE, Parallel, Pass
from petlbench.api.tokens import Texts, plain_tokens
from petlbench.backbones.vl_bart import VLBart
from petlbench.backbones.vl_t5 import VLT5
from petlbench.core.recipe import Recipe
from tests.backbone_factory import draw, small_tiny

KINDS: dict[str, Any] = {"vl_bart": VLBart, "vl_t5": VLT5}
NARROW: dict[str, Any] = {"width": 256, "ffn": 32}  # wide enough for moments, and fast
VARIANTS = ("large", "middleX", "middleY", "small")


def method(name: str, **options: Any) -> VLPET:
    return VLPET(VLPETConfig(**{**VLPET.variants[name], **options}))


def controls(backbone: Backbone, role: str = "encoder") -> list[GranularityControl]:
    sites = [s.sites["output"] for layer in backbone.stack(role) for _, s in layer.items()]
    return [one for site in sites for one in site.children() if isinstance(one, GranularityControl)]


def value_paths(backbone: Backbone) -> list[Any]:
    values = [layer["cross_attention"].projections["v"].singles()[0] for layer in backbone.stack("decoder")]
    beside = [getattr(value.owner, value.name) for value in values]
    return [one.path for one in beside if isinstance(one, Parallel)]


@cache
def untouched(family: str) -> Backbone:
    """Build the backbone at the published size, on the meta device."""
    with torch.device("meta"):
        backbone: Backbone = KINDS[family](KINDS[family].configured(family, {}))
    return backbone


def on_meta(family: str, variant: str) -> tuple[int, int]:
    """Count trainable and total parameters at the published size."""
    backbone = deepcopy(untouched(family))
    with torch.device("meta"):
        method(variant).adapt(backbone)
    parameters = list(backbone.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


COUNTS = {
    ("vl_bart", "small"): (4_291_020, 143_845_068),
    ("vl_bart", "middleX"): (4_281_804, 143_835_852),
    ("vl_bart", "middleY"): (4_281_792, 143_835_840),
    ("vl_bart", "large"): (6_052_416, 145_606_464),
    ("vl_bart", "small_released"): (4_291_020, 143_845_068),
    ("vl_t5", "small"): (10_518_168, 233_457_816),
    ("vl_t5", "middleX"): (10_499_736, 233_439_384),
    ("vl_t5", "middleY"): (10_499_712, 233_439_360),
    ("vl_t5", "large"): (17_582_208, 240_521_856),
}


@pytest.mark.parametrize(("family", "variant"), COUNTS)
def test_parameters_are_the_published_ones(family: str, variant: str) -> None:
    assert on_meta(family, variant) == COUNTS[family, variant]


@pytest.mark.parametrize(
    ("variant", "percent"), [("small", 2.0799), ("middleX", 2.0735), ("middleY", 2.0735), ("large", 3.2753)]
)
def test_compacter_with_a_gate_and_light_decoder_has_the_papers_share(variant: str, percent: float) -> None:
    """The specification derives four decimals of Table 9's "Compacter + G + LW"."""
    trainable, total = on_meta("vl_bart", f"compacter_{variant}")
    assert round(100 * trainable / total, 4) == percent


def test_what_trains_is_what_it_says() -> None:
    """These are encoder modules, value adapters, norms of stacks without cross-attention, the host's projection."""
    backbone = small_tiny()
    before = {name for name, _ in backbone.named_parameters()}
    VLPET().adapt(backbone)
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    norms = {
        f"stacks.{role}.{norm}.{kind}"
        for role, around in (("vision", "final_norm"), ("encoder", "embedding_norm"))
        for norm in (around, *(f"layers.{i}.sublayers.{s}.norm" for i in range(2) for s in ("attention", "ffn")))
        for kind in ("weight", "bias")
    }
    assert {name for name in trained if name in before} == norms | backbone.host_parameters()
    inserted = {name for name, _ in backbone.named_parameters()} - before
    moved = {name for name in inserted if ".base." in name}  # frozen weights beneath a path
    assert inserted - moved == trained - before and not moved & trained
    assert len(controls(backbone)) == len(controls(backbone, "vision")) == 4 and not controls(backbone, "decoder")
    assert len(value_paths(backbone)) == 2


def adapted(family: str, variant: str, **options: Any) -> Backbone:
    """Adapt a small backbone; the method's initial values stay."""
    torch.manual_seed(0)
    backbone: Backbone = KINDS[family](KINDS[family].configured(f"{family}:tiny", NARROW))
    return method(variant, **options).adapt(backbone)


def values(*tensors: Tensor) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def linears(backbone: Backbone) -> list[nn.Linear]:
    inserted = [*controls(backbone), *value_paths(backbone)]
    return [module for one in inserted for module in one.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_bart_everything_is_drawn_as_bart_draws(variant: str) -> None:
    backbone = adapted("vl_bart", variant)
    drawn = [values(linear.weight) for linear in linears(backbone)]
    gates = [control.gate for control in controls(backbone)]
    if variant == "middleY":
        drawn += [values(gate.z) for gate in gates if isinstance(gate, MiddleYGate)]
        assert len(drawn) == 4 * 2 + 2 * 2 + 4
    for size in {len(one) for one in drawn}:
        same = torch.cat([one for one in drawn if len(one) == size])
        assert abs(float(same.std()) / 0.02 - 1) < 4 / len(same) ** 0.5
        assert abs(float(same.mean())) < 0.02 * 4 / len(same) ** 0.5
        assert float(same.abs().max()) > 0.02 * 2  # uniform numbers would stay below sqrt 3
    assert not any(linear.bias.any() for linear in linears(backbone))
    assert all(control.scale == 1 for control in controls(backbone))


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_t5_last_layers_start_at_zero_and_the_rest_as_torch_draws(variant: str) -> None:
    backbone = adapted("vl_t5", variant)
    last, first = [], []
    for one in controls(backbone):
        gate: Any = one.gate
        inner: Any = one.change
        last += [inner.up, *([gate.bottleneck.up] if variant == "large" else [])]
        last += [gate.linear] if variant in ("middleX", "small") else []
        first += [inner.down, *([gate.bottleneck.down] if variant == "large" else [])]
        if variant == "middleY":
            assert not gate.z.any()
    last += [path.up for path in value_paths(backbone)]
    first += [path.down for path in value_paths(backbone)]
    assert {id(linear) for linear in linears(backbone)} == {id(linear) for linear in first + last}
    assert not any(linear.weight.any() or linear.bias.any() for linear in last)
    bound = 256**-0.5
    for drawn in (values(*(one.weight for one in first)), values(*(one.bias for one in first))):
        assert bound * 0.95 < float(drawn.abs().max()) <= bound
        assert abs(float(drawn.std()) / (bound / 3**0.5) - 1) < 4 / len(drawn) ** 0.5


@pytest.mark.parametrize(("variant", "share"), [("large", 0.15), ("middleX", 0.15), ("middleY", 0.3), ("small", 0.15)])
def test_on_t5_a_share_of_the_frozen_output_is_left_at_the_start(variant: str, share: float) -> None:
    x, h = draw(2, 3, 256), draw(2, 3, 256, seed=1)
    for control in controls(adapted("vl_t5", variant).double()):
        with Pass().active():
            torch.testing.assert_close(control(x, h), share * h)


def test_phm_layers_are_drawn_as_compacter_draws_them() -> None:
    """This holds on T5 too, where their last layers do not start at zero."""
    for family in KINDS:
        backbone = adapted(family, "compacter_middleX")
        made = [control.change for control in controls(backbone)] + value_paths(backbone)
        assert all(isinstance(one, PHMBottleneck) for one in made)
        assert abs(float(values(*(side.A for one in made for side in (one.down, one.up))).std()) / 0.01 - 1) < 0.5


@pytest.mark.parametrize(("family", "ranks"), [("vl_bart", (32, 32, 32)), ("vl_t5", (64, 64, 32))])
def test_ranks_are_shares_of_the_width(family: str, ranks: tuple[int, int, int]) -> None:
    """The ranks are those of the encoder module, its gate, and the value adapter."""

    def found(**options: Any) -> tuple[int, int, int]:
        backbone = adapted(family, "large", **options)
        control: Any = controls(backbone)[0]
        modules = control.change, control.gate.bottleneck, value_paths(backbone)[0]
        assert all(isinstance(module, Bottleneck) for module in modules)
        return tuple(module.down.out_features for module in modules)  # type: ignore[return-value]

    assert found() == ranks
    assert found(reduction=16) == (16, 16, 16 * ranks[2] // ranks[0])
    assert found(reduction=16, gate_reduction=32, value_reduction=64) == (16, 8, 4)
    assert found(rank=12, gate_rank=5, value_rank=3) == (12, 5, 3)


def encoded(backbone: Backbone, ids: Tensor) -> Tensor:
    """Return the first row's states of real text tokens and image tokens."""
    texts = Texts(ids, ids != backbone.pad_id)
    batch = len(ids)
    pixels = plain_tokens(draw(1, 4, 32).expand(batch, -1, -1), torch.ones(batch, 4, dtype=torch.bool), IMAGE)
    fused = backbone.fuse(backbone.embed_text(texts), pixels, task="vqa")
    return fused.states[0][fused.mask[0]]


@pytest.mark.parametrize("variant", [*VARIANTS, "small_released"])
def test_a_sample_depends_on_who_shares_its_batch_only_as_released(variant: str) -> None:
    """The row beside the sample is longer, which pads the sample."""
    backbone = method(variant).adapt(small_tiny()).eval()
    backbone.double().requires_grad_(False)
    for control in controls(backbone):
        for parameter in control.gate.parameters():
            parameter.normal_()
    pad = backbone.pad_id
    alone = encoded(backbone, torch.tensor([[5, 6, 7]]))
    beside = encoded(backbone, torch.tensor([[5, 6, 7, pad, pad], [8, 9, 10, 11, 12]]))
    gap = float((alone - beside).abs().max())
    assert gap > 1e-4 if variant == "small_released" else gap < 1e-12
    assert bool(getattr(method(variant), "mixes_rows", "")) == (variant == "small_released")


def test_small_gate_sees_no_token_to_come_where_its_tower_decodes() -> None:
    gate, x, m = SmallGate(8, masked=True).double(), draw(2, 4, 8), draw(2, 4, 8, seed=1)
    with Pass(memory=draw(2, 3, 8)).active():
        whole, shorter = gate(x, m), gate(x[:, :3], m[:, :3])
    torch.testing.assert_close(whole[:, :3], shorter)
    with Pass().active():
        torch.testing.assert_close(whole[:, -1:], gate(x, m))


def test_several_heads_are_one() -> None:
    """Table 9's "VL-Adapter + G + LW" has one head, but the same function, parameters and initial values."""
    one, four = adapted("vl_bart", "large", heads=1), adapted("vl_bart", "large", heads=4)
    first, second = one.state_dict(), four.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"heads": 3}, "3 heads do not divide the rank 4 at width 32"),
    ({"reduction": 64, "heads": 4}, "4 heads do not divide the rank 1"),
    ({"rank": 6, "heads": 4}, "4 heads do not divide the rank 6"),
    ({"module": "compacter", "n": 3}, "n = 3 must divide both sides"),
    ({"stacks": ("fusion",)}, "no stack 'fusion'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_sizes_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLPET(VLPETConfig(**options)).adapt(small_tiny(vision_width=32))


@pytest.mark.parametrize(
    "options", [{"reduction": 0}, {"rank": 0}, {"variant": "medium"}, {"module": "lora"}, {"scale": 0}, {"hands": 4}]
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VLPETConfig(**options)


def test_recipes_are_the_authors() -> None:
    rates = {family: method("small").default_recipe(family)["lr"] for family in ("vl_bart", "vl_t5", "tiny")}
    assert rates == {"vl_bart": 1e-3, "vl_t5": 3e-4, "tiny": 1e-3}
    recipe = Recipe(**method("large").default_recipe("vl_bart"))
    assert (recipe.warmup, recipe.clip_norm, recipe.weight_decay, recipe.schedule) == (0.1, 5.0, 0.01, "linear")
    assert (recipe.betas, recipe.eps) == ((0.9, 0.999), 1e-6)
