"""One cell, from its description to its record."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from safetensors.torch import save_file

from petlbench.backbones.base import Backbone
from petlbench.datasets.base import Source, Split
from petlbench.errors import UserError
from petlbench.measure.clock import PhaseClock
from petlbench.measure.environment import describe
from petlbench.measure.flops import step_flops
from petlbench.measure.latency import latency
from petlbench.measure.memory import cuda_peaks, peak_rss_bytes, reset_cuda_peaks
from petlbench.measure.parameters import count
from petlbench.method import Method, adapt
from petlbench.records import Store
from petlbench.registry import BACKBONES, DATASETS, METHODS, TASKS
from petlbench.spec import Cell, Outcome, Record, Trial
from petlbench.task import Row, Task
from petlbench.training import Diverged, Fit, Report, Setting, batches, evaluate, fit, load_state

Event = dict[str, Any]


def run_cell(
    cell: Cell,
    store_root: Path,
    *,
    device: str = "auto",
    threads: int = 1,
    jobs: int = 1,
    data_root: Path | None = None,
    report: Callable[[Event], None] = lambda event: None,
) -> Record:
    """Train, select on validation, test once, measure, and save the record, whatever the outcome.

    Raises UserError when the record itself cannot be saved.
    """
    disable_progress_bars()
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    run = CellRun(cell, Store.open(store_root, create=True), chosen, threads, jobs, data_root)
    run.report = lambda event: report({"cell": cell.id, **event})
    try:
        return run.execute()
    except Diverged as error:
        return run.fail("diverged", str(error))
    except torch.OutOfMemoryError as error:
        return run.fail("oom", str(error))
    except Exception as error:  # one cell's fault must not take the others down
        return run.fail("failed", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")


@dataclass
class Data:
    """The three parts of a data set in a task's schema."""

    train: Dataset
    validation: Dataset
    test: Dataset


