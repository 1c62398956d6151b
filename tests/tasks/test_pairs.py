"""Statements and questions about two images: batches, answers without generation, telling the two images apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from petlbench.tasks.pairs import Pairs
from PIL import Image
from torch import Tensor

from petlbench.api.backbone import Backbone
from petlbench.api.decoding import generated_texts, token_losses
from petlbench.api.registries import BACKBONES
from petlbench.api.schemas import PAIRS
from petlbench.api.sites import TEXT
from petlbench.api.task import Batch, Row
from petlbench.api.tokens import Images
from petlbench.backbones.parts.visual_block import GridVision
from petlbench.backbones.supplied import supply
from petlbench.core.errors import UserError
from petlbench.datasets.scenes.digits import Digits, ScenesConfig
from petlbench.datasets.scenes.pairs import DigitPairs
from tests.backbone_factory import randomise

FAMILIES = ["tiny", "vl_bart:tiny", "vl_t5:tiny", "clip:tiny", "clip:coca-tiny", "beit3:tiny"]
NATIVE = {"vl_bart:tiny", "vl_t5:tiny"}
COLOURS = [("red", "blue"), ("white", "green"), ("black", "yellow")]


def built(name: str) -> Backbone:
    """Build a backbone; the suite supplies the abilities for `pairs` that it lacks."""
    cls: Any = BACKBONES.get(name)
    torch.manual_seed(0)
    return supply(cls(cls.configured(name, {"weights": "none"})), Pairs.needs).eval()


def rows(kinds: tuple[str, ...] = ("true/false",) * 3) -> list[Row]:
    """Return rows of images of two colours; odd statements are false."""
    return [
        {
            "sample_id": f"s{i}",
            "image_id": f"p{i}",
            "image": Image.new("RGB", (40, 30), left),
            "image_2": Image.new("RGB", (40, 30), right),
            "question": "the left one is red",
            "answers": [("true", "false")[i % 2]],
            "answer_type": kind,
        }
        for i, (kind, (left, right)) in enumerate(zip(kinds, COLOURS, strict=True))
    ]


def swapped(images: Images) -> Images:
    """Return the images with the second ones first."""
    half = len(images.pixels) // 2
    return Images(*(t.roll(half, 0) for t in (images.pixels, images.mask, images.scale, images.offset)))


# The backbones


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_that_serves_it_hears_which_image_is_which(name: str) -> None:
    backbone, task = built(name), Pairs()
    randomise(backbone)
    batch = task.collate(rows(), backbone, None)
    batch = Batch(batch.images.to_dtype(torch.float64), batch.texts, batch.extras)
    memory = task._memory(backbone, batch)
    other = task._memory(backbone, Batch(swapped(batch.images), batch.texts, batch.extras))
    first, second = (len(t.states[0]) for t in backbone.embed_pair(batch.images))
    texts = len(backbone.embed_text(batch.texts["question"]).states[0])
    assert memory.states.shape[:2] == (3, texts + first + second) and first == second
    here, there = (m.of_type(TEXT).mean().detach() for m in (memory, other))
    assert float((here - there).abs().max()) > 1e-3 * float(here.abs().max())


@pytest.mark.parametrize("name", sorted(NATIVE))
def test_the_first_image_is_embedded_as_one_alone_and_the_second_differs_by_its_row(name: str) -> None:
    backbone = built(name)
    assert isinstance(backbone, GridVision), "nothing is supplied"
    images = backbone.images([Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "white", "green")])
    first, second = backbone.embed_pair(images)
    alone = backbone.embed_image(images)
    table = backbone.visual.image.weight
    torch.testing.assert_close(first.states, alone.states[:2], rtol=0, atol=1e-6)
    torch.testing.assert_close(second.states, alone.states[2:] + table[1] - table[0], rtol=0, atol=1e-5)
    assert torch.equal(second.positions, alone.positions[:2]) and second.segments == alone.segments


def test_a_backbone_with_fixed_places_is_refused_with_the_reason() -> None:
    cls: Any = BACKBONES.get("transvg")
    reason = Pairs().refuses(cls, cls.configured("transvg:tiny", {}))
    assert reason is not None and reason.startswith("it cannot pair (its fusion encoder has a learned place")


# Batches, loss and answers


def test_a_batch_holds_all_first_images_then_all_second_ones_and_the_answer() -> None:
    backbone, task, chosen = built("tiny"), Pairs(), rows(("true/false", "other", "true/false"))
    batch = task.collate(chosen, backbone, np.random.default_rng(0))
    expected = backbone.images([row["image"] for row in chosen] + [row["image_2"] for row in chosen])
    assert torch.equal(batch.images.pixels, expected.pixels) and batch.extras["stated"].tolist() == [True, False, True]
    assert [backbone.text_of(ids) for ids in batch.texts["answer"].ids.tolist()] == ["true", "false", "true"]
    assert "answer" not in task.collate(chosen, backbone, None).texts


def test_the_loss_is_a_mean_over_samples_of_means_over_tokens() -> None:
    backbone, task, chosen = built("tiny"), Pairs(), rows()
    chosen[1]["answers"] = ["the small red circle"]
    batch = task.collate(chosen, backbone, np.random.default_rng(0))
    target = batch.texts["answer"]
    losses = token_losses(backbone, task._memory(backbone, batch), target, "pairs")
    means = [losses[i, : int(target.mask[i].sum())].mean() for i in range(3)]
    loss = task.loss(backbone, torch.nn.Module(), batch)
    torch.testing.assert_close(loss, torch.stack(means).mean())
    assert float(loss.detach()) != pytest.approx(float((losses.sum() / target.mask.sum()).detach()))


class Decoder:
    """Stands for `decode`: logits of `true` exceed those of `false` by a margin per row; keeps its inputs."""

    def __init__(self, words: int, true: int, false: int, margins: list[float]) -> None:
        self.words, self.true, self.false, self.margins = words, true, false, margins
        self.given: list[list[int]] = []

    def __call__(self, memory: Any, ids: Tensor, cache: Any = None, *, task: str) -> tuple[Tensor, Any]:
        self.given = ids.tolist()
        logits = torch.zeros(*ids.shape, self.words)
        logits[..., 7] = 9.0  # generation would choose this word
        logits[:, -1, self.true] = torch.tensor(self.margins)
        logits[:, :-1, self.false] = 5.0  # the task ignores other positions
        return logits, cache


def test_a_statement_is_true_if_and_only_if_true_has_strictly_the_larger_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, task = built("tiny"), Pairs()
    start, true, _ = backbone.texts(["true"], 9).ids[0].tolist()
    false = int(backbone.texts(["false"], 9).ids[0, 1])
    decoder = Decoder(len(backbone.word_table()), true, false, [0.1, 0.0, -0.1])
    monkeypatch.setattr(backbone.inner, "decode", decoder)
    batch = task.collate(rows(), backbone, None)
    assert task.predict(backbone, torch.nn.Module(), batch) == ["true", "false", "false"]
    assert decoder.given == [[backbone.start_id, start]] * 3, "BART's: the answer is behind its own start"


def test_where_answers_have_no_start_of_their_own_the_first_place_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, task = built("tiny"), Pairs()
    decoder = Decoder(len(backbone.word_table()), 11, 12, [1.0, -1.0, 1.0])
    monkeypatch.setattr(backbone.inner, "decode", decoder)
    batch = task.collate(rows(), backbone, None)
    encode = backbone.codec.encode
    answers = (torch.tensor([[11, 2], [12, 2]]), torch.ones(2, 2, dtype=torch.bool))
    monkeypatch.setattr(
        backbone.codec, "encode", lambda texts, n: answers if texts == ["true", "false"] else encode(texts, n)
    )
    assert task.predict(backbone, torch.nn.Module(), batch) == ["true", "false", "true"]
    assert decoder.given == [[backbone.start_id]] * 3


def test_questions_are_answered_by_generating_whatever_stands_beside_them() -> None:
    backbone, task = built("tiny"), Pairs()
    batch = task.collate(rows(("true/false", "other", "true/false")), backbone, None)
    with torch.no_grad():
        found = task.predict(backbone, torch.nn.Module(), batch)
        stated = task.predict(backbone, torch.nn.Module(), task.collate(rows(), backbone, None))
        generated = generated_texts(backbone, task._memory(backbone, batch), task="pairs", max_length=10)
    assert found == [stated[0], generated[1], stated[2]] and generated[1] not in ("true", "false")


def test_a_tokenizer_without_the_words_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, task = built("tiny"), Pairs()
    batch = task.collate(rows(), backbone, None)
    monkeypatch.setattr(backbone.codec, "encode", lambda texts, n: (torch.tensor([[0, 3, 2]] * 2),) * 2)
    with pytest.raises(UserError, match="no words for true and false"):
        task.predict(backbone, torch.nn.Module(), batch)


def test_accuracy_is_the_share_of_exact_answers() -> None:
    scores = Pairs().score(rows(), ["true", "true", "True"])
    assert scores.metrics == {"accuracy": pytest.approx(1 / 3)} and scores.sample_ids == ["s0", "s1", "s2"]
    assert scores.samples == {"accuracy": [1.0, 0.0, 0.0]}


def test_a_drawing_has_the_first_image_on_the_left() -> None:
    picture, caption = Pairs().picture(rows()[0], "false")
    assert picture.getpixel((2, 2)) == (255, 0, 0) and picture.getpixel((picture.width - 2, 2)) == (0, 0, 255)
    assert caption == "the left one is red: false (true: true)"


# The embedded pairs


@pytest.fixture
def digit_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DigitPairs:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path))
    return DigitPairs(ScenesConfig(train_scenes=60, validation_scenes=4, test_scenes=4))


def test_an_embedded_statement_is_about_the_scene_on_the_side_it_names(digit_pairs: DigitPairs) -> None:
    asked = {row["question"]: row for row in Digits(digit_pairs.config).load("vqa", "train").select(range(120))}
    rows = digit_pairs.load("pairs", "train")
    assert rows.features == PAIRS and len(rows) == len(set(rows["sample_id"])) == 120
    drawn: Counter[tuple[str, str]] = Counter()
    for row in rows:
        _, _, side, rest = row["question"].split(" ", 3)
        question, answer = rest.rsplit(" ", 1)
        if sum(one == question for one in asked) != 1 or question not in asked:
            continue
        sides = dict(zip(("left", "right"), row["image_id"].split("+"), strict=True))
        images = dict(zip(("left", "right"), (row["image"], row["image_2"]), strict=True))
        source = asked[question]
        if f"{source['image_id']}-pairs" not in row["sample_id"]:
            continue  # the same words about another scene
        drawn[side, row["answers"][0]] += 1
        assert sides[side] == source["image_id"] and sides["left"] != sides["right"]
        assert images[side].tobytes() == source["image"].tobytes()
        assert (row["answers"] == ["true"]) == ([answer] == source["answers"])
        assert row["answer_type"] == "true/false"
    assert len(drawn) == 4 and min(drawn.values()) > 10


def test_a_limit_gives_the_first_embedded_pairs_and_options_other_ones(digit_pairs: DigitPairs) -> None:
    few, whole = (digit_pairs.load("pairs", "train", n).remove_columns(["image", "image_2"]) for n in (7, None))
    assert few.to_list() == whole.select(range(7)).to_list()
    other = DigitPairs(ScenesConfig(seed=1, train_scenes=60, validation_scenes=4, test_scenes=4))
    assert digit_pairs.fingerprint("pairs") != other.fingerprint("pairs") != Digits(other.config).fingerprint("vqa")
    with pytest.raises(UserError, match="digit_pairs has no task 'vqa': choose one of pairs"):
        digit_pairs.load("vqa", "train")
