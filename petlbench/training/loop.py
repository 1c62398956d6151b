"""Train a method; this is the only training loop."""

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
from petlbench.training.checkpoint import Saved
from petlbench.training.evaluation import evaluate
from petlbench.training.optimizers import rate
from petlbench.training.precision import backend_text, computing, kernels
from petlbench.training.setup import TrainingSetup
from petlbench.training.state import BestState, TrainingResult, TrainingState

KEPT_LOSSES = 50  # points of the loss curve kept in a record

SMALLEST_SCALE = 1.0  # of the loss in fp16: if gradients overflow below it, scaling is not the cause


class Diverged(Exception):
    """The loss, or in fp16 its gradients, are not finite."""


def fit(
    setup: TrainingSetup,
    train: Dataset,
    validation: Dataset,
    lr: float,
    *,
    resume: Saved | None = None,
    keep: Callable[[TrainingState], None] = lambda training: None,
) -> TrainingResult:
    """Train for `recipe.steps`, evaluate on validation `recipe.validations` times, keep the best state.

    `keep` is called after every step and may save `training.state()`. Given that state as `resume`, training continues
    from it and ends with the same numbers. Raise Diverged if the loss is not finite; in fp16, if scaling it down does
    not help.
    """
    recipe = setup.recipe
    training = TrainingState(setup, train, lr)
    if resume:
        training.restore(resume)
    setup.clock.warm_up()
    marks = {round(recipe.steps * (i + 1) / recipe.validations) for i in range(recipe.validations)}
    with closing(training.batches):
        while training.step < recipe.steps:
            train_step(training)
            if training.step in marks:
                _validate(training, validation)
            keep(training)
    assert training.best is not None  # the last step is always a mark
    best = training.best
    joules, counted = training.joules
    energy = joules / counted if counted else None
    return TrainingResult(best.state, best.metrics, best.step, _thinned(training.losses), training.memory, energy)


def train_step(training: TrainingState) -> None:
    """Make one optimizer step. The first one also accounts for memory, and is never timed."""
    setup, clock, recipe = training.setup, training.setup.clock, training.setup.recipe
    # A skipped first step leaves the optimizer without moments, so account again.
    accounting = training.memory is None or not training.memory.optimizer_bytes
    saved = SavedTensors(training.modules) if accounting else None
    joules = training.meter() if training.meter else 0.0
    with clock.step():
        batch = next(training.batches)
        with kernels(recipe):
            with clock.phase("forward"):
                loss = _forward(setup, batch, saved)
            with clock.phase("backward"):
                training.scaler.scale(loss).backward()
        with clock.phase("optimizer"):
            stepped = _optimize(training)
    if training.meter and training.step >= WARMUP:
        training.joules = (training.joules[0] + training.meter() - joules, training.joules[1] + 1)
    if saved is not None:
        training.memory = account(
            training.modules.values(),
            training.optimizer,
            0,
            native_saved_bytes=saved.saved_bytes,
            backend=backend_text(recipe, setup.device, setup.backbone),
        )
    with clock.phase("optimizer"):
        training.optimizer.zero_grad(set_to_none=True)
    training.step += 1
    _note(training, float(loss.detach()), stepped)


def _optimize(training: TrainingState) -> bool:
    """Clip and step. Return False if fp16 gradients overflow: the step is skipped, and the loss scale goes down."""
    recipe, scale = training.setup.recipe, training.scaler.get_scale()
    training.scaler.unscale_(training.optimizer)
    if recipe.clip_norm is not None:
        nn.utils.clip_grad_norm_(training.parameters.values(), recipe.clip_norm)
    for group in training.optimizer.param_groups:
        group["lr"] = training.lr * group["scale"] * rate(recipe, training.step)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    return training.scaler.get_scale() >= scale


def _note(training: TrainingState, loss: float, stepped: bool) -> None:
    """Keep and report the loss of the last step, made or skipped. Raise Diverged if training cannot recover."""
    steps = training.setup.recipe.steps
    training.setup.context.report({"phase": "train", "step": training.step, "steps": steps, "loss": loss})
    if math.isfinite(loss):
        training.losses.append((training.step, loss))
    where = f"at step {training.step} of {steps} with a rate of {training.lr:g}"
    if not math.isfinite(loss) and stepped:
        raise Diverged(f"the loss is {loss} {where}")
    if not stepped and training.scaler.get_scale() < SMALLEST_SCALE:
        raise Diverged(f"fp16 overflows {where}, however the loss of {loss:g} is scaled")


def _validate(training: TrainingState, validation: Dataset) -> None:
    """Score the current state, and keep it if it is the best so far."""
    setup = training.setup
    with setup.clock.phase("validation"):
        scores, _ = evaluate(setup, validation)
        training.modules.train()
    score = scores.metrics.get(setup.task.main_metric)
    if score is None:
        raise UserError("the validation split has no public answers to select on: choose another part")
    setup.context.report({"phase": "validation", "step": training.step, "steps": setup.recipe.steps, "score": score})
    if training.best is None or score > training.best.score:
        # On the CPU: a copy on the GPU would count as memory that training takes.
        state = {name: p.detach().to("cpu", copy=True) for name, p in training.parameters.items()}
        training.best = BestState(score, training.step, scores.metrics, state)


def _forward(setup: TrainingSetup, batch: Batch, saved: SavedTensors | None) -> Tensor:
    with saved or nullcontext(), computing(setup.recipe, setup.device):
        return setup.task.loss(setup.backbone, setup.head, batch)


def _thinned(losses: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Return at most KEPT_LOSSES + 1 points, the last point included."""
    stride = max(1, -(-len(losses) // KEPT_LOSSES))
    return tuple(losses[stride - 1 :: stride]) + (() if len(losses) % stride == 0 else (losses[-1],))
