"""Sites: the wiring is the library's, places see what they promise, passes are current, everything can be undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from petlbench.methods.lora import LoRA
from petlbench.methods.selective import BitFit, Full, HeadOnly
from petlbench.methods.vl_adapter import VLAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.method import Method, adapt
from petlbench.api.sites import PLACES, Pass, Place, Stack, current_pass
from petlbench.api.snapshot import Snapshot
from petlbench.api.tokens import Images
from tests.backbone_factory import draw, randomise, small_tiny
from tests.layer_cases import FAMILIES, B, D, N, make


class Change(nn.Module):
    """u(x, value) = a value + b x, which remembers what it was given."""

    def __init__(self, a: float = 1.0, b: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = a, b
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        self.seen.append((x, value))
        return self.a * value + self.b * x


def seeded(function: Callable[..., Tensor], *args: object) -> Tensor:
    torch.manual_seed(5)
    return function(*args)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_without_insertions_is_the_librarys(family: str, training: bool) -> None:
    """Bit for bit, in training with every dropout drawn alike as well."""
    case, x = make(family), draw(B, N, D)
    case.train(training)
    y = seeded(lambda: case.layer(x, case.context)[0])
    assert torch.equal(y, seeded(case.call, x))
    assert not torch.allclose(y, x)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_places_see_and_replace_what_they_promise(family: str, training: bool) -> None:
    case, x = make(family), draw(B, N, D)
    case.train(training)
    changes: dict[Place, tuple[float, float]] = {"output": (2.0, 0.5), "branch": (0.5, 1.0), "normed": (3.0, -1.0)}
    spies = {}
    for name, sublayer in case.layer.items():
        for place, (a, b) in changes.items():
            modules = Change(a, b), Change()
            spies[name, place] = modules
            for module in modules:
                sublayer.insert(place, module)
    tap = {name: frozenset(PLACES) for name, _ in case.layer.items()}
    torch.manual_seed(5)
    y, taps = case.layer(x, case.context, tap)

    torch.manual_seed(5)
    assert [name for name, _ in case.layer.items()] == [name for name, _, _ in case.parts]
    for name, core, norm in case.parts:
        before = x

        def at(place: Place, value: Tensor, name: str = name, before: Tensor = before) -> Tensor:
            (got_x, got_value), (_, changed) = (spy.seen[0] for spy in spies[name, place])
            assert torch.equal(got_x, before) and torch.equal(got_value, value)
            a, b = changes[place]
            expected = a * value + b * before
            assert torch.equal(changed, expected) and torch.equal(taps[name, place], expected)
            return expected

        h = at("output", core(norm(x) if case.pre_norm else x))
        branch = at("branch", F.dropout(h, case.dropout, training))
        x = at("normed", x + branch if case.pre_norm else norm(x + branch))
    assert torch.equal(y, x)
    assert set(taps) == set(spies)


def stack_of(family: str, layers: int = 3, final_norm: bool = True) -> tuple[Stack, Pass]:
    cases = [make(family) for _ in range(layers)]
    norm = nn.LayerNorm(D) if final_norm else None
    stack = Stack([case.layer for case in cases], width=D, final_norm=norm)
    randomise(stack)
    return stack.eval(), cases[0].context


@pytest.mark.parametrize("family", ["clip", "bart_decoder"])
def test_slices_of_a_stack_compose(family: str) -> None:
    stack, context = stack_of(family)
    x = draw(B, N, D)
    sites = [(0, "ffn", "output"), (1, "attention", "branch"), (2, "ffn", "normed"), (2, "ffn", "branch")]
    whole, taps = stack.run(x, context, taps=sites)
    assert list(taps) == [sites[0], sites[1], sites[3], sites[2]]
    for cut in range(len(stack.layers)):
        middle, early = stack.run(x, context, stop=cut, taps=sites)
        end, late = stack.run(middle, context, start=cut, taps=sites)
        assert torch.equal(end, whole)
        assert set(early) == {site for site in sites if site[0] < cut} and not set(early) & set(late)
        assert all(torch.equal((early | late)[site], value) for site, value in taps.items())
    last_layer, _ = stack.run(x, replace(context), stop=2)
    by_hand = stack.final_norm(stack.layers[2](last_layer, context)[0])
    assert torch.equal(by_hand, whole)
    assert not torch.equal(last_layer, stack.final_norm(last_layer))


def test_the_tail_follows_the_last_sublayer() -> None:
    stack, context = stack_of("clip", layers=2, final_norm=False)
    x = draw(B, N, D)
    middle, _ = stack.run(x, context, stop=1)
    first, second = randomise(nn.Linear(D, D), 1), randomise(nn.Linear(D, D), 2)
    layer = stack.layers[0]
    layer.tail.extend([first, second])
    assert torch.equal(stack.run(x, context, stop=1)[0], second(first(middle)))


class PerTask(nn.Module):
    """A gain per task, chosen by the pass: wrong gradients if a recomputation saw another pass."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.ParameterDict({"a": torch.full((), 0.5), "b": torch.full((), 2.0)}).double()
        self.passes: list[Pass] = []

    def forward(self, *values: Tensor) -> Tensor:
        now = current_pass()
        self.passes.append(now)
        assert now.task is not None
        return values[-1] * self.gain[now.task] * (1 + now.step)


