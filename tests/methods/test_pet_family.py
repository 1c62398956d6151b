"""VL-Adapter's family of methods: published counts, per-task modules, formulas, initial values, and wrong options."""

from __future__ import annotations

import ast
import inspect
import json
import math
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from petlbench.methods.compacter import Compacter, CompacterConfig, PHMBottleneck, PHMLinear
from petlbench.methods.hyperformer import GeneratedAdapter, Hyperformer
from petlbench.methods.lora import LoRA, LoRAConfig, LowRank
from petlbench.methods.per_task import PerTask
from petlbench.methods.prompt import Prompt, PromptConfig, Prompted
from petlbench.methods.selective import BitFit, Full
from petlbench.methods.vl_adapter import Adapter, VLAdapter
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method, adapt, make_method
from petlbench.api.sites import IMAGE, TEXT, Parallel, Pass
from petlbench.api.tokens import plain_tokens
from petlbench.backbones.beit3 import BEiT3
from petlbench.backbones.clip import Clip
from petlbench.backbones.transvg import TransVG
from petlbench.backbones.vl_bart import VLBart
from petlbench.backbones.vl_t5 import VLT5
from tests.backbone_factory import draw, randomise, small_tiny
from tests.golden.arrays import differences
from tests.golden.checks.pet_names import ADAPTED

TASKS = ("rec", "vqa", "captioning", "retrieval")
METHODS: tuple[type[Method], ...] = (VLAdapter, LoRA, Compacter, Hyperformer, Prompt)
VARIANTS = [(cls, name) for cls in METHODS for name in cls.variants or ("",)]


def variant(cls: type[Method], name: str, *tasks: str, **options: Any) -> Method:
    return make_method(cls, {**cls.variants.get(name, {}), **options}, tasks or TASKS)


@cache
def on_meta(cls: Any, name: str) -> Backbone:
    """Return a shared backbone, which callers must leave as it was."""
    with torch.device("meta"):
        backbone: Backbone = cls(cls.configured(name, {}))
    return backbone


