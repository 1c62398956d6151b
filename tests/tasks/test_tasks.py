"""Tasks: contents of a batch, losses, and predictions that depend on their own sample alone."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from petlbench.tasks.captioning import Captioning
from petlbench.tasks.rec import PointingHead, ReferringExpressions, corners, generalised_iou
from petlbench.tasks.retrieval import Retrieval, RetrievalHead, contrastive_loss
from petlbench.tasks.vqa import VisualQuestionAnswering
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.backbone import BackboneConfig
from petlbench.api.sites import IMAGE, TEXT
from petlbench.api.task import Batch, Row, Task
from petlbench.api.tokens import Texts
from petlbench.backbones.tiny import Tiny, TinyConfig
from petlbench.core.errors import UserError
from tests.backbone_factory import Bare, draw, randomise, small_tiny
from tests.golden import FOLDER

SIZES = [(400, 100), (64, 64), (50, 80), (33, 47)]
TASKS = [ReferringExpressions, VisualQuestionAnswering, Captioning, Retrieval]


def rows() -> list[Row]:
    """Return one row per size, with the columns of every task."""
    rng = np.random.default_rng(0)
    texts = ["red circle", "the small blue square on the left", "two", "a green triangle"]
    answers = [["red"], ["yes"] * 4 + ["no"] * 6, ["two"] * 10, ["left", "right"]]
    return [
        {
            "sample_id": f"s{i}",
            "image_id": f"i{i}",
            "image": Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)),
            "expression": texts[i],
            "question": texts[i],
            "box": [3.0 * i, 2.5, width / 3, height / 2],
            "subset": "",
            "answers": answers[i],
            "answer_type": "number" if i == 2 else "other",
            "captions": [f"{texts[i]} {word}" for word in ("above", "here and there", "below a line")][: i + 1],
        }
        for i, (width, height) in enumerate(SIZES)
    ]


def double(batch: Batch) -> Batch:
    images = batch.images.to_dtype(torch.float64)
    extras = {name: t.double() if t.is_floating_point() else t for name, t in batch.extras.items()}
    return replace(batch, images=images, extras=extras)


def setup(task: Task, **sizes: Any) -> tuple[Tiny, nn.Module]:
    backbone = small_tiny(**sizes)
    return backbone, randomise(task.head(backbone), seed=4).eval()


def without_images(chosen: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "image"} for row in chosen]


class Mute(Bare):
    """A backbone without abilities; its refusals say why the suite can supply none."""

    refusals = dict.fromkeys(("embed", "fuse", "decode", "ground"), "it is mute")


@pytest.mark.parametrize("cls", TASKS)
def test_a_task_trains_predicts_and_scores(cls: type[Task]) -> None:
    # One caption each: retrieval's per-sample scores are per image, its metric also counts captions.
    task, data = cls(), [row | {"captions": row["captions"][:1]} for row in rows()]
    backbone, head = setup(task)
    assert task.refuses(Tiny, TinyConfig()) is None
    assert re.fullmatch(
        r"it cannot .*\b(embed|decode|ground) \(it is mute\).*", str(task.refuses(Mute, BackboneConfig()))
    )
    assert set(task.features) <= set(data[0])
    batch = double(task.collate(data, backbone, np.random.default_rng(0)))
    loss = task.loss(backbone, head, batch)
    assert loss.shape == () and bool(loss.isfinite())
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in [*head.parameters(), *backbone.visual.parameters()])

    for_prediction = double(task.collate(data, backbone, None)).to(torch.device("cpu"))
    with torch.no_grad():
        predictions = task.predict(backbone, head, for_prediction)
    scores = task.score(without_images(data), predictions)
    assert len(predictions) == len(data) and scores.sample_ids == ["s0", "s1", "s2", "s3"]
    assert scores.metrics[task.main_metric] == pytest.approx(np.mean(scores.samples[task.main_metric]), abs=1e-6)
    assert all(len(values) == len(data) for values in scores.samples.values())
    json.dumps([scores.metrics, scores.samples, predictions if task.keeps_predictions else None])


@pytest.mark.parametrize("cls", TASKS)
def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(cls: type[Task]) -> None:
    task, data = cls(), rows()
    backbone, head = setup(task)
    with torch.no_grad():
        together = task.predict(backbone, head, double(task.collate(data, backbone, None)))
        alone = [task.predict(backbone, head, double(task.collate([row], backbone, None)))[0] for row in data]
    for one, other in zip(together, alone, strict=True):
        if cls is Retrieval:  # its predictions are in single precision
            np.testing.assert_allclose(np.vstack(one), np.vstack(other), rtol=0, atol=1e-6)
        elif cls is ReferringExpressions:
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-9)
        else:
            assert one == other


def test_states_of_a_sample_do_not_depend_on_the_rest_of_the_batch() -> None:
    backbone, data = small_tiny(), rows()

    def fused(chosen: list[Row]) -> list[Tensor]:
        batch = double(VisualQuestionAnswering().collate(chosen, backbone, None))
        tokens = backbone.fuse(
            backbone.embed_text(batch.texts["question"]), backbone.embed_image(batch.images), task="vqa"
        )
        return [states[mask] for states, mask in zip(tokens.states, tokens.mask, strict=True)]

    for row, states in zip(data, fused(data), strict=True):
        torch.testing.assert_close(states, fused([row])[0], rtol=0, atol=1e-9)


def test_a_head_starts_from_the_values_the_backbone_brings() -> None:
    backbone = small_tiny()
    state = randomise(PointingHead(backbone.width)).float().state_dict()
    backbone.pretrained_heads = {"rec": dict(state)}
    found = ReferringExpressions().head(backbone).state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_boxes_return_to_the_pixels_they_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    task, data = ReferringExpressions(), rows()
    backbone = small_tiny()
    data[0]["box"] = [0.0, 0.0, 400.0, 100.0]
    batch = task.collate(data, backbone, None)
    assert batch.extras["boxes"][0].tolist() == pytest.approx([2.0, 0.5, 4.0, 1.0])  # units of the short side
    truth = Fixed(batch.extras["boxes"])
    found = task.predict(backbone, truth, double(batch))
    for box, row in zip(found, data, strict=True):
        assert box == pytest.approx(row["box"], abs=1e-4)
    assert float(task.loss(backbone, truth, double(batch))) == pytest.approx(0, abs=1e-6)
    assert task.score(data, found).metrics["acc_50"] == 1
    tokens = backbone.embed_image(double(batch).images)  # token centres are in the same units
    assert tokens.positions[0][tokens.mask[0]].mean(0).tolist() == pytest.approx([2.0, 0.5])


class Fixed(nn.Module):
    """A head that gives the same boxes for every input."""

    def __init__(self, boxes: Tensor) -> None:
        super().__init__()
        self.boxes = boxes

    def forward(self, tokens: object) -> Tensor:
        return self.boxes


def test_box_losses_are_transvgs() -> None:
    with np.load(FOLDER / "m2ist" / "rec_utils.npz", allow_pickle=False) as file:
        predicted, truth = torch.from_numpy(file["pred_cxcywh"]), torch.from_numpy(file["gt_cxcywh"])
        giou, total = torch.from_numpy(file["giou"]), float(file["loss_l1"] + file["loss_giou"])
    torch.testing.assert_close(generalised_iou(corners(predicted), corners(truth)), giou, rtol=0, atol=1e-9)
    task, backbone = ReferringExpressions(), small_tiny()
    some = double(task.collate([rows()[1]] * len(truth), backbone, None))
    batch = replace(some, extras={"boxes": truth})
    assert float(task.loss(backbone, Fixed(predicted), batch)) == pytest.approx(total, abs=1e-9)


def test_boxes_without_an_area_have_a_finite_loss() -> None:
    """The release's cuts leave such boxes."""
    task, backbone = ReferringExpressions(), small_tiny()
    data = [row | {"box": [3.0, 2.0, 0.0, height]} for row, height in zip(rows(), (5.0, 0.0, 4.0, 0.0), strict=True)]
    head = randomise(task.head(backbone))
    loss = task.loss(backbone, head, double(task.collate(data, backbone, None)))
    loss.backward()
    assert bool(loss.isfinite()) and all(bool(p.grad.isfinite().all()) for p in head.parameters())


