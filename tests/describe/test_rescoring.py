"""METEOR and SPICE of kept captions are computed without a change to the record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from petlbench.core.cell import Cell
from petlbench.core.errors import UserError
from petlbench.core.recipe import Recipe
from petlbench.core.record import Record
from petlbench.describe.caption_scores import score, score_table
from petlbench.metrics import java_captions
from petlbench.metrics.cider import CiderScores
from petlbench.pipeline.cell import run_cell
from petlbench.pipeline.options import RunOptions
from petlbench.results.store import Store

NLVR = Path(__file__).parents[1] / "fixtures" / "nlvr"


def share_of_words(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> CiderScores:
    """A stand-in for a Java metric: it returns the mean number of references."""
    samples = [float(len(own)) for own in references]
    return CiderScores(sum(samples) / len(samples), samples)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Record]:
    folder = tmp_path_factory.mktemp("results")
    recipe = Recipe(steps=1, batch_size=4, eval_limit=6)
    cell = Cell(method="head_only", variant="mine", task="captioning", dataset="nlvr", backbone="tiny", recipe=recipe)
    record = run_cell(cell, folder, RunOptions(device="cpu", data_root=NLVR))
    assert (record.outcome, record.reason) == ("ok", "")
    store = Store.open(folder, create=False)
    other_task = record.model_copy(update={"cell": cell.model_copy(update={"task": "vqa"})})
    store.save(other_task, store.samples(record))
    return store, record


@pytest.fixture(autouse=True)
def metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java_captions, "METRICS", {"meteor": share_of_words})
    monkeypatch.setattr(java_captions, "_command", lambda metric: ([], Path()))


def test_each_captioning_record_gets_a_row_and_stays_as_it_is(results: tuple[Store, Record]) -> None:
    store, record = results
    frame = score(store, ["meteor"], NLVR)
    (row,) = frame.to_dict("records")
    references = share_of_words([], _references(record)).corpus
    assert row == {
        **{"method": "head_only:mine", "backbone": "tiny", "dataset": "nlvr", "seed": 0},
        **{"cider_d": record.metrics["cider_d"], "meteor": references},
    }
    assert store.get(record.cell) == record
    assert [str(column.header) for column in score_table(frame).columns] == list(row)
    assert score_table(frame).row_count == 1


def _references(record: Record) -> list[list[str]]:
    from petlbench.api.registries import DATASETS

    cls = DATASETS.get("nlvr")
    return list(cls(cls.Config(), NLVR).load("captioning", "test", record.cell.recipe.eval_limit)["captions"])


def test_other_data_than_was_tested_on_is_refused(results: tuple[Store, Record], tmp_path: Path) -> None:
    store, record = results
    samples = store.samples(record) or {}
    other = Store.open(tmp_path, create=True)
    other.save(record, {**samples, "sample_ids": samples["sample_ids"][::-1]})
    with pytest.raises(UserError, match="other rows"):
        score(other, ["meteor"], NLVR)
    other.save(record, {**samples, "predictions": samples["predictions"][1:]})
    with pytest.raises(UserError, match="kept no caption for each"):
        score(other, ["meteor"], NLVR)


def test_nothing_to_score_and_unknown_metrics_are_one_line(results: tuple[Store, Record], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no record in .* kept captions"):
        score(Store.open(tmp_path, create=True), ["meteor"], NLVR)
    with pytest.raises(UserError, match="unknown metric 'meteors'"):
        score(results[0], ["meteors"], NLVR)