def counted(method: Method, cls: Any, host: str) -> tuple[int, int]:
    """Count trainable and all parameters."""
    backbone, handle = adapt(method, on_meta(cls, host))
    parameters = list(backbone.parameters())
    assert all(p.is_meta for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    handle.restore()
    return trained, sum(p.numel() for p in parameters)


COUNTS = [  # method, variant, family; the authors' code counts trainable and all parameters
    (VLAdapter, "single", "bart", 6_081_600, 145_606_464),
    (VLAdapter, "multiple", "bart", 19_430_400, 158_955_264),
    (VLAdapter, "half_shared_up", "bart", 12_725_760, 152_250_624),
    (VLAdapter, "half_shared_down", "bart", 12_786_240, 152_311_104),
    (LoRA, "single", "bart", 8_786_688, 148_234_752),
    (LoRA, "multiple", "bart", 30_020_352, 169_468_416),
    (Compacter, "single", "bart", 3_870_240, 143_395_104),
    (Compacter, "multiple", "bart", 10_584_960, 150_109_824),
    (Prompt, "single", "bart", 2_843_936, 142_417_952),
    (Prompt, "multiple", "bart", 6_627_200, 146_201_216),
    (Hyperformer, "", "bart", 8_579_088, 148_103_952),
    (BitFit, "", "bart", 1_708_800, 141_156_864),
    (Full, "", "bart", 141_156_864, 141_156_864),
    (VLAdapter, "single", "t5", 19_333_632, 242_292_480),
    (LoRA, "single", "t5", 18_170_112, 241_128_960),
    (Compacter, "single", "t5", 6_057_792, 229_016_640),
    (Prompt, "single", "t5", 2_842_400, 225_801_248),
    (Hyperformer, "", "t5", 8_534_544, 231_493_392),
    (BitFit, "", "t5", 1_581_312, 224_540_160),
    (Full, "", "t5", 224_540_160, 224_540_160),
]


@pytest.mark.parametrize(
    ("cls", "name", "family", "trained", "total"), COUNTS, ids=[f"{c[0].__name__}-{c[1]}-{c[2]}" for c in COUNTS]
)
def test_published_counts(cls: type[Method], name: str, family: str, trained: int, total: int) -> None:
    """Uses default options and no storage."""
    host = {"bart": VLBart, "t5": VLT5}[family], f"vl_{family}"
    assert counted(variant(cls, name), *host) == (trained, total)


def test_options_change_what_trains_on_t5() -> None:
    for options, trained in ({"reduction": 8}, 10_480_512), ({"train_norms": True}, 19_333_632 + 62 * 768):
        assert counted(variant(VLAdapter, "", **options), VLT5, "vl_t5")[0] == trained


def test_default_recipes_are_the_authors() -> None:
    rates = {
        (cls, name, family): variant(cls, name).default_recipe(family)["lr"]
        for cls, name in [*VARIANTS, (BitFit, ""), (Full, "")]
        for family in ("vl_bart", "vl_t5")
    }
    slow = {(VLAdapter, name) for name in VLAdapter.variants if name != "single"}
    on_t5 = {VLAdapter: 3e-4, LoRA: 3e-4, BitFit: 3e-3, Prompt: 3e-3}
    for (cls, name, family), rate in rates.items():
        other = 1e-4 if cls is Full else 3e-4 if (cls, name) in slow else 1e-3
        assert rate == (on_t5.get(cls, other) if family == "vl_t5" else other), (cls, name, family)


@pytest.mark.parametrize("cls", METHODS)
def test_variants_are_literals_and_the_first_is_the_default(cls: type[Method]) -> None:
    """The package lists variants without an import."""
    tree = ast.parse(inspect.getsource(cls))
    found = [n.value for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "variants"]
    variants = {} if not found or found[0] is None else ast.literal_eval(found[0])
    assert variants == dict(cls.variants)
    assert not variants or next(iter(variants.values())) == {}


# Passes.


@cache
def texts() -> Any:
    return small_tiny().texts(["a red circle", "two blue squares on the left"], 20)


def image() -> Any:
    return plain_tokens(draw(2, 4, 32, seed=5), torch.ones(2, 4, dtype=torch.bool), IMAGE)


def logits(backbone: Backbone, task: str) -> Tensor:
    memory = backbone.fuse(backbone.embed_text(texts(), task=task), image(), task=task)
    return backbone.decode(memory, texts().ids, task=task)[0]


def adapted(method: Method, seed: int = 1) -> Backbone:
    """Adapt a small random backbone; the method's own parameters are random too."""
    backbone = method.adapt(small_tiny())
    return randomise(backbone, seed).eval()  # type: ignore[return-value]


def reached(backbone: Backbone, task: str) -> tuple[set[str], set[str]]:
    """Return the trainable names in a task's pass that get a gradient, and those that do not."""
    backbone.zero_grad()
    logits(backbone, task).square().sum().backward()
    inside = ("stacks.encoder.", "stacks.decoder.", "prompts.", "inner.stacks.encoder.", "inner.stacks.decoder.")
    names = {n: p for n, p in backbone.named_parameters() if p.requires_grad and n.startswith(inside)}
    alive = {name for name, p in names.items() if p.grad is not None and p.grad.any()}
    return alive, names.keys() - alive


@pytest.mark.parametrize(("cls", "name"), VARIANTS)
def test_what_serves_other_tasks_is_unused_and_nothing_else(cls: type[Method], name: str) -> None:
    method = variant(cls, name, **({"stacks": ("encoder", "decoder")} if cls is not Prompt else {}))
    backbone = adapted(method)
    for task in ("vqa", "captioning"):
        alive, silent = reached(backbone, task)
        shared = cls is not Hyperformer and method.config.sharing == "single"
        others = [] if shared else [method.own.format(task=name) for name in TASKS if name != task]
        assert alive and silent == {n for n in alive | silent if any(fnmatchcase(n, wild) for wild in others)}
        assert not method.unused_parameters, "the cell trains on all of them"


@pytest.mark.parametrize(
    ("cls", "name"), [(k, n) for k, n in VARIANTS if k is Hyperformer or n.startswith(("multiple", "half"))]
)
def test_a_task_is_computed_with_its_own_modules(cls: type[Method], name: str) -> None:
    """Different modules give different results; a task without modules is refused by name."""
    method = variant(cls, name, "vqa", "captioning")
    backbone = adapted(method)
    with torch.no_grad():
        assert not torch.allclose(logits(backbone, "vqa"), logits(backbone, "captioning"))
        with pytest.raises(ValueError, match="task 'rec', only for vqa, captioning"):
            logits(backbone, "rec")


@pytest.mark.parametrize(
    ("cls", "name"), [(k, n) for k, n in VARIANTS if k is Hyperformer or n.startswith(("multiple", "half"))]
)
def test_modules_of_tasks_that_the_cell_does_not_train_on_are_declared_unused(cls: type[Method], name: str) -> None:
    """Published counts include them; a run has only its own task's, and a method without a task is refused."""
    several = variant(cls, name, "captioning", tasks=["rec", "vqa", "captioning"])
    alive, silent = reached(adapted(several), "captioning")
    assert several.unused_parameters.keys() == {several.own.format(task=task) for task in ("rec", "vqa")}  # type: ignore[attr-defined]
    assert alive and silent == {
        n for n in alive | silent if any(fnmatchcase(n, wild) for wild in several.unused_parameters)
    }
    one = variant(cls, name, "captioning")
    alive, silent = reached(adapted(one), "captioning")
    assert alive and not silent and not one.unused_parameters
    with pytest.raises(ValueError, match="no task was given"):
        make_method(cls, cls.variants.get(name, {})).adapt(small_tiny())


@pytest.mark.parametrize("side", ["down", "up"])
def test_a_shared_half_is_one_parameter(side: str) -> None:
    method = variant(VLAdapter, f"half_shared_{side}")
    other = "up" if side == "down" else "down"
    (adapter,) = next(iter(method.adapt(small_tiny()).stack("encoder")))["ffn"].sites["output"].children()
    assert isinstance(getattr(adapter, side), nn.Linear) and list(getattr(adapter, other).tasks) == list(TASKS)


# Formulas, with all gradients.


def same(ours: Tensor, formula: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, formula, rtol=0, atol=1e-12)
    weight = draw(*ours.shape, seed=9)
    sides = (torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, formula))
    for first, second in zip(*sides, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-11)