def scored(*subsets: str) -> dict[str, float]:
    """Return the metrics of rows of these subsets, whose overlaps are 1, 0.5, 0.25, 1, 0.5, ..."""
    data = [{"box": [0.0, 0.0, 4.0, 4.0], "sample_id": str(i), "subset": name} for i, name in enumerate(subsets)]
    return ReferringExpressions().score(data, [[0, 0, 4, (4, 2, 1)[i % 3]] for i in range(len(data))]).metrics


def test_subsets_are_scored_apart_where_there_are_several() -> None:
    assert scored("testA", "testB", "testA", "testB") == pytest.approx(
        {
            "acc_50": 0.75,
            "mean_iou": 2.75 / 4,
            "acc_50/testA": 0.5,
            "mean_iou/testA": 1.25 / 2,
            "acc_50/testB": 1.0,
            "mean_iou/testB": 1.5 / 2,
        }
    )
    for alone in (("", "", ""), ("testA", "testA", "testA"), ("testA", "", "testA")):
        assert scored(*alone) == pytest.approx({"acc_50": 2 / 3, "mean_iou": 1.75 / 3})
    assert scored("testA", "", "testB").keys() == scored("testA", "testB").keys()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_prediction_that_is_no_number_is_a_miss(wrong: float) -> None:
    data = [row | {"box": [0.0, 0.0, 4.0, 4.0]} for row in rows()]
    right = [0.0, 0.0, 4.0, 4.0]
    broken = [[wrong, 0.0, 4.0, 4.0], [0.0, 0.0, wrong, wrong], [wrong] * 4]
    scores = ReferringExpressions().score(data, [right, *broken])
    assert scores.metrics == {"acc_50": 0.25, "mean_iou": 0.25}
    assert scores.samples == {"acc_50": [1, 0, 0, 0], "mean_iou": [1, 0, 0, 0]}


