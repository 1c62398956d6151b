"""The bridge to peft: listed types, sites of its layers, their claims, and their removal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import peft.mapping
import pytest
import torch
from peft import PeftType
from petlbench.methods.lora import LoRA, LoRAConfig
from petlbench.methods.peft_bridge import Adapted, Peft, PeftConfig
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer

from petlbench.api.method import adapt
from petlbench.api.sites import IMAGE, TEXT, Pass, Stack
from petlbench.backbones.parts.multiway import multiway_stack
from petlbench.backbones.parts.transformers_parts import bart_decoder_layer, bart_encoder_layer
from petlbench.conformance.module_snapshot import ModuleSnapshot, digests, tensors
from tests.backbone_factory import Bare, bart_config, draw, randomise
from tests.layer_cases import FAMILIES, B, N, make
from tests.layer_cases import D as NARROW

D = 32
SHAPED_BY_VALUES = {"adamss"}  # its number of parameters depends on the weights


def untouched() -> Bare:
    """Return an encoder stack of two layers, in single precision, which some types need."""
    layers = [bart_encoder_layer(BartEncoderLayer(bart_config(D, 4, 64))) for _ in range(2)]
    backbone = Bare(encoder=Stack(layers, width=D))
    return randomise(backbone, std=0.2).float().eval()  # type: ignore[return-value]


def output(backbone: Bare) -> Tensor:
    x = draw(B, N, D).to(next(backbone.parameters()).dtype)
    return backbone.stack("encoder").run(x, Pass())[0].detach()


def method(**config: Any) -> Peft:
    return Peft(PeftConfig(**config))


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def moved(backbone: nn.Module, std: float = 0.05) -> None:
    """Change the trained values, as learning would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained(backbone).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)


# What there is


def kinds() -> dict[str, list[str]]:
    """Return the variants by type."""
    found: dict[str, list[str]] = {}
    for name, config in Peft.variants.items():
        found.setdefault(config.get("type", "lora"), []).append(name)
    return found


def test_every_type_of_the_installed_peft_is_listed_once_and_the_impossible_ones_say_why() -> None:
    installed = {kind.value.lower() for kind in PeftType}
    assert kinds().keys() | Peft.impossible.keys() == installed
    assert not kinds().keys() & Peft.impossible.keys()
    assert all(kind in Peft.variants for kind in kinds()), "a type's own name is its plain variant"
    assert all(reason and "\n" not in reason for reason in Peft.impossible.values())
    assert Peft.variants["lora"] == {} and PeftConfig().type == "lora"


@pytest.mark.parametrize("kind", sorted(Peft.impossible))
def test_an_impossible_type_is_refused_with_its_reason(kind: str) -> None:
    with pytest.raises(ValidationError, match=Peft.impossible[kind].replace("(", r"\(")):
        method(type=kind)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "lorra"}, "no type 'lorra': did you mean 'lora'"),
        ({"type": "zzzzz"}, "no type 'zzzzz': there are adalora, "),
        ({"options": {"lora_dropuot": 0.1}}, "no option 'lora_dropuot': did you mean 'lora_dropout'"),
        ({"type": "ia3", "options": {"target_modules": ["q"]}}, "choose modules with `targets` and `stacks`"),
        ({"type": "ia3", "options": {"feedforward_modules": ["in"]}}, "choose modules with `targets` and `stacks`"),
        ({"type": "boft", "options": {"boft_block_num": 4}}, "peft says: "),
        ({"type": "ln_tuning", "targets": ["q"]}, "goes into norms: leave targets out"),
        ({"targets": []}, "at least 1 item"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        method(**config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "oft", "options": {"oft_block_size": 5}}, "a size that divides"),
        ({"type": "boft", "options": {"boft_block_size": 5}}, r"in_features \(32\) must be divisible"),
        ({"type": "c3a", "options": {"block_size": 5}}, "should be a factor of the input size"),
        ({"type": "vblora", "options": {"vector_length": 5}}, "divisible"),
        ({"options": {"r": 0}}, "positive integer"),
        ({"targets": ["queries"]}, "no projection called queries in the chosen stacks"),
        ({"stacks": ["decoder"]}, "no stack 'decoder'"),
    ],
)
def test_what_does_not_fit_the_backbone_is_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        method(**config).adapt(untouched())
    assert "\n" not in str(caught.value)


def test_an_older_peft_is_told_that_it_lacks_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, PeftType.HRA)
    with pytest.raises(ValueError, match=r"the installed peft [\d.]+ has no type 'hra': upgrade it"):
        method(type="hra").adapt(untouched())


def test_a_missing_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"peft cannot be imported \(.*\): `pip install peft`"):
        method().adapt(untouched())


# What each variant does


