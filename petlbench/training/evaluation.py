"""Score a split and predict on it; load a trained state."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset, Image
from torch import Tensor

from petlbench.api.task import Batch, Row, Scores
from petlbench.training.batches import prefetch
from petlbench.training.precision import computing
from petlbench.training.setup import TrainingSetup


def without_images(rows: Dataset) -> list[Row]:
    """Return all rows as plain data, without their images."""
    pictures = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    plain: list[Row] = rows.remove_columns(pictures).to_list()
    return plain


@torch.no_grad()
def evaluate(setup: TrainingSetup, rows: Dataset) -> tuple[Scores, list[Any]]:
    """Return scores and predictions on all `rows`, in their order. Switches the modules to evaluation mode."""
    task, size = setup.task, setup.recipe.eval_batch_size
    setup.modules().eval()
    predictions: list[Any] = []

    def make(start: int) -> Batch:
        chosen = [rows[i] for i in range(start, min(start + size, len(rows)))]
        return setup.prepared(task.collate(chosen, setup.backbone, None))

    starts = range(0, len(rows), size)
    for made in prefetch(make, starts, setup.context.workers):
        batch = made.to(setup.device)
        with computing(setup.recipe, setup.device):
            predictions += task.predict(setup.backbone, setup.head, batch, beams=setup.recipe.beams)
    return task.score(without_images(rows), predictions), predictions


@torch.no_grad()
def load_state(setup: TrainingSetup, state: dict[str, Tensor]) -> None:
    """Copy a saved state into the trainable parameters. Raise KeyError for a name that is not one of them."""
    parameters = setup.trainable()
    for name, value in state.items():
        parameters[name].copy_(value)
