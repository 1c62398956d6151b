"""Checks of every backbone family: tasks train, sites are exact, insertions can be removed, sizes need no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from petlbench.methods.lora import LoRA
from petlbench.methods.selective import Full, HeadOnly
from petlbench.methods.vl_adapter import VLAdapter
from PIL import Image
from torch import Tensor, nn

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method, adapt
from petlbench.api.registries import BACKBONES, TASKS
from petlbench.api.sites import PLACES, Layer, Pass, Place, SubLayer
from petlbench.api.snapshot import Snapshot
from petlbench.api.task import Batch, Task
from petlbench.api.tokens import Tokens
from petlbench.core.cell import Cell
from petlbench.core.recipe import Recipe
from petlbench.pipeline.assembly import attach_head, build_backbone, build_setup
from petlbench.pipeline.data import Data, load_data, load_source
from petlbench.training.context import RunContext
from petlbench.training.evaluation import evaluate, load_state
from petlbench.training.loop import fit
from petlbench.training.state import TrainingState

CPU = torch.device("cpu")
FAMILIES = ["tiny", "vl_bart:tiny", "vl_t5:tiny", "transvg:tiny", "beit3:tiny", "clip:tiny", "clip:coca-tiny"]
HOME = dict.fromkeys(FAMILIES, "vqa") | {"transvg:tiny": "rec", "beit3:tiny": "retrieval", "clip:tiny": "retrieval"}
RECIPE = Recipe(steps=2, batch_size=4, eval_batch_size=4, train_limit=8, eval_limit=4)
SCENES = dict.fromkeys(("train_scenes", "validation_scenes", "test_scenes"), 8)


def serves(family: str, task: str) -> bool:
    cls = BACKBONES.get(family)
    return TASKS.get(task)().refuses(cls, cls.configured(family, {})) is None


SERVED = [(family, task) for family in FAMILIES for task in TASKS.names() if serves(family, task)]


def cell_of(family: str, task: str, method: str = "full") -> Cell:
    return Cell(
        method=method,
        task=task,
        dataset=TASKS.get(task).default_dataset,
        dataset_config=SCENES,
        backbone=family,
        recipe=RECIPE,
        seed=3,
    )


@cache
def data_of(task: str) -> Data:
    cell = cell_of("tiny", task)
    return load_data(cell, load_source(cell, None), TASKS.get(task)())


def test_which_family_serves_what() -> None:
    everything = {"rec", "vqa", "pairs", "captioning", "retrieval"}
    found = {family: {task for name, task in SERVED if name == family} for family in FAMILIES}
    less = {"transvg:tiny": everything - {"retrieval", "pairs"}, "clip:coca-tiny": everything - {"rec"}}
    assert found == dict.fromkeys(FAMILIES, everything) | less


@pytest.mark.parametrize("method", [Full, HeadOnly])
@pytest.mark.parametrize(("family", "task"), SERVED)
def test_every_family_trains_on_every_task_it_serves(family: str, task: str, method: type[Method]) -> None:
    """Trained values change, all others keep every bit, and the rows of a split are scored."""
    cell, data = cell_of(family, task), data_of(task)
    backbone = build_backbone(cell, CPU)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    setup, _ = build_setup(cell, backbone, TASKS.get(task)(), RunContext.on(CPU), method=method())
    trained = setup.trainable()
    start = {name: p.detach().clone() for name, p in trained.items()}
    fitted = fit(setup, data.train, data.validation, lr=1e-2)
    assert all(np.isfinite(loss) for _, loss in fitted.losses)
    load_state(setup, fitted.state)
    scores, predictions = evaluate(setup, data.test)
    assert len(predictions) == len(data.test) and np.isfinite(scores.metrics[setup.task.main_metric])
    changed = {name for name, value in start.items() if not torch.equal(value, trained[name])}
    assert changed
    free = {id(p) for p in trained.values()}
    own = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    frozen = {name for name, tensor in own.items() if id(tensor) not in free and name in before}
    assert [name for name in frozen if not torch.equal(own[name], before[name])] == []
    if method is Full:
        assert {name for name, p in backbone.named_parameters() if id(p) not in free} == {
            *backbone.fixed_parameters(),
            *(
                f"own_heads.{n}"
                for n, _ in backbone.own_heads.named_parameters()
                if task not in n.split(".")[0].split("+")
            ),
        }


class Oracle(nn.Module):
    """A head that returns the boxes it was built with."""

    def __init__(self, boxes: Tensor) -> None:
        super().__init__()
        self.boxes = boxes

    def forward(self, tokens: Tokens) -> Tensor:
        return self.boxes


@pytest.mark.parametrize("family", [family for family, task in SERVED if task == "rec"])
def test_a_box_comes_back_in_pixels_of_the_stored_image(family: str) -> None:
    """Check the family's own preprocessing, which may resize, pad or crop."""
    task: Task = TASKS.get("rec")()
    backbone, _ = attach_head(build_backbone(cell_of(family, "rec"), CPU), task, CPU)
    sizes, boxes = (
        [(90, 40), (37, 64), (50, 50)],
        [[3.0, 4.0, 20.0, 30.0], [1.0, 40.5, 7.0, 9.0], [0.0, 0.0, 50.0, 50.0]],
    )
    rows = [
        {"image": Image.new("RGB", size), "expression": "it", "box": box}
        for size, box in zip(sizes, boxes, strict=True)
    ]
    batch = task.collate(rows, backbone, None)
    with torch.no_grad():
        found = task.predict(backbone.eval(), Oracle(batch.extras["boxes"]), batch)
    np.testing.assert_allclose(found, boxes, atol=1e-3)
    assert not np.allclose(batch.extras["boxes"], boxes, atol=0.1)