@pytest.mark.parametrize("name", list(Peft.variants))
def test_a_variant_trains_its_own_starts_as_it_claims_merges_and_goes_without_a_trace(name: str) -> None:
    here = method(**Peft.variants[name])
    backbone = untouched()
    inventory, before = ModuleSnapshot(backbone), digests(tensors(backbone))
    own, plain = set(backbone.parameters()), output(backbone)
    torch.manual_seed(0)
    found, handle = adapt(here, backbone)
    backbone.eval()
    assert found is backbone and trained(backbone)
    assert name == "ln_tuning" or own.isdisjoint(trained(backbone).values())
    kept = output(backbone)
    gap = float((kept - plain).abs().max())
    assert gap < (1e-5 if here.identity else 2.0), "FourierFT at its scale for wide models is off by hundreds"
    moved(backbone)
    assert (output(backbone) - kept).abs().max() > 1e-6
    handle.restore()
    assert not inventory.changes() and digests(tensors(backbone)) == before


@pytest.mark.parametrize("name", [name for name, config in Peft.variants.items() if method(**config).mergeable])
def test_a_merged_variant_computes_the_same_in_the_untouched_structure(name: str) -> None:
    backbone, here = untouched(), method(**Peft.variants[name])
    structure = [(n, type(m)) for n, m in backbone.named_modules()]
    torch.manual_seed(0)
    here.adapt(backbone)
    backbone.double().eval()
    moved(backbone)
    unmerged = output(backbone)
    here.merge()
    assert [(n, type(m)) for n, m in backbone.named_modules()] == structure
    torch.testing.assert_close(output(backbone), unmerged, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["adamss", "beft", "c3a", "deft", "lily"])
def test_what_cannot_be_merged_says_so(name: str) -> None:
    here = method(**Peft.variants[name])
    here.adapt(untouched())
    assert not here.mergeable
    with pytest.raises(NotImplementedError, match=f"'{name}' cannot be merged"):
        here.merge()


@pytest.mark.parametrize("name", sorted(Peft.variants.keys() - SHAPED_BY_VALUES))
def test_without_memory_the_same_parameters_train(name: str) -> None:
    shapes = []
    for backbone in (untouched(), untouched().to("meta")):
        method(**Peft.variants[name]).adapt(backbone)
        shapes.append({n: tuple(p.shape) for n, p in trained(backbone).items()})
    assert {str(t.device) for t in [*backbone.parameters(), *backbone.buffers()]} == {"meta"}
    assert all(m.path.base_layer is m.base for m in backbone.modules() if isinstance(m, Adapted))
    assert shapes[0] == shapes[1]


def test_values_are_drawn_on_the_cpu_whatever_the_default_device_is() -> None:
    backbone = untouched()
    with torch.device("meta"):
        method(type="vera").adapt(backbone)
    assert {str(t.device) for t in [*backbone.parameters(), *backbone.buffers()]} == {"cpu"}


def test_its_lora_is_ours() -> None:
    ours, theirs = (randomise(untouched()) for _ in range(2))
    LoRA(LoRAConfig(rank=4, alpha=6, dropout=0, train_biases=False)).adapt(ours)
    method(options={"r": 4, "lora_alpha": 6}).adapt(theirs)
    moved(ours)
    values = {f"{name.rpartition('.')[0]}.lora_{name[-1]}.default.weight": p for name, p in trained(ours).items()}
    assert values.keys() == trained(theirs).keys() and len(values) == 8
    with torch.no_grad():
        for name, parameter in trained(theirs).items():
            parameter.copy_(values[name])
    torch.testing.assert_close(output(theirs), output(ours), rtol=0, atol=1e-12)
    for backbone in (ours, theirs):
        backbone.stack("encoder").run(draw(B, N, D), Pass())[0].square().sum().backward()
    for name, parameter in trained(theirs).items():
        torch.testing.assert_close(parameter.grad, values[name].grad, rtol=0, atol=1e-10)


def test_what_is_drawn_follows_from_the_seed() -> None:
    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        backbone = untouched()
        torch.manual_seed(seed)
        method().adapt(backbone)
        return list(trained(backbone).values())

    one, again, other = drawn(0), drawn(0), drawn(1)
    assert all(map(torch.equal, one, again)) and not all(map(torch.equal, one, other))


# Where it goes


def places(config: Mapping[str, Any], backbone: Bare | None = None) -> set[str]:
    """Return the adapted projections of layer 0, by sub-layer and attribute."""
    backbone = backbone or untouched()
    method(**config).adapt(backbone)
    prefix = "stacks.encoder.layers.0.sublayers."
    found = {n for n, m in backbone.named_modules() if isinstance(m, Adapted) and n.startswith(prefix)}
    return {".".join(n.removeprefix(prefix).split(".")[i] for i in (0, -1)) for n in found}


def test_targets_are_query_and_value_unless_said_otherwise_and_for_ia3_those_of_its_paper() -> None:
    assert places({}) == {"attention.q_proj", "attention.v_proj"}
    assert places({"type": "ia3"}) == {"attention.k_proj", "attention.v_proj", "ffn.fc2"}
    assert places({"type": "ia3", "targets": ["o", "in"]}) == {"attention.out_proj", "ffn.fc1"}


def test_ia3_scales_keys_values_and_what_enters_the_second_projection() -> None:
    backbone = untouched()
    method(type="ia3").adapt(backbone)
    shapes = {name.split(".")[-4]: tuple(p.shape) for name, p in trained(backbone).items()}
    assert shapes == {"k_proj": (D, 1), "v_proj": (D, 1), "fc2": (1, 64)}


