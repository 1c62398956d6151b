"""Helpers for tests of data sets: make pictures, and train one epoch on a miniature in its official layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from petlbench.core.cell import Cell
from petlbench.core.recipe import Recipe
from petlbench.core.record import Record
from petlbench.pipeline.cell import run_cell
from petlbench.pipeline.options import RunOptions

BATCH = 4


def picture(path: Path, size: tuple[int, int] = (64, 48), seed: int = 0) -> Path:
    """Write a picture of noise in large squares, in the format of the file's suffix, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)
    return path


def one_epoch(task: str, dataset: str, root: Path, out: Path, *, rows: int, **cell: Any) -> Record:
    """Return the record of a cell that trains once on `rows` rows, with `tiny` by default, and is tested."""
    recipe = Recipe(steps=math.ceil(rows / BATCH), batch_size=BATCH, eval_batch_size=2 * BATCH)
    cell_to_run = Cell(**{"method": "lora", "backbone": "tiny", "recipe": recipe, **cell}, task=task, dataset=dataset)
    return run_cell(cell_to_run, out, RunOptions(device="cpu", threads=1, data_root=root))
