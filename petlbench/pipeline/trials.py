"""Try the learning rates of a cell one after the other; a search that is killed continues from its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from petlbench.api.backbone import Backbone
from petlbench.api.snapshot import Snapshot
from petlbench.api.task import Task
from petlbench.core.cell import Cell
from petlbench.core.record import Memory, Trial
from petlbench.pipeline.assembly import build_setup
from petlbench.pipeline.data import Data
from petlbench.training.checkpoint import Checkpoint, Saved, prefixed
from petlbench.training.context import RunContext
from petlbench.training.loop import Diverged, fit
from petlbench.training.setup import TrainingSetup
from petlbench.training.state import TrainingResult, TrainingState


@dataclass(frozen=True)
class BestTrial:
    """The best trial on validation so far."""

    score: float
    lr: float
    fit: TrainingResult

    def state(self) -> Saved:
        """Return everything that a checkpoint needs to keep."""
        fields = {name: getattr(self.fit, name) for name in ("validation", "best_step", "losses", "step_joules")}
        memory = self.fit.memory.model_dump() if self.fit.memory else None
        return Saved(self.fit.state, {"score": self.score, "lr": self.lr, "fit": {**fields, "memory": memory}})

    @classmethod
    def restored(cls, state: Saved) -> BestTrial:
        """Rebuild the trial from `state`."""
        rest = dict(state.rest["fit"])
        memory = rest.pop("memory")
        losses = tuple((int(step), float(loss)) for step, loss in rest.pop("losses"))
        fitted = TrainingResult(state=state.tensors, losses=losses, memory=Memory(**memory) if memory else None, **rest)
        return cls(state.rest["score"], state.rest["lr"], fitted)


class RateSearch:
    """Makes one trial per rate, all from the same start, and keeps the best on validation."""

    def __init__(
        self,
        cell: Cell,
        backbone: Backbone,
        task: Task,
        context: RunContext,
        checkpoint: Checkpoint,
        inspect: Callable[[TrainingSetup], None] = lambda setup: None,
    ) -> None:
        """`inspect` is called with each setup once it is built."""
        self._cell, self._backbone, self._task = cell, backbone, task
        self._context, self._checkpoint, self._inspect = context, checkpoint, inspect
        self._setup: tuple[TrainingSetup, Snapshot] | None = None
        self._best: BestTrial | None = None
        self.trials: list[Trial] = []

    def run(self, data: Data) -> tuple[TrainingSetup, TrainingResult, float]:
        """Return the setup, the training result (not yet loaded into the setup) and the rate of the best trial.

        Continues from the checkpoint if there is one. Raise Diverged if all trials diverge.
        """
        rates = [self._cell.recipe.lr * factor for factor in self._cell.recipe.lr_factors]
        resume = self._resumed()
        for lr in rates[len(self.trials) :]:
            setup = self._start()
            try:
                fitted = fit(setup, data.train, data.validation, lr, resume=resume, keep=self._keep)
            except Diverged:
                self.trials.append(Trial(lr=lr, outcome="diverged"))
                if self._best is None and len(self.trials) == len(rates):
                    raise
            else:
                self._finished(lr, fitted)
            resume = None
        assert self._best is not None
        last = self._best.lr == rates[-1]
        return (setup if last else self._start()), self._best.fit, self._best.lr

    def _start(self) -> TrainingSetup:
        """Build the setup afresh, after removing what an earlier trial left in the backbone."""
        with self._context.clock.phase("build"):
            if self._setup:
                self._setup[1].restore()
            self._setup = build_setup(self._cell, self._backbone, self._task, self._context)
            self._inspect(self._setup[0])
        return self._setup[0]

    def _finished(self, lr: float, fitted: TrainingResult) -> None:
        trial = Trial(
            lr=lr, outcome="ok", validation=fitted.validation, best_step=fitted.best_step, losses=fitted.losses
        )
        self.trials.append(trial)
        score = fitted.validation[self._task.main_metric]
        if self._best is None or score > self._best.score:
            self._best = BestTrial(score, lr, fitted)

    def _keep(self, training: TrainingState) -> None:
        """Write the checkpoint when it is due."""
        if not self._checkpoint.due():
            return
        with self._context.clock.phase("checkpoint"):
            here, best = training.state(), self._best.state() if self._best else Saved()
            rest: dict[str, Any] = {
                "course": here.rest,
                "winner": best.rest,
                "trials": [trial.model_dump(mode="json") for trial in self.trials],
                "clock": self._context.clock.state(),
            }
            tensors = {**prefixed("course", here.tensors), **prefixed("winner", best.tensors)}
            self._checkpoint.save(Saved(tensors, rest))

    def _resumed(self) -> Saved | None:
        """Load what an earlier process saved; return the state of the trial that it was in, if any."""
        saved = self._checkpoint.load()
        if saved is None:
            return None
        rest = saved.rest
        self._context.clock.restore(rest["clock"])
        self.trials = [Trial.model_validate(trial) for trial in rest["trials"]]
        if rest["winner"]:
            self._best = BestTrial.restored(Saved(saved.under("winner"), rest["winner"]))
        self._context.report({"phase": "resume", "step": rest["course"]["step"], "steps": self._cell.recipe.steps})
        return Saved(saved.under("course"), rest["course"])
