"""Ladder side-tuning: saved activations, isolation of the backbone, initial values, and refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from petlbench.methods.lora import LoRA
from petlbench.methods.lst.method import LST, LadderStack, LSTConfig, SideTuned, side_parts
from petlbench.methods.lst.network import LSTSideStack
from petlbench.methods.lst.pruning import fisher, left, parts, pruned, selected
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from petlbench.api.backbone import Backbone
from petlbench.api.decoding import generate, token_losses
from petlbench.api.sites import IMAGE, TEXT, Layer, Stack
from petlbench.api.tokens import Texts, Tokens, plain_tokens
from petlbench.backbones.clip import Clip
from petlbench.backbones.parts.bert import bert_layer
from petlbench.backbones.vl_t5 import VLT5
from tests.backbone_factory import Bare, draw, posing, randomise, small_tiny
from tests.golden.checks.ladder import Host, double_norm, watched
from tests.golden.checks.library_loops import beam

SIZES = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 3,
    "vocab_size": 50,
    "relative_attention_num_buckets": 8,
}
DROPPED: dict[str, Any] = {"encoder": (1, 2), "decoder": (0, 2)}


def t5() -> Host:
    """Return a random host in double precision and evaluation mode, whose images are visual tokens."""
    host = Host(SIZES, {}, 6, 2).double()
    randomise(host)
    return host.eval()


def language(kind: str) -> Any:
    return t5() if kind == "t5" else small_tiny()


def tuned(host: Any, **options: Any) -> SideTuned:
    """Adapt with every trained value random, gates and biases too, except those from pruning."""
    adapted = LST(LSTConfig(**{"reduction": 2, "init": "random"} | options)).adapt(host)
    assert isinstance(adapted, SideTuned)
    randomise(adapted.side, seed=1)
    return adapted.eval()


def question(host: Any, rows: int = 2, length: int = 5) -> Tokens:
    """Return text tokens with padding in the second row."""
    ids = torch.arange(3, 3 + rows * length).reshape(rows, length) % 40 + 3
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, -2:] = False
    tokens: Tokens = host.embed_text(Texts(ids, mask))
    return tokens


def picture(host: Any, seed: int = 0, rows: int = 2) -> Tokens:
    """Return four visual tokens."""
    states = draw(rows, 4, host.width, seed=seed)
    return plain_tokens(states, torch.ones(rows, 4, dtype=torch.bool), IMAGE)


def bert(layers: int = 3, *, width: int = 16, heads: int = 4, ffn: int = 24) -> Stack:
    config = BertConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=ffn, attn_implementation="sdpa")
    return Stack([bert_layer(BertLayer(config)) for _ in range(layers)], width=width)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_no_image_reaches_the_frozen_layers(kind: str) -> None:
    """Their states are the same to the bit whatever the image, one per text token."""
    host = language(kind)
    model, seen = tuned(host), []
    hooks = [
        layer.register_forward_hook(lambda m, i, output: seen.append(output[0])) for layer in host.stack("encoder")
    ]
    memories = [model.fuse(question(host), picture(host, seed), task="vqa") for seed in (0, 1)]
    for hook in hooks:
        hook.remove()
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [state.shape[1] for state in first] == [5] * len(first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(memories[0].text.states, memories[1].text.states)
    assert not torch.equal(memories[0].states[:, :5], memories[1].states[:, :5])  # the side sees the image


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_cached_decoding_is_uncached_decoding(kind: str) -> None:
    host = language(kind)
    model = tuned(host)
    memory = model.fuse(question(host), picture(host), task="vqa")
    ids = torch.tensor([[2, 7, 9, 4], [2, 5, 5, 8]])
    with double_norm():
        whole, _ = model.decode(memory, ids, task="vqa")
        cache, steps = model.new_cache(), []
        for place in (slice(0, 2), slice(2, 3), slice(3, 4)):
            logits, cache = model.decode(memory, ids[:, place], cache, task="vqa")
            steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_both_caches_follow_the_beams(kind: str) -> None:
    host = language(kind)
    model = tuned(host)
    memory = model.fuse(question(host), picture(host), task="vqa")
    ids, order = torch.tensor([[2, 7], [2, 5]]), torch.tensor([1, 1])
    with double_norm():
        _, cache = model.decode(memory, ids, model.new_cache(), task="vqa")
        cache = model.reorder_cache(cache, order)
        after, _ = model.decode(memory.rows(order), torch.tensor([[4], [6]]), cache, task="vqa")
        whole, _ = model.decode(memory.rows(order), torch.tensor([[2, 5, 4], [2, 5, 6]]), task="vqa")
    torch.testing.assert_close(after, whole[:, -1:], rtol=0, atol=1e-9)


def test_one_beam_is_greedy() -> None:
    model = tuned(small_tiny())
    memory = model.fuse(question(model), picture(model), task="vqa")
    greedy = generate(model, memory, task="vqa", max_length=6)
    found = beam(model, memory, 7, 1, "vqa")
    assert [row[1 : 1 + len(mine)] for row, mine in zip(found, greedy, strict=True)] == greedy


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("training", [False, True])
def test_of_the_frozen_backbone_only_the_taps_are_saved(kind: str, training: bool) -> None:
    """These are E_0 and the states after each layer, none inside the layers, without any gradient function."""
    host = language(kind)
    model = tuned(host).train(training)
    frozen = {name: m for name, m in host.named_modules() if ".layers." in name}
    layers = [m for m in frozen.values() if isinstance(m, Layer)]
    alive: list[Tensor] = []  # keeps tensors alive, so that no address is used twice
    inner, taps, saved = set[int](), set[int](), list[int]()

    def look(module: nn.Module, _: Any, output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        if isinstance(found, Tensor):
            assert not found.requires_grad
            alive.append(found)
            (taps if module in layers else inner).add(found.untyped_storage().data_ptr())

    hooks = [m.register_forward_hook(look) for m in frozen.values()]
    text, image = question(host), picture(host).states.requires_grad_(True)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        visual = plain_tokens(image, torch.ones(2, 4, dtype=torch.bool), IMAGE)
        memory = model.fuse(text, visual, task="vqa")
        loss = token_losses(model, memory, Texts(torch.tensor([[4, 5], [6, 2]]), torch.ones(2, 2).bool()), "vqa").sum()
    for hook in hooks:
        hook.remove()
    loss.backward()
    assert taps & set(saved) and not (inner - taps) & set(saved)
    assert image.grad is not None and image.grad.any()  # the visual projection trains
    assert all(p.grad is None for p in host.parameters())


def test_gates_mix_before_each_side_layer_and_visual_rows_get_no_ladder() -> None:
    """Follows section 1 of the paper, without some side layers: z = mu side + (1 - mu) D_l E_l."""
    model = tuned(t5(), layers=DROPPED)
    with watched(model) as seen:
        memory = model.fuse(question(model), picture(model), task="vqa")
        model.decode(memory, torch.tensor([[2, 7, 9], [2, 5, 5]]), task="vqa")
    for short, role in (("enc", "encoder"), ("dec", "decoder")):
        stack, before = getattr(model.side, role), seen[f"{short}.side_0"]
        assert stack.kept == DROPPED[role]
        for index in stack.kept:
            mu = 1 / (1 + torch.exp(-stack.gates[index] / 0.1))
            rung = stack.ladders[str(index)](seen[f"{short}.backbone_h.{index}"])
            expected = mu * before
            expected[:, : rung.shape[1]] += (1 - mu) * rung
            torch.testing.assert_close(seen[f"{short}.side_in.{index}"], expected, rtol=0, atol=1e-12)
            before = seen[f"{short}.side_out.{index}"]
        assert f"{short}.side_out.{({0, 1, 2} - set(stack.kept)).pop()}" not in seen


def test_a_stack_of_another_host_gives_the_result_of_its_side() -> None:
    """Computes by hand: post-norm BERT layers at half the width, as many heads, ladders without bias; no layer 1."""
    host = bert()
    adapted = LST(LSTConfig(reduction=2, layers={"fusion": (0, 2)})).adapt(Bare(fusion=host).double()).eval()
    randomise(adapted, seed=3)
    stack = adapted.stack("fusion")
    assert isinstance(stack, LadderStack)
    x, mask = draw(2, 6, 16), torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    bias = (~mask)[:, None, None].double() * -1e9
    context = plain_tokens(x, mask, TEXT).context(bias=bias)
    y, _ = stack.run(x, context)
    state, side = x, x @ stack.side.enter.weight.T
    for index, layer in enumerate(host):
        state, _ = layer(state, context)
        if index == 1:
            continue
        thin, mu = stack.side.layers[str(index)], torch.sigmoid(10 * stack.side.gates[index])
        assert isinstance(thin, Layer)
        z = mu * side + (1 - mu) * state @ stack.side.ladders[str(index)].weight.T  # type: ignore[operator]
        mix: Any = thin["attention"].core
        q, k, v = (getattr(mix, role)(z).unflatten(-1, (4, 2)).transpose(1, 2) for role in "qkv")
        weights = (q @ k.mT / math.sqrt(2) + bias).softmax(-1)
        z = thin["attention"].norm(z + mix.o((weights @ v).transpose(1, 2).flatten(2)))
        feed: Any = thin["ffn"].core
        side = thin["ffn"].norm(z + feed.leave(nn.functional.gelu(feed.enter(z))))
    torch.testing.assert_close(y, side @ stack.up.weight.T, rtol=0, atol=1e-12)


def test_an_image_alone_stands_beside_an_empty_text_that_is_not_handed_on() -> None:
    host = small_tiny()
    model = tuned(host)
    alone = model.fuse(picture(host), task="captioning")
    empty = host.embed_text(host.texts(["", ""], 64))
    both = model.fuse(empty, picture(host), task="captioning")
    assert alone.states.shape == (2, 4, host.width) and alone.segments == ((IMAGE, 4),)
    torch.testing.assert_close(alone.states, both.states[:, empty.mask.shape[1] :], rtol=0, atol=1e-12)
    assert torch.equal(alone.text.states, both.text.states)


def test_a_memory_hands_on_rows_of_both_encoders() -> None:
    memory = tuned(t5()).fuse(question(t5()), picture(t5()), task="vqa")
    one = memory.rows(torch.tensor([1]))
    for whole, part in ((memory, one), (memory.text, one.text)):
        assert torch.equal(part.states[0], whole.states[1]) and torch.equal(part.mask[0], whole.mask[1])
    assert torch.equal(one.side[0], memory.side[1])


def test_in_training_backbone_and_side_drop_for_themselves() -> None:
    host = small_tiny()
    model = tuned(host, init="pruned").train()
    entered: dict[str, Tensor] = {}
    next(iter(host.stack("encoder"))).register_forward_pre_hook(lambda m, given: entered.update(host=given[0]))
    model.side.encoder.enter.register_forward_pre_hook(lambda m, given: entered.update(side=given[0]))
    model.fuse(question(host, length=30), task="vqa")
    dropped = {name: x == 0 for name, x in entered.items()}
    assert all(0.05 < float(zeros.double().mean()) < 0.15 for zeros in dropped.values())
    assert not torch.equal(dropped["host"], dropped["side"])


@pytest.mark.parametrize("kind", ["t5", "bart", "bert"])
def test_it_runs_in_bfloat16(kind: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        if kind == "bert":
            stack = LST(LSTConfig(reduction=2)).adapt(Bare(fusion=bert())).stack("fusion")
            tokens = plain_tokens(draw(1, 4, 16).float(), torch.ones(1, 4).bool(), TEXT)
            y, _ = stack.run(tokens.states, tokens.context())
        else:
            model = tuned(language(kind)).float()
            image = picture(model)
            memory = model.fuse(question(model), replace(image, states=image.states.float()), task="vqa")
            y, _ = model.decode(memory, torch.tensor([[2, 4], [2, 5]]), task="vqa")
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    y.float().sum().backward()


# How it starts


def test_ladders_start_as_torch_draws_them_and_gates_at_a_half() -> None:
    adapted = LST(LSTConfig(reduction=2)).adapt(Host({**SIZES, "d_model": 256, "d_kv": 64}, {}, 0, 0))
    assert isinstance(adapted, SideTuned)
    for stack in (adapted.side.encoder, adapted.side.decoder):
        assert all(not gate.any() and gate.requires_grad for gate in stack.gates)
        for linear in (stack.enter, *stack.ladders.values()):
            for values in (linear.weight, linear.bias):
                assert float(values.detach().abs().max()) <= 1 / 16  # 1 / sqrt(256), uniform
            assert float(linear.weight.detach().std()) == pytest.approx(1 / 16 / math.sqrt(3), rel=0.03)


def test_random_layers_beside_t5_have_the_big_ones_deviations() -> None:
    sizes = {**SIZES, "d_model": 256, "d_kv": 64, "d_ff": 512}
    side = LST(LSTConfig(reduction=2, init="random")).adapt(Host(sizes, {}, 0, 0)).side
    deviations = {"q": (256 * 64) ** -0.5, "k": 1 / 16, "v": 1 / 16, "o": 256**-0.5, "in": 1 / 16, "out": 512**-0.5}
    for name, parameter in side_parts(side).items():
        role = name.split(".")[-2]
        if role in deviations:
            assert float(parameter.detach().std()) == pytest.approx(deviations[role], rel=0.05), name
        elif "norm" in name:
            assert bool((parameter == 1).all()), name


def test_everything_beside_other_stacks_starts_normal_and_without_bias() -> None:
    stack = LST(LSTConfig()).adapt(Bare(fusion=bert(1, width=256, heads=4, ffn=512))).stack("fusion")
    assert isinstance(stack, LadderStack)
    linears = [m for m in (*stack.side.modules(), stack.up) if isinstance(m, nn.Linear)]
    assert len(linears) == 9 and stack.up.bias is None and stack.side.enter.bias is None
    for linear in linears:
        assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.06)
        assert linear.bias is None or not linear.bias.any()


def test_side_layers_start_as_pruned_weights_and_keep_all_relative_positions() -> None:
    host = t5()
    adapted = LST(LSTConfig(reduction=2, layers=DROPPED)).adapt(host)
    assert isinstance(adapted, SideTuned)
    values = {name: p.detach() for name, p in parts(host).items()}
    expected, mine = pruned(values, values, 2), side_parts(adapted.side)
    assert mine.keys() == {n for n in expected if n != "table" and not n.startswith(("encoder.0.", "decoder.1."))}
    assert all(torch.equal(p, expected[name]) for name, p in mine.items())
    assert torch.equal(mine["encoder.relative"], values["encoder.relative"])


def test_pruning_goes_through_a_file_of_fisher_sums(tmp_path: Path) -> None:
    """The first `limit` samples count; modes, flags and gradients stay; the file decides which rows stay."""
    host = t5().train()
    host.freeze()
    before = {name: p.requires_grad for name, p in host.named_parameters()}
    samples = [(Texts(torch.tensor([[i, 7, 8]]), torch.ones(1, 3).bool()),) * 2 for i in (3, 4, 5)]
    sums = fisher(host, samples, 2)
    again = [fisher(host, [sample], 1) for sample in samples]
    for name, value in sums.items():
        torch.testing.assert_close(value, again[0][name] + again[1][name], rtol=1e-9, atol=1e-12)
    assert host.training and before == {name: p.requires_grad for name, p in host.named_parameters()}
    assert all(p.grad is None for p in host.parameters())
    path = tmp_path / "fisher.safetensors"
    save_file(sums, path)
    adapted = LST(LSTConfig(reduction=2, importance=str(path))).adapt(host)
    values = {name: p.detach() for name, p in parts(host).items()}
    expected, plain = pruned(values, sums, 2), pruned(values, values, 2)
    mine = side_parts(adapted.side)
    assert all(torch.equal(p, expected[name]) for name, p in mine.items())
    assert not all(torch.equal(expected[name], plain[name]) for name in mine)


def test_rows_that_stay_come_in_the_order_of_a_set() -> None:
    """When few of many stay, the order is not ascending; the authors' code cuts heads from this order."""
    score = torch.zeros(768, 1)
    score[[531, 2, 28, 526, 3, 6]] = 1
    found = selected(score, 1 - 6 / 768)
    assert sorted(found) == [2, 3, 6, 28, 526, 531] and found == list(
        set(range(768)) - set(range(768)).difference(found)
    )


