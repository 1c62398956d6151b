"""Measure what a method costs without training it: parameters, bytes, FLOPs and seconds of a few real steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from petlbench.api.backbone import Backbone
from petlbench.api.registries import TASKS
from petlbench.api.source import Source
from petlbench.api.task import Task
from petlbench.core.cell import Cell, MethodSpec, Suite
from petlbench.core.errors import UserError
from petlbench.core.record import Parameters
from petlbench.describe.cost_table import Costs
from petlbench.measure.clock import IN_STEP, TRAINING, WARMUP
from petlbench.measure.environment import describe
from petlbench.measure.memory import planned, with_peaks, with_saved
from petlbench.pipeline.assembly import build_backbone, build_setup
from petlbench.pipeline.compatibility import quiet_meta
from petlbench.pipeline.data import load_source, load_split
from petlbench.pipeline.plan.suite import expand
from petlbench.pipeline.plan.variants import method_specs
from petlbench.training.context import RunContext
from petlbench.training.loop import Diverged, train_step
from petlbench.training.setup import TrainingSetup
from petlbench.training.state import TrainingState
from petlbench.training.step_costs import (
    canonical_saved_bytes,
    counted,
    effective_parameters,
    extra_at_inference,
    first_batch,
    inference,
    training_flops,
)

TURNS = 2  # the methods take turns with their timed steps, so that a machine's drift affects all alike
SECONDS_OF_ENERGY = 1.0  # a GPU's driver updates its counter about ten times a second: a shorter time gives no figure


def profile_cells(
    methods: Sequence[str],
    *,
    task: str,
    backbone: str = "tiny",
    batch_size: int = 32,
    data_root: Path | None = None,
) -> list[Cell]:
    """Return one cell per method (names and wildcards, default options), limited to the rows that a profile needs.

    `task` is a name or `task:dataset`. Raise UserError if a name does not exist or two of them do not fit.
    """
    suite = Suite.model_validate(
        {
            "name": "profile",
            "methods": [spec.model_dump() for spec in method_specs(methods)],
            "tasks": [task],
            "backbones": [backbone],
            "recipe": {"batch_size": batch_size, "eval_batch_size": batch_size},
        }
    )
    return expand(suite, limit=batch_size, data_root=data_root)


def profile(
    cells: Sequence[Cell],
    *,
    device: str = "auto",
    threads: int | None = None,
    steps: int = 6,
    meta: bool = False,
    data_root: Path | None = None,
) -> list[Costs]:
    """Measure the costs of each cell, in the cells' order; `steps` training steps are timed.

    With `meta` nothing is allocated or run: only parameters and planned bytes are known, for a backbone of any size.
    `threads` None means torch's own number. Raise UserError if a method does not fit the backbone.
    """
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device("meta" if meta else automatic if device == "auto" else device)
    costs: dict[str, Costs] = {}  # by cell id
    with _threads(threads), quiet_meta():
        environment = {} if meta else describe(str(chosen), torch.get_num_threads())
        for _, group in groupby(sorted(cells, key=_shared), key=_shared):
            subjects = _subjects(list(group), chosen)
            if meta:
                for subject in subjects:
                    subject.plan()
            else:
                _measure(subjects, load_source(subjects[0].cell, data_root), steps)
            costs |= {subject.cell.id: subject.costs(environment) for subject in subjects}
    return [costs[cell.id] for cell in cells]


def _measure(subjects: Sequence[_ProfiledCell], source: Source, steps: int) -> None:
    rows: dict[int | None, Dataset] = {}
    for subject in subjects:
        limit = subject.cell.recipe.train_limit
        if limit not in rows:
            rows[limit] = load_split(subject.cell, source, subject.task, "train")
        subject.measure(rows[limit])
    turns = max(1, min(TURNS, steps))
    for turn in range(turns):
        for subject in subjects:
            subject.train(steps // turns + (turn < steps % turns))
    for subject in subjects:  # last, so that every cell's calls are warmed up
        subject.predict()


def _shared(cell: Cell) -> str:
    """Return a key of everything but method and recipe; cells with equal keys are measured on one backbone."""
    return cell.model_dump_json(exclude={"method", "variant", "method_config", "recipe"})


def _subjects(cells: Sequence[Cell], device: torch.device) -> list[_ProfiledCell]:
    task, backbone = TASKS.get(cells[0].task)(), build_backbone(cells[0], device)
    return [_ProfiledCell(cell, backbone, task, device) for cell in cells]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _ProfiledCell:
    """One cell under measurement, on a backbone that it shares with others."""

    def __init__(self, cell: Cell, backbone: Backbone, task: Task, device: torch.device) -> None:
        self.cell, self.backbone, self.task, self.device = cell, backbone, task, device
        self.untouched = sum(p.numel() for p in backbone.parameters())
        self.context = RunContext.on(device)
        self.fields: dict[str, Any] = {"cell": cell, "method": MethodSpec(name=cell.method, variant=cell.variant).label}
        self.joules: list[tuple[float, int]] = []  # by turn: joules, number of steps

    @contextmanager
    def _adapted(self) -> Iterator[TrainingSetup]:
        """Yield the cell's training setup; restore the backbone afterwards."""
        cell = self.cell
        try:
            setup, handle = build_setup(cell, self.backbone, self.task, self.context)
        except ValueError as error:
            raise UserError(f"method '{cell.method}' does not fit backbone '{cell.backbone}': {error}") from error
        try:
            yield setup
        finally:
            handle.restore()

    def plan(self) -> None:
        """Count what is known without running anything."""
        with self._adapted() as setup:
            self.memory = planned(setup.modules().values())
            self.fields["parameters"] = _counted(setup)
            if setup.method is not None and setup.method.mergeable:
                setup.method.merge()
            self._count_extra(setup)

    def measure(self, rows: Dataset) -> None:
        """Measure what is the same on every machine, for the first batch of `rows`."""
        self.rows = rows
        with self._adapted() as setup:
            batch = first_batch(self.rows, setup)
            reached = effective_parameters(setup, batch)
            self.fields["parameters"] = _counted(setup).model_copy(update={"effective": reached})
            self.saved = canonical_saved_bytes(setup, batch)
            self.fields["flops"] = training_flops(setup, batch)

    def predict(self) -> None:
        with self._adapted() as setup:
            self.fields["inference"] = inference(setup, self.rows, self.cell.recipe.eval_batch_size)
            self._count_extra(setup)

    def _count_extra(self, merged: TrainingSetup) -> None:
        extra = extra_at_inference(merged, self.untouched)
        self.fields["parameters"] = self.fields["parameters"].model_copy(update={"inference_extra": extra})

    def train(self, steps: int) -> None:
        """Train one turn: untimed steps, then `steps` timed ones; memory is accounted in the first step."""
        with self._adapted() as setup:
            # The rate changes no cost; a schedule that is shorter than the turn would make it negative.
            setup.recipe = setup.recipe.model_copy(update={"schedule": "constant"})
            training = TrainingState(setup, self.rows, setup.recipe.lr)
            untimed = 1 if self.joules else WARMUP  # in the second turn only the optimizer's state is new
            self.context.clock.warm_up(untimed)
            try:
                for _ in range(untimed + steps):
                    train_step(training)
            except Diverged as error:
                raise UserError(f"method '{self.cell.method}' cannot be profiled: {error}; lower its rate") from error
            assert training.memory is not None
            self.memory = with_saved(training.memory, self.saved)
            self.joules.append(training.joules)

    def costs(self, environment: dict[str, Any]) -> Costs:
        timing = self.context.clock.timing()
        seconds = {f"{name}_seconds": getattr(timing, f"{name}_seconds") for name in ("step", *IN_STEP)}
        joules, steps = (sum(values) for values in zip(*self.joules, strict=True)) if self.joules else (0.0, 0)
        long_enough = steps * (timing.step_seconds or 0.0) >= SECONDS_OF_ENERGY
        energy = joules / steps if long_enough and joules else None
        # All clocks read one peak of the device: only phases that end before another clock runs belong to this cell.
        peaks = {name: peak for name, peak in self.context.clock.peaks().items() if name in TRAINING}
        memory = with_peaks(self.memory, peaks)
        return Costs(**self.fields, **seconds, memory=memory, step_joules=energy, environment=environment)


def _counted(setup: TrainingSetup) -> Parameters:
    stored_bytes = sum(p.numel() * p.element_size() for p in setup.trainable().values())
    return counted(setup).model_copy(update={"stored_bytes": stored_bytes})
