"""Test the training loop on a least-squares problem in place of backbone and task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from petlbench.api import schemas
from petlbench.api.task import Batch, Row, Scores, Task
from petlbench.api.tokens import Images
from petlbench.core.recipe import Recipe
from petlbench.training.batches import Batches, prefetch
from petlbench.training.context import RunContext
from petlbench.training.evaluation import evaluate, load_state
from petlbench.training.loop import Diverged, fit
from petlbench.training.optimizers import optimizer, rate
from petlbench.training.setup import TrainingSetup
from tests.backbone_factory import posing


class Line(Task):
    """Fit y = 2 x; the score is minus the squared error, and is scripted where `scripted` holds values."""

    name: ClassVar[str] = "line"
    default_dataset: ClassVar[str] = "none"
    main_metric: ClassVar[str] = "fit"
    needs: ClassVar[frozenset[str]] = frozenset()
    features = schemas.VQA

    def __init__(self) -> None:
        self.seen: list[list[float]] = []
        self.scripted: list[float] = []
        self.training: list[bool] = []

    def collate(self, rows: Sequence[Row], backbone: Any, rng: np.random.Generator | None) -> Batch:
        x = torch.tensor([row["x"] for row in rows])
        if rng is not None:
            self.seen.append(x.tolist())
        empty = torch.zeros(0)
        return Batch(Images(empty, empty, empty, empty), {}, {"x": x})

    def loss(self, backbone: Any, head: nn.Module, batch: Batch) -> Tensor:
        self.training.append(backbone.training)
        x = batch.extras["x"][:, None]
        return (backbone(x) - 2 * x).square().mean()

    def predict(self, backbone: Any, head: nn.Module, batch: Batch, *, beams: int = 1) -> list[Any]:
        assert not backbone.training and not torch.is_grad_enabled()
        return backbone(batch.extras["x"][:, None])[:, 0].tolist()

    def score(self, rows: Sequence[Row], predictions: Sequence[Any]) -> Scores:
        errors = [-((p - 2 * row["x"]) ** 2) for p, row in zip(predictions, rows, strict=True)]
        score = self.scripted.pop(0) if self.scripted else float(np.mean(errors))
        return Scores({"fit": score}, {"fit": errors}, [str(row["x"]) for row in rows])


def rows(number: int = 10) -> Dataset:
    x = np.linspace(-1, 1, number, dtype=np.float32)
    return Dataset.from_dict({"x": x, "image": [None] * number})


def setup(recipe: Recipe, seed: int = 0) -> TrainingSetup:
    torch.manual_seed(0)
    return TrainingSetup(posing(nn.Linear(1, 1)), nn.Module(), Line(), recipe, seed, RunContext.on("cpu"))


def recipe(**changes: Any) -> Recipe:
    return Recipe(**{"steps": 60, "batch_size": 4, "lr": 0.1, "weight_decay": 0.0, **changes})


def test_training_fits_and_says_how() -> None:
    result = fit(setup(recipe()), rows(), rows(5), lr=0.1)
    assert result.validation["fit"] > -0.01
    assert result.best_step == 60
    assert result.losses[-1][0] == 60 and result.losses[-1][1] < result.losses[0][1] / 10
    # weights 2 x 4 bytes, as many gradients, twice that as moments and two 4-byte step counters
    assert result.memory is not None
    assert (result.memory.weights_bytes, result.memory.gradients_bytes, result.memory.optimizer_bytes) == (8, 8, 24)


def test_the_best_state_on_validation_is_kept_not_the_last() -> None:
    here = setup(recipe(validations=3))
    here.task.scripted = [1.0, 3.0, 2.0]  # type: ignore[attr-defined]
    states: list[Tensor] = []

    def report(event: dict[str, Any]) -> None:
        if event["phase"] == "validation":
            weight = here.backbone.get_parameter("weight")
            states.append(weight.detach().clone())

    here.context = replace(here.context, report=report)
    result = fit(here, rows(), rows(5), lr=0.1)
    assert (result.best_step, result.validation["fit"]) == (40, 3.0)
    assert torch.equal(result.state["backbone.weight"], states[1]) and not torch.equal(states[1], states[2])
    load_state(here, result.state)
    assert torch.equal(here.backbone.weight, states[1])  # type: ignore[arg-type]


def test_every_row_comes_once_an_epoch_in_an_order_that_the_seed_alone_decides() -> None:
    first, again, other = (setup(recipe(steps=5), seed) for seed in (0, 0, 1))
    for here in (first, again, other):
        fit(here, rows(10), rows(5), lr=0.1)
    seen = [x for batch in first.task.seen for x in batch]  # type: ignore[attr-defined]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == sorted(rows(10)["x"])
    assert first.task.seen == again.task.seen != other.task.seen  # type: ignore[attr-defined]


def test_fewer_rows_than_a_batch_still_fill_it() -> None:
    here = setup(recipe(batch_size=4))
    assert len(next(Batches(rows(3), here)).extras["x"]) == 4


def test_a_batch_depends_on_the_seed_and_its_number_alone() -> None:
    here = setup(recipe(batch_size=4))
    batches = Batches(rows(10), here)
    made = [next(batches).extras["x"] for _ in range(7)]
    later = Batches(rows(10), here, start=5)
    assert torch.equal(next(later).extras["x"], made[5]) and torch.equal(next(later).extras["x"], made[6])


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_no_batch_and_no_prediction(workers: int) -> None:
    alone, helped = setup(recipe()), setup(recipe())
    helped.workers = workers
    first, second = (fit(here, rows(), rows(5), lr=0.1) for here in (alone, helped))
    assert first.losses == second.losses and first.validation == second.validation
    assert evaluate(alone, rows(300)) == evaluate(helped, rows(300))


def test_workers_stay_a_batch_each_ahead_and_no_more() -> None:
    made: list[int] = []
    batches = prefetch(lambda number: made.append(number) or number, count(), 3)  # type: ignore[arg-type,func-returns-value,return-value]
    assert [next(batches), next(batches)] == [0, 1]
    assert set(made) <= {0, 1, 2, 3, 4} and {0, 1} <= set(made)
    batches.close()  # type: ignore[attr-defined]


def test_what_a_worker_stumbles_over_is_raised_where_its_batch_is_due() -> None:
    def make(number: int) -> Batch:
        if number == 2:
            raise ValueError("torn")
        return number  # type: ignore[return-value]

    batches = prefetch(make, range(9), 4)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="torn"):
        next(batches)


def test_a_loss_that_is_not_finite_ends_the_trial() -> None:
    with pytest.raises(Diverged, match="at step"):
        fit(setup(recipe(lr=1e30, clip_norm=1e30)), rows(), rows(5), lr=1e30)


def test_training_is_in_training_mode_also_after_a_validation() -> None:
    here = setup(recipe(steps=4, validations=4))
    fit(here, rows(), rows(5), lr=0.1)
    assert here.task.training == [True] * 4  # type: ignore[attr-defined]


def test_evaluation_is_not_training_time() -> None:
    here = setup(recipe(steps=4))
    fit(here, rows(), rows(5), lr=0.1)
    timing = here.clock.timing()
    parts = [timing.phases[name] for name in ("data", "forward", "backward", "optimizer")]
    assert timing.train_seconds == pytest.approx(sum(parts)) and timing.phases["validation"] > 0


def test_scores_come_in_the_order_of_the_rows_whatever_the_batch() -> None:
    scores, predictions = evaluate(setup(recipe(eval_batch_size=3)), rows(7))
    assert len(predictions) == 7 and scores.sample_ids == [str(x) for x in rows(7)["x"]]


def test_the_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    shape = recipe(steps=10, warmup=0.2)
    assert [round(rate(shape, step), 3) for step in range(10)] == [
        0.5,
        1,
        1,
        0.875,
        0.75,
        0.625,
        0.5,
        0.375,
        0.25,
        0.125,
    ]
    assert rate(recipe(steps=10, warmup=0.2, schedule="constant"), 9) == 1.0
    assert rate(recipe(steps=10, warmup=0.0, schedule="cosine"), 5) == pytest.approx(0.5)


def test_biases_and_gains_are_not_decayed() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    groups = optimizer(dict(module.named_parameters()), recipe(weight_decay=0.1), 0.1).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (3, 0.0)]
