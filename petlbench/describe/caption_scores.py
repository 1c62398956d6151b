"""Score kept captions with METEOR and SPICE: after a run, so that no run depends on an installed Java."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from petlbench.api.registries import TASKS
from petlbench.core.cell import MethodSpec
from petlbench.core.errors import UserError
from petlbench.core.record import Record
from petlbench.core.tables import plain_table
from petlbench.core.units import score_text
from petlbench.describe.variants import attribute, declaring
from petlbench.metrics import java_captions
from petlbench.pipeline.data import tested_rows
from petlbench.results.store import Store

if TYPE_CHECKING:
    from rich.table import Table

CELL = ("method", "backbone", "dataset", "seed")  # columns


def score(store: Store, metrics: Sequence[str], data_root: Path | None = None) -> pd.DataFrame:
    """Return a row for each record that kept captions: its cell, its recorded main metric, then `metrics`.

    The metrics are of the whole corpus. Nothing is written to the store. Raise UserError if a metric is unknown or
    cannot be computed here, if no record kept captions, or if the data differs from what was tested on.
    """
    java_captions.check_available(metrics)
    ended = [record for record in store.load() if record.outcome == "ok" and record.samples is not None]
    tasks = declaring(TASKS, [record.cell.task for record in ended], "caption_references")
    records = [record for record in ended if record.cell.task in tasks]
    if not records:
        able = ", ".join(declaring(TASKS, TASKS.names(), "caption_references"))
        raise UserError(f"no record in {store.root} kept captions: run cells of a task that does first ({able})")
    rows = [_row(record, store, metrics, data_root) for record in records]
    main_metrics = dict.fromkeys(attribute(TASKS, task, "main_metric") for task in tasks)
    return pd.DataFrame(rows, columns=[*CELL, *main_metrics, *metrics])


def _row(record: Record, store: Store, metrics: Sequence[str], data_root: Path | None) -> dict[str, object]:
    cell = record.cell
    rows, samples = tested_rows(record, store, data_root)
    captions = samples.get("predictions")
    if not isinstance(captions, list) or len(captions) != len(rows):
        raise UserError(f"{cell.label} kept no caption for each of its {len(rows)} test rows: run it again")
    references = list(rows[attribute(TASKS, cell.task, "caption_references")])
    scores = {name: java_captions.METRICS[name](captions, references).corpus for name in metrics}
    method = MethodSpec(name=cell.method, variant=cell.variant).label
    named = dict(zip(CELL, (method, cell.backbone, cell.dataset, cell.seed), strict=True))
    main_metric = attribute(TASKS, cell.task, "main_metric")
    return {**named, main_metric: record.metrics.get(main_metric, math.nan), **scores}


def score_table(frame: pd.DataFrame) -> Table:
    """Return the scores as a table; a task's own metric has the unit that it has in a record."""
    from rich.text import Text

    table = plain_table(frame.columns, [name for name in frame.columns if name not in CELL])
    for row in frame.itertuples(index=False):
        texts = [
            str(value) if name in CELL else score_text(value) for name, value in zip(frame.columns, row, strict=True)
        ]
        table.add_row(*map(Text, texts))
    return table
