"""Pictures of predictions, drawn from real cells on real files."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from petlbench.core.cell import Cell
from petlbench.core.errors import UserError
from petlbench.core.recipe import Recipe
from petlbench.describe.predictions import show_predictions
from petlbench.pipeline.cell import run_cell
from petlbench.pipeline.options import RunOptions
from petlbench.results.store import Store

NLVR = Path(__file__).parents[1] / "fixtures" / "nlvr"


def cell(task: str) -> Cell:
    recipe = Recipe(steps=2, batch_size=4)
    return Cell(method="head_only", task=task, dataset="nlvr", backbone="tiny", recipe=recipe)


@pytest.mark.parametrize("task", ["rec", "vqa", "captioning", "retrieval"])
def test_every_task_runs_on_the_real_files_and_shows_what_it_predicted(task: str, tmp_path: Path) -> None:
    record = run_cell(cell(task), tmp_path, RunOptions(device="cpu", data_root=NLVR))
    assert (record.outcome, record.reason) == ("ok", "")
    store = Store.open(tmp_path, create=False)
    if task == "retrieval":  # embeddings cannot be drawn
        with pytest.raises(UserError, match="no record"):
            show_predictions(store, tmp_path / "pictures", data_root=NLVR)
        return
    (path,) = show_predictions(store, tmp_path / "pictures", count=3, data_root=NLVR)
    with Image.open(path) as sheet:
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 24) or []}
        assert sheet.width > 3 * 400
    assert ((0, 255, 0) in colours) == (task == "rec")  # the target's box


def test_other_data_than_was_tested_on_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run_cell(cell("vqa"), tmp_path, RunOptions(device="cpu", data_root=NLVR))
    store = Store.open(tmp_path, create=False)
    samples = store.samples(record) or {}
    store.save(record, {**samples, "sample_ids": samples["sample_ids"][::-1]})
    with pytest.raises(UserError, match="other rows"):
        show_predictions(store, tmp_path / "pictures", data_root=NLVR)
