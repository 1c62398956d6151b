"""Run one cell, from its description to its record."""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import disable_progress_bars

from petlbench.api.backbone import Backbone
from petlbench.api.registries import METHODS, TASKS
from petlbench.api.task import Task
from petlbench.core.cell import Cell
from petlbench.core.errors import Unwritable, UserError
from petlbench.core.files import make_folder, write_atomic
from petlbench.core.recipe import Outcome
from petlbench.core.record import Memory, Parameters, Record, Size
from petlbench.measure.environment import describe
from petlbench.measure.memory import peak_rss_bytes, with_peaks, with_saved
from petlbench.pipeline import fingerprint
from petlbench.pipeline.assembly import build_backbone
from petlbench.pipeline.data import Data, load_data, load_source
from petlbench.pipeline.options import RunOptions
from petlbench.pipeline.trials import RateSearch
from petlbench.results.store import Store
from petlbench.training.checkpoint import Checkpoint, save_tensors
from petlbench.training.context import Report, RunContext, silent
from petlbench.training.evaluation import evaluate, load_state, without_images
from petlbench.training.loop import Diverged
from petlbench.training.setup import TrainingSetup
from petlbench.training.state import TrainingResult
from petlbench.training.step_costs import (
    canonical_saved_bytes,
    counted,
    effective_parameters,
    extra_at_inference,
    first_batch,
    inference,
    training_flops,
)

T = TypeVar("T")
CUDA_WORKERS = 4


def run_cell(
    cell: Cell,
    store_root: Path,
    options: RunOptions = RunOptions(),  # noqa: B008 -- frozen
    *,
    fingerprints: Mapping[str, str] | None = None,
    report: Report = silent,
) -> Record:
    """Train, select on validation, test once, measure, and save the record, whatever the outcome.

    A killed cell continues from its last checkpoint. `fingerprints`: those of the code when it was imported, for the
    record (default: of the code as it is now). Raise Unwritable if results cannot be saved.
    """
    disable_progress_bars()
    store = Store.open(store_root, create=True)
    context = context_of(options, lambda event: report({"cell": cell.id, **event}))
    run = CellRun(cell, store, options, context, fingerprints)
    try:
        return run.execute()
    except Unwritable:
        raise
    except Exception as error:  # one cell's fault must not take the others down
        traceback.print_exc()
        sys.stderr.flush()
        return run.fail(_outcome(error), _reason(error))


def context_of(options: RunOptions, report: Report) -> RunContext:
    """Return the context that the options describe on this machine."""
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    workers = options.workers if options.workers is not None else CUDA_WORKERS if wanted == "cuda" else 0
    return RunContext.on(wanted, report=report, workers=workers, data_root=options.data_root)


def _outcome(error: Exception) -> Outcome:
    if isinstance(error, Diverged):
        return "diverged"
    # Off CUDA, torch reports a failed allocation as a plain RuntimeError.
    starved = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
    return "oom" if starved else "failed"


def _reason(error: Exception) -> str:
    plain = isinstance(error, (UserError, Diverged))
    return str(error) if plain else f"{type(error).__name__}: {error}"


def size_of(cell: Cell) -> Size | None:
    """Return the value of the method's size option; None if there is no such option, or if the backbone decides."""
    cls = METHODS.get(cell.method)
    value = None if cls.size_option is None else getattr(cls.Config(**cell.method_config), cls.size_option.field)
    return None if value is None else Size(name=cls.size_option.field, value=value)  # type: ignore[union-attr]


@dataclass
class PartialRecord:
    """The fields of a record that are known so far. They go into the record even if the cell fails."""

    cell: Cell
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    main_metric: str = ""
    size: Size | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    parameters: Parameters | None = None

    def completed(self, **rest: Any) -> Record:
        """Return the record; `rest` gives the other fields."""
        return Record(**{**vars(self), **rest})


