"""What methods rely on beyond sites: one method at a time, whose parameters are whose, and pairs that do not fit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from petlbench.methods.lora import LoRA
from petlbench.methods.lst.method import LST
from petlbench.methods.m2ist.method import M2IST
from petlbench.methods.prompt import Prompt
from petlbench.methods.selective import BitFit, Full
from petlbench.methods.vl_adapter import VLAdapter
from petlbench.methods.vl_pet import VLPET
from PIL import Image
from PIL.Image import Image as Picture
from torch import Tensor, nn

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method
from petlbench.api.registries import BACKBONES, TASKS
from petlbench.api.snapshot import inserted
from petlbench.api.tokens import Images, Texts, Tokens
from petlbench.backbones.supplied import supply
from petlbench.backbones.transvg import TransVG
from petlbench.core.cell import Cell
from petlbench.core.recipe import Recipe
from petlbench.pipeline import compatibility
from petlbench.pipeline.assembly import build_backbone, build_setup
from petlbench.pipeline.compatibility import incompatible_cells
from petlbench.training.context import RunContext
from petlbench.training.optimizers import ReleasedAdamW, optimizer, rate
from tests.backbone_factory import Bare, draw, small_tiny


@pytest.mark.parametrize("second", [LoRA, VLAdapter, BitFit])
def test_a_second_method_that_would_freeze_the_first_is_refused(second: type[Method]) -> None:
    backbone = small_tiny()
    LoRA().adapt(backbone)
    paths = [p.requires_grad for module in inserted(backbone) for p in module.parameters()]
    with pytest.raises(ValueError, match="another method is in this backbone already"):
        second().adapt(backbone)
    assert paths == [p.requires_grad for module in inserted(backbone) for p in module.parameters()] and all(paths)


def test_what_freezes_nothing_may_follow_another_method() -> None:
    backbone = small_tiny()
    Full().adapt(VLAdapter().adapt(backbone))
    assert all(p.requires_grad for module in inserted(backbone) for p in module.parameters())


def test_a_method_leaves_out_stacks_that_every_method_trains_whole() -> None:
    with torch.device("meta"):
        backbone = TransVG(TransVG.configured("transvg:tiny", {}))
    assert backbone.roles() == ("vision", "text", "fusion")
    assert backbone.pretrained_roles() == ("vision", "text")
    VLAdapter().adapt(backbone)
    assert not [name for name, _ in backbone.named_parameters() if ".fusion." in name and ".sites." in name]


class GainsAlone(Bare):
    """Norms with a gain and no bias, as T5's; nothing else of T5 is said of it."""

    norm_bias = False


def gains_alone() -> Backbone:
    stack = small_tiny().stack("encoder")
    stack.embedding_norm = nn.RMSNorm(stack.width)
    for layer in stack:
        for _, sublayer in layer.items():
            sublayer.norm = nn.RMSNorm(sublayer.width)
    return GainsAlone(encoder=stack)