def test_a_checkpoint_leaves_out_what_training_cannot_change() -> None:
    """Leave out the CNN that computes features; keep running statistics that training changes."""
    cell = cell_of("vl_bart:tiny", "vqa")
    backbone = build_backbone(cell, CPU)
    backbone.register_module("moving", nn.BatchNorm1d(2))
    setup, _ = build_setup(cell, backbone, TASKS.get("vqa")(), RunContext.on(CPU), method=HeadOnly())
    names = set(TrainingState(setup, data_of("vqa").train, 1e-2).state().tensors)
    assert any("grid." in name for name in setup.modules().state_dict())
    assert not any("grid." in name for name in names)
    assert "values/backbone.moving.running_mean" in names


class Bench:
    """A family at test size in double precision, with a batch of its home task."""

    def __init__(self, family: str) -> None:
        self.task: Task = TASKS.get(HOME[family])()
        self.backbone = build_backbone(cell_of(family, self.task.name), CPU).double()
        torch.manual_seed(0)
        adapted, head = attach_head(self.backbone, self.task, CPU)
        self.adapted, self.head = adapted.double(), head.double()
        rows: Dataset = data_of(self.task.name).validation
        self.rows = [rows[i] for i in range(3)]
        self.adapted.eval(), self.head.eval()

    def batch(self, *, training: bool = True) -> Batch:
        made = self.task.collate(self.rows, self.backbone, np.random.default_rng(0) if training else None)
        extras = {name: t.double() if t.is_floating_point() else t for name, t in made.extras.items()}
        return Batch(made.images.to_dtype(torch.float64), made.texts, extras)

    def loss(self) -> Tensor:
        return self.task.loss(self.adapted, self.head, self.batch())

    def sublayers(self) -> Iterator[tuple[str, SubLayer]]:
        for role in self.backbone.roles():
            for index, layer in enumerate(self.backbone.stack(role)):
                yield from ((f"{role}.{index}.{name}", sublayer) for name, sublayer in layer.items())


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


every_family = pytest.mark.parametrize("bench", FAMILIES, indirect=True)


