"""Hold, save and restore the state of a training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

from petlbench.core.record import Memory
from petlbench.measure.energy import energy_counter
from petlbench.training.batches import Batches
from petlbench.training.checkpoint import Saved, prefixed
from petlbench.training.optimizers import optimizer
from petlbench.training.precision import scaler
from petlbench.training.seeds import rng_state, set_rng_state
from petlbench.training.setup import TrainingSetup


@dataclass(frozen=True)
class TrainingResult:
    """The best state on validation, with the metrics, losses and costs of the training that found it."""

    state: dict[str, Tensor]
    validation: dict[str, float]
    best_step: int
    losses: tuple[tuple[int, float], ...]
    memory: Memory | None
    step_joules: float | None = None


class TrainingState:
    """The state of a training: everything that its next step and its result depend on."""

    def __init__(self, setup: TrainingSetup, train: Dataset, lr: float) -> None:
        self.setup, self.lr = setup, lr
        self.modules = setup.modules().train()
        self.parameters = setup.trainable()
        self.optimizer = optimizer(self.parameters, setup.recipe, lr, setup.backbone, setup.method_parameters())
        self.scaler = scaler(setup.recipe, setup.device)
        self.train = train
        self.batches = Batches(train, setup)
        self.step = 0
        self.losses: list[tuple[int, float]] = []
        self.memory: Memory | None = None
        self.meter = energy_counter(setup.device)
        self.joules: tuple[float, int] = (0.0, 0)  # joules, and the number of steps after warm-up that took them
        self.best: BestState | None = None

    def _values(self) -> dict[str, Tensor]:
        """Return the tensors that training can change: parameters, and buffers of modules in training mode.

        A module that stays in evaluation mode, such as a CNN that only makes features, keeps its buffers.
        """
        training = [(prefix, module) for prefix, module in self.modules.named_modules() if module.training]
        buffers = {f"{prefix}.{name}": b for prefix, m in training for name, b in m.named_buffers(recurse=False)}
        return {**self.parameters, **buffers}

    def state(self) -> Saved:
        """Return everything that `restore` needs to continue with the same numbers."""
        best = self.best
        moments = {
            f"{index}/{key}": value
            for index, state in self.optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }
        tensors = {
            **prefixed("values", self._values()),
            **prefixed("optimizer", moments),
            **prefixed("rng", rng_state(self.setup.device)),
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
        return Saved(tensors, rest)

    @torch.no_grad()
    def restore(self, state: Saved) -> None:
        """Return to the point at which `state` was taken."""
        rest = state.rest
        saved = state.under("values")
        for name, value in self._values().items():
            value.copy_(saved[name])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.under("optimizer").items():
            index, _, key = name.partition("/")
            moments.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        set_rng_state(state.under("rng"), self.setup.device)
        self.step = rest["step"]
        self.batches = Batches(self.train, self.setup, self.step)
        self.losses = [(int(step), float(loss)) for step, loss in rest["losses"]]
        self.scaler.load_state_dict(rest["scaler"])
        self.memory = Memory(**rest["memory"]) if rest["memory"] else None
        self.joules = (float(rest["joules"][0]), int(rest["joules"][1]))
        self.best = BestState(**rest["best"], state=state.under("best")) if rest["best"] else None


@dataclass(frozen=True)
class BestState:
    """The best state on validation so far."""

    score: float
    step: int
    metrics: dict[str, float]
    state: dict[str, Tensor]