class CellRun:
    """The state of one cell while it runs."""

    def __init__(
        self, cell: Cell, store: Store, device: torch.device, threads: int, jobs: int, data_root: Path | None
    ) -> None:
        self.cell, self.store, self.device = cell, store, device
        self.threads, self.jobs, self.data_root = threads, jobs, data_root
        self.report: Report = lambda event: None
        self.started = datetime.now(UTC)
        self.clock = PhaseClock(device)
        self.trials: list[Trial] = []
        reset_cuda_peaks(device)

    def execute(self) -> Record:
        self.report({"phase": "load"})
        with self.clock.phase("load"):
            task = TASKS.get(self.cell.task)()
            source = self._source()
            data = self._data(source, task)
        with self.clock.phase("build"):
            backbone = self._backbone()
        setting, fitted, lr = self._search(backbone, task, data)
        load_state(setting, fitted.state)
        self.report({"phase": "test"})
        with self.clock.phase("test"):
            scores, predictions = evaluate(setting, data.test)
        with self.clock.phase("save"):
            stored_bytes = self._save_adapter(fitted)
        peaks = cuda_peaks(self.device)
        timing = self.clock.timing(jobs=self.jobs, threads=self.threads)
        # What follows measures, and is not part of the cell's time.
        parameters = count(setting.backbone, setting.head, setting.backbone.host_parameters())
        assert fitted.memory is not None
        memory = fitted.memory.model_copy(
            update={
                "peak_allocated_bytes": peaks[0],
                "peak_reserved_bytes": peaks[1],
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
        record = Record(
            cell=self.cell,
            outcome="ok",
            started=self.started.isoformat(timespec="seconds"),
            main_metric=task.main_metric,
            metrics=scores.metrics,
            validation=fitted.validation,
            chosen_lr=lr,
            trials=tuple(self.trials),
            parameters=parameters.model_copy(update={"stored_bytes": stored_bytes}),
            memory=memory,
            timing=timing.model_copy(update={"latency_seconds": self._latency(setting, data.test[0])}),
            step_flops=self._flops(setting, data.train),
            fingerprints={"data": source.fingerprint(self.cell.task)},
            notes=tuple(filter(None, [*source.notes(), backbone.note])),
            environment=describe(str(self.device), self.threads),
        )
        samples = {
            "metric": task.main_metric,
            "sample_ids": scores.sample_ids,
            "scores": scores.samples,
            **({"predictions": predictions} if task.keeps_predictions else {}),
        }
        return self.store.save(record, samples)

    def fail(self, outcome: Outcome, reason: str) -> Record:
        """A failed cell leaves a record too: with its reason, its trials and its machine."""
        return self.store.save(
            Record(
                cell=self.cell,
                outcome=outcome,
                reason=" ".join(reason.split()),
                started=self.started.isoformat(timespec="seconds"),
                trials=tuple(self.trials),
                timing=self.clock.timing(jobs=self.jobs, threads=self.threads),
                environment=describe(str(self.device), self.threads),
            ),
            None,
        )

    def _source(self) -> Source:
        kind = DATASETS.get(self.cell.dataset)
        return kind(kind.Config(**self.cell.dataset_config), self.data_root)

    def _data(self, source: Source, task: Task) -> Data:
        recipe = self.cell.recipe
        limits: dict[Split, int | None] = {
            "train": recipe.train_limit,
            "validation": recipe.eval_limit,
            "test": recipe.eval_limit,
        }
        parts = {split: source.load(task.name, split, limit) for split, limit in limits.items()}
        for split, rows in parts.items():
            if not len(rows):
                raise UserError(f"data set '{self.cell.dataset}' has no {split} rows for task '{task.name}'")
            if set(rows.features) != set(task.features):
                raise UserError(
                    f"data set '{self.cell.dataset}' gives the columns {', '.join(rows.features)} for task "
                    f"'{task.name}', which needs {', '.join(task.features)}"
                )
        return Data(**parts)

    def _backbone(self) -> Backbone:
        kind: Any = BACKBONES.get(self.cell.backbone)
        torch.manual_seed(self.cell.seed)
        backbone: Backbone = kind(kind.Config(**self.cell.backbone_config)).to(self.device)
        return backbone

    def _method(self) -> Method:
        kind = METHODS.get(self.cell.method)
        return kind(kind.Config(**self.cell.method_config))

    def _search(self, backbone: Backbone, task: Task, data: Data) -> tuple[Setting, Fit, float]:
        """One trial per rate, all from the same start; the best on validation, inserted in the returned setting."""
        best: tuple[float, Fit, float] | None = None
        rates = [self.cell.recipe.lr * factor for factor in self.cell.recipe.lr_factors]
        for lr in rates:
            with self.clock.phase("build"):
                setting, handle = self._setting(backbone, task)
            try:
                fitted = fit(setting, data.train, data.validation, lr)
            except Diverged:
                self.trials.append(Trial(lr=lr, outcome="diverged"))
                if best is None and lr == rates[-1]:
                    raise
            else:
                self.trials.append(
                    Trial(
                        lr=lr,
                        outcome="ok",
                        validation=fitted.validation,
                        best_step=fitted.best_step,
                        losses=fitted.losses,
                    )
                )
                score = fitted.validation[task.main_metric]
                if best is None or score > best[0]:
                    best = (score, fitted, lr)
            with self.clock.phase("build"):
                handle.restore()
        assert best is not None
        with self.clock.phase("build"):
            setting, _ = self._setting(backbone, task)
        return setting, best[1], best[2]

    def _setting(self, backbone: Backbone, task: Task) -> tuple[Setting, Any]:
        torch.manual_seed(self.cell.seed)
        adapted, handle = adapt(self._method(), backbone)
        head = task.head(adapted).to(self.device)
        torch.manual_seed(self.cell.seed + 1)  # dropout, whatever the method drew
        setting = Setting(adapted, head, task, self.cell.recipe, self.cell.seed, self.device, self.clock, self.report)
        if not setting.trainable():
            raise UserError(f"method '{self.cell.method}' leaves nothing to train on task '{task.name}'")
        return setting, handle

    def _save_adapter(self, fitted: Fit) -> int:
        """Everything that trained, and nothing else, as safetensors; its size in bytes."""
        path = self.store.adapters / f"{self.cell.id}.safetensors"
        partial = path.with_name(f".{uuid.uuid4().hex}.tmp")
        tensors = {name: value.cpu().contiguous() for name, value in fitted.state.items()}
        try:
            save_file(tensors, partial, metadata={"cell": json.dumps(self.cell.model_dump(mode="json"))})
            os.replace(partial, path)
        except Exception as error:
            partial.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}: {error}; free some space there or choose another folder") from error
        return path.stat().st_size

    def _latency(self, setting: Setting, row: Row) -> float:
        """Median seconds from one row to its prediction, preprocessing included."""

        @torch.no_grad()
        def predict() -> None:
            batch = setting.task.collate([row], setting.backbone, None).to(self.device)
            setting.task.predict(setting.backbone, setting.head, batch, beams=setting.recipe.beams)

        setting.modules().eval()
        return latency(predict, repeats=5, warmup=1, device=self.device)

    def _flops(self, setting: Setting, train: Dataset) -> int:
        """Of one training step, dropout off."""
        setting.modules().eval()
        batch = next(batches(train, setting))
        return step_flops(lambda: setting.task.loss(setting.backbone, setting.head, batch).backward())
