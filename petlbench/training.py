"""The one training loop."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from torch import Tensor, nn

from petlbench.backbones.base import Backbone
from petlbench.checkpoint import State, prefixed, rng_state, set_rng_state
from petlbench.errors import UserError
from petlbench.measure.clock import WARMUP, PhaseClock
from petlbench.measure.energy import energy_counter
from petlbench.measure.memory import SavedTensors, account
from petlbench.measure.parameters import of_method
from petlbench.method import Method
from petlbench.optimizers import ReleasedAdamW
from petlbench.precision import computing, described, kernels, scaler
from petlbench.spec import Memory, Recipe
from petlbench.task import Batch, Row, Scores, Task

Report = Callable[[dict[str, Any]], None]
KEPT_LOSSES = 50  # points of the loss curve kept in a record
SMALLEST_SCALE = 1.0  # of the loss in fp16: what overflows below it, overflows by itself


class Diverged(Exception):
    """The loss, or in fp16 its gradients, are no finite numbers any more."""


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
    workers: int = 0  # threads that make batches while others are computed on; 0: none

    def prepared(self, batch: Batch) -> Batch:
        """In memory from which a GPU reads while it computes."""
        return batch.pinned() if self.device.type == "cuda" else batch

    def modules(self) -> nn.ModuleDict:
        """Both trained modules under the names that an adapter file uses."""
        return nn.ModuleDict({"backbone": self.backbone, "head": self.head})

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name; a shared one once."""
        return {name: p for name, p in self.modules().named_parameters() if p.requires_grad}

    def own(self) -> set[str]:
        """Names of the trainable parameters that are neither a head's nor a host part's: the method's."""
        backbone = self.backbone
        own = of_method(backbone, self.head, backbone.host_parameters(), backbone.head_parameters())
        ids = {id(p) for p in own}
        return {name for name, p in self.trainable().items() if id(p) in ids}


@dataclass(frozen=True)
class Fit:
    """What training left: the best state on validation, and how it got there."""

    state: dict[str, Tensor]
    validation: dict[str, float]
    best_step: int
    losses: tuple[tuple[int, float], ...]
    memory: Memory | None
    step_joules: float | None = None


def optimizer(
    parameters: dict[str, nn.Parameter],
    recipe: Recipe,
    lr: float,
    backbone: Backbone | None = None,
    own: Set[str] = frozenset(),
) -> torch.optim.Optimizer:
    """AdamW; biases, one-dimensional gains and what `backbone` names are not decayed. `own`: names of the method's own.

    Each group's `scale` is what the rate of its layer and owner is to the peak rate.
    """
    spared = {f"backbone.{name}" for name in backbone.undecayed_parameters()} if backbone else set()
    depths = {role: len(backbone.stack(role).layers) for role in backbone.roles()} if backbone else {}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        decayed = "bias" not in name if recipe.released else p.ndim > 1 and name not in spared
        scale = layer_scale(name, depths, recipe.layer_decay) * (recipe.method_lr if name in own else 1.0)
        groups.setdefault((decayed, scale), []).append(p)
    made = [
        {"params": groups[decayed, scale], "weight_decay": recipe.weight_decay if decayed else 0.0, "scale": scale}
        for decayed, scale in sorted(groups, reverse=True)
    ]
    kind = ReleasedAdamW if recipe.released else torch.optim.AdamW
    return kind(made, lr=lr, betas=recipe.betas, eps=recipe.eps)


def layer_scale(name: str, depths: Mapping[str, int], decay: float) -> float:
    """The share of the peak rate for a parameter: decay^(L - i) in layer i of L, 1 in heads and final norms, and what
    lies below the first layer counts as one layer more. `depths`: L by stack."""
    if found := re.search(r"\bstacks\.(\w+)\.layers\.(\d+)\.", name):
        return decay ** (depths[found[1]] - int(found[2]))
    if re.search(r"^head\.|\b(own_heads|lent|final_norm)\.", name):
        return 1.0
    return decay ** (max(depths.values(), default=-1) + 1)


def rate(recipe: Recipe, step: int) -> float:
    """The share of the peak rate at `step` (from 0): linear warm-up, then the schedule down to the floor."""
    warm = round(recipe.warmup * recipe.steps)
    if step < warm and recipe.released:
        return step / warm
    if step < warm:
        return step / max(1, warm - 1) if recipe.warmup_from_zero else (step + 1) / warm
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "step":
        return 1.0 if 3 * step < 2 * recipe.steps else 0.1
    left = (recipe.steps - step) / max(1, recipe.steps - warm)
    fallen = left if recipe.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
    return recipe.lr_floor + (1 - recipe.lr_floor) * fallen


