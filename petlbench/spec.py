"""What is run and what is left behind: frozen, validated models. Imports neither torch nor any method or task."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from .units import parse_bytes

SCHEMA_VERSION = 2
OLDER = "older, unverified"  # how a record of an earlier schema version is marked wherever it is shown

Positive = Annotated[int, Field(gt=0)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Outcome = Literal["ok", "oom", "diverged", "failed", "timeout"]


class Frozen(BaseModel):
    """Immutable and closed: an unknown key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Recipe(Frozen):
    """How a cell is trained and evaluated. The same for every method unless a suite says otherwise."""

    steps: Positive = Field(300, description="optimizer steps")
    batch_size: Positive = Field(32, description="training samples per step")
    eval_batch_size: Positive = Field(128, description="samples per evaluation batch")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.01, ge=0, description="AdamW decay; biases and one-dimensional gains are exempt")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW moment decays")
    eps: float = Field(1e-6, gt=0, description="AdamW epsilon")
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps with a rising rate")
    warmup_from_zero: bool = Field(False, description="the rate of the very first step is 0, not a share of the peak")
    schedule: Literal["linear", "cosine", "constant", "step"] = Field(
        "linear", description="the rate after warm-up; step: a tenth from two thirds of the steps on"
    )
    lr_floor: float = Field(0.0, ge=0, le=1, description="share of the peak rate that linear and cosine fall to")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="a layer's rate as a share of the next one's; heads, final norms: the peak"
    )
    method_lr: float = Field(
        1.0, gt=0, description="rate of the method's own parameters as a share of that of heads and host parts"
    )
    released: bool = Field(
        False,
        description="optimizer of VL-T5's, VL-Adapter's and VL-PET's code: decay after the update, of all but what has "
        "`bias` in its name (so of gains too), eps beside the uncorrected moment, the first step at a rate of 0",
    )
    clip_norm: float | None = Field(5.0, gt=0, description="global gradient-norm clip; null: none")
    validations: Positive = Field(1, description="evaluations on validation, evenly spaced; the best is kept for test")
    train_limit: Positive | None = Field(None, description="training rows used; all when null")
    eval_limit: Positive | None = Field(None, description="validation and test rows used; all when null")
    augment: str = Field("none", description="of training rows, by the task's name for it, such as `transvg` in rec")
    beams: Positive = Field(1, description="beam width of generation; 1 is greedy")
    lr_factors: tuple[float, ...] = Field((1.0,), min_length=1, description="trials: lr times each; best on validation")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of matrix products, by autocast; weights stay fp32; fp16 scales the loss"
    )
    attention: Literal["fused", "unfused"] = Field("fused", description="unfused keeps attention maps for backward")
    gradient_checkpointing: bool = Field(False, description="layers run again in backward instead of keeping tensors")
    compile: bool = Field(False, description="layers run through torch.compile; needs a C++ compiler")


class MethodSpec(Frozen):
    """A method by registry name, the name of its variant (free text, shown in tables) and its configuration."""

    name: str
    variant: str = ""
    config: dict[str, Any] = {}
    recipe: dict[str, Any] = {}

    @property
    def label(self) -> str:
        return f"{self.name}:{self.variant}" if self.variant else self.name


class BackboneSpec(Frozen):
    """A backbone by registry name and its configuration."""

    name: str
    config: dict[str, Any] = {}


class Cell(Frozen):
    """One (method, task, dataset, backbone, seed, recipe): the unit of work, failure, resumption and caching."""

    method: str
    variant: str = ""
    method_config: dict[str, Any] = {}
    task: str
    dataset: str
    dataset_config: dict[str, Any] = {}
    backbone: str
    backbone_config: dict[str, Any] = {}
    seed: int = 0
    recipe: Recipe = Recipe()

    @property
    def digest(self) -> str:
        """Eight hex digits of SHA-256 over the cell's canonical JSON, without what has its default value.

        The rule is for the fields of the cell and of its recipe, so a field that is added with a default changes no
        digest. A default that changes leaves the digest too, though not the cell: `differences` then tells the two
        apart, as a record holds its whole cell.
        """
        text = json.dumps(self.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def stem(self) -> str:
        """The readable part of `id`, safe in a file name; cells that differ in a configuration or recipe share it."""
        parts = [self.task, self.dataset, self.method, *([self.variant] if self.variant else []), self.backbone]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join([*parts, f"s{self.seed}"]))

    @property
    def id(self) -> str:
        """A file-name-safe, readable, unique name."""
        return f"{self.stem}_{self.digest}"

    def differences(self, other: Cell) -> tuple[str, ...]:
        """The parts in which `other` is another cell, as JSON holds them: `cell`, `recipe`, or none."""
        ours, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        recipes = ours.pop("recipe"), theirs.pop("recipe")
        parts = {"cell": ours != theirs, "recipe": recipes[0] != recipes[1]}
        return tuple(name for name, differs in parts.items() if differs)

    @property
    def label(self) -> str:
        """What a person reads in a progress line."""
        variant = f":{self.variant}" if self.variant else ""
        return f"{self.method}{variant} on {self.task}:{self.dataset} ({self.backbone}, seed {self.seed})"


class Suite(Frozen):
    """What a YAML file holds: methods x tasks x backbones x seeds, and one recipe with overrides."""

    name: str
    description: str = ""
    methods: tuple[MethodSpec, ...] = Field(min_length=1)
    tasks: tuple[str, ...] = Field(min_length=1, description="`task` or `task:dataset`")
    backbones: tuple[BackboneSpec, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    recipe: dict[str, Any] = Field({}, description="fields of Recipe, for every cell")
    task_recipes: dict[str, dict[str, Any]] = Field({}, description="fields of Recipe by task name")
    dataset_configs: dict[str, dict[str, Any]] = Field({}, description="options by data set name")
    sweep: bool = Field(False, description="every method at each of the sizes it declares")
    timeout: float | None = Field(None, gt=0, description="seconds that one cell may take")
    memory_limit: Bytes | None = Field(None, description="resident memory of one cell: bytes, or text such as 4 GiB")

    @field_validator("seeds")
    @classmethod
    def _no_seed_twice(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"a seed is given more than once: {', '.join(map(str, seeds))}")
        return seeds

    @model_validator(mode="before")
    @classmethod
    def _names_stand_for_specs(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data

        def spec(item: Any) -> Any:
            return {"name": item} if isinstance(item, str) else item

        lists = {k: [spec(i) for i in data[k]] for k in ("methods", "backbones") if isinstance(data.get(k), list)}
        return {**data, **lists}


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
