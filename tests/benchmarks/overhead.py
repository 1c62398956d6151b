"""The cost of the training loop beyond a plain loop's: `python -m tests.benchmarks.overhead`.

After every step of the training loop a hand-written loop takes a step with the same modules, the same batch and the
same kind of optimizer, so that a machine's drift affects both. The result is the median ratio of such pairs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from petlbench.api.registries import TASKS
from petlbench.core.cell import Cell
from petlbench.describe.profile import profile_cells
from petlbench.measure.clock import WARMUP
from petlbench.pipeline.assembly import build_backbone, build_setup
from petlbench.pipeline.data import load_source, load_split
from petlbench.training.context import RunContext
from petlbench.training.loop import fit
from petlbench.training.optimizers import optimizer, rate
from petlbench.training.setup import TrainingSetup
from tests.benchmarks import holds, sized

LIMIT = 1.05  # highest allowed ratio
STEPS = sized(150, 12)
VALIDATION_ROWS = 2  # validation ends the run; the benchmark does not time it


@dataclass(frozen=True)
class Overhead:
    """Median seconds of a step by both loops, and the median of the pairs' ratios."""

    loop_seconds: float
    hand_seconds: float
    ratio: float
    phases_share: float  # sum of the phases over the total of the same run: 1


def prepare(method: str, batch_size: int = 8) -> tuple[TrainingSetup, Dataset]:
    """Return a method on `tiny` and vqa, ready to train, and rows of exactly one batch."""
    cell: Cell = profile_cells([method], task="vqa", batch_size=batch_size)[0]
    task, device = TASKS.get(cell.task)(), torch.device("cpu")
    rows = load_split(cell, load_source(cell, None), task, "train")
    setup, _ = build_setup(cell, build_backbone(cell, device), task, RunContext.on(device))
    return setup, rows


def by_hand(setup: TrainingSetup, rows: Dataset) -> Iterator[None]:
    """Run a plain loop, a step at a time: no clock, no report, no accounting."""
    backbone, head, task, recipe = setup.backbone, setup.head, setup.task, setup.recipe
    parameters = setup.trainable()
    optim = optimizer(parameters, recipe, recipe.lr, backbone, setup.method_parameters())
    for step in range(recipe.steps):
        order = np.random.default_rng([setup.seed, 0, step]).permutation(len(rows)).tolist()  # the rows are one batch
        rng = np.random.default_rng([setup.seed, 1, step])
        batch = task.collate([rows[i] for i in order], backbone, rng).to(setup.device)
        task.loss(backbone, head, batch).backward()
        nn.utils.clip_grad_norm_(parameters.values(), recipe.clip_norm)
        for group in optim.param_groups:
            group["lr"] = recipe.lr * group["scale"] * rate(recipe, step)
        optim.step()
        optim.zero_grad(set_to_none=True)
        yield


def measure(method: str = "lora", steps: int = STEPS, batch_size: int = 8) -> Overhead:
    """Run steps of both loops in turns and time them, except the first ones, which warm caches.

    A step of the training loop is everything it does between two reports.
    """
    setup, rows = prepare(method, batch_size)
    setup.recipe = setup.recipe.model_copy(update={"steps": steps})
    hand = by_hand(setup, rows)
    marks: list[tuple[float, float]] = []  # where a step of the loop ends, and then one by hand

    def report(event: dict[str, Any]) -> None:
        if event["phase"] == "train":
            ended = perf_counter()
            next(hand)
            marks.append((ended, perf_counter()))

    setup.context = replace(setup.context, report=report)
    fit(setup, rows, rows.select(range(VALIDATION_ROWS)), setup.recipe.lr)
    timing = setup.clock.timing()
    pairs = [(b[0] - a[1], b[1] - b[0]) for a, b in pairwise(marks)][WARMUP:]
    return Overhead(
        loop_seconds=median(ours for ours, _ in pairs),
        hand_seconds=median(theirs for _, theirs in pairs),
        ratio=median(ours / theirs for ours, theirs in pairs),
        phases_share=sum(timing.phases.values()) / timing.total_seconds,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print both medians and the ratio; the exit status is 1 if the ratio is above LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = measure(args.method, args.steps, args.batch_size)
    print(f"training loop  {1000 * found.loop_seconds:.2f} ms a step")
    print(f"by hand        {1000 * found.hand_seconds:.2f} ms a step")
    print(f"ratio          {found.ratio:.3f} (limit {LIMIT})")
    print(f"phases / total {found.phases_share:.4f}")
    return int(not holds(LIMIT, found.ratio))


if __name__ == "__main__":
    sys.exit(main())