class Batches:
    """Endless training batches from `start` on: each epoch a new permutation, what does not fill a batch carried over.

    A batch depends on the seed and its number alone, so that any can be made at any time, by any thread.
    """

    def __init__(self, rows: Dataset, setting: Setting, start: int = 0) -> None:
        self._rows, self._setting = rows, setting
        self._epochs: dict[int, np.ndarray] = {}
        self._made = ahead(self._make, count(start), setting.workers)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        with self._setting.clock.phase("data"):
            return next(self._made).to(self._setting.device)

    def close(self) -> None:
        """Make no more of them."""
        self._made.close()

    def _make(self, step: int) -> Batch:
        setting, size = self._setting, self._setting.recipe.batch_size
        rng = np.random.default_rng([setting.seed, 1, step])
        rows = [self._rows[self._place(i)] for i in range(step * size, (step + 1) * size)]
        drawn = setting.task.augmented(rows, setting.recipe.augment, rng)
        return setting.prepared(setting.task.collate(drawn, setting.backbone, rng))

    def _place(self, i: int) -> int:
        """The row that comes as the `i`-th of all epochs."""
        epoch, within = divmod(i, len(self._rows))
        if epoch not in self._epochs:  # two threads may both draw it: they draw the same
            order = np.random.default_rng([self._setting.seed, 0, epoch]).permutation(len(self._rows))
            self._epochs = {number: o for number, o in self._epochs.items() if number >= epoch - 1} | {epoch: order}
        return int(self._epochs[epoch][within])


def ahead(make: Callable[[int], Batch], numbers: Iterable[int], workers: int) -> Generator[Batch, None, None]:
    """`make` of each number, in their order, by `workers` threads that stay a batch each ahead.

    Decoding and resizing images run outside of Python's lock, so threads are enough. An error of `make` is raised where
    its batch is due. Without workers, each batch is made when it is due.
    """
    if not workers:
        yield from map(make, numbers)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        waiting: deque[Future[Batch]] = deque()
        for number in numbers:
            waiting.append(pool.submit(make, number))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # without waiting: the collector may be what ends this, in a thread that a worker waits for
        pool.shutdown(wait=False, cancel_futures=True)


class Course:
    """Where training stands: all that its next step, and its result, depend on."""

    def __init__(self, setting: Setting, train: Dataset, lr: float) -> None:
        self.setting, self.lr = setting, lr
        self.modules = setting.modules().train()
        self.parameters = setting.trainable()
        self.optimizer = optimizer(self.parameters, setting.recipe, lr, setting.backbone, setting.own())
        self.scaler = scaler(setting.recipe, setting.device)
        self.train = train
        self.batches = Batches(train, setting)
        self.step = 0
        self.losses: list[tuple[int, float]] = []
        self.memory: Memory | None = None
        self.meter = energy_counter(setting.device)
        self.joules: tuple[float, int] = (0.0, 0)  # of so many steps after warm-up
        self.best: Best | None = None

    def _values(self) -> dict[str, Tensor]:
        """What training can change of the modules; not the buffers of those that stay in evaluation mode, like a CNN
        that only makes features."""
        moving = [(prefix, module) for prefix, module in self.modules.named_modules() if module.training]
        buffers = {f"{prefix}.{name}": b for prefix, m in moving for name, b in m.named_buffers(recurse=False)}
        return {**self.parameters, **buffers}

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
            "scaler": self.scaler.state_dict(),
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
        self.batches = Batches(self.train, self.setting, self.step)
        self.losses = [(int(step), float(loss)) for step, loss in rest["losses"]]
        self.scaler.load_state_dict(rest["scaler"])
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
    course.setting.report({"phase": "train", "step": course.step, "steps": steps, "loss": loss})
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
    setting.report({"phase": "validation", "step": course.step, "steps": setting.recipe.steps, "score": score})
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


def without_images(rows: Dataset) -> list[Row]:
    """All rows as plain data."""
    pictures = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    plain: list[Row] = rows.remove_columns(pictures).to_list()
    return plain


@torch.no_grad()
def evaluate(setting: Setting, rows: Dataset) -> tuple[Scores, list[Any]]:
    """Scores and predictions on all `rows`, in evaluation mode; in their order."""
    task, size = setting.task, setting.recipe.eval_batch_size
    setting.modules().eval()
    predictions: list[Any] = []

    def make(start: int) -> Batch:
        chosen = [rows[i] for i in range(start, min(start + size, len(rows)))]
        return setting.prepared(task.collate(chosen, setting.backbone, None))

    starts = range(0, len(rows), size)
    for made in ahead(make, starts, setting.workers):
        batch = made.to(setting.device)
        with computing(setting.recipe, setting.device):
            predictions += task.predict(setting.backbone, setting.head, batch, beams=setting.recipe.beams)
    return task.score(without_images(rows), predictions), predictions


@torch.no_grad()
def load_state(setting: Setting, state: dict[str, Tensor]) -> None:
    """Put the values of a state back into the trainable parameters. Raises KeyError for a name that is not one."""
    parameters = setting.trainable()
    for name, value in state.items():
        parameters[name].copy_(value)