def test_modules_see_their_own_pass_and_none_outside() -> None:
    stack, context = stack_of("bart_encoder", layers=2)
    asker = PerTask()
    stack.layers[0]["ffn"].insert("branch", asker)
    stack.layers[1].tail.append(asker)
    mine = replace(context, task="a", step=3, types=torch.zeros(B, N), mask=torch.ones(B, N, dtype=torch.bool))
    with Pass(task="another").active():
        stack.run(draw(B, N, D), mine)
        assert current_pass().task == "another"
    assert asker.passes == [mine, mine]
    with pytest.raises(LookupError):
        current_pass()
    with pytest.raises((KeyError, AttributeError)):
        stack.run(draw(B, N, D), replace(context, task="unknown"))
    with pytest.raises(LookupError):
        current_pass()


def test_checkpointing_recomputes_in_the_pass_it_was_recorded_in() -> None:
    stack, context = stack_of("bart_encoder", layers=2)
    stack.train()
    asker = PerTask()
    for layer in stack:
        layer["attention"].insert("output", asker)
        layer.tail.append(asker)
    x = draw(B, N, D).requires_grad_()
    results = []
    for stack.checkpointing in (False, True):
        asker.passes.clear()
        torch.manual_seed(0)
        a, _ = stack.run(x, replace(context, task="a"))
        b, taps = stack.run(x, replace(context, task="b", step=1), taps=[(1, "ffn", "output")])
        (a.square().sum() + b.pow(3).sum() + taps[1, "ffn", "output"].sum()).backward()
        tensors = {"x": x, **dict(stack.named_parameters())}
        results.append({name: tensor.grad for name, tensor in tensors.items()})
        assert len(asker.passes) == (16 if stack.checkpointing else 8)
        for tensor in tensors.values():
            tensor.grad = None
    plain, recomputed = results
    assert all(plain[name] is not None and torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("method", [Full, HeadOnly, BitFit, LoRA, VLAdapter])
def test_a_snapshot_gives_the_backbone_back_bit_for_bit(method: type[Method]) -> None:
    backbone = small_tiny().train()
    backbone.stack("encoder").layers[0].eval()
    backbone.token_embedding.weight.requires_grad_(False)

    def state() -> dict[str, object]:
        modules = {name: (type(module), module.training) for name, module in backbone.named_modules()}
        flags = {name: (id(p), p.requires_grad, p.grad) for name, p in backbone.named_parameters()}
        return {"modules": modules, "flags": flags, "keys": list(backbone.state_dict())}

    before, values = state(), {name: value.clone() for name, value in backbone.state_dict().items()}
    adapter = method()
    adapted, handle = adapt(adapter, backbone)
    assert isinstance(handle, Snapshot)
    adapted.train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    texts = adapted.texts(["a red circle", "a blue square on the left"], 20)
    images = Images(draw(2, 3, 32, 32), torch.ones(2, 32, 32, dtype=torch.bool), *torch.ones(2, 2, 2).double())
    for _ in range(2):
        parts = adapted.embed_text(texts), adapted.embed_image(images)
        memory = adapted.fuse(*parts, task="vqa")
        adapted.decode(memory, texts.ids, task="vqa")[0].square().mean().backward()
        optimizer.step()
    if method is LoRA:
        adapter.merge()
    adapted.eval()
    assert state() != before
    assert any(not torch.equal(value, values[name]) for name, value in adapted.state_dict().items() if name in values)
    handle.restore()
    assert state() == before
    assert all(torch.equal(value, values[name]) for name, value in backbone.state_dict().items())
