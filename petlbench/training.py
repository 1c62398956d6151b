"""The one training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from petlbench.backbones.base import Backbone
from petlbench.measure.clock import PhaseClock
from petlbench.measure.memory import SavedTensors, account
from petlbench.spec import Memory, Recipe
from petlbench.task import Batch, Scores, Task

Report = Callable[[dict[str, Any]], None]
KEPT_LOSSES = 50  # points of the loss curve kept in a record


class Diverged(Exception):
    """The loss is not a finite number any more."""


@dataclass
class Setting:
    """What is trained and evaluated, on what, and who is told."""

    backbone: Backbone
    head: nn.Module
    task: Task
    recipe: Recipe
    seed: int
    device: torch.device
    clock: PhaseClock
    report: Report = field(default=lambda event: None)

    def modules(self) -> nn.ModuleDict:
        """Both trained modules under the names that an adapter file uses."""
        return nn.ModuleDict({"backbone": self.backbone, "head": self.head})

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name; a shared one once."""
        return {name: p for name, p in self.modules().named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Fit:
    """What training left: the best state on validation, and how it got there."""

    state: dict[str, Tensor]
    validation: dict[str, float]
    best_step: int
    losses: tuple[tuple[int, float], ...]
    memory: Memory | None


def optimizer(parameters: dict[str, nn.Parameter], recipe: Recipe, lr: float) -> torch.optim.AdamW:
    """AdamW; biases and one-dimensional gains are not decayed."""
    decayed = [p for p in parameters.values() if p.ndim > 1]
    others = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=recipe.betas, eps=recipe.eps)


def rate(recipe: Recipe, step: int) -> float:
    """The share of the peak rate at `step` (from 0): linear warm-up, then the schedule down to zero."""
    warm = round(recipe.warmup * recipe.steps)
    if step < warm:
        return (step + 1) / warm
    if recipe.schedule == "constant":
        return 1.0
    left = (recipe.steps - step) / max(1, recipe.steps - warm)
    return left if recipe.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


def batches(rows: Dataset, setting: Setting) -> Iterator[Batch]:
    """Endless training batches: each epoch a new permutation, what does not fill a batch carried over."""
    rng = np.random.default_rng([setting.seed, 0])
    order: list[int] = []
    while True:
        with setting.clock.phase("data"):
            while len(order) < setting.recipe.batch_size:
                order += rng.permutation(len(rows)).tolist()
            chosen, order = order[: setting.recipe.batch_size], order[setting.recipe.batch_size :]
            batch = setting.task.collate([rows[i] for i in chosen], setting.backbone, rng).to(setting.device)
        yield batch


def fit(setting: Setting, train: Dataset, validation: Dataset, lr: float) -> Fit:
    """Train for `recipe.steps`, evaluate on validation `recipe.validations` times, keep the best state.

    Raises Diverged when the loss is not finite.
    """
    recipe, clock, modules = setting.recipe, setting.clock, setting.modules()
    parameters = setting.trainable()
    optim = optimizer(parameters, recipe, lr)
    stream = batches(train, setting)
    marks = {round(recipe.steps * (i + 1) / recipe.validations) for i in range(recipe.validations)}
    losses: list[tuple[int, float]] = []
    memory: Memory | None = None
    best: tuple[float, int, dict[str, float], dict[str, Tensor]] | None = None
    for step in range(recipe.steps):
        modules.train()
        with clock.step():
            batch = next(stream)
            saved = SavedTensors(modules) if step == 0 else None  # the first step is warm-up, never timed
            with clock.phase("forward"):
                loss = _forward(setting, batch, saved)
            with clock.phase("backward"):
                loss.backward()
            with clock.phase("optimizer"):
                nn.utils.clip_grad_norm_(parameters.values(), recipe.clip_norm)
                for group in optim.param_groups:
                    group["lr"] = lr * rate(recipe, step)
                optim.step()
        if saved is not None:
            memory = account(modules.values(), optim, saved.saved_bytes, _backend(setting))
        with clock.phase("optimizer"):
            optim.zero_grad(set_to_none=True)
        value = float(loss.detach())
        losses.append((step + 1, value))
        setting.report({"phase": "train", "step": step + 1, "steps": recipe.steps, "loss": value})
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value} at step {step + 1} of {recipe.steps} with a rate of {lr:g}")
        if step + 1 in marks:
            with clock.phase("validation"):
                scores, _ = evaluate(setting, validation)
            score = scores.metrics[setting.task.main_metric]
            setting.report({"phase": "validation", "step": step + 1, "steps": recipe.steps, "score": score})
            if best is None or score > best[0]:
                state = {name: p.detach().clone() for name, p in parameters.items()}
                best = (score, step + 1, scores.metrics, state)
    assert best is not None  # the last step is always a mark
    _, best_step, metrics, state = best
    return Fit(state, metrics, best_step, _thinned(losses), memory)


def _forward(setting: Setting, batch: Batch, saved: SavedTensors | None) -> Tensor:
    if saved is None:
        return setting.task.loss(setting.backbone, setting.head, batch)
    with saved:
        return setting.task.loss(setting.backbone, setting.head, batch)


def _backend(setting: Setting) -> str:
    attention = getattr(getattr(setting.backbone, "config", None), "attention", "unknown")
    return f"{setting.device.type}, {attention} attention"


def _thinned(losses: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """At most KEPT_LOSSES + 1 points, the last always among them."""
    stride = max(1, -(-len(losses) // KEPT_LOSSES))
    return tuple(losses[stride - 1 :: stride]) + (() if len(losses) % stride == 0 else (losses[-1],))


@torch.no_grad()
def evaluate(setting: Setting, rows: Dataset) -> tuple[Scores, list[Any]]:
    """Scores and predictions on all `rows`, in evaluation mode; in their order."""
    task, size = setting.task, setting.recipe.eval_batch_size
    setting.modules().eval()
    predictions: list[Any] = []
    for start in range(0, len(rows), size):
        chosen = [rows[i] for i in range(start, min(start + size, len(rows)))]
        batch = task.collate(chosen, setting.backbone, None).to(setting.device)
        predictions += task.predict(setting.backbone, setting.head, batch, beams=setting.recipe.beams)
    return task.score(rows.remove_columns("image").to_list(), predictions), predictions


@torch.no_grad()
def load_state(setting: Setting, state: dict[str, Tensor]) -> None:
    """Put the values of a state back into the trainable parameters. Raises KeyError for a name that is not one."""
    parameters = setting.trainable()
    for name, value in state.items():
        parameters[name].copy_(value)
