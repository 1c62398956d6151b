"""The one training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from petlbench.backbones.base import Backbone
from petlbench.checkpoint import State, prefixed, rng_state, set_rng_state
from petlbench.measure.clock import WARMUP, PhaseClock
from petlbench.measure.energy import energy_counter
from petlbench.measure.memory import SavedTensors, account
from petlbench.method import Method
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
    method: Method | None = None

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
    step_joules: float | None = None


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


class Batches:
    """Endless training batches: each epoch a new permutation, what does not fill a batch carried over."""

    def __init__(self, rows: Dataset, setting: Setting) -> None:
        self._rows, self._setting = rows, setting
        self._rng = np.random.default_rng([setting.seed, 0])
        self._order: list[int] = []

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        setting, size = self._setting, self._setting.recipe.batch_size
        with setting.clock.phase("data"):
            while len(self._order) < size:
                self._order += self._rng.permutation(len(self._rows)).tolist()
            chosen, self._order = self._order[:size], self._order[size:]
            rows = [self._rows[i] for i in chosen]
            return setting.task.collate(rows, setting.backbone, self._rng).to(setting.device)

    def state(self) -> dict[str, Any]:
        """What the batches to come depend on, as JSON values."""
        return {"rng": self._rng.bit_generator.state, "order": self._order}

    def restore(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state["rng"]
        self._order = list(state["order"])


class Course:
    """Where training stands: all that its next step, and its result, depend on."""

    def __init__(self, setting: Setting, train: Dataset, lr: float) -> None:
        self.setting, self.lr = setting, lr
        self.modules = setting.modules().train()
        self.parameters = setting.trainable()
        self.optimizer = optimizer(self.parameters, setting.recipe, lr)
        self.batches = Batches(train, setting)
        self.step = 0
        self.losses: list[tuple[int, float]] = []
        self.memory: Memory | None = None
        self.meter = energy_counter(setting.device)
        self.joules: tuple[float, int] = (0.0, 0)  # of so many steps after warm-up
        self.best: Best | None = None

    def _values(self) -> dict[str, Tensor]:
        """What training can change of the modules."""
        return {**self.parameters, **dict(self.modules.named_buffers())}

    def state(self) -> State:
        """A copy on disk of this is enough to go on as if nothing had happened."""
        best = self.best
        moments = {
            f"{index}/{key}": value
            for index, state in self.optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }
        tensors = {
            **prefixed("values", self._values()),
            **prefixed("optimizer", moments),
            **prefixed("rng", rng_state(self.setting.device)),
            **prefixed("best", best.state if best else {}),
        }
        rest = {
            "step": self.step,
            "losses": self.losses,
            "batches": self.batches.state(),
            "memory": self.memory.model_dump() if self.memory else None,
            "joules": self.joules,
            "best": {"score": best.score, "step": best.step, "metrics": best.metrics} if best else None,
        }
        return State(tensors, rest)

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Go back to where `state` was taken."""
        rest = state.rest
        saved = state.under("values")
        for name, value in self._values().items():
            value.copy_(saved[name])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.under("optimizer").items():
            index, _, key = name.partition("/")
            moments.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        set_rng_state(state.under("rng"), self.setting.device)
        self.step = rest["step"]
        self.losses = [(int(step), float(loss)) for step, loss in rest["losses"]]
        self.batches.restore(rest["batches"])
        self.memory = Memory(**rest["memory"]) if rest["memory"] else None
        self.joules = (float(rest["joules"][0]), int(rest["joules"][1]))
        self.best = Best(**rest["best"], state=state.under("best")) if rest["best"] else None


@dataclass(frozen=True)
class Best:
    """The best state on validation so far."""

    score: float
    step: int
    metrics: dict[str, float]
    state: dict[str, Tensor]


def fit(
    setting: Setting,
    train: Dataset,
    validation: Dataset,
    lr: float,
    *,
    resume: State | None = None,
    keep: Callable[[Course], None] = lambda course: None,
) -> Fit:
    """Train for `recipe.steps`, evaluate on validation `recipe.validations` times, keep the best state.

    `keep` is called after every step, and may save `course.state()`; with that as `resume`, training goes on from
    there and ends with the same numbers. Raises Diverged when the loss is not finite.
    """
    recipe = setting.recipe
    course = Course(setting, train, lr)
    if resume:
        course.restore(resume)
    setting.clock.warm_up()
    marks = {round(recipe.steps * (i + 1) / recipe.validations) for i in range(recipe.validations)}
    while course.step < recipe.steps:
        train_step(course)
        if course.step in marks:
            _validate(course, validation)
        keep(course)
    assert course.best is not None  # the last step is always a mark
    best = course.best
    joules, counted = course.joules
    energy = joules / counted if counted else None
    return Fit(best.state, best.metrics, best.step, _thinned(course.losses), course.memory, energy)


def train_step(course: Course) -> None:
    """One optimizer step; the first one is also where memory is accounted, and never timed."""
    setting, clock, lr, recipe = course.setting, course.setting.clock, course.lr, course.setting.recipe
    saved = SavedTensors(course.modules) if course.memory is None else None
    joules = course.meter() if course.meter else 0.0
    with clock.step():
        batch = next(course.batches)
        with clock.phase("forward"):
            loss = _forward(setting, batch, saved)
        with clock.phase("backward"):
            loss.backward()
        with clock.phase("optimizer"):
            nn.utils.clip_grad_norm_(course.parameters.values(), recipe.clip_norm)
            for group in course.optimizer.param_groups:
                group["lr"] = lr * rate(recipe, course.step)
            course.optimizer.step()
    if course.meter and course.step >= WARMUP:
        course.joules = (course.joules[0] + course.meter() - joules, course.joules[1] + 1)
    if saved is not None:
        course.memory = account(
            course.modules.values(),
            course.optimizer,
            0,
            native_saved_bytes=saved.saved_bytes,
            backend=_backend(setting),
        )
    with clock.phase("optimizer"):
        course.optimizer.zero_grad(set_to_none=True)
    course.step += 1
    value = float(loss.detach())
    course.losses.append((course.step, value))
    setting.report({"phase": "train", "step": course.step, "steps": recipe.steps, "loss": value})
    if not math.isfinite(value):
        raise Diverged(f"the loss is {value} at step {course.step} of {recipe.steps} with a rate of {lr:g}")


def _validate(course: Course, validation: Dataset) -> None:
    """Score the present state, and keep it when none was better."""
    setting = course.setting
    with setting.clock.phase("validation"):
        scores, _ = evaluate(setting, validation)
        course.modules.train()
    score = scores.metrics[setting.task.main_metric]
    setting.report({"phase": "validation", "step": course.step, "steps": setting.recipe.steps, "score": score})
    if course.best is None or score > course.best.score:
        # On the CPU: a second copy on a GPU would pass for what training takes.
        state = {name: p.detach().to("cpu", copy=True) for name, p in course.parameters.items()}
        course.best = Best(score, course.step, scores.metrics, state)


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