def test_many_small_steps_can_leave_other_sizes() -> None:
    assert [left(size, 2, 10) for size in (16, 32)] == [6, 15] and [left(size, 4, 10) for size in (16, 32)] == [5, 8]
    assert [left(size, 4, 1) for size in (16, 768)] == [4, 192]
    with pytest.raises(ValueError, match="pruning_steps 10 leave"):
        LST(LSTConfig(reduction=2, pruning_steps=10)).adapt(t5())


# Sizes


def trainable(backbone: nn.Module) -> int:
    return sum(p.numel() for p in backbone.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("reduction", "published"), [(2, 59_124_504), (4, 17_967_384), (8, 6_678_552), (16, 3_356_568)]
)
def test_counts_beside_t5_base(reduction: int, published: int) -> None:
    """Counts include the visual block; the authors' reduction of 4 gives 7.46 %."""
    with torch.device("meta"):
        host = VLT5(VLT5.configured("vl_t5", {}))
    adapted = LST(LSTConfig(reduction=reduction)).adapt(host)
    assert trainable(adapted) == published
    if reduction == 4:
        assert sum(p.numel() for p in adapted.parameters()) == 240_926_232


def test_counts_with_dropped_layers_and_of_a_single_stream() -> None:
    kept = (1, 2, 3, 5, 6, 7, 9, 10, 11)
    with torch.device("meta"):
        host = VLT5(VLT5.configured("vl_t5", {}))
        stream = bert(12, width=768, heads=12, ffn=3072)
    adapted = LST(LSTConfig(reduction=8, layers={"encoder": kept, "decoder": kept})).adapt(host)
    assert trainable(adapted) - 1_581_312 == 3_878_712
    assert trainable(LST().adapt(Bare(fusion=stream))) == 7_402_764


