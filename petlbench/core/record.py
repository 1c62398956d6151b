"""What is run and what is left behind: frozen, validated models. Imports neither torch nor any method or task."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from petlbench.core.cell import Cell
from petlbench.core.recipe import Frozen, Outcome

SCHEMA_VERSION = 2

OLDER = "older, unverified"  # how a record of an earlier schema version is marked wherever it is shown


class Parameters(Frozen):
    """Counts of scalars: what trains, split by owner; what is stored; what inference needs besides the backbone."""

    method: int = Field(description="trainable, inserted or unfrozen by the method")
    head: int = Field(description="trainable, in the task's head")
    host: int = Field(description="trainable, in host parts that every method trains (such as a visual projection)")
    trainable: int = Field(description="method + head + host")
    total: int = Field(description="all parameters of the adapted backbone and the head")
    percent: float = Field(description="100 * trainable / total")
    effective: int | None = Field(None, description="of `trainable`: those that the loss can send a gradient to here")
    stored: int | None = Field(None, description="scalars in the saved adapter file")
    stored_bytes: int | None = Field(None, description="size of the saved adapter file")
    inference_extra: int | None = Field(
        None, description="parameters beyond the untouched backbone's, head apart, after merging where that is possible"
    )


class Peak(Frozen):
    """Highest CUDA memory of a stretch of time, in bytes."""

    allocated_bytes: int
    reserved_bytes: int


class Memory(Frozen):
    """Bytes. The accounting is canonical: the same on every machine. Native bytes and peaks are the machine's."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    saved_bytes: int | None = Field(
        description="tensors that one training step saves for backward, deduplicated by storage, with unfused "
        "attention and one-byte dropout masks, in fp32; with gradient checkpointing where the recipe has it"
    )
    accounted_bytes: int | None = Field(description="the four above together")
    native_saved_bytes: int | None = Field(None, description="the same as the machine really keeps them")
    saved_backend: str = Field("", description="what the native bytes depend on: device, attention, precision, ...")
    peaks: dict[str, Peak] = Field({}, description="by phase; CUDA only")
    peak_allocated_bytes: int | None = Field(None, description="CUDA only")
    peak_reserved_bytes: int | None = Field(None, description="CUDA only")
    peak_rss_bytes: int | None = Field(None, description="peak resident memory of the cell's process")


class Timing(Frozen):
    """Seconds. `phases`, with the remainder `other`, sum to `total_seconds`; training never includes evaluation."""

    phases: dict[str, float]
    total_seconds: float = Field(description="by a clock of its own, from the cell's start; not the sum of the phases")
    train_seconds: float = Field(description="data + forward + backward + optimizer, over all trials")
    step_seconds: float | None = Field(None, description="median of a training step after warm-up")
    forward_seconds: float | None = Field(None, description="median of its forward pass")
    backward_seconds: float | None = Field(None, description="median of its backward pass")
    optimizer_seconds: float | None = Field(None, description="median of clipping and the optimizer's step")
    jobs: int = Field(1, description="cells that ran at the same time; more than 1 marks contended timings")
    threads: int = 1
    workers: int = Field(0, description="threads that made batches beside the computing ones")
    resumed: int = Field(0, description="times that the cell was continued from a checkpoint")


class Inference(Frozen):
    """Prediction, preprocessing included; `merged` where the method can fold itself into the weights."""

    latency_seconds: float = Field(description="median of one prediction, batch of one")
    throughput: float = Field(description="samples per second in batches of `batch_size`")
    batch_size: int
    merged_latency_seconds: float | None = None
    merged_throughput: float | None = None


class Flops(Frozen):
    """Floating-point operations of one training step, dropout off, attention unfused; a multiply-add is two.

    What gradient checkpointing computes again counts as backward; precision and compilation change nothing.
    """

    forward: int
    backward: int

    @property
    def step(self) -> int:
        return self.forward + self.backward


class Size(Frozen):
    """The value of a method's size knob: what a curve of one method runs along."""

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
    """What one cell left behind."""

    schema_version: int = SCHEMA_VERSION
    cell: Cell
    outcome: Outcome
    reason: str = ""
    log: tuple[str, ...] = Field((), description="last lines that the cell printed, when it did not end well")
    started: str = Field("", description="UTC, ISO 8601")
    main_metric: str = ""
    metrics: dict[str, float] = Field({}, description="on test, after the one test evaluation")
    validation: dict[str, float] = {}
    chosen_lr: float | None = None
    trials: tuple[Trial, ...] = ()
    parameters: Parameters | None = None
    memory: Memory | None = None
    timing: Timing | None = None
    inference: Inference | None = None
    flops: Flops | None = None
    step_joules: float | None = Field(None, description="energy of one training step; where NVML gives it")
    size: Size | None = Field(None, description="of the method; none where it has no size knob")
    samples: str | None = Field(None, description="per-sample test scores: JSON file name, beside the record")
    fingerprints: dict[str, str] = Field(
        {}, description="of the code (method, task, metric, backbone, source, training), of the data and of the weights"
    )
    notes: tuple[str, ...] = Field((), description="what a reader of the row must know, such as skipped images")
    environment: dict[str, Any] = {}

    @property
    def older(self) -> bool:
        """Of an earlier schema version: shown, but nothing in it can be checked against what is asked for today."""
        return self.schema_version < SCHEMA_VERSION