def gelu_tanh(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def test_a_bottleneck_per_task_is_the_formula() -> None:
    method: Any = variant(VLAdapter, "half_shared_up")
    adapter = randomise(method.adapter(16, "bart"))
    assert isinstance(adapter, Adapter) and isinstance(adapter.down, PerTask) and isinstance(adapter.up, nn.Linear)
    h = draw(2, 5, 16).requires_grad_()
    down: Any = adapter.down.of("captioning")
    with Pass(task="captioning").active():
        ours = adapter(draw(2, 5, 16, seed=3), h)  # the adapter ignores the residual input
    formula = h + gelu_tanh(h @ down.weight.T + down.bias) @ adapter.up.weight.T + adapter.up.bias
    same(ours, formula, [h, *down.parameters(), *adapter.up.parameters()])


@pytest.mark.parametrize("factor", [None, 1, 3])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_phm_layer_multiplies_by_a_sum_of_kronecker_products(n: int, factor: int | None) -> None:
    layer: Any = randomise(PHMLinear(8, 12, n, factor_rank=factor))
    z = draw(2, 3, 8).requires_grad_()
    blocks = layer.S if factor is None else [a @ b for a, b in zip(layer.S_left, layer.S_right, strict=True)]
    matrix = sum(torch.kron(a, s.contiguous()) for a, s in zip(layer.A, blocks, strict=True))
    same(layer(z), z @ matrix + layer.b, [z, *layer.parameters()])


def test_a_phm_bottleneck_has_no_residual() -> None:
    module: Any = randomise(PHMBottleneck(8, 4, out=12))
    z = draw(2, 8).requires_grad_()
    same(module(z), module.up(gelu_tanh(module.down(z))), [z, *module.parameters()])
    assert module(z).shape == (2, 12)


def test_a_shared_rule_is_one_parameter_of_the_whole_backbone() -> None:
    for backbone in (small_tiny(), on_meta(VLBart, "vl_bart:tiny")):
        rules = Compacter(CompacterConfig(shared_rule=True)).adapt(backbone)
        assert len([name for name, _ in rules.named_parameters() if name.endswith(".A")]) == 1
        assert len({id(m.A) for m in rules.modules() if isinstance(m, PHMLinear)}) == 1


def test_a_shared_rule_is_no_other_tasks_own() -> None:
    """Its name comes from its first place, which is the first task's."""
    method = variant(Compacter, "multiple", shared_rule=True, stacks=("encoder", "decoder"))
    alive, _ = reached(adapted(method), "captioning")
    assert sum(name.endswith(".tasks.rec.A") for name in alive) == 1


def test_hyperformer_generates_as_the_formula() -> None:
    method = variant(Hyperformer, "", "vqa", "rec", task_dim=6, hidden=5, projected=3, reduction=8)
    backbone = adapted(method)
    layer = list(backbone.stack("decoder"))[1]
    (adapter,) = layer["cross_attention"].sites["output"].children()
    assert isinstance(adapter, GeneratedAdapter)
    net: Any = adapter.network
    h = draw(2, 3, 32).requires_grad_()
    with Pass(task="rec").active():
        ours = adapter(h, h)
    hidden = torch.relu(net.enter.weight @ torch.cat([net.tasks["rec"], net.layers[1]]) + net.enter.bias)
    e = net.leave.weight @ hidden + net.leave.bias
    e = (e - e.mean()) / (e.var(unbiased=False) + 1e-6).sqrt() * net.norm.weight + net.norm.bias
    down, up = net.down["cross_attention"], net.up["cross_attention"]
    first = (down.weight.weight @ e + down.weight.bias).reshape(4, 32)
    second = (up.weight.weight @ e + up.weight.bias).reshape(32, 4)
    inner = gelu_tanh(h @ first.T + down.bias.weight @ e + down.bias.bias)
    formula = h + inner @ second.T + up.bias.weight @ e + up.bias.bias
    same(ours, formula, [h, net.tasks["rec"], net.layers, *net.enter.parameters(), *down.parameters()])


def test_hyperformer_has_one_network_per_stack_and_one_embedding_per_task() -> None:
    backbone = variant(Hyperformer, "").adapt(small_tiny())
    networks: dict[str, Any] = {}
    for role in backbone.roles():
        found = {m.network for m in backbone.stack(role).modules() if isinstance(m, GeneratedAdapter)}
        (networks[role],) = found
    assert len(set(networks.values())) == 3
    assert len({id(network.tasks) for network in networks.values()}) == 1
    assert list(networks["encoder"].down) == ["attention", "ffn"]
    assert list(networks["decoder"].down) == ["attention", "cross_attention", "ffn"]
    assert networks["vision"].layers.shape == (2, 32 * 2 // 3)


def test_plain_lora_is_pefts() -> None:
    """Outputs, gradients and defaults equal those of peft's own layer with its default configuration."""
    defaults = peft.LoraConfig()
    config = LoRAConfig(**LoRA.variants["plain"])  # type: ignore[arg-type]
    assert (config.rank, config.alpha, config.dropout) == (defaults.r, defaults.lora_alpha, defaults.lora_dropout)
    base = nn.Linear(16, 12).double()
    theirs: Any = peft.tuners.lora.Linear(base, "default", defaults, r=defaults.r, lora_alpha=defaults.lora_alpha)
    theirs = theirs.double().eval()
    ours: Any = LowRank(16, 12, config.rank or 0, config.alpha or 0, config.dropout).double()
    assert theirs.scaling["default"] == ours.scale
    for matrix, side in ((ours.A, theirs.lora_A), (ours.B, theirs.lora_B)):
        assert matrix.shape == side["default"].weight.shape
        matrix.data.copy_(draw(*matrix.shape))
        side["default"].weight = matrix
    x = draw(2, 5, 16).requires_grad_()
    same(Parallel(base, ours)(x), theirs(x), [x, ours.A, ours.B])


def test_lora_of_several_tasks_merges_only_where_one_is_left() -> None:
    several, one = variant(LoRA, "multiple"), variant(LoRA, "multiple", "vqa")
    adapted(several)
    assert LoRA().mergeable and not several.mergeable
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        several.merge()
    backbone = adapted(one)
    assert one.mergeable
    with torch.no_grad():
        before = logits(backbone, "vqa")
        one.merge()
        torch.testing.assert_close(logits(backbone, "vqa"), before, rtol=0, atol=1e-9)
    assert not any(isinstance(module, Parallel) for module in backbone.modules())


# Prompts.


def prompted(method: Method | None = None) -> Prompted:
    backbone = adapted(method or Prompt(PromptConfig(length=3)))
    assert isinstance(backbone, Prompted)
    return backbone


def test_prompts_go_before_text_through_the_embedding_norm() -> None:
    backbone = prompted()
    text = backbone.embed_text(texts())
    fused = backbone.fuse(text, image(), task="vqa")
    made: Any = backbone.prompts
    norm: Any = backbone.stack("encoder").embedding_norm
    tokens = torch.tanh(made.embedding @ made.enter.weight.T + made.enter.bias) @ made.leave.weight.T + made.leave.bias
    tokens = F.layer_norm(tokens, (32,), norm.weight, norm.bias)
    states = torch.cat([tokens.expand(2, -1, -1), text.states, image().states], dim=1)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.bool), text.mask, image().mask], dim=1)
    context = Pass(bias=torch.zeros(2, 1, 1, mask.shape[1]).double().masked_fill(~mask[:, None, None], -1e300))
    expected, _ = backbone.stack("encoder").run(states, context)
    torch.testing.assert_close(fused.states[mask], expected[mask], rtol=0, atol=1e-10)
    assert torch.equal(fused.mask, mask) and (fused.types[:, :3] == TEXT).all()
    same(fused.states[mask], expected[mask], list(made.parameters()))


