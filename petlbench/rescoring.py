"""METEOR and SPICE of captions that were kept: computed after a run, so that no result hangs on an installed Java."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from petlbench.errors import UserError
from petlbench.metrics import java_captions
from petlbench.records import Store
from petlbench.spec import MethodSpec, Record
from petlbench.tested import tested_rows
from petlbench.units import score_text

if TYPE_CHECKING:
    from rich.table import Table

TASK, OWN_METRIC = "captioning", "cider_d"
CELL = ("method", "backbone", "dataset", "seed")  # columns


def score(store: Store, metrics: Sequence[str], data_root: Path | None = None) -> pd.DataFrame:
    """A row per captioning record that kept its predictions: its cell, CIDEr-D as recorded, then `metrics`.

    These are of the corpus. Nothing is written to the store. Raises UserError when a metric is unknown or cannot be
    computed here, when no record kept captions, or when the data is not what was tested on.
    """
    java_captions.check(metrics)
    records = [record for record in store.load() if record.outcome == "ok" and record.cell.task == TASK]
    rows = [_row(record, store, metrics, data_root) for record in records if record.samples is not None]
    if not rows:
        raise UserError(f"no record in {store.root} kept captions: run captioning cells first")
    return pd.DataFrame(rows, columns=[*CELL, OWN_METRIC, *metrics])


def _row(record: Record, store: Store, metrics: Sequence[str], data_root: Path | None) -> dict[str, object]:
    cell = record.cell
    rows, samples = tested_rows(record, store, data_root)
    captions = samples.get("predictions")
    if not isinstance(captions, list) or len(captions) != len(rows):
        raise UserError(f"{cell.label} kept no caption for each of its {len(rows)} test rows: run it again")
    references = list(rows["captions"])
    scores = {name: java_captions.METRICS[name](captions, references).corpus for name in metrics}
    method = MethodSpec(name=cell.method, variant=cell.variant).label
    named = dict(zip(CELL, (method, cell.backbone, cell.dataset, cell.seed), strict=True))
    return {**named, OWN_METRIC: record.metrics.get(OWN_METRIC, math.nan), **scores}


def render(frame: pd.DataFrame) -> Table:
    """For a terminal; CIDEr-D in the toolkit's unit, as in a record."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in frame.columns:
        table.add_column(str(name), justify="left" if name in CELL else "right", no_wrap=name not in CELL)
    for row in frame.itertuples(index=False):
        texts = [
            str(value) if name in CELL else score_text(value) for name, value in zip(frame.columns, row, strict=True)
        ]
        table.add_row(*map(Text, texts))
    return table
