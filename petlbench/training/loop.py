"""The one training loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing, nullcontext

from datasets import Dataset
from torch import Tensor, nn

from petlbench.api.task import Batch
from petlbench.core.errors import UserError
from petlbench.measure.clock import WARMUP
from petlbench.measure.memory import SavedTensors, account
from petlbench.training.checkpoint import State
from petlbench.training.evaluation import evaluate
from petlbench.training.optimizers import rate
from petlbench.training.precision import computing, described, kernels
from petlbench.training.setup import Setting
from petlbench.training.state import Best, Course, Fit

KEPT_LOSSES = 50  # points of the loss curve kept in a record

SMALLEST_SCALE = 1.0  # of the loss in fp16: what overflows below it, overflows by itself


class Diverged(Exception):
    """The loss, or in fp16 its gradients, are no finite numbers any more."""


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
    there and ends with the same numbers. Raises Diverged when the loss is not finite; in fp16, when scaling it down
    does not help.
    """
    recipe = setting.recipe
    course = Course(setting, train, lr)
    if resume:
        course.restore(resume)
    setting.clock.warm_up()
    marks = {round(recipe.steps * (i + 1) / recipe.validations) for i in range(recipe.validations)}
    with closing(course.batches):
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
    setting, clock, recipe = course.setting, course.setting.clock, course.setting.recipe
    # Again after a step that was skipped, which left the optimizer without moments.
    accounting = course.memory is None or not course.memory.optimizer_bytes
    saved = SavedTensors(course.modules) if accounting else None
    joules = course.meter() if course.meter else 0.0
    with clock.step():
        batch = next(course.batches)
        with kernels(recipe):
            with clock.phase("forward"):
                loss = _forward(setting, batch, saved)
            with clock.phase("backward"):
                course.scaler.scale(loss).backward()
        with clock.phase("optimizer"):
            stepped = _optimize(course)
    if course.meter and course.step >= WARMUP:
        course.joules = (course.joules[0] + course.meter() - joules, course.joules[1] + 1)
    if saved is not None:
        course.memory = account(
            course.modules.values(),
            course.optimizer,
            0,
            native_saved_bytes=saved.saved_bytes,
            backend=described(recipe, setting.device, setting.backbone),
        )
    with clock.phase("optimizer"):
        course.optimizer.zero_grad(set_to_none=True)
    course.step += 1
    _note(course, float(loss.detach()), stepped)


def _optimize(course: Course) -> bool:
    """Clip and step. False when gradients overflow in fp16: the step is skipped, and the loss scaled less from now."""
    recipe, scale = course.setting.recipe, course.scaler.get_scale()
    course.scaler.unscale_(course.optimizer)
    if recipe.clip_norm is not None:
        nn.utils.clip_grad_norm_(course.parameters.values(), recipe.clip_norm)
    for group in course.optimizer.param_groups:
        group["lr"] = course.lr * group["scale"] * rate(recipe, course.step)
    course.scaler.step(course.optimizer)
    course.scaler.update()
    return course.scaler.get_scale() >= scale


def _note(course: Course, loss: float, stepped: bool) -> None:
    """Keep and report the loss of the step that was just made, or skipped. Raises Diverged when there is no hope."""
    steps = course.setting.recipe.steps
    course.setting.context.report({"phase": "train", "step": course.step, "steps": steps, "loss": loss})
    if math.isfinite(loss):
        course.losses.append((course.step, loss))
    where = f"at step {course.step} of {steps} with a rate of {course.lr:g}"
    if not math.isfinite(loss) and stepped:
        raise Diverged(f"the loss is {loss} {where}")
    if not stepped and course.scaler.get_scale() < SMALLEST_SCALE:
        raise Diverged(f"fp16 overflows {where}, however the loss of {loss:g} is scaled")


def _validate(course: Course, validation: Dataset) -> None:
    """Score the present state, and keep it when none was better."""
    setting = course.setting
    with setting.clock.phase("validation"):
        scores, _ = evaluate(setting, validation)
        course.modules.train()
    score = scores.metrics.get(setting.task.main_metric)
    if score is None:
        raise UserError("the validation split has no public answers to select on: choose another part")
    setting.context.report({"phase": "validation", "step": course.step, "steps": setting.recipe.steps, "score": score})
    if course.best is None or score > course.best.score:
        # On the CPU: a second copy on a GPU would pass for what training takes.
        state = {name: p.detach().to("cpu", copy=True) for name, p in course.parameters.items()}
        course.best = Best(score, course.step, scores.metrics, state)


def _forward(setting: Setting, batch: Batch, saved: SavedTensors | None) -> Tensor:
    with saved or nullcontext(), computing(setting.recipe, setting.device):
        return setting.task.loss(setting.backbone, setting.head, batch)


def _thinned(losses: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """At most KEPT_LOSSES + 1 points, the last always among them."""
    stride = max(1, -(-len(losses) // KEPT_LOSSES))
    return tuple(losses[stride - 1 :: stride]) + (() if len(losses) % stride == 0 else (losses[-1],))
