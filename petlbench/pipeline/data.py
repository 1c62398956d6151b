"""Load the rows of a cell: its source, its splits, and the rows on which a record was tested."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from petlbench.api.registries import DATASETS
from petlbench.api.source import Source, Split
from petlbench.api.task import Task
from petlbench.core.cell import Cell
from petlbench.core.errors import UserError
from petlbench.core.record import Record
from petlbench.results.store import Store

if TYPE_CHECKING:
    from datasets import Dataset


def tested_rows(record: Record, store: Store, data_root: Path | None) -> tuple[Dataset, dict[str, Any]]:
    """Return the test rows and the record's samples. Raise UserError if the rows have changed since the test."""
    cell, samples = record.cell, store.samples(record) or {}
    cls = DATASETS.get(cell.dataset)
    rows = cls(cls.Config(**cell.dataset_config), data_root).load(cell.task, "test", cell.recipe.eval_limit)
    if list(rows["sample_id"]) != samples.get("sample_ids"):
        raise UserError(f"{cell.label} was tested on other rows than data set '{cell.dataset}' has now: run it again")
    return rows, samples


@dataclass(frozen=True)
class Data:
    """The three splits of a data set in a task's schema."""

    train: Dataset
    validation: Dataset
    test: Dataset


def load_source(cell: Cell, data_root: Path | None) -> Source:
    """Return the cell's data source. `data_root`: the folder of data sets (None: PETLBENCH_DATA)."""
    cls = DATASETS.get(cell.dataset)
    return cls(cls.Config(**cell.dataset_config), data_root)


def load_split(cell: Cell, source: Source, task: Task, split: Split) -> Dataset:
    """Load one split, limited as the recipe says. Raise UserError if it is empty or has the wrong columns."""
    limit = cell.recipe.train_limit if split == "train" else cell.recipe.eval_limit
    rows = source.load(task.name, split, limit)
    if not len(rows):
        raise UserError(f"data set '{cell.dataset}' has no {split} rows for task '{task.name}'")
    if set(rows.features) != set(task.features):
        raise UserError(
            f"data set '{cell.dataset}' gives the columns {', '.join(rows.features)} for task "
            f"'{task.name}', which needs {', '.join(task.features)}"
        )
    return rows


def load_data(cell: Cell, source: Source, task: Task) -> Data:
    """Load all three splits."""
    return Data(*(load_split(cell, source, task, split) for split in ("train", "validation", "test")))