def multiway() -> Bare:
    stack = multiway_stack(width=D, layers=2, heads=4, ffn=64, drop_path=0.0)
    return randomise(Bare(encoder=stack), std=0.2).float().eval()  # type: ignore[return-value]


def test_a_packed_projection_is_adapted_once_for_each_modality() -> None:
    backbone = multiway()
    context = Pass(segments=((TEXT, 2), (IMAGE, 3)))
    before = backbone.stack("encoder").run(draw(B, N, D).float(), context)[0]
    method(targets=("q", "k", "v")).adapt(backbone)
    adapted = [m for m in backbone.modules() if isinstance(m, Adapted)]
    assert len(adapted) == 2 * 2 and {m.path.out_features for m in adapted} == {3 * D}
    assert all(m.rows == slice(0, D) for m in adapted), "the checks find it by the first of its roles"
    moved(backbone)
    after = backbone.stack("encoder").run(draw(B, N, D).float(), context)[0]
    assert bool(((after - before).abs().amax(-1) > 1e-6).all())


def test_ln_tuning_trains_all_norms_one_per_modality() -> None:
    backbone = multiway()
    norms = [m for norm in backbone.stack("encoder").norms() for m in norm.modules() if isinstance(m, nn.LayerNorm)]
    method(type="ln_tuning").adapt(backbone)
    assert len(norms) == 2 * (2 * 2 + 1)
    assert set(trained(backbone).values()) == {p for norm in norms for p in norm.parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_of_every_family_can_be_adapted(family: str) -> None:
    case, x = make(family), draw(B, N, NARROW)
    backbone = Bare(encoder=Stack([case.layer], width=NARROW))
    plain, _ = case.layer(x, case.context)
    for target in ("q", "k", "v", "o", "in", "out"):
        _, handle = adapt(method(type="hra", targets=[target], options={"r": 2}), backbone)
        moved(backbone, 0.3)
        assert not torch.allclose(case.layer(x, case.context)[0], plain), target
        handle.restore()
        assert torch.equal(case.layer(x, case.context)[0], plain)


def test_host_parts_train_on_beneath() -> None:
    backbone = untouched()
    name = "stacks.encoder.layers.0.sublayers.attention.core.attention.q_proj.weight"
    backbone.host_parameters = lambda: {name}  # type: ignore[method-assign]
    weight = backbone.get_parameter(name)
    method(stacks=("encoder",)).adapt(backbone)
    assert weight.requires_grad and sum(p is weight for p in trained(backbone).values()) == 1


@pytest.mark.parametrize("kind", ["lora", "ln_tuning", "vera"])
def test_a_second_method_is_refused_on_either_side(kind: str) -> None:
    for first, second in ((method(type=kind), LoRA()), (LoRA(), method(type=kind))):
        backbone = untouched()
        first.adapt(backbone)
        with pytest.raises(ValueError, match="another method is in this backbone already"):
            second.adapt(backbone)


# What is shared and what stays fixed


def towers() -> Bare:
    """Return stacks of different widths: shared weights must be cut to fit, or not be shared."""
    encoder = [bart_encoder_layer(BartEncoderLayer(bart_config(D, 4, 64))) for _ in range(2)]
    decoder = [bart_decoder_layer(BartDecoderLayer(bart_config(48, 4, 96), layer_idx=i)) for i in range(2)]
    return Bare(encoder=Stack(encoder, width=D), decoder=Stack(decoder, width=48)).eval()


@pytest.mark.parametrize("kind", ["lily", "tinylora", "unilora", "vblora", "vera"])
def test_types_that_share_weights_share_them_between_layers_and_fit_stacks_of_any_width(kind: str) -> None:
    backbone = towers()
    method(type=kind).adapt(backbone)
    for role, width in (("encoder", D), ("decoder", 48)):
        layers = list(backbone.stack(role))
        held = [[*layer.parameters(), *layer.buffers()] for layer in layers]
        owned = [{id(tensor) for tensor in one} for one in held]
        assert owned[0] & owned[1], role
        x, memory = torch.randn(B, N, width), torch.randn(B, 3, width)
        assert backbone.stack(role).run(x, Pass(memory=memory))[0].isfinite().all()


def test_default_sizes_fit_the_narrowest_projection_and_the_user_s_own_are_kept() -> None:
    def rank(width: int, **options: Any) -> int:
        layer = bart_encoder_layer(BartEncoderLayer(bart_config(width, 4, 64)))
        backbone = Bare(encoder=Stack([layer], width=width)).to("meta")
        method(type="hira", options=options).adapt(backbone)
        return int(next(iter(trained(backbone).values())).shape[0])

    assert [rank(width) for width in (8, 96, 128, 256)] == [2, 24, 32, 32]
    assert rank(8, r=5) == 5


def test_adalora_s_ranks_stay_as_they_are() -> None:
    backbone = untouched()
    method(type="adalora").adapt(backbone)
    fixed = [p for name, p in backbone.named_parameters() if "ranknum" in name]
    assert len(fixed) == 4 and not any(p.requires_grad for p in fixed) and {int(p) for p in fixed} == {8}