class CellRun:
    """The state of one cell while it runs."""

    def __init__(
        self,
        cell: Cell,
        store: Store,
        options: RunOptions,
        context: RunContext,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        self.cell, self.store, self.options, self.context = cell, store, options, context
        self.clock, self.report, self._fingerprints = context.clock, context.report, fingerprints
        self.partial = PartialRecord(cell)
        self.checkpoint: Checkpoint | None = None
        self.search: RateSearch | None = None
        self.untouched = 0

    def execute(self) -> Record:
        self.report({"phase": "load"})
        with self.clock.phase("load"):
            task, data = self._load()
        with self.clock.phase("build"):
            backbone = build_backbone(self.cell, self.context.device)
            self.untouched = sum(p.numel() for p in backbone.parameters())
        setup, fitted, lr = self._search(backbone, task, data)
        load_state(setup, fitted.state)
        self.report({"phase": "test"})
        with self.clock.phase("test"):
            scores, predictions = evaluate(setup, data.test)
        with self.clock.phase("save"):
            stored_bytes = self._save_adapter(fitted)
            self._submit(task.submission(without_images(data.test), predictions))
        peaks = self.clock.peaks()
        self.report({"phase": "measure"})
        with self.clock.phase("measure"):
            batch = first_batch(data.train, setup)
            canonical = self._measured("saved tensors", lambda: canonical_saved_bytes(setup, batch))
            memory = self._memory(fitted, canonical)
            flops = self._measured("operations", lambda: training_flops(setup, batch))
            reached = self._measured("effective parameters", lambda: effective_parameters(setup, batch))
            parameters = self._parameters(setup, stored_bytes)
            size = self.cell.recipe.eval_batch_size
            predicting = self._measured("inference", lambda: inference(setup, data.test, size))
            # Last, because `inference` has merged the method.
            extra = extra_at_inference(setup, self.untouched) if predicting else None
        self.partial.parameters = parameters.model_copy(update={"inference_extra": extra, "effective": reached})
        record = self.partial.completed(
            **self._ending(),
            outcome="ok",
            metrics=scores.metrics,
            validation=fitted.validation,
            chosen_lr=lr,
            memory=with_peaks(memory, peaks),
            inference=predicting,
            flops=flops,
            step_joules=fitted.step_joules,
        )
        samples = {
            "metric": task.main_metric,
            "sample_ids": scores.sample_ids,
            "scores": scores.samples,
            **({"predictions": predictions} if task.keeps_predictions else {}),
        }
        saved = self.store.save(record, samples)
        assert self.checkpoint is not None
        self.checkpoint.remove()
        return saved

    def fail(self, outcome: Outcome, reason: str) -> Record:
        """Save the record of a failed cell, with its reason, its trials and its machine."""
        if self.checkpoint and outcome == "diverged":  # it would diverge again from there
            self.checkpoint.remove()
        record = self.partial.completed(**self._ending(), outcome=outcome, reason=" ".join(reason.split()))
        return self.store.save(record, None)

    def _ending(self) -> dict[str, Any]:
        """Return the fields that every record ends with, whatever the outcome."""
        threads = self.options.threads or 1
        return {
            "trials": tuple(self.search.trials) if self.search else (),
            "timing": self.clock.timing(self.options.jobs, threads, self.context.workers),
            "environment": describe(str(self.context.device), threads),
        }

    def _load(self) -> tuple[Task, Data]:
        task = TASKS.get(self.cell.task)()
        self.partial.main_metric, self.partial.size = task.main_metric, size_of(self.cell)
        root = self.context.data_root
        source = load_source(self.cell, root)
        self.partial.fingerprints = self._fingerprints or fingerprint.fingerprints(self.cell, root, source)
        data = load_data(self.cell, source, task)
        self.partial.notes = source.notes()
        return task, data

    def _search(self, backbone: Backbone, task: Task, data: Data) -> tuple[TrainingSetup, TrainingResult, float]:
        self.partial.notes += (backbone.note,) if backbone.note else ()
        identity = [self.cell.id, self.partial.fingerprints, str(torch.__version__), self.context.device.type]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        path = self.store.checkpoints / f"{self.cell.id}.safetensors"
        self.checkpoint = Checkpoint(path, key, self.options.checkpoint_seconds)
        self.search = RateSearch(self.cell, backbone, task, self.context, self.checkpoint, self._inspect)
        return self.search.run(data)

    def _inspect(self, setup: TrainingSetup) -> None:
        """Count parameters early: it costs nothing, and a cell that fails later still has the counts."""
        self.partial.parameters = self._parameters(setup, None)

    def _parameters(self, setup: TrainingSetup, stored_bytes: int | None) -> Parameters:
        return counted(setup).model_copy(update={"stored_bytes": stored_bytes})

    def _measured(self, what: str, measure: Callable[[], T]) -> T | None:
        """Return `measure()`, or None if memory runs out: unfused attention may need more of it than training does."""
        try:
            return measure()
        except torch.OutOfMemoryError:
            self.partial.notes += (f"{what} not measured: out of memory",)
            return None

    def _memory(self, fitted: TrainingResult, saved: int | None) -> Memory:
        assert fitted.memory is not None
        return with_saved(fitted.memory, saved).model_copy(update={"peak_rss_bytes": peak_rss_bytes()})

    def _submit(self, submission: Any) -> None:
        """Write a file for the evaluation server, if the answers of the test split are not public."""
        if submission is None:
            return
        folder = self.store.root / "submissions"
        make_folder(folder)
        write_atomic(folder / f"{self.cell.id}.json", json.dumps(submission).encode())
        self.partial.notes += (f"no public answers: {folder.name}/{self.cell.id}.json is for the evaluation server",)

    def _save_adapter(self, fitted: TrainingResult) -> int:
        """Save everything that trained, and nothing else, as safetensors; return the size in bytes."""
        path = self.store.adapters / f"{self.cell.id}.safetensors"
        return save_tensors(path, fitted.state, {"cell": json.dumps(self.cell.model_dump(mode="json"))})
