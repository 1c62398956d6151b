"""Make synthetic records for the tests of the code that reads records."""

from __future__ import annotations

from typing import Any

from petlbench.core.cell import Cell
from petlbench.core.recipe import Outcome, Recipe
from petlbench.core.record import Flops, Inference, Memory, Parameters, Record, Size, Timing

MIB = 2**20


def make_record(
    method: str = "lora",
    score: float = 0.5,
    *,
    variant: str = "",
    task: str = "rec",
    dataset: str = "digits",
    backbone: str = "tiny",
    seed: int = 0,
    outcome: Outcome = "ok",
    trainable: int = 10_000,
    accounted: int = 100 * MIB,
    train_seconds: float = 60.0,
    jobs: int = 1,
    steps: int = 300,
    metric: str = "acc@0.5",
    started: str = "2024-01-01T00:00:00Z",
    method_config: dict[str, Any] | None = None,
    peaks: tuple[int | None, int | None] = (None, 300 * MIB),
    environment: dict[str, Any] | None = None,
    size: tuple[str, float] | None = None,
    fingerprints: dict[str, str] | None = None,
    flops: tuple[int, int] | None = (10**12, 2 * 10**12),
    inference: Inference | None = None,
    step_joules: float | None = None,
) -> Record:
    """Return a plausible record; a failed one has its parameters but no results of training."""
    cell = Cell(
        method=method,
        variant=variant,
        method_config=method_config or {},
        task=task,
        dataset=dataset,
        backbone=backbone,
        seed=seed,
        recipe=Recipe(steps=steps),
    )
    common: dict[str, Any] = {
        "cell": cell,
        "outcome": outcome,
        "started": started,
        "main_metric": metric,
        "environment": environment or {},
        "size": Size(name=size[0], value=size[1]) if size else None,
        "fingerprints": fingerprints or {},
        "parameters": _parameters(trainable, trainable if outcome == "ok" else None),
    }
    if outcome != "ok":
        return Record(**common, reason="out of memory")
    return Record(
        **common,
        metrics={metric: score},
        memory=_memory(accounted, *peaks),
        timing=_timing(train_seconds, steps, jobs),
        inference=inference,
        flops=Flops(forward=flops[0], backward=flops[1]) if flops else None,
        step_joules=step_joules,
    )


def _memory(accounted: int, peak_allocated: int | None, peak_rss: int | None) -> Memory:
    quarter = accounted // 4
    return Memory(
        weights_bytes=quarter,
        gradients_bytes=quarter,
        optimizer_bytes=quarter,
        saved_bytes=accounted - 3 * quarter,
        accounted_bytes=accounted,
        saved_backend="cpu, unfused",
        peak_allocated_bytes=peak_allocated,
        peak_rss_bytes=peak_rss,
    )


def _timing(train_seconds: float, steps: int, jobs: int) -> Timing:
    return Timing(
        phases={"forward": train_seconds, "other": 1.0},
        total_seconds=train_seconds + 1.0,
        train_seconds=train_seconds,
        step_seconds=train_seconds / steps,
        jobs=jobs,
    )


def _parameters(trainable: int, stored: int | None) -> Parameters:
    head = 1_000
    return Parameters(
        method=trainable - head,
        head=head,
        host=0,
        trainable=trainable,
        total=1_000_000,
        percent=trainable / 1e4,
        stored=stored,
    )


def make_samples(metric: str, scores: list[float], ids: list[str] | None = None) -> dict[str, Any]:
    """Return per-sample scores as a run saves them."""
    ids = ids or [f"image-{index}" for index in range(len(scores))]
    return {"metric": metric, "sample_ids": ids, "scores": {metric: scores}, "predictions": ["?"] * len(scores)}
