"""One cell, from its description to its record."""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import disable_progress_bars

from petlbench import fingerprint
from petlbench.assembly import Data, build_backbone, load_data, load_source
from petlbench.backbones.base import Backbone
from petlbench.checkpoint import Checkpoint, save_tensors
from petlbench.errors import Unwritable, UserError
from petlbench.measure.clock import PhaseClock
from petlbench.measure.environment import describe
from petlbench.measure.memory import peak_rss_bytes, with_peaks, with_saved
from petlbench.measure.setting import (
    canonical_saved_bytes,
    counted,
    effective,
    extra_at_inference,
    first_batch,
    inference,
    training_flops,
)
from petlbench.records import Store, make_folder, write_atomic
from petlbench.registry import METHODS, TASKS
from petlbench.search import Search
from petlbench.spec import Cell, Memory, Outcome, Parameters, Record, Size
from petlbench.task import Task
from petlbench.training import Diverged, Fit, Report, Setting, evaluate, load_state, without_images

T = TypeVar("T")
CUDA_WORKERS = 4
Event = dict[str, Any]


def run_cell(
    cell: Cell,
    store_root: Path,
    *,
    device: str = "auto",
    threads: int = 1,
    jobs: int = 1,
    data_root: Path | None = None,
    checkpoint_seconds: float = 60.0,
    workers: int | None = None,
    fingerprints: dict[str, str] | None = None,
    report: Callable[[Event], None] = lambda event: None,
) -> Record:
    """Train, select on validation, test once, measure, and save the record, whatever the outcome.

    A cell that was killed goes on from its last checkpoint; one is written every `checkpoint_seconds` while it trains.
    `workers`: threads that make batches meanwhile (default: some on CUDA, none on a CPU, where they take its time).
    `fingerprints`: those to record, of the code as it was when it was imported; by default as it is now.
    Raises Unwritable when results cannot be saved.
    """
    disable_progress_bars()
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    loading = workers if workers is not None else CUDA_WORKERS if chosen.type == "cuda" else 0
    options = Options(chosen, threads, jobs, loading, data_root, checkpoint_seconds, fingerprints)
    run = CellRun(cell, Store.open(store_root, create=True), options, lambda event: report({"cell": cell.id, **event}))
    try:
        return run.execute()
    except Unwritable:
        raise
    except Exception as error:  # one cell's fault must not take the others down
        traceback.print_exc()
        sys.stderr.flush()
        return run.fail(_outcome(error), _reason(error))


def _outcome(error: Exception) -> Outcome:
    if isinstance(error, Diverged):
        return "diverged"
    # Off CUDA, torch reports a failed allocation as a plain RuntimeError.
    starved = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
    return "oom" if starved else "failed"


def _reason(error: Exception) -> str:
    told = isinstance(error, (UserError, Diverged))
    return str(error) if told else f"{type(error).__name__}: {error}"


def size_of(cell: Cell) -> Size | None:
    """Where the cell stands on its method's size knob; None for a method without one, or where the backbone decides."""
    kind = METHODS.get(cell.method)
    value = None if kind.knob is None else getattr(kind.Config(**cell.method_config), kind.knob.field)
    return None if value is None else Size(name=kind.knob.field, value=value)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Options:
    """How a cell is run, as `run_cell` says; nothing here changes its scores."""

    device: torch.device
    threads: int
    jobs: int
    workers: int
    data_root: Path | None
    checkpoint_seconds: float
    fingerprints: dict[str, str] | None