def test_prompts_stand_before_one_modality_alone_and_leave_its_mean_alone() -> None:
    backbone = prompted()
    for part in (backbone.embed_text(texts()), image()):
        fused = backbone.fuse(part, task="retrieval")
        assert fused.mask[:, :3].all() and fused.states.shape[1] == 3 + part.states.shape[1]
        kept = fused.states[:, 3:] * part.mask.unsqueeze(-1)
        torch.testing.assert_close(fused.pooled(), kept.sum(1) / part.mask.sum(1, keepdim=True))
        assert fused.rows(torch.tensor([1])).pooled().shape == (1, 32)


def test_beit3_pools_the_token_that_it_marked() -> None:
    inner = BEiT3(BEiT3.configured("beit3:tiny", {}))
    backbone = Prompt(PromptConfig(length=3)).adapt(inner).eval()
    part = plain_tokens(
        torch.randn(2, 17, 32), torch.ones(2, 17, dtype=torch.bool), IMAGE, mark=torch.zeros(2, dtype=torch.long)
    )
    fused = backbone.fuse(part, task="retrieval")
    assert fused.mark is not None and fused.mark.tolist() == [3, 3]
    torch.testing.assert_close(fused.pooled(), fused.states[:, 3])
    assert backbone.own_head("retrieval") is inner.own_head("retrieval") is not None


