"""Parts that the suite supplies to a backbone for a task: they work, count as head, and no method goes into them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image
from PIL.Image import new as new_image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from petlbench.api.backbone import Backbone
from petlbench.api.decoding import generate
from petlbench.api.registries import TASKS
from petlbench.api.sites import IMAGE, TEXT, Pass
from petlbench.api.tokens import Images, Texts, Tokens, plain_tokens
from petlbench.backbones.parts.vision import preprocess
from petlbench.backbones.supplied import Decoder, Fusion, SuppliedBackbone, supply, with_parts_of
from petlbench.backbones.tiny import Tiny
from petlbench.core.cell import Cell
from petlbench.pipeline.assembly import build_setup
from petlbench.training.context import RunContext
from petlbench.training.evaluation import load_state
from petlbench.training.setup import TrainingSetup
from petlbench.training.step_costs import counted, extra_at_inference
from tests.backbone_factory import draw, randomise, small_tiny

CPU = torch.device("cpu")
TASKS_LENT_FOR = ("captioning", "pairs", "rec", "vqa")


class Dual(Backbone):
    """Two towers of different widths that never meet; a supplied decoder takes the words of its text tower."""

    abilities = frozenset({"embed", "ground"})

    def __init__(self) -> None:
        super().__init__()
        text, image = small_tiny(), small_tiny(width=24, heads=2)
        self.codec, self.max_text, self.width = text.codec, text.max_text, 24
        self.config = text.config
        self.texts_of, self.images_of = nn.ModuleList([text]), nn.ModuleList([image])
        self.stacks["text"], self.stacks["vision"] = text.stack("encoder"), image.stack("vision")

    @property
    def text_width(self) -> int:
        return 32

    def host_parameters(self) -> set[str]:
        return {f"images_of.0.{name}" for name in self.images_of[0].host_parameters()}  # type: ignore[operator]

    def word_table(self) -> Tensor:
        return self.texts_of[0].word_table()  # type: ignore[operator,no-any-return]

    def images(self, images: Sequence[Image]) -> Images:
        return preprocess(images, 32).to_dtype(torch.float64)

    def embed_image(self, images: Images, *, task: str | None = None) -> Tokens:
        return self.images_of[0].embed_image(images)  # type: ignore[operator,no-any-return]

    def embed_text(self, texts: Texts, *, task: str | None = None) -> Tokens:
        text = self.texts_of[0]
        assert isinstance(text, Tiny)
        return text.fuse(text.embed_text(texts), task="")

    def fuse(self, *parts: Tokens, task: str) -> Tokens:
        assert len(parts) == 1, "towers never meet"
        return parts[0]


class Encoder(Tiny):
    """A backbone that fuses but does not decode."""

    abilities = frozenset({"embed", "fuse", "ground"})

    def new_cache(self) -> Any:
        raise NotImplementedError

    def decode(self, memory: Tokens, ids: Tensor, cache: Any = None, *, task: str) -> tuple[Tensor, Any]:
        raise NotImplementedError


def dual() -> Backbone:
    return Dual().eval()


def setup(backbone: Backbone, task: str, method: str = "head_only", seed: int = 0) -> TrainingSetup:
    cell = Cell(method=method, task=task, dataset="digits", backbone="tiny", seed=seed)
    made = build_setup(cell, backbone, TASKS.get(task)(), RunContext.on(CPU))[0]
    made.modules().double().eval()
    return made


def supplied_dual(needs: set[str] = {"fuse", "decode"}) -> SuppliedBackbone:  # noqa: B006
    """Return a dual encoder with supplied parts of random values."""
    backbone = supply(dual(), frozenset(needs))
    assert isinstance(backbone, SuppliedBackbone)
    randomise(backbone.supplied, std=0.2)
    return backbone.eval()


def parts(lengths: tuple[int, int] = (5, 6), batch: int = 2, seed: int = 0) -> tuple[Tokens, Tokens]:
    """Return text (B, N, 32) and image tokens (B, M, 24), all real."""
    masks = [torch.ones(batch, n, dtype=torch.bool) for n in lengths]
    text = plain_tokens(draw(batch, lengths[0], 32, seed=seed), masks[0], TEXT)
    image = plain_tokens(
        draw(batch, lengths[1], 24, seed=seed + 1), masks[1], IMAGE, positions=draw(batch, lengths[1], 2)
    )
    return text, image


# Which parts are supplied


@pytest.mark.parametrize(
    ("needs", "supplied", "served"),
    [
        (set(), [], {"embed", "ground"}),
        ({"embed"}, [], {"embed", "ground"}),
        ({"fuse", "ground"}, ["fusion"], {"embed", "ground", "fuse"}),
        ({"decode"}, ["decoder"], {"embed", "ground", "decode"}),
        ({"fuse", "decode"}, ["fusion", "decoder"], {"embed", "ground", "fuse", "decode"}),
        ({"pair"}, ["order"], {"embed", "ground", "pair"}),
        ({"fuse", "pair"}, ["fusion", "order"], {"embed", "ground", "fuse", "pair"}),
    ],
)
def test_only_missing_abilities_are_supplied(needs: set[str], supplied: list[str], served: set[str]) -> None:
    backbone = dual()
    larger = supply(backbone, frozenset(needs))
    assert larger.abilities == served
    if supplied:
        assert isinstance(larger, SuppliedBackbone) and larger.inner is backbone and list(larger.supplied) == supplied
    else:
        assert larger is backbone


def test_everything_else_is_the_backbone_s_own() -> None:
    larger = supplied_dual()
    inner = larger.inner
    assert (larger.width, larger.text_width, larger.codec, larger.max_text) == (24, 32, inner.codec, inner.max_text)
    assert larger.roles() == ("text", "vision") and larger.stack("text") is inner.stack("text")
    assert (larger.pad_id, larger.eos_id, larger.start_id) == (inner.pad_id, inner.eos_id, inner.start_id)
    assert larger.host_parameters() == {f"inner.{name}" for name in inner.host_parameters()} != set()
    assert larger.config is inner.config
    names = {name for name, _ in larger.named_parameters()}
    assert larger.head_parameters() == {name for name in names if name.startswith("supplied.")} < names


@pytest.mark.parametrize("task", TASKS_LENT_FOR)
def test_a_dual_encoder_trains_and_predicts_on_every_task_with_supplied_parts(task: str) -> None:
    here = setup(dual(), task)
    images = {"image": new_image("RGB", (40, 32)), "image_2": new_image("RGB", (40, 32), "red")}
    rows = [ROW[task] | images | {"sample_id": str(i)} for i in range(2)]
    batch = here.task.collate(rows, here.backbone, np.random.default_rng(0))
    batch.extras.update({k: v.double() for k, v in batch.extras.items() if v.is_floating_point()})
    here.task.loss(here.backbone, here.head, batch).backward()
    for name in here.backbone.head_parameters():
        gradient = here.backbone.get_parameter(name).grad
        unused = name.endswith("k_proj.bias") or (task == "captioning" and "fusion" in name)
        assert unused or (gradient is not None and gradient.any()), name
    for beams in (1, 2):
        with torch.no_grad():
            assert len(here.task.predict(here.backbone, here.head, batch, beams=beams)) == 2


ROW: dict[str, dict[str, Any]] = {
    "vqa": {"question": "what is red?", "answers": ["circle"] * 10},
    "captioning": {"captions": ["a red circle", "the small square"]},
    "pairs": {"question": "both are red", "answers": ["true"], "answer_type": "true/false"},
    "rec": {"expression": "the red circle", "box": [2.0, 3.0, 10.0, 12.0]},
}


def test_an_encoder_keeps_its_own_joint_pass_and_gets_a_decoder() -> None:
    backbone = Encoder(small_tiny().config).double().eval()
    larger = supply(backbone, frozenset({"fuse", "decode"}))
    assert isinstance(larger, SuppliedBackbone) and list(larger.supplied) == ["decoder"]
    tokens = backbone.embed_text(backbone.texts(["red circle"], 8))
    assert torch.equal(larger.fuse(tokens, task="vqa").states, backbone.fuse(tokens, task="vqa").states)


@pytest.mark.parametrize("width", [24, 96, 200, 1030])
def test_parts_can_be_supplied_at_any_width(width: int) -> None:
    fused = Fusion(width, width).eval()(
        [plain_tokens(torch.randn(1, 3, width), torch.ones(1, 3, dtype=torch.bool), TEXT)], "vqa"
    )
    assert fused.states.shape == (1, 3, width) and Decoder(16, width).stack.width == width


# How they count


def test_supplied_parts_count_as_head_and_cost_nothing_at_inference() -> None:
    backbone = dual()
    untouched = sum(p.numel() for p in backbone.parameters())
    host = sum(backbone.get_parameter(name).numel() for name in backbone.host_parameters())
    here = setup(backbone, "vqa")
    supplied = sum(p.numel() for p in here.backbone.supplied.parameters())  # type: ignore[union-attr,operator]
    counts = counted(here)
    own = sum(p.numel() for p in here.head.parameters())
    assert (counts.method, counts.head, counts.host) == (0, supplied + own, host) and supplied > 0
    assert counts.total == untouched + supplied + own
    assert extra_at_inference(here, untouched) == 0


def test_no_method_goes_into_supplied_parts() -> None:
    backbone = dual()
    projections = len(list(backbone.stack("text"))) + len(list(backbone.stack("vision")))
    here = setup(backbone, "vqa", "lora")
    paths = [name for name, m in here.backbone.named_modules() if type(m).__name__ == "LowRank"]
    assert len(paths) == 2 * projections and not any(name.startswith("supplied.") for name in paths)


def test_an_adapter_file_holds_supplied_parts_and_restores_them(tmp_path: Any) -> None:
    here = setup(dual(), "vqa")
    randomise(here.backbone.supplied, seed=5)  # type: ignore[arg-type]
    state = {name: p.detach().clone() for name, p in here.trainable().items()}
    assert {f"backbone.{name}" for name in here.backbone.head_parameters()} < state.keys()
    save_file(state, tmp_path / "adapter.safetensors")
    other = setup(dual(), "vqa")
    load_state(other, load_file(tmp_path / "adapter.safetensors"))
    tokens = parts()
    ones, others = (s.backbone.fuse(*tokens, task="vqa").states for s in (here, other))
    assert torch.equal(ones, others)


def test_supplied_values_follow_from_the_cell_s_seed() -> None:
    def values(seed: int) -> dict[str, Tensor]:
        return dict(setup(dual(), "vqa", seed=seed).backbone.supplied.state_dict())  # type: ignore[union-attr,operator]

    one, again, other = values(0), values(0), values(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    drawn = [name for name in one if name.endswith("weight") and "norm" not in name and one[name].ndim > 1]
    assert drawn and not any(torch.equal(one[name], other[name]) for name in drawn)


@pytest.mark.parametrize(("method", "reached"), [("full", True), ("head_only", False)])
def test_gradients_reach_the_word_table_only_where_it_trains(method: str, reached: bool) -> None:
    here = setup(dual(), "captioning", method)
    _, image = parts()
    logits, _ = here.backbone.decode(image, torch.tensor([[2, 5], [2, 7]]), task="captioning")
    logits.square().sum().backward()
    gradient = here.backbone.word_table().grad
    assert (gradient is not None and bool(gradient.any())) is reached
    enter = here.backbone.supplied["decoder"].enter.weight.grad  # type: ignore[union-attr,index]
    assert enter is not None and enter.any()


def test_the_same_parts_can_be_put_on_another_backbone() -> None:
    one, plain = supplied_dual(), dual()
    other = with_parts_of(plain, one)
    assert isinstance(other, SuppliedBackbone) and other.inner is plain
    assert other.supplied["fusion"] is one.supplied["fusion"] and other.abilities == one.abilities
    assert with_parts_of(plain, dual()) is plain


# What they compute


def test_masked_tokens_change_no_real_ones() -> None:
    backbone, (text, image) = supplied_dual(), parts((5, 6))
    plain = backbone.fuse(text, image, task="rec").states
    junk_text, junk_image = parts((9, 8), seed=7)
    states = (
        torch.cat([text.states, junk_text.states[:, 5:]], 1),
        torch.cat([image.states, junk_image.states[:, 6:]], 1),
    )
    masks = [torch.arange(s.shape[1])[None].expand(2, -1) < n for s, n in zip(states, (5, 6), strict=True)]
    padded = backbone.fuse(
        plain_tokens(states[0], masks[0], TEXT), plain_tokens(states[1], masks[1], IMAGE), task="rec"
    )
    real = padded.states[padded.mask].view(2, 11, 24)
    torch.testing.assert_close(real, plain, rtol=0, atol=1e-12)
    assert padded.segments == ((TEXT, 9), (IMAGE, 8)) and padded.types[0].tolist() == [TEXT] * 9 + [IMAGE] * 8


def test_both_modalities_are_heard_and_places_are_kept() -> None:
    backbone, (text, image) = supplied_dual(), parts()
    fused = backbone.fuse(text, image, task="rec")
    assert torch.equal(fused.of_type(IMAGE).positions[:, 5:], image.positions)
    other_text, _ = parts(seed=3)
    changed = backbone.fuse(other_text, image, task="rec").states - fused.states
    assert bool((changed[:, 5:].abs().amax(-1) > 1e-6).all())


def test_decoding_with_a_cache_equals_decoding_all_at_once() -> None:
    backbone, (_, image) = supplied_dual(), parts()
    ids = torch.tensor([[2, 5, 9, 4], [2, 7, 3, 6]])
    whole, none = backbone.decode(image, ids, task="vqa")
    assert none is None and whole.shape == (2, 4, len(backbone.word_table()))
    cache, steps = backbone.new_cache(), []
    for t in range(ids.shape[1]):
        logits, cache = backbone.decode(image, ids[:, t : t + 1], cache, task="vqa")
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-12)
    earlier, _ = backbone.decode(image, ids[:, :2], task="vqa")
    torch.testing.assert_close(whole[:, :2], earlier, rtol=0, atol=1e-12)


def test_a_reordered_cache_goes_on_with_the_chosen_rows() -> None:
    backbone, (_, image) = supplied_dual(), parts()
    ids, order = torch.tensor([[2, 5, 9], [2, 7, 3]]), torch.tensor([1, 1])
    _, cache = backbone.decode(image, ids[:, :2], backbone.new_cache(), task="vqa")
    cache = backbone.reorder_cache(cache, order)
    memory = Tokens(image.states[order], image.mask[order], image.types[order], image.positions[order])
    found_logits, _ = backbone.decode(memory, ids[:, 2:], cache, task="vqa")
    expected, _ = backbone.decode(memory, torch.cat([ids[order, :2], ids[:, 2:]], 1), task="vqa")
    torch.testing.assert_close(found_logits, expected[:, -1:], rtol=0, atol=1e-12)


def test_the_decoder_attends_to_real_memory_only() -> None:
    backbone, (_, image) = supplied_dual(), parts((5, 6))
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    masked = plain_tokens(image.states, mask, IMAGE)
    short = plain_tokens(image.states[:, :4], mask[:, :4], IMAGE)
    ids = torch.tensor([[2, 5], [2, 7]])
    one, other = (backbone.decode(memory, ids, task="vqa")[0] for memory in (masked, short))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_beams_find_at_least_what_greedy_decoding_does() -> None:
    backbone, (_, image) = supplied_dual(), parts()

    def score(ids: list[int], row: int) -> float:
        full = torch.tensor([[backbone.start_id, *ids]])
        memory = plain_tokens(image.states[row : row + 1], image.mask[row : row + 1], IMAGE)
        log = backbone.decode(memory, full[:, :-1], task="vqa")[0].log_softmax(-1)
        return float(log[0].gather(1, full[0, 1:, None]).mean())

    with torch.no_grad():
        greedy, beams = (generate(backbone, image, task="vqa", max_length=4, beams=n) for n in (1, 8))
        assert all(score(b, i) >= score(g, i) - 1e-9 for i, (g, b) in enumerate(zip(greedy, beams, strict=True)))


@pytest.fixture
def repeatable() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def test_dropout_is_on_in_training_and_off_in_evaluation(repeatable: None) -> None:
    backbone, tokens, ids = supplied_dual(), parts(), torch.tensor([[2, 5], [2, 7]])

    def outputs() -> list[Tensor]:
        fused = backbone.fuse(*tokens, task="vqa")
        return [fused.states, backbone.decode(tokens[1], ids, task="vqa")[0]]

    backbone.eval()
    assert all(torch.equal(one, other) for one, other in zip(outputs(), outputs(), strict=True))
    backbone.supplied.train()
    assert not any(torch.equal(one, other) for one, other in zip(outputs(), outputs(), strict=True))
    for module in backbone.supplied.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in [*backbone.supplied["fusion"].stack, *backbone.supplied["decoder"].stack]:  # type: ignore[misc]
        for _, sublayer in layer.items():
            sublayer.core.eval()
    one, other = outputs(), outputs()
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True)), "the input's own dropout"


def test_the_pass_says_task_types_and_step() -> None:
    backbone, (text, image) = supplied_dual(), parts()
    seen: list[Pass] = []
    for part in ("fusion", "decoder"):
        layer = backbone.supplied[part].stack.layers[0]  # type: ignore[union-attr,index]
        layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    backbone.fuse(text, image, task="rec")
    cache = backbone.new_cache()
    for _ in range(2):
        backbone.decode(image, torch.tensor([[2], [2]]), cache, task="vqa")
    assert [one.task for one in seen] == ["rec", "vqa", "vqa"]
    assert [one.step for one in seen] == [0, 0, 1]
    assert seen[0].segments == ((TEXT, 5), (IMAGE, 6)) and seen[1].segments == ((TEXT, 1),)


# The order of two images


def image_pair(backbone: Backbone) -> Images:
    """Return two samples of two images each: all first images, then all second ones."""
    return backbone.images([new_image("RGB", (40, 32), colour) for colour in ("red", "blue", "white", "green")])


def test_the_order_is_added_to_the_tokens_of_each_image() -> None:
    backbone = supplied_dual({"pair"})
    images, order = image_pair(backbone), backbone.get_parameter("supplied.order.image.weight")
    both = backbone.embed_image(images)
    first, second = backbone.embed_pair(images)
    assert first.states.shape == (2, *both.states.shape[1:]) and first.segments == second.segments == both.segments
    torch.testing.assert_close(first.states, both.states[:2] + order[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(second.states, both.states[2:] + order[1], rtol=0, atol=1e-12)
    assert torch.equal(second.positions, both.positions[2:]) and torch.equal(second.mask, both.mask[2:])


def test_it_is_the_order_that_tells_two_images_apart() -> None:
    backbone, (text, _) = supplied_dual({"fuse", "pair"}), parts()
    images, swapped = image_pair(backbone), image_pair(backbone)
    swapped = Images(*(t.roll(2, 0) for t in (swapped.pixels, swapped.mask, swapped.scale, swapped.offset)))

    def of_text(given: Images) -> Tensor:
        return backbone.fuse(text, *backbone.embed_pair(given), task="pairs").of_type(TEXT).mean()

    assert float((of_text(images) - of_text(swapped)).detach().abs().max()) > 1e-3
    nn.init.zeros_(backbone.get_parameter("supplied.order.image.weight"))
    torch.testing.assert_close(of_text(images), of_text(swapped), rtol=0, atol=1e-12)


def test_a_supplied_order_counts_as_the_task_s_head_and_is_small() -> None:
    here = setup(small_tiny(), "pairs")
    assert here.backbone.head_parameters() == {"supplied.order.image.weight"}
    assert counted(here).head == 2 * here.backbone.width
    assert float(here.backbone.get_parameter("supplied.order.image.weight").detach().abs().max()) < 0.2