def test_gates_of_dropped_layers_are_declared_dead() -> None:
    method = LST(LSTConfig(reduction=2, layers=DROPPED))
    adapted = method.adapt(t5())
    assert set(method.unused_parameters) == {"*encoder*gates.0", "*decoder*gates.1"}
    assert isinstance(adapted, SideTuned)
    ended = LST(LSTConfig(reduction=2, layers={"encoder": (0, 1)})).adapt(t5())
    assert isinstance(ended, SideTuned)
    assert [gate.requires_grad for gate in ended.side.encoder.gates] == [True, True, False]


# Wrong input


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"reduction": 3}, "reduction 3 does not divide its"),
        ({"reduction": 16}, "reduction 16 does not divide its"),
        ({"layers": {"encoder": (3,)}}, "must be among 0 to 2"),
        ({"layers": {"vision": (0,)}}, "along a stack 'vision' here, but along encoder, decoder"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LST(LSTConfig(**{"reduction": 2} | options)).adapt(t5())


WRONG: list[dict[str, Any]] = [
    {"reduction": 0},
    {"layers": {"encoder": ()}},
    {"layers": {"encoder": (1, 1)}},
    {"layers": {"encoder": (-1,)}},
    {"init": "fisher"},
    {"pruning_steps": 0},
]


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        LSTConfig(**options)


def test_other_hosts_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="pruning starts from the words"):
        LST(LSTConfig(init="pruned")).adapt(Bare(fusion=bert()))
    with torch.device("meta"):
        coca: Backbone = Clip(Clip.configured("clip:coca-tiny", {}))
    with pytest.raises(ValueError, match="frozen pooling"):
        LST().adapt(coca)
    stack = LST(LSTConfig(reduction=2)).adapt(Bare(fusion=bert())).stack("fusion")
    with pytest.raises(ValueError, match="as a whole"):
        stack.run(draw(1, 2, 16), plain_tokens(draw(1, 2, 16), torch.ones(1, 2).bool(), TEXT).context(), start=1)


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_a_second_method_is_refused(kind: str) -> None:
    host = t5() if kind == "t5" else Bare(fusion=bert())
    adapted = LST(LSTConfig(reduction=2)).adapt(host)
    with pytest.raises(ValueError, match="another method is in this backbone"):
        LoRA().adapt(adapted)
    assert any(isinstance(m, LSTSideStack) for m in posing(adapted).modules())