class Spy(nn.Module):
    """Return the value unchanged, and count the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        assert x.shape == value.shape
        self.calls += 1
        return value


@every_family
def test_a_module_that_does_nothing_changes_no_bit_at_any_site(bench: Bench) -> None:
    with torch.no_grad():
        before = bench.loss()
        spies = {(name, place): Spy() for name, _ in bench.sublayers() for place in PLACES}
        for name, sublayer in bench.sublayers():
            for place in PLACES:
                sublayer.insert(place, spies[name, place])
        assert torch.equal(bench.loss(), before)
    assert [site for site, spy in spies.items() if not spy.calls] == []


class Known(nn.Module):
    """u(x, value) = 0.7 value + 0.4 x."""

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        return 0.7 * value + 0.4 * x


def inline(layer: Layer, x: Tensor, context: Pass, at: tuple[str, Place]) -> Tensor:
    """Compute the layer by the formulas of sites.py, with `Known` at one site and without dropout."""

    def placed(name: str, place: Place, x: Tensor, value: Tensor) -> Tensor:
        return 0.7 * value + 0.4 * x if (name, place) == at else value

    for name, sublayer in layer.items():
        with context.active():
            h = placed(name, "output", x, sublayer.core(sublayer.norm(x) if sublayer.pre_norm else x, context))
            y = x + placed(name, "branch", x, h)
            x = placed(name, "normed", x, y if sublayer.pre_norm else sublayer.norm(y))
    return x


@every_family
def test_a_known_module_at_any_site_is_the_inline_formula(bench: Bench) -> None:
    seen: dict[Layer, tuple[Tensor, Pass]] = {}

    def keep(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, Layer)
        seen.setdefault(layer, (args[0].detach(), args[1]))

    layers = [layer for role in bench.backbone.roles() for layer in bench.backbone.stack(role)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    with torch.no_grad():
        bench.loss()
        for hook in hooks:
            hook.remove()
        assert set(seen) == set(layers)
        for layer, (x, context) in seen.items():
            plain = layer(x, context)[0]
            for name, sublayer in layer.items():
                for place in PLACES:
                    sublayer.insert(place, Known())
                    found, taps = layer(x, context, {name: frozenset({place})})
                    expected = inline(layer, x, context, (name, place))
                    assert not torch.allclose(found, plain)
                    assert float((found - expected).abs().max()) <= 1e-12 * max(1.0, float(expected.abs().max()))
                    assert set(taps) == {(name, place)}
                    _pop(sublayer.sites[place])
            assert torch.equal(layer(x, context)[0], plain)


def _pop(modules: nn.Module) -> None:
    assert isinstance(modules, nn.ModuleList)
    modules.pop(-1)


@every_family
@pytest.mark.parametrize("method", [LoRA, VLAdapter])
def test_removed_modules_leave_nothing_behind(bench: Bench, method: Callable[[], Method]) -> None:
    keys, hooks = list(bench.backbone.state_dict()), _hooks(bench.backbone)
    with torch.no_grad():
        before = bench.loss()
    bench.backbone.requires_grad_(True)
    torch.manual_seed(0)
    adapted, handle = adapt(method(), bench.backbone)
    adapted.double()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    bench.loss().backward()
    assert not torch.equal(bench.loss(), before)
    handle.restore()
    with torch.no_grad():
        assert torch.equal(bench.loss(), before)
    assert list(bench.backbone.state_dict()) == keys and _hooks(bench.backbone) == hooks


def _hooks(module: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(child, kind)) for child in module.modules() for kind in kinds)


@every_family
def test_checkpointing_changes_no_bit_of_loss_or_gradients(bench: Bench) -> None:
    """Train with modules at every site; every dropout draws the same values."""
    for _, sublayer in bench.sublayers():
        for place in PLACES:
            sublayer.insert(place, Known())
    bench.backbone.unfreeze()
    bench.adapted.train()
    found = []
    for on in (False, True):
        for role in bench.backbone.roles():
            bench.backbone.stack(role).checkpointing = on
        bench.adapted.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        loss = bench.loss()
        loss.backward()
        grads = {name: p.grad for name, p in bench.backbone.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    (loss, grads), (again, others) = found
    assert torch.equal(loss, again) and grads.keys() == others.keys() and grads
    assert [name for name, grad in grads.items() if not torch.equal(grad, others[name])] == []


@every_family
def test_sites_keep_their_promise_under_autocast(bench: Bench) -> None:
    bench.adapted.float(), bench.head.float()
    batch = bench.task.collate(bench.rows, bench.backbone, np.random.default_rng(0))

    def loss() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return bench.task.loss(bench.adapted, bench.head, batch)

    before = loss()
    assert bool(before.isfinite())
    for _, sublayer in bench.sublayers():
        for place in PLACES:
            sublayer.insert(place, Spy())
    assert torch.equal(loss(), before)
    for _, sublayer in bench.sublayers():
        sublayer.insert("output", Known())
    assert not torch.equal(loss(), before)


@every_family
def test_a_row_is_predicted_as_if_it_were_alone(bench: Bench) -> None:
    with torch.no_grad():
        together = bench.task.predict(bench.adapted, bench.head, bench.batch(training=False))
        rows = bench.rows
        alone = []
        for row in rows:
            bench.rows = [row]
            alone += bench.task.predict(bench.adapted, bench.head, bench.batch(training=False))
    for one, other in zip(together, alone, strict=True):
        if isinstance(one, str):
            assert one == other
        else:
            for a, b in zip(one, other, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@every_family
def test_every_projection_takes_a_parallel_path(bench: Bench) -> None:
    """A path that adds zero changes no bit; at any place, a path that adds a value changes the output."""

    class Path(nn.Module):
        def __init__(self, out: int, value: float) -> None:
            super().__init__()
            self.out, self.value = out, value

        def forward(self, x: Tensor) -> Tensor:
            # Not a constant: the next norm would remove it.
            return (self.value * torch.linspace(-1, 1, self.out, dtype=x.dtype)).expand(*x.shape[:-1], -1)

    with torch.no_grad():
        before = bench.loss()
        for name, sublayer in bench.sublayers():
            assert {"in", "out"} <= set(sublayer.projections) or {"q", "k", "v", "o"} <= set(sublayer.projections)
            for role, projection in sublayer.projections.items():
                changed = []
                for single in projection.singles():
                    assert single.in_features > 0
                    for value in (0.0, 0.3):
                        single.add(path := Path(single.out_features, value))
                        changed.append(not torch.equal(bench.loss(), before))
                        single.remove(path)
                # The same vector on all keys adds a constant to all scores of a query, which the softmax removes.
                assert not any(changed[::2]) and (all(changed[1::2]) or role == "k"), (name, role)
        assert torch.equal(bench.loss(), before)


@pytest.mark.parametrize("name", [f"{family.partition(':')[0]}" for family in FAMILIES[1:-1]])
def test_published_sizes_build_without_memory_weights_or_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    backbone: Backbone = build_backbone(
        Cell(method="full", task="vqa", dataset="digits", backbone=name), torch.device("meta")
    )
    assert all(tensor.is_meta for tensor in (*backbone.parameters(), *backbone.buffers()))
    assert sum(p.numel() for p in backbone.parameters()) > 1e8
    Snapshot(backbone).restore()