def test_a_host_of_norms_without_bias_is_not_taken_for_t5() -> None:
    """Ranks, scales and initial values are those of any host but T5."""
    is_side_module = list(inserted(VLAdapter().adapt(gains_alone())))
    assert {adapter.down.out_features for adapter in is_side_module} == {32 // 8}  # type: ignore[union-attr]
    assert not any(linear.bias.any() for adapter in is_side_module for linear in (adapter.down, adapter.up))  # type: ignore[union-attr]
    assert {path.A.shape[0] for path in inserted(LoRA().adapt(gains_alone()))} == {32 // 6}  # type: ignore[union-attr]
    assert {control.scale for control in inserted(VLPET().adapt(gains_alone()))} == {1.0}
    t5 = GainsAlone(encoder=gains_alone().stack("encoder"))
    t5.initialisation = "t5"
    assert {control.scale for control in inserted(VLPET().adapt(t5))} == {0.3}


def test_norms_train_where_the_authors_code_finds_them_to_be_layer_norms() -> None:
    for host, trains in ((small_tiny(), True), (gains_alone(), False)):
        adapted = VLAdapter().adapt(host)
        assert {p.requires_grad for norm in adapted.stack("encoder").norms() for p in norm.parameters()} == {trains}


@dataclass(frozen=True)
class Carrying(Tokens):
    side: Tensor | None = None


def test_rows_of_tokens_are_picked_from_all_that_a_subclass_carries() -> None:
    states, mask = draw(3, 2, 4), torch.ones(3, 2, dtype=torch.bool)
    tokens = Carrying(states, mask, mask.long(), draw(3, 2, 2), ((1, 2),), side=draw(3, 2, 5, seed=1))
    index = torch.tensor([2, 2, 0])
    rows = tokens.rows(index)
    assert isinstance(rows, Carrying) and rows.segments == tokens.segments and rows.mark is None
    assert rows.side is not None and tokens.side is not None
    assert torch.equal(rows.side, tokens.side[index]) and torch.equal(rows.states, states[index])
    assert replace(rows, side=None).side is None


CELL = Cell(method="vl_adapter", task="rec", dataset="digits", backbone="tiny", recipe=Recipe(method_lr=0.1))


def test_the_method_s_own_parameters_have_their_share_of_the_rate() -> None:
    device = torch.device("meta")
    setup, _ = build_setup(CELL, build_backbone(CELL, device), TASKS.get("rec")(), RunContext.on(device))
    own, parameters = setup.method_parameters(), setup.trainable()
    assert {name.partition(".")[0] for name in parameters.keys() - own} == {"backbone", "head"}
    assert {name.split(".")[1] for name in parameters.keys() - own if name.startswith("backbone.")} == {"visual"}
    groups = optimizer(parameters, CELL.recipe, 1.0, setup.backbone, own).param_groups
    scales = {id(p): group["scale"] for group in groups for p in group["params"]}
    assert {name: scales[id(p)] for name, p in parameters.items()} == {
        name: 0.1 if name in own else 1.0 for name in parameters
    }


def test_the_step_schedule_falls_to_a_tenth_at_two_thirds() -> None:
    recipe = Recipe(steps=9, warmup=0.0, schedule="step")
    assert [rate(recipe, step) for step in range(9)] == [1.0] * 6 + [0.1] * 3


def test_the_released_recipe_starts_at_a_rate_of_zero_and_decays_gains() -> None:
    recipe = Recipe(steps=30, released=True)
    assert [rate(recipe, step) for step in (0, 1, 3, 4)] == pytest.approx([0.0, 1 / 3, 1.0, 26 / 27])
    module = nn.LayerNorm(3)
    groups = optimizer(dict(module.named_parameters()), recipe, 0.1).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert (decays[id(module.weight)], decays[id(module.bias)]) == (recipe.weight_decay, 0.0)


def test_released_adamw_decays_after_its_update_and_corrects_no_eps() -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optim = ReleasedAdamW([{"params": [p], "weight_decay": 0.1}], lr=0.5, betas=(0.9, 0.99), eps=1e-2)
    expected, m, v = p.detach().clone(), torch.zeros(2), torch.zeros(2)
    for step, gradient in enumerate([torch.tensor([0.3, 0.0]), torch.tensor([-0.1, 1e-3])], start=1):
        p.grad = gradient.double()
        optim.step()
        m, v = 0.9 * m + 0.1 * p.grad, 0.99 * v + 0.01 * p.grad**2
        expected = expected - 0.5 * (1 - 0.99**step) ** 0.5 / (1 - 0.9**step) * m / (v.sqrt() + 1e-2)
        expected = expected - 0.5 * 0.1 * expected
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)


def test_a_pair_that_does_not_fit_is_found_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(VLAdapter):
        def adapt(self, backbone: Backbone) -> Backbone:
            super().adapt(backbone)
            raise ValueError("a stack\nthat it needs is missing")

    class Broken(VLAdapter):
        def adapt(self, backbone: Backbone) -> Backbone:
            raise ZeroDivisionError

    class Endless(VLAdapter):
        def adapt(self, backbone: Backbone) -> Backbone:
            while True:
                time.sleep(0.01)

    reason = "method 'vl_adapter' does not fit backbone 'tiny': a stack that it needs is missing"
    assert incompatible_cells([CELL], Picky) == {CELL.id: reason}
    monkeypatch.setattr(compatibility, "TRIAL_SECONDS", 0.1)
    before = signal.getsignal(signal.SIGALRM)
    assert (
        incompatible_cells([CELL], VLAdapter)
        == incompatible_cells([CELL], Broken)
        == incompatible_cells([CELL], Endless)
        == {}
    )
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("end", [lambda: time.sleep(60), lambda: os._exit(1)], ids=["endless", "fatal"])
def test_the_trials_after_one_without_a_verdict_go_on(monkeypatch: pytest.MonkeyPatch, end: Callable[[], None]) -> None:
    class Fickle(VLAdapter):
        def adapt(self, backbone: Backbone) -> Backbone:
            if self.tasks == ("vqa",):
                end()
            raise ValueError(f"not for {self.tasks}")

    monkeypatch.setattr(compatibility, "TRIAL_SECONDS", 1.0)
    cells = [CELL.model_copy(update={"task": task}) for task in ("rec", "vqa", "captioning")]
    found = incompatible_cells(cells, Fickle)
    assert {identity: reason.partition(" not for ")[2] for identity, reason in found.items()} == {
        cells[0].id: "('rec',)",
        cells[2].id: "('captioning',)",
    }
    assert not multiprocessing.active_children()


def vl_bart() -> Backbone:
    kind: type[Backbone] = BACKBONES.get("vl_bart")
    torch.manual_seed(0)
    made: Backbone = kind(kind.configured("vl_bart:tiny", {})).eval()  # type: ignore[call-arg]
    return made


PICTURES = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]


@pytest.mark.parametrize("method", [LoRA, M2IST, Prompt, LST])
def test_a_wrapper_keeps_its_backbone_s_own_order_of_two_images(method: type[Method]) -> None:
    host = vl_bart()
    images = host.images(PICTURES)
    own = [tokens.states for tokens in host.embed_pair(images)]
    adapted = method().adapt(host).eval()
    assert supply(adapted, frozenset({"fuse", "decode", "pair"})) is adapted, "nothing is lent to it"
    assert all(torch.equal(a.states, b) for a, b in zip(adapted.embed_pair(images), own, strict=True))


class Careless(Backbone):
    """A wrapper that claims all its backbone can, and hands on only what it knows of."""

    def __init__(self, inner: Backbone) -> None:
        super().__init__()
        self.inner, self.abilities, self.width = inner, inner.abilities, inner.width

    def host_parameters(self) -> set[str]:
        return set()

    def images(self, images: Sequence[Picture]) -> Images:
        return self.inner.images(images)

    def embed_image(self, images: Images, *, task: str | None = None) -> Tokens:
        return self.inner.embed_image(images, task=task)

    def embed_text(self, texts: Texts, *, task: str | None = None) -> Tokens:
        return self.inner.embed_text(texts, task=task)

    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        return self.inner.fuse(*parts, task=task)


def test_a_wrapper_that_does_not_hand_two_images_on_is_told_so_rather_than_given_two_first_ones() -> None:
    wrapper = supply(Careless(vl_bart()), frozenset({"fuse", "pair"}))
    with pytest.raises(NotImplementedError, match="Careless cannot distinguish two images"):
        wrapper.embed_pair(wrapper.images(PICTURES))