def test_pointing_ignores_text_and_padding() -> None:
    task, backbone = ReferringExpressions(), small_tiny()
    head = randomise(task.head(backbone))
    batch = double(task.collate(rows(), backbone, None))
    tokens = backbone.fuse(
        backbone.embed_text(batch.texts["expression"]), backbone.embed_image(batch.images), task="rec"
    )
    other = tokens.states.masked_fill(~(tokens.mask & (tokens.types == IMAGE))[..., None], 1e3)
    assert set(tokens.types.flatten().tolist()) == {TEXT, IMAGE} and not tokens.mask.all()
    torch.testing.assert_close(head(replace(tokens, states=other)), head(tokens), rtol=0, atol=1e-12)


def test_the_loss_of_referring_expressions_falls_in_a_few_steps() -> None:
    task = ReferringExpressions()
    backbone, head = setup(task)
    batch = double(task.collate(rows(), backbone, np.random.default_rng(0)))
    optimizer, losses = torch.optim.Adam([*head.parameters(), *backbone.parameters()], lr=3e-3), []
    for _ in range(8):
        loss = task.loss(backbone, head, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_contrastive_loss_is_clips_with_one_caption_per_image() -> None:
    logits, index = draw(5, 5), torch.arange(5)
    clip = (F.cross_entropy(logits, index) + F.cross_entropy(logits.T, index)) / 2
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(5, dtype=torch.bool)), clip, rtol=0, atol=1e-12)


def test_contrastive_loss_spreads_over_every_caption_of_an_image() -> None:
    """With own pairs at z and all others at 0 the loss has a closed form, at least the target's entropy."""
    task, data = Retrieval(), [rows()[3]] * 2 + [rows()[0]]  # an image twice, with two captions drawn each time
    batch = task.collate(data, small_tiny(), np.random.default_rng(0))
    assert batch.extras["owners"].tolist() == [0, 0, 1, 1, 2]
    own = batch.extras["own"]
    assert own.int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]]
    for z in (0.0, 1.5, 40.0):
        logits = (z * own.double()).requires_grad_()
        e = math.exp(z)
        by_image = (2 * math.log((4 * e + 1) / e) + math.log((e + 4) / e)) / 3
        by_text = (4 * math.log((2 * e + 1) / e) + math.log((e + 2) / e)) / 5
        loss = contrastive_loss(logits, own)
        assert float(loss.detach()) == pytest.approx((by_image + by_text) / 2, abs=1e-12)
    assert float(torch.autograd.grad(loss, logits)[0].abs().max()) < 1e-12  # no own caption is pushed away


def test_retrieval_draws_two_captions_and_embeds_all_in_prediction() -> None:
    task, backbone, data = Retrieval(), small_tiny(), rows()
    drawn = task.collate(data, backbone, np.random.default_rng(1))
    assert np.bincount(drawn.extras["owners"].numpy()).tolist() == [1, 2, 2, 2]
    assert len({tuple(ids) for ids in drawn.texts["captions"].ids[3:5].tolist()}) == 2
    head = task.head(backbone).double()
    with torch.no_grad():
        found = task.predict(backbone, head, double(task.collate(data, backbone, None)))
    assert [len(texts) for _, texts in found] == [len(row["captions"]) for row in data]
    for image, texts in found:
        np.testing.assert_allclose(np.linalg.norm(np.vstack([image, texts]), axis=1), 1, atol=1e-6)
    perfect = [(np.eye(4)[i], np.eye(4)[[i] * len(row["captions"])]) for i, row in enumerate(data)]
    scores = task.score(data, perfect)
    assert scores.metrics["mean_r1"] == 1 and scores.samples["mean_r1"] == [1, 1, 1, 1]
    assert isinstance(head, RetrievalHead)
    head.log_scale.data.fill_(9.0)
    unit = torch.full((1, 4), 0.5, dtype=torch.float64)
    assert head.similarity(unit, unit).item() == pytest.approx(100)