class CellRun:
    """The state of one cell while it runs."""

    def __init__(self, cell: Cell, store: Store, options: Options, report: Report) -> None:
        self.cell, self.store, self.options, self.report = cell, store, options, report
        self.device = options.device
        self.clock = PhaseClock(self.device)
        # What is known so far goes into the record also when the cell fails.
        self.known: dict[str, Any] = {"cell": cell, "started": datetime.now(UTC).isoformat(timespec="seconds")}
        self.checkpoint: Checkpoint | None = None
        self.search: Search | None = None
        self.untouched = 0

    def execute(self) -> Record:
        self.report({"phase": "load"})
        with self.clock.phase("load"):
            task, data = self._load()
        with self.clock.phase("build"):
            backbone = build_backbone(self.cell, self.device)
            self.untouched = sum(p.numel() for p in backbone.parameters())
        setting, fitted, lr = self._search(backbone, task, data)
        load_state(setting, fitted.state)
        self.report({"phase": "test"})
        with self.clock.phase("test"):
            scores, predictions = evaluate(setting, data.test)
        with self.clock.phase("save"):
            stored_bytes = self._save_adapter(fitted)
            self._submit(task.submission(without_images(data.test), predictions))
        peaks = self.clock.peaks()
        self.report({"phase": "measure"})
        with self.clock.phase("measure"):
            batch = first_batch(data.train, setting)
            canonical = self._measured("saved tensors", lambda: canonical_saved_bytes(setting, batch))
            memory = self._memory(fitted, canonical)
            flops = self._measured("operations", lambda: training_flops(setting, batch))
            reached = self._measured("effective parameters", lambda: effective(setting, batch))
            parameters = self._parameters(setting, stored_bytes)
            size = self.cell.recipe.eval_batch_size
            predicting = self._measured("inference", lambda: inference(setting, data.test, size))
            # Asked last: by now it is merged.
            extra = extra_at_inference(setting, self.untouched) if predicting else None
        record = Record(
            **self._common()
            | {"parameters": parameters.model_copy(update={"inference_extra": extra, "effective": reached})},
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
        """A failed cell leaves a record too: with its reason, its trials and its machine."""
        if self.checkpoint and outcome == "diverged":  # it would diverge again from there
            self.checkpoint.remove()
        record = Record(**self._common(), outcome=outcome, reason=" ".join(reason.split()))
        return self.store.save(record, None)

    def _common(self) -> dict[str, Any]:
        return {
            **self.known,
            "trials": tuple(self.search.trials) if self.search else (),
            "timing": self.clock.timing(self.options.jobs, self.options.threads, self.options.workers),
            "environment": describe(str(self.device), self.options.threads),
        }

    def _load(self) -> tuple[Task, Data]:
        task = TASKS.get(self.cell.task)()
        self.known |= {"main_metric": task.main_metric, "size": size_of(self.cell)}
        source = load_source(self.cell, self.options.data_root)
        self.known["fingerprints"] = self.options.fingerprints or fingerprint.fingerprints(
            self.cell, self.options.data_root, source
        )
        data = load_data(self.cell, source, task)
        self.known["notes"] = source.notes()
        return task, data

    def _search(self, backbone: Backbone, task: Task, data: Data) -> tuple[Setting, Fit, float]:
        self.known["notes"] += (backbone.note,) if backbone.note else ()
        belongs = [self.cell.id, self.known["fingerprints"], str(torch.__version__), self.device.type]
        key = hashlib.sha256(json.dumps(belongs, sort_keys=True).encode()).hexdigest()
        path = self.store.checkpoints / f"{self.cell.id}.safetensors"
        self.checkpoint = Checkpoint(path, key, self.options.checkpoint_seconds)
        self.search = Search(
            self.cell,
            backbone,
            task,
            self.device,
            self.clock,
            self.checkpoint,
            self.report,
            self._inspect,
            self.options.workers,
        )
        return self.search.run(data)

    def _inspect(self, setting: Setting) -> None:
        """Counts cost nothing, and a row that fails later should have them."""
        self.known["parameters"] = self._parameters(setting, None)

    def _parameters(self, setting: Setting, stored_bytes: int | None) -> Parameters:
        return counted(setting).model_copy(update={"stored_bytes": stored_bytes})

    def _measured(self, what: str, measure: Callable[[], T]) -> T | None:
        """What `measure` gives. Unfused attention may need more memory than training: no reason to lose the cell."""
        try:
            return measure()
        except torch.OutOfMemoryError:
            self.known["notes"] += (f"{what} not measured: out of memory",)
            return None

    def _memory(self, fitted: Fit, saved: int | None) -> Memory:
        assert fitted.memory is not None
        return with_saved(fitted.memory, saved).model_copy(update={"peak_rss_bytes": peak_rss_bytes()})

    def _submit(self, submission: Any) -> None:
        """What an evaluation server takes, where the answers of the test split are not public."""
        if submission is None:
            return
        folder = self.store.root / "submissions"
        make_folder(folder)
        write_atomic(folder / f"{self.cell.id}.json", json.dumps(submission).encode())
        self.known["notes"] += (f"no public answers: {folder.name}/{self.cell.id}.json is for the evaluation server",)

    def _save_adapter(self, fitted: Fit) -> int:
        """Everything that trained, and nothing else, as safetensors; its size in bytes."""
        path = self.store.adapters / f"{self.cell.id}.safetensors"
        return save_tensors(path, fitted.state, {"cell": json.dumps(self.cell.model_dump(mode="json"))})
