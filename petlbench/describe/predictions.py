"""Draw a contact sheet of test samples for each record that kept its predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from petlbench.api.registries import TASKS
from petlbench.core.drawing import contact_sheet
from petlbench.core.errors import UserError
from petlbench.core.record import Record
from petlbench.describe.variants import declaring
from petlbench.pipeline.data import tested_rows
from petlbench.results.store import Store

COLUMNS = 4


def show_predictions(store: Store, out_dir: Path, *, count: int = 16, data_root: Path | None = None) -> list[Path]:
    """Write one PNG per record with predictions: at most `count` samples, spread evenly over the test split.

    Raise UserError if no record kept predictions, or if the data differs from what the record was tested on.
    """
    records = [
        record for record in store.load() if record.outcome == "ok" and TASKS.get(record.cell.task).keeps_predictions
    ]
    if not records:
        able = ", ".join(declaring(TASKS, TASKS.names(), "keeps_predictions"))
        raise UserError(f"no record in {store.root} kept predictions: run cells of a task that keeps them ({able})")
    out_dir.mkdir(parents=True, exist_ok=True)
    return [_sheet(record, store, out_dir, count, data_root) for record in records]


def _sheet(record: Record, store: Store, out_dir: Path, count: int, data_root: Path | None) -> Path:
    cell, task = record.cell, TASKS.get(record.cell.task)()
    rows, samples = tested_rows(record, store, data_root)
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int).tolist()
    pictures = [task.picture(rows[i], samples["predictions"][i]) for i in chosen]
    path = out_dir / f"{cell.id}.png"
    contact_sheet([image for image, _ in pictures], [caption for _, caption in pictures], COLUMNS).save(path)
    return path