def test_vqa_draws_by_soft_score_and_weighs_by_it() -> None:
    task, backbone, row = VisualQuestionAnswering(), small_tiny(), rows()[0]
    row["answers"] = ["red"] * 5 + ["blue"] * 3 + ["green"] * 1 + ["left"] * 1
    soft = {"red": 1.0, "blue": 0.9, "green": 0.3, "left": 0.3}
    rng, draws = np.random.default_rng(0), 2000
    batch = task.collate([row | {"image": Image.new("RGB", (8, 8))}] * draws, small_tiny(image_size=8), rng)
    answers = [backbone.text_of(ids) for ids in batch.texts["answer"].ids.tolist()]
    assert all(weight == pytest.approx(soft[a]) for a, weight in zip(answers, batch.extras["weights"], strict=True))
    for answer, score in soft.items():
        share = score / sum(soft.values())
        assert abs(answers.count(answer) / draws - share) < 5 * math.sqrt(share * (1 - share) / draws)
    assert task.collate([row | {"answers": ["two"]}], backbone, rng).extras["weights"].tolist() == [1.0]

    batch = double(task.collate(rows()[1:2] * 2, backbone, rng))

    def loss(*weights: float) -> float:
        weighted = replace(batch, extras={"weights": torch.tensor(weights)})
        return task.loss(backbone, nn.Module(), weighted).item()

    assert loss(1, 0.5) == pytest.approx((loss(2, 0) + 0.5 * loss(0, 2)) / 2, abs=1e-9)


def test_questions_without_public_answers_are_predicted_and_handed_in_but_not_scored() -> None:
    task, backbone, data = VisualQuestionAnswering(), small_tiny(), rows()
    hidden = [row | {"answers": [], "answer_type": "", "sample_id": str(7 + i)} for i, row in enumerate(data)]
    with torch.no_grad():
        predictions = task.predict(backbone, nn.Module(), double(task.collate(hidden, backbone, None)))
    scores = task.score(without_images(hidden), predictions)
    assert (scores.metrics, scores.samples, scores.sample_ids) == ({}, {}, ["7", "8", "9", "10"])
    handed_in = json.loads(json.dumps(task.submission(without_images(hidden), predictions)))
    assert handed_in == [{"question_id": 7 + i, "answer": answer} for i, answer in enumerate(predictions)]
    assert task.submission(without_images(data), predictions) is None
    assert task.submission(without_images([*hidden[:3], data[3]]), predictions) is None
    assert [entry["question_id"] for entry in task.submission([hidden[0] | {"sample_id": "q²"}], ["a"])] == ["q²"]
    assert task.picture(hidden[0], "red")[1] == "red circle: red"
    assert task.picture(data[0], "blue")[1] == "red circle: blue (true: red)"


def test_training_on_a_question_without_public_answers_is_refused() -> None:
    task, data = VisualQuestionAnswering(), rows()
    data[2]["answers"] = []
    with pytest.raises(UserError, match="question s2 has no public answers to train on"):
        task.collate(data, small_tiny(), np.random.default_rng(0))


def test_answers_are_scored_overall_by_type_and_exactly_where_there_is_one() -> None:
    task, data = VisualQuestionAnswering(), without_images(rows())
    some = task.score([*data[:3], data[3] | {"answers": []}], ["Red", "no", "two", "right"])
    assert some.metrics == pytest.approx({"vqa_accuracy": 1, "vqa_accuracy/number": 1, "vqa_accuracy/other": 1})
    assert some.sample_ids == ["s0", "s1", "s2"] and len(some.samples["vqa_accuracy"]) == 3
    single = [row | {"answers": row["answers"][:1]} for row in data]
    found = task.score(single, ["Red", "yes", "blue", "left"])
    assert found.samples == {"vqa_accuracy": [1, 1, 0, 1], "exact_match": [0, 1, 0, 1]}
    assert found.metrics == pytest.approx(
        {"vqa_accuracy": 3 / 4, "exact_match": 1 / 2, "vqa_accuracy/number": 0, "vqa_accuracy/other": 1}
    )


def test_captioning_averages_over_real_tokens_only() -> None:
    task, backbone = Captioning(), small_tiny()
    batch = double(task.collate(rows(), backbone, np.random.default_rng(0)))
    caption = batch.texts["caption"]
    assert not caption.mask.all()
    memory = backbone.fuse(backbone.embed_image(batch.images), task="captioning")
    entered = torch.cat([torch.full((4, 1), backbone.start_id), caption.ids[:, :-1]], dim=1)
    logs = backbone.decode(memory, entered, task="captioning")[0].log_softmax(-1)
    expected = -logs.gather(2, caption.ids[..., None]).squeeze(-1)[caption.mask].mean()
    padded = Texts(F.pad(caption.ids, (0, 3), value=backbone.pad_id), F.pad(caption.mask, (0, 3)))
    for texts in (caption, padded):
        found = task.loss(backbone, nn.Module(), replace(batch, texts={"caption": texts}))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
