"""The record of a cell, as frozen, validated models. This module imports no torch, method or task."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from petlbench.core.cell import Cell
from petlbench.core.recipe import Frozen, Outcome

SCHEMA_VERSION = 2

OLDER = "older, unverified"  # the mark on a record of an earlier schema version, wherever it is shown


class Parameters(Frozen):
    """Counts of scalars: trainable ones by owner, stored ones, and those that inference adds to the backbone."""

    method: int = Field(description="trainable, inserted or unfrozen by the method")
    head: int = Field(description="trainable, in the task's head")
    host: int = Field(description="trainable, in host parts that every method trains (such as a visual projection)")
    trainable: int = Field(description="method + head + host")
    total: int = Field(description="all parameters of the adapted backbone and the head")
    percent: float = Field(description="100 * trainable / total")
    effective: int | None = Field(None, description="trainable scalars that the loss can send a gradient to here")
    stored: int | None = Field(None, description="scalars in the saved adapter file")
    stored_bytes: int | None = Field(None, description="size of the saved adapter file")
    inference_extra: int | None = Field(
        None, description="parameters beyond the untouched backbone's, without the head, merged where that is possible"
    )


class Peak(Frozen):
    """The highest CUDA memory over some time, in bytes."""

    allocated_bytes: int
    reserved_bytes: int


class Memory(Frozen):
    """Bytes. The accounting is canonical: equal on every machine. Native bytes and peaks depend on the machine."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    saved_bytes: int | None = Field(
        description="tensors that one training step saves for backward, deduplicated by storage, with unfused "
        "attention and one-byte dropout masks, in fp32; with gradient checkpointing if the recipe sets it"
    )
    accounted_bytes: int | None = Field(description="the four above together")
    native_saved_bytes: int | None = Field(None, description="tensors saved for backward as this machine keeps them")
    saved_backend: str = Field("", description="what the native bytes depend on: device, attention, precision, ...")
    peaks: dict[str, Peak] = Field({}, description="by phase; CUDA only")
    peak_allocated_bytes: int | None = Field(None, description="CUDA only")
    peak_reserved_bytes: int | None = Field(None, description="CUDA only")
    peak_rss_bytes: int | None = Field(None, description="peak resident memory of the cell's process")


class Timing(Frozen):
    """Seconds. `phases`, including the remainder `other`, sum to `total_seconds`; training excludes evaluation."""

    phases: dict[str, float]
    total_seconds: float = Field(description="measured separately from the cell's start; not the sum of the phases")
    train_seconds: float = Field(description="data + forward + backward + optimizer, over all trials")
    step_seconds: float | None = Field(None, description="median of a training step after warm-up")
    forward_seconds: float | None = Field(None, description="median of its forward pass")
    backward_seconds: float | None = Field(None, description="median of its backward pass")
    optimizer_seconds: float | None = Field(None, description="median of clipping and the optimizer's step")
    jobs: int = Field(1, description="cells that ran at the same time; more than 1 marks contended timings")
    threads: int = 1
    workers: int = Field(0, description="threads that prepared batches, besides the computing threads")
    resumed: int = Field(0, description="number of times that the cell continued from a checkpoint")


class Inference(Frozen):
    """Speed of prediction, preprocessing included; `merged` if the method can be folded into the weights."""

    latency_seconds: float = Field(description="median of one prediction, batch of one")
    throughput: float = Field(description="samples per second in batches of `batch_size`")
    batch_size: int
    merged_latency_seconds: float | None = None
    merged_throughput: float | None = None


class Flops(Frozen):
    """Floating-point operations of one training step, dropout off, attention unfused; a multiply-add is two.

    Recomputation by gradient checkpointing counts as backward; precision and compilation change nothing.
    """

    forward: int
    backward: int

    @property
    def step(self) -> int:
        return self.forward + self.backward


class Size(Frozen):
    """The value of a method's size option, the axis of the method's curve."""

    name: str
    value: float


class Trial(Frozen):
    """One learning rate tried; selection uses the validation score only."""

    lr: float
    outcome: Outcome
    validation: dict[str, float] = {}
    best_step: int | None = None
    losses: tuple[tuple[int, float], ...] = Field((), description="(step, training loss), thinned")


class Record(Frozen):
    """The results of one cell, and the conditions under which they were measured."""

    schema_version: int = SCHEMA_VERSION
    cell: Cell
    outcome: Outcome
    reason: str = ""
    log: tuple[str, ...] = Field((), description="last lines that the cell printed, if it failed")
    started: str = Field("", description="UTC, ISO 8601")
    main_metric: str = ""
    metrics: dict[str, float] = Field({}, description="on the test split, from its one evaluation")
    validation: dict[str, float] = {}
    chosen_lr: float | None = None
    trials: tuple[Trial, ...] = ()
    parameters: Parameters | None = None
    memory: Memory | None = None
    timing: Timing | None = None
    inference: Inference | None = None
    flops: Flops | None = None
    step_joules: float | None = Field(None, description="energy of one training step, where NVML reports it")
    size: Size | None = Field(None, description="of the method; none if it has no size option")
    samples: str | None = Field(None, description="per-sample test scores: JSON file name, beside the record")
    fingerprints: dict[str, str] = Field(
        {},
        description="digests of the code (method, task, metric, backbone, source, training), the data and the weights",
    )
    notes: tuple[str, ...] = Field((), description="caveats for readers of the row, such as skipped images")
    environment: dict[str, Any] = {}

    @property
    def older(self) -> bool:
        """Whether the schema version is an earlier one: such a record is shown but cannot be checked."""
        return self.schema_version < SCHEMA_VERSION
