"""Methods train exactly the declared parameters, in the published numbers, from the right initial values."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from petlbench.methods.lora import LoRA, LoRAConfig, LowRank
from petlbench.methods.selective import BitFit, Full, HeadOnly
from petlbench.methods.vl_adapter import VLAdapter, VLAdapterConfig
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer
from transformers.models.t5.modeling_t5 import T5Attention, T5Config

from petlbench.api.method import Method, train_biases
from petlbench.api.sites import Stack
from petlbench.backbones.parts.transformers_parts import bart_decoder_layer, bart_encoder_layer
from petlbench.backbones.tiny import Tiny
from tests.backbone_factory import Bare, bart_config, randomise, small_tiny

TEXT_STACKS = ("encoder", "decoder")


def names_after(method: Method, **sizes: int) -> tuple[Tiny, set[str]]:
    backbone = small_tiny(**sizes)
    assert method.adapt(backbone) is backbone
    return backbone, {name for name, p in backbone.named_parameters() if p.requires_grad}


def is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def sublayers(roles: Iterable[str] = ("vision", "encoder", "decoder")) -> list[str]:
    """Return the names of all sub-layers of the small backbone, two layers per stack."""
    inside = {"decoder": ("attention", "cross_attention", "ffn")}
    return [
        f"stacks.{role}.layers.{i}.sublayers.{name}"
        for role in roles
        for i in range(2)
        for name in inside.get(role, ("attention", "ffn"))
    ]


def paths(roles: Iterable[str] = ("vision", "encoder", "decoder")) -> set[str]:
    stems = [f"{name}.core.attention" for name in sublayers(roles) if name.endswith("attention")]
    return {f"{stem}.{side}_proj.path.{matrix}" for stem in stems for side in "qv" for matrix in "AB"}


def adapters(roles: Iterable[str] = ("vision", "encoder", "decoder")) -> set[str]:
    sides = [f"{side}.{kind}" for side in ("down", "up") for kind in ("weight", "bias")]
    return {f"{name}.sites.output.0.{side}" for name in sublayers(roles) for side in sides}


def norms(roles: Iterable[str] = ("vision", "encoder", "decoder")) -> set[str]:
    around = {"vision": "final_norm", "encoder": "embedding_norm", "decoder": "embedding_norm"}
    modules = [f"{name}.norm" for name in sublayers(roles)] + [f"stacks.{role}.{around[role]}" for role in roles]
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


VISUAL = {f"visual.{part}.{kind}" for part in ("linear", "norm") for kind in ("weight", "bias")}


def test_selective_methods_train_what_they_say() -> None:
    backbone, trained = names_after(Full())
    everything = {name for name, _ in backbone.named_parameters()}
    assert trained == everything
    assert names_after(HeadOnly())[1] == VISUAL
    assert names_after(BitFit())[1] == VISUAL | {name for name in everything if is_bias(name)}


def test_a_table_whose_name_holds_the_word_bias_is_no_bias() -> None:
    attention = T5Attention(T5Config(d_model=8, d_kv=4, num_heads=2), has_relative_attention_bias=True)
    attention.requires_grad_(False)
    train_biases(attention)
    assert not any(p.requires_grad for p in attention.parameters())


def test_lora_trains_its_paths_and_by_default_all_biases() -> None:
    backbone, trained = names_after(LoRA())
    assert trained == paths() | VISUAL | {name for name, _ in backbone.named_parameters() if is_bias(name)}
    assert names_after(LoRA(LoRAConfig(train_biases=False)))[1] == paths() | VISUAL
    only = LoRAConfig(train_biases=False, stacks=("decoder",))
    assert names_after(LoRA(only))[1] == paths(["decoder"]) | VISUAL


def test_vl_adapter_trains_adapters_and_the_norms_of_its_stacks() -> None:
    assert names_after(VLAdapter())[1] == adapters() | norms() | VISUAL
    assert names_after(VLAdapter(VLAdapterConfig(train_norms=False)))[1] == adapters() | VISUAL
    only = VLAdapterConfig(stacks=("vision",))
    assert names_after(VLAdapter(only))[1] == adapters(["vision"]) | norms(["vision"]) | VISUAL


def count(module: nn.Module, inside: str = "") -> int:
    return sum(p.numel() for name, p in module.named_parameters() if p.requires_grad and inside in name)


def test_counts_follow_the_closed_forms() -> None:
    v, d, rank = 16, 32, 3  # widths of the vision stack and of the language model
    backbone, _ = names_after(LoRA(LoRAConfig(rank=rank)))
    assert count(backbone, ".path.") == 2 * 2 * (2 * rank * v) + (2 + 2 * 2) * 2 * (2 * rank * d)
    backbone, _ = names_after(VLAdapter(VLAdapterConfig(reduction=5)))
    sizes = [(4, v, v // 5), (4 + 6, d, d // 5)]
    assert count(backbone, ".sites.") == sum(n * (2 * w * r + r + w) for n, w, r in sizes)
    assert count(backbone, "visual.") == v * d + d + 2 * d


def bart_base() -> Bare:
    """Return encoder and decoder stacks of BART-base, without storage."""
    config = bart_config(768, 12, 3072)
    with torch.device("meta"):
        encoder = [bart_encoder_layer(BartEncoderLayer(config)) for _ in range(6)]
        decoder = [bart_decoder_layer(BartDecoderLayer(config, layer_idx=i)) for i in range(6)]
        kinds = zip(TEXT_STACKS, (encoder, decoder), strict=True)
        return Bare(**{role: Stack(x, width=768, embedding_norm=nn.LayerNorm(768)) for role, x in kinds})


def test_counts_on_bart_base_are_the_published_ones() -> None:
    backbone = VLAdapter(VLAdapterConfig(stacks=TEXT_STACKS)).adapt(bart_base())
    assert (count(backbone, ".sites."), count(backbone)) == (4_449_600, 4_449_600 + 49_152)
    backbone = LoRA(LoRAConfig(stacks=TEXT_STACKS)).adapt(bart_base())
    assert (count(backbone, ".path."), count(backbone)) == (7_077_888, 7_077_888 + 125_952)
    assert count(BitFit().adapt(bart_base())) == 125_952


@pytest.mark.parametrize("method", [LoRA, VLAdapter])
def test_a_stack_that_the_backbone_lacks_is_refused(method: type[Method]) -> None:
    with pytest.raises(ValueError, match=r"no stack 'fusion'.*vision, encoder, decoder"):
        method(method.Config(stacks=("fusion",))).adapt(small_tiny())  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="no projection called gate"):
        LoRA(LoRAConfig(targets=("gate",))).adapt(small_tiny())


def test_lora_starts_as_the_identity_and_merges_into_the_weights() -> None:
    backbone = small_tiny()
    texts = backbone.texts(["a red circle", "two blue squares on the left"], 20)

    def logits() -> Tensor:
        memory = backbone.fuse(backbone.embed_text(texts), task="vqa")
        return backbone.decode(memory, texts.ids, task="vqa")[0]

    structure, plain = [name for name, _ in backbone.named_modules()], logits()
    method = LoRA(LoRAConfig(targets=("q", "k", "v", "o", "in", "out")))
    method.adapt(backbone)
    backbone.eval()
    assert torch.equal(logits(), plain)
    for module in backbone.modules():
        if isinstance(module, LowRank):
            randomise(module)
    unmerged = logits()
    assert not torch.allclose(unmerged, plain)
    method.merge()
    assert [name for name, _ in backbone.named_modules()] == structure
    torch.testing.assert_close(logits(), unmerged, rtol=0, atol=1e-11)
    with pytest.raises(NotImplementedError, match="VLAdapter cannot be merged"):
        VLAdapter().merge()


def test_initial_values_have_the_published_moments() -> None:
    torch.manual_seed(0)
    bottleneck, path = VLAdapter().adapter(512, "bart"), LowRank(256, 128, 64, 16.0, 0.1)
    for linear in (bottleneck.down, bottleneck.up):
        assert isinstance(linear, nn.Linear)
        weight, n = linear.weight.detach(), linear.weight.numel()
        assert abs(float(weight.mean())) < 5 * 0.02 / math.sqrt(n)
        assert abs(float(weight.std()) - 0.02) < 5 * 0.02 / math.sqrt(2 * n)
        assert not linear.bias.any()
    bound = 1 / math.sqrt(256)  # uniform: Kaiming's with a = sqrt 5
    assert 0.99 * bound < float(path.A.detach().abs().max()) <= bound
    assert float(path.A.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not path.B.any()