@pytest.mark.parametrize(
    ("cls", "name", "reason"),
    [
        (TransVG, "transvg:tiny", "its fusion encoder has a learned place for every token"),
        (Clip, "clip:tiny", "a causal text tower like CLIP's has a learned place for every token"),
        (Clip, "clip:coca-tiny", "a causal text tower like CLIP's has a learned place for every token"),
    ],
)
def test_prompts_are_refused_where_every_token_has_a_learned_place(cls: Any, name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Prompt().adapt(on_meta(cls, name))


def test_a_second_method_would_freeze_prompts_and_is_refused() -> None:
    with pytest.raises(ValueError, match="another method is in this backbone"):
        BitFit().adapt(Prompt().adapt(small_tiny()))


# Names in golden files of whole models, some of which the repository lacks.

SOME_NAMES = {
    "vl_adapter": ({"enc.0.adapter_attn.down.W", "dec.1.adapter_cross.up.b"}, 2 * 5 * 4),
    "multi_adapter": ({"enc.0.adapter_attn.vqa.down.W", "dec.1.adapter_cross.caption.up.b"}, 2 * 5 * 4 * 4),
    "half_shared_up": ({"dec.0.adapter_self.gqa.down.b", "enc.1.adapter_ffn.vqa.up.W"}, 2 * 5 * 2 * (4 + 1)),
    "half_shared_down": ({"dec.0.adapter_self.gqa.up.b", "enc.1.adapter_ffn.vqa.down.W"}, 2 * 5 * 2 * (4 + 1)),
    "lora": ({"enc.0.attn.q.lora_A", "dec.1.self.v.lora_B", "dec.0.cross.q.lora_A"}, 2 * 3 * 2 * 2),
    "multi_lora": ({"enc.0.attn.q.lora_A.gqa", "dec.0.cross.v.lora_B.nlvr"}, 2 * 3 * 2 * 2 * 4),
    "compacter": ({"enc.0.adapter_attn.down.A", "dec.1.adapter_cross.up.S", "dec.0.adapter_ffn.up.b"}, 2 * 5 * 6),
    "hyperformer": (
        {"task_emb.nlvr", "enc.hyper.layer_emb", "dec.hyper.mlp1.W", "dec.hyper.cross.up.gen_b.W", "enc.hyper.ln.gain"},
        4 + 2 * 7 + 5 * 8,
    ),
    "prompt": ({"enc.prompt.emb", "enc.prompt.in.W", "enc.prompt.out.b"}, 5),
    "bitfit": (set(), 0),
    "full": (set(), 0),
}


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("name", SOME_NAMES)
def test_golden_names_cover_all_parameters_of_a_method(name: str, family: str) -> None:
    """Each parameter has one name, at the README's sizes if the file gives none."""
    assert ADAPTED.keys() == SOME_NAMES.keys()
    host = small_t5() if family == "t5" else VLBart(VLBart.configured("vl_bart:tiny", {"width": 32, "ffn": 64}))
    own = {id(p) for p in host.parameters()}
    meta = {"base": {"d_model": 32}, "overrides": ["--reduction_factor", "4", "--n_boxes", "4"], "trainable": []}
    backbone = ADAPTED[name].build(meta, family).adapt(host)
    names = ADAPTED[name].names(backbone, meta)
    some, number = SOME_NAMES[name]
    assert some <= names.keys() and len(names) == number
    is_side_module = {id(p) for p in backbone.parameters()} - own
    assert {id(p) for p in names.values()} == is_side_module and len(names) == len(is_side_module)
    ranks = {len(p) for key, p in names.items() if key.endswith(("down.b", "lora_A"))}
    assert ranks <= {8, 6}


def test_shapes_in_a_file_decide_sizes() -> None:
    meta: dict[str, Any] = {"base": {"d_model": 32}, "overrides": ["--reduction_factor", "4", "--lora_dim", "5"]}
    lora = ADAPTED["lora"].build
    assert lora(meta, "bart").config.rank == 5
    assert lora(meta | {"shapes": {"enc.0.attn.q.lora_A": (7, 32)}}, "bart").config.rank == 7
    shapes = {"enc.0.adapter_attn.down.b": (16,), "enc.0.adapter_attn.down.A": (4, 4, 4)}
    compacter = ADAPTED["compacter"].build(meta | {"shapes": shapes}, "bart").config
    assert (compacter.reduction, compacter.n, compacter.factor_rank) == (2, 4, None)
    with pytest.raises(ValueError, match="no reduction of a width of 32 gives a rank of 17"):
        ADAPTED["vl_adapter"].build(meta | {"shapes": {"enc.0.adapter_attn.down.b": (17,)}}, "bart")


def test_files_of_modules_outside_the_repository_can_be_checked(tmp_path: Path) -> None:
    """Checks LoRA for several tasks and half-shared adapters, and notices a wrong number and one without a check."""
    tasks, d, r = ("vqa", "gqa"), 6, 3
    lora = {"p/W": draw(5, d), "p/b": draw(5), "in/x": draw(2, 4, d, seed=1)}
    half = {"p/vqa.up.W": draw(d, r), "p/vqa.up.b": draw(d, seed=2), "in/h": draw(2, 4, d, seed=3)}
    for seed, task in enumerate(tasks):
        a, b = lora[f"p/A.{task}"], lora[f"p/B.{task}"] = draw(r, d, seed=seed), draw(5, r, seed=seed)
        lora[f"out/{task}"] = lora["in/x"] @ (lora["p/W"] + 2 * b @ a).T + lora["p/b"]
        w, c = half[f"p/{task}.down.W"], half[f"p/{task}.down.b"] = draw(r, d, seed=seed), draw(r, seed=seed)
        inner = gelu_tanh(half["in/h"] @ w.T + c)
        half[f"out/{task}"] = half["in/h"] + inner @ half["p/vqa.up.W"].T + half["p/vqa.up.b"]
    metas = {
        "lora_multi_linear": {"r": r, "alpha": 2 * r, "dropout": 0.1},
        "vladapter_half_shared_up_adapter": {"r": r},
    }
    for (name, meta), tensors in zip(metas.items(), (lora, half), strict=True):
        for changed in ("", "out/gqa", "out/unheard_of"):
            values = {key: value.numpy() for key, value in tensors.items()}
            if changed:
                values[changed] = values["out/gqa"] + 1e-6
            np.savez(tmp_path / f"{name}.npz", meta_json=np.array(json.dumps(meta)), **values)
            found = differences(tmp_path / f"{name}.npz")
            assert [item.name for item in found if not item.agrees] == ([changed] if changed else [])


# Initial values.


def moments(value: Tensor, std: float, mean: float = 0.0) -> None:
    """Check mean and standard deviation to five standard errors."""
    n = value.numel()
    assert abs(float(value.mean()) - mean) < 5 * std / math.sqrt(n)
    assert float(value.std()) == pytest.approx(std, rel=5 / math.sqrt(n))


def uniform(value: Tensor, bound: float) -> None:
    assert 0.98 * bound < float(value.detach().abs().max()) <= bound
    moments(value.detach(), bound / math.sqrt(3))


def test_vl_adapter_starts_as_the_host_draws_linear_layers() -> None:
    torch.manual_seed(0)
    method: Any = variant(VLAdapter, "multiple")
    bart, t5 = (method.adapter(512, host) for host in ("bart", "t5"))
    for side in ("down", "up"):
        for task in TASKS:
            linear = getattr(bart, side).of(task)
            moments(linear.weight.detach(), 0.02)
            assert not linear.bias.any()
        linear = getattr(t5, side).of("vqa")
        uniform(linear.weight, 1 / math.sqrt(linear.in_features))
        assert linear.bias.any()


def test_phm_layers_start_as_measured() -> None:
    torch.manual_seed(0)
    layer, factored = PHMLinear(256, 128, 4), PHMLinear(256, 128, 4, factor_rank=8)
    assert layer.S is not None and not layer.b.any()
    uniform(layer.S, math.sqrt(2) * math.sqrt(6 / (64 + 32)))
    uniform(factored.S_left, math.sqrt(2) * math.sqrt(6 / (64 + 8)))
    uniform(factored.S_right, math.sqrt(2) * math.sqrt(6 / (8 + 32)))
    moments(torch.stack([PHMLinear(8, 8, 4).A.detach() for _ in range(50)]), 0.01)


@pytest.mark.parametrize(("family", "std", "layers"), [("bart", 0.02, 0.02), ("t5", 0.01, 1.0)])
def test_hyper_networks_start_as_measured(family: str, std: float, layers: float) -> None:
    torch.manual_seed(0)
    host: Any = small_t5() if family == "t5" else small_tiny()
    backbone = variant(Hyperformer, "", task_dim=2000, hidden=100).adapt(host)
    (adapter,) = next(iter(backbone.stack("encoder")))["ffn"].sites["output"].children()
    net: Any = adapter.network
    for linear in (net.enter, net.leave, net.down["ffn"].weight, net.up["ffn"].weight):
        moments(linear.weight.detach(), std)
        assert not linear.bias.any()
    moments(net.layers.detach(), layers)
    moments(torch.cat(list(net.tasks.values())).detach(), 1.0)


def small_t5() -> Backbone:
    backbone: Backbone = VLT5(VLT5.configured("vl_t5:tiny", {"width": 32, "ffn": 64, "head_width": 8}))
    return backbone


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_prompts_start_as_the_host_draws(family: str) -> None:
    torch.manual_seed(0)
    host = small_t5() if family == "t5" else small_tiny()
    made: Any = Prompt(PromptConfig(length=200, mid=300)).adapt(host).prompts
    moments(made.embedding.detach(), 1.0 if family == "t5" else 0.02)
    for linear in (made.enter, made.leave):
        if family == "t5":
            uniform(linear.weight, 1 / math.sqrt(linear.in_features))
        else:
            moments(linear.weight.detach(), 0.02)
        assert bool(linear.bias.any()) == (family == "t5")


# Wrong options.


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (VLAdapter, {"reduction": 0}),
        (VLAdapter, {"sharing": "half"}),
        (VLAdapter, {"tasks": ()}),
        (VLAdapter, {"tasks": ("vqa", "vqa")}),
        (VLAdapter, {"tasks": ("vqqa",)}),
        (LoRA, {"rank": 0}),
        (LoRA, {"sharing": "half_shared_up"}),
        (Compacter, {"n": 0}),
        (Compacter, {"factor_rank": 0}),
        (Hyperformer, {"projected": 0}),
        (Prompt, {"length": 0}),
        (Prompt, {"stacks": ("nowhere",), "no_such_option": 1}),
    ],
)
def test_wrong_options_are_refused(cls: type[Method], options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        cls.Config(**options)


@pytest.mark.parametrize(("options", "sides"), [({"n": 3}, "16 to 2"), ({"n": 2, "reduction": 10}, "16 to 1")])
def test_compacter_refuses_sizes_that_n_does_not_divide(options: dict[str, int], sides: str) -> None:
    with pytest.raises(ValueError, match=f"n = {options['n']} must divide both sides of a projection from {sides}"):
        Compacter(CompacterConfig(**options)).adapt(small_tiny())  # type: ignore[arg-type]
