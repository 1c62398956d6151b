"""The rows that a record was tested on, with what was kept of each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from petlbench.errors import UserError
from petlbench.records import Store
from petlbench.registry import DATASETS
from petlbench.spec import Record

if TYPE_CHECKING:
    from datasets import Dataset


def tested_rows(record: Record, store: Store, data_root: Path | None) -> tuple[Dataset, dict[str, Any]]:
    """The test rows, and the record's samples. Raises UserError when the data is not what was tested on."""
    cell, samples = record.cell, store.samples(record) or {}
    kind = DATASETS.get(cell.dataset)
    rows = kind(kind.Config(**cell.dataset_config), data_root).load(cell.task, "test", cell.recipe.eval_limit)
    if list(rows["sample_id"]) != samples.get("sample_ids"):
        raise UserError(f"{cell.label} was tested on other rows than data set '{cell.dataset}' has now: run it again")
    return rows, samples
