"""Older records are read, shown, marked, found under their old names and never lost; the rule of a cell's id."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, create_model

from petlbench.commands import main
from petlbench.core.cell import Cell
from petlbench.core.errors import UserError
from petlbench.core.recipe import Recipe
from petlbench.core.record import OLDER, SCHEMA_VERSION, Record
from petlbench.pipeline.fingerprint import fingerprints
from petlbench.pipeline.freshness import CellState, stale_parts, state_of
from petlbench.results import leaderboard
from petlbench.results import store as store_module
from petlbench.results.repair import repair
from petlbench.results.store import Store, find
from petlbench.results.uncertainty import pairs
from petlbench.results.uncertainty.comparison import compare
from petlbench.results.upgrade import OPTIONAL, STEPS, former_ids, legacy_digest, upgraded, without
from tests.record_factory import make_record, make_samples

FIXTURES = Path(__file__).parents[1] / "fixtures" / "older_records"
RESULTS = Path(__file__).parents[2] / "results"
NAME = "rec_digits_lora_tiny_s0_30269d15"  # of both records, by the earlier rule
LATER = "2030-01-01T00:00:00+00:00"


def copied(tmp_path: Path, version: int) -> Store:
    """Copy a results folder with the record that petlbench wrote in that schema version."""
    shutil.copytree(FIXTURES / f"version_{version}", tmp_path / "out")
    return Store.open(tmp_path / "out", create=True)


@pytest.fixture
def old(tmp_path: Path) -> Store:
    return copied(tmp_path, 1)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def rewrite(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def remade(record: Record, started: str = LATER) -> Record:
    """Return the record that a run of the same cell would write today."""
    new = make_record(started=started, metric="acc_50", score=0.9)
    return new.model_copy(update={"cell": record.cell})


def add_method(store: Store, method: str, score: float) -> None:
    """Return another record of the same version and setting."""
    path = store.paths()[0]
    content = json.loads(path.read_text())
    content["cell"]["method"], content["metrics"]["acc_50"], content["samples"] = method, score, None
    cell = Cell(**content["cell"])
    (store.records / f"{cell.stem}_{legacy_digest(cell)}.json").write_text(json.dumps(content))


# Reading


def test_a_record_of_version_1_is_read_with_what_has_kept_its_meaning(old: Store) -> None:
    [record] = old.load()
    [younger] = Store(FIXTURES / "version_2").load()  # the same cell on the same machine
    assert record.schema_version == 1 and record.older and not younger.older
    assert record.cell == younger.cell and record.metrics == younger.metrics and record.trials[0].losses
    assert record.memory and younger.memory and record.parameters
    assert record.memory.native_saved_bytes == younger.memory.native_saved_bytes == 55987360
    assert (record.memory.saved_bytes, record.memory.accounted_bytes) == (None, None)
    assert (record.flops, record.inference, record.size, record.parameters.effective) == (None, None, None, None)


def test_reading_leaves_the_file_as_it_is(old: Store) -> None:
    before = contents(old.root)
    old.get(old.load()[0].cell)
    find([old.root]).load()
    assert contents(old.root) == before


def test_each_version_has_its_step_and_the_input_stays_as_it_is() -> None:
    assert sorted(STEPS) == list(range(1, SCHEMA_VERSION))
    text = (FIXTURES / "version_1" / "records" / f"{NAME}.json").read_text()
    data = json.loads(text)
    assert upgraded(data)["memory"] != data["memory"] and data == json.loads(text)
    assert upgraded({"schema_version": 1, "memory": None}) == {"schema_version": 1, "memory": None}


def test_keys_that_no_record_has_any_more_are_left_out_at_any_depth(old: Store) -> None:
    [expected] = old.load()
    path = old.paths()[0]
    content = json.loads(path.read_text())
    content["trials"][0]["mood"] = content["cell"]["recipe"]["colour"] = content["cell"]["mood"] = "blue"
    rewrite(path, weather={"mood": 1}, **content)
    assert old.load() == [expected]


def test_what_an_older_record_lacks_is_not_known(old: Store) -> None:
    rewrite(old.paths()[0], memory=None, timing=None, parameters=None)
    [record] = old.load()
    assert (record.memory, record.timing, record.parameters) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cell": 3}, "is not a record of petlbench (cell: "),
        ({"schema_version": 0}, "is not a record of petlbench (no schema version is 0)"),
        ({"schema_version": [1]}, "is not a record of petlbench (it has no `schema_version`)"),
        ({"schema_version": 1.0}, "is not a record of petlbench (it has no `schema_version`)"),
        ({"schema_version": 99}, "has schema version 99, newer than 2; upgrade petlbench, or `petlbench repair "),
    ],
)
def test_what_is_no_older_record_is_refused(old: Store, changes: dict[str, Any], said: str) -> None:
    rewrite(old.paths()[0], **changes)
    with pytest.raises(UserError) as caught:
        old.load()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_key_in_a_record_of_this_version_is_still_refused(tmp_path: Path) -> None:
    store = copied(tmp_path, 2)
    rewrite(store.paths()[0], weather="blue")
    with pytest.raises(UserError, match=r"is not a record of petlbench \(weather: "):
        store.load()


def test_paths_are_left_out_of_nested_data() -> None:
    data = {"a": [1, {"b": 2, "c": 3}, 4], "d": 5}
    assert without(data, [("a", 1, "b"), ("a", 0), ("d",)]) == {"a": [{"c": 3}, 4]}
    assert without(data, []) == data


# Shown and marked


def test_older_rows_are_shown_marked_and_unranked_and_change_nobody_elses_rank(tmp_path: Path) -> None:
    store, samples = copied(tmp_path, 1), [make_samples("acc_50", [x] * 4 + [1.0 - x]) for x in (1.0, 0.0)]
    add_method(store, "full", 0.99)
    for method, scores in zip(("bitfit", "head_only"), samples, strict=True):
        store.save(make_record(method, 0.5, metric="acc_50"), scores)
    frame = leaderboard.table(store).set_index("method")
    assert frame["stale"].to_dict() == {"bitfit": False, "head_only": False, "full": True, "lora": True}
    older, fresh = frame[frame["stale"]], frame[~frame["stale"]]
    assert older["score_mean"].tolist() == [0.99, 0.541015625]
    assert older[["rank", "score_low", "score_high", "accounted_bytes"]].isna().all(axis=None)
    assert not older["pareto"].any() and fresh["pareto"].any()
    assert fresh["rank"].notna().all()
    for path in store.paths():
        if store_module.read_record(path).older:
            path.unlink()
    alone = leaderboard.table(store).set_index("method")
    assert fresh.equals(alone)


def test_tables_and_pairs_say_what_is_older(old: Store, capsys: pytest.CaptureFixture[str]) -> None:
    add_method(old, "full", 0.99)
    note = "older, unverified, so not ranked: full, lora"
    assert leaderboard.table(old).attrs["notes"]["rec", "digits", "tiny"][0] == note
    found = pairs.pairs(old)
    assert found.empty and found.attrs["notes"] == {("rec", "digits", "tiny"): [note]}
    for arguments in (["leaderboard", str(old.root)], ["compare", str(old.root)]):
        assert main.main(arguments) == 0
        assert note in capsys.readouterr().out
    assert main.main(["leaderboard", str(old.root)]) == 0
    said = capsys.readouterr().out
    assert "lora stale: older, unverified" in said and "have changed since" not in said
    assert main.main(["list", "records", "--results", str(old.root), "l*"]) == 0
    assert capsys.readouterr().out.endswith("acc_50 0.541  stale (older, unverified)\n")
    assert main.main(["plot", str(old.root), "--out", str(old.root / "figures")]) == 0
    assert list((old.root / "figures").iterdir())


def test_older_records_are_compared_as_reported_without_significance(old: Store) -> None:
    add_method(old, "full", 0.75)
    [row] = compare(old, "lora", "full").to_dict("records")
    assert row["metric"] == f"acc_50 ({OLDER})"
    assert (row["mean_a"], row["mean_b"], row["difference"]) == (0.541015625, 0.75, 0.541015625 - 0.75)
    assert all(row[name] != row[name] for name in ("low", "high", "p"))


def test_a_comparison_leaves_older_records_out_where_there_are_others(old: Store) -> None:
    add_method(old, "full", 0.75)
    for method, score in (("lora", 1.0), ("full", 0.0)):  # another recipe than that of the older ones
        old.save(make_record(method, metric="acc_50", score=score), make_samples("acc_50", [score] * 3))
    [row] = compare(old, "lora", "full").to_dict("records")
    assert (row["metric"], row["difference"], row["p"]) == ("acc_50", 1.0, 0.0)


# Run again


def test_an_older_record_is_stale(old: Store) -> None:
    [record] = old.load()
    assert state_of(record.cell, record, {}) == CellState("stale", OLDER)
    assert stale_parts(record) == (OLDER,)


def test_a_run_makes_older_records_anew_unless_they_are_kept(
    old: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [record] = old.load()
    ran: list[Cell] = []

    def run_cells(cells: list[Cell], store: Store, *_: Any, **more: Any) -> None:
        ran.extend(cells)
        for cell in cells:
            store.save(remade(record).model_copy(update={"fingerprints": fingerprints(cell)}))

    monkeypatch.setattr("petlbench.pipeline.run.expand", lambda suite, **filters: [record.cell])
    monkeypatch.setattr("petlbench.pipeline.run.run_cells", run_cells)
    monkeypatch.setattr("petlbench.pipeline.launch.process.server_beside", nullcontext)
    arguments = ["run", "smoke", "--out", str(old.root)]
    assert main.main([*arguments, "--dry-run"]) == 0
    assert "stale (older, unverified)  lora on rec:digits" in capsys.readouterr().out
    assert main.main([*arguments, "--keep-stale"]) == 0 and ran == []
    assert main.main(arguments) == 0 and ran == [record.cell]
    assert [path.stem for path in old.paths()] == [record.cell.id]
    assert main.main(arguments) == 0 and ran == [record.cell]  # done


# Repair


def test_repair_leaves_older_records_where_they_are_even_without_their_samples(old: Store) -> None:
    before = contents(old.root)
    assert old.load()[0].samples and not any(old.sample_scores.iterdir())
    assert repair(old) == []
    assert contents(old.root) == before


def test_repair_keeps_an_old_name_and_fixes_a_wrong_one(old: Store) -> None:
    [record] = old.load()
    old.paths()[0].rename(old.records / "mine.json")
    assert repair(old) == [f"records/mine.json renamed to {record.cell.id}.json: that is its cell"]
    assert old.load() == [record]


@pytest.mark.parametrize("started", ["2020-01-01T00:00:00+00:00", LATER])
def test_of_an_old_and_a_new_name_the_later_record_counts_and_repair_sets_the_other_aside(
    tmp_path: Path, started: str
) -> None:
    store = copied(tmp_path, 2)
    [former] = store.load()
    kept = (store.records / f"{NAME}.json").read_bytes()
    adapter = store.adapters / f"{NAME}.safetensors"
    (store.sample_scores / f"{NAME}.json").write_text(json.dumps(make_samples("acc_50", [1.0])))
    new = store.save(remade(former, started))
    (store.records / f"{NAME}.json").write_bytes(kept)  # as left by a process that is killed before it removes the file
    (store.sample_scores / f"{NAME}.json").write_text(json.dumps(make_samples("acc_50", [1.0])))
    adapter.write_bytes(b"adapter")
    later, earlier = (new, NAME) if started == LATER else (former, new.cell.id)
    for results in (store, find([store.root])):
        assert results.load() == [later] and results.get(former.cell) == later
    before = sorted(contents(store.root).values())
    [line] = repair(store)
    assert line.startswith(f"records/{earlier}.json moved to set-aside/records/{earlier}.json")
    assert line.endswith(f"the cell {former.cell.id} has a later record")
    assert store.load() == [later] and sorted(contents(store.root).values()) == before
    assert adapter.exists() == (later == former)


# The id of a cell


def test_defaults_do_not_count_in_a_digest() -> None:
    cell = Cell(method="lora", task="vqa", dataset="digits", backbone="tiny")
    assert cell.digest == "8291e716"
    assert cell.model_copy(update={"recipe": Recipe(steps=300, lr=1e-3)}).id == cell.id
    others = [Recipe(steps=301), Recipe(augment="transvg"), Recipe(betas=(0.9, 0.98)), Recipe(clip_norm=None)]
    assert len({cell.model_copy(update={"recipe": recipe}).id for recipe in others} | {cell.id}) == 5
    assert cell.model_copy(update={"seed": 1}).digest != cell.digest


def test_a_field_that_is_added_with_a_default_changes_no_id() -> None:
    wider = create_model("Wider", __base__=Recipe, momentum=(float, Field(0.5)))
    grown = create_model("Grown", __base__=Cell, recipe=(wider, wider()), region=(str, ""))
    for recipe in ({}, {"steps": 7, "precision": "bf16"}):
        known = {"method": "lora", "task": "vqa", "dataset": "digits", "backbone": "tiny", "recipe": recipe}
        assert grown(**known).id == Cell(**known).id
        assert grown(**{**known, "region": "x"}).id != Cell(**known).id
        assert grown(**{**known, "recipe": {**recipe, "momentum": 0.1}}).id != Cell(**known).id


def test_a_default_that_changes_makes_the_record_stale_under_the_same_id(tmp_path: Path) -> None:
    """The record is written as if the default of `steps` had been 200, so that it has the id of a bare cell."""
    store = Store.open(tmp_path / "out", create=True)
    asked = make_record().cell
    made = make_record(steps=200)
    saved = store.save(made)
    (store.records / f"{made.cell.id}.json").rename(store.records / f"{asked.id}.json")
    assert store.load() == [saved] and store.get(asked) == saved and repair(store) == []
    assert state_of(asked, store.get(asked), {}) == CellState("stale", "recipe")
    elsewhere = saved.cell.model_copy(update={"method_config": {"rank": 2}})
    assert state_of(elsewhere, saved, {}) == CellState("stale", "cell")
    new = store.save(make_record(started=LATER))
    assert store.load() == [new] and state_of(asked, store.get(asked), {}) == CellState("done")


def test_a_configuration_that_json_holds_otherwise_is_no_other_cell(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "out", create=True)
    saved = store.save(make_record(method_config={"sizes": (1, 2)}))
    found = store.get(saved.cell)
    assert found and state_of(saved.cell, found, {}) == CellState("done")


def test_the_former_rule_knows_the_names_of_all_reference_results() -> None:
    paths = [*RESULTS.glob("*/records/*.json"), *FIXTURES.glob("*/records/*.json")]
    assert len(paths) > 2
    for path in paths:
        record = store_module.read_record(path)
        assert path.stem in (record.cell.id, *former_ids(record.cell))


def test_the_former_rule_left_out_the_defaults_of_fields_that_had_been_added() -> None:
    cell = Cell(method="lora", task="vqa", dataset="digits", backbone="tiny")
    assert legacy_digest(cell) == "7dc6c41c"
    others = {"augment": "x", "attention": "unfused", "precision": "bf16"}
    others |= {name: not value for name, value in OPTIONAL.items() if isinstance(value, bool)}
    others |= {name: 0.5 for name, value in OPTIONAL.items() if isinstance(value, float)}
    changed = {legacy_digest(cell.model_copy(update={"recipe": Recipe(**{n: v})})) for n, v in others.items()}
    assert others.keys() == OPTIONAL.keys() and len(changed | {legacy_digest(cell)}) == len(OPTIONAL) + 1


# Old names in a store


def test_a_record_under_its_old_name_is_found_with_its_samples(tmp_path: Path) -> None:
    store, samples = copied(tmp_path, 2), make_samples("acc_50", [1.0, 0.0])
    (store.sample_scores / f"{NAME}.json").write_text(json.dumps(samples))
    [record] = store.load()
    assert record.cell.id != NAME and NAME in former_ids(record.cell)
    for results in (store, find([store.root])):
        assert results.get(record.cell) == record and results.samples(record) == samples
    assert find([store.root]).load() == [record]


def test_an_old_name_holds_nothing_for_a_cell_that_differs_where_that_rule_is_blind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copied(tmp_path, 2)
    other = store.load()[0].cell.model_copy(update={"seed": 1})
    monkeypatch.setattr(store_module, "former_ids", lambda cell: (NAME,))
    assert store.get(other) is None
    store.save(remade(store.load()[0]).model_copy(update={"cell": other}))
    assert (store.records / f"{NAME}.json").exists() and len(store.load()) == 2


def test_a_cell_that_is_run_again_takes_its_new_name_and_leaves_no_second_record(tmp_path: Path) -> None:
    store = copied(tmp_path, 2)
    companions = [store.sample_scores / f"{NAME}.json"]
    companions += [folder / f"{NAME}.safetensors" for folder in (store.adapters, store.checkpoints)]
    for path in companions:
        path.write_text("{}")
    [former] = store.load()
    new = store.save(remade(former), make_samples("acc_50", [1.0]))
    assert contents(store.root).keys() == {f"records/{new.cell.id}.json", f"samples/{new.cell.id}.json"}
    assert store.load() == [new] == [store.get(former.cell)] and new.cell == former.cell


def test_what_an_old_name_holds_stays_when_it_is_later_or_cannot_be_read(tmp_path: Path) -> None:
    store = copied(tmp_path, 2)
    path, [former] = store.paths()[0], store.load()
    store.save(remade(former, "2020-01-01T00:00:00+00:00"))
    assert path.exists() and store.load() == [former]
    path.write_text("{")
    store.save(remade(former))
    assert path.read_text() == "{"


@pytest.mark.parametrize("call", ["unlink", "replace"])
def test_a_process_that_is_killed_while_it_saves_loses_no_record(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copied(tmp_path, 2)
    [former] = store.load()

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*((Path, "unlink") if call == "unlink" else (os, "replace")), killed)
        store.save(remade(former))
    written = call == "unlink"
    assert store.load() == [remade(former) if written else former] and (store.records / f"{NAME}.json").exists()
    if written:
        assert len(repair(store)) == 1
    new = store.save(remade(former))
    assert store.load() == [new] and len(store.paths()) == 1


def test_a_name_that_goes_while_others_read_costs_them_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = copied(tmp_path, 2)
    [former] = store.load()
    kept, read = contents(store.root), store_module.read_record
    reads: list[Path] = []

    def beaten(path: Path) -> Record:
        """Save the cell, as another process would, right before the first read of its old file."""
        reads.append(path)
        if len(reads) == 1:
            assert path.stem == NAME
            store.save(remade(former))
        return read(path)

    monkeypatch.setattr(store_module, "read_record", beaten)
    assert store.load() == [remade(former)]
    (store.records / f"{former.cell.id}.json").unlink()
    for name, data in kept.items():
        (store.root / name).write_bytes(data)
    reads.clear()
    assert store.get(former.cell) == remade(former) and not (store.records / f"{NAME}.json").exists()
