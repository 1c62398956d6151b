"""Repair of a results folder: it can be read again, no file is lost, and each action is reported."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from petlbench.core.errors import UserError
from petlbench.core.record import Record
from petlbench.results.repair import repair
from petlbench.results.store import Store
from tests.record_factory import make_record, make_samples


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "results", create=True)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def path_of(store: Store, record: Record) -> Path:
    return store.records / f"{record.cell.id}.json"


def test_a_sound_folder_is_left_as_it_is(store: Store) -> None:
    store.save(make_record(), make_samples("acc@0.5", [1.0]))
    store.save(make_record("bitfit", outcome="oom"))
    before = contents(store.root)
    assert repair(store) == []
    assert contents(store.root) == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def make_new(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))


def make_foreign(path: Path) -> None:
    path.write_text('{"name": "theirs"}')


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncate, "truncated"),
        (make_new, "schema version 99, newer"),
        (make_foreign, "not a record"),
        (make_folder, "is a folder"),
    ],
)
def test_a_spoilt_record_moves_aside_with_its_samples_and_adapter(
    store: Store, spoil: Callable[[Path], None], reason: str
) -> None:
    sound = store.save(make_record("bitfit"), make_samples("acc@0.5", [0.0]))
    spoilt = store.save(make_record(), make_samples("acc@0.5", [1.0]))
    name = spoilt.cell.id
    (store.adapters / f"{name}.safetensors").write_bytes(b"adapter")
    spoil(path_of(store, spoilt))
    before = contents(store.root)
    lines = repair(store)
    assert len(lines) == 1 and reason in lines[0] and "\n" not in lines[0]
    assert lines[0].startswith(f"records/{name}.json moved to set-aside/records/{name}.json")
    assert store.load() == [sound] and store.samples(sound) is not None
    after = contents(store.root)
    assert sorted(after.values()) == sorted(before.values())
    moved = {path for path in after if path.startswith("set-aside")}
    assert moved >= {f"set-aside/samples/{name}.json", f"set-aside/adapters/{name}.safetensors"}
    assert repair(store) == []


def test_what_was_set_aside_before_is_never_overwritten(store: Store) -> None:
    for content in ("first", "second", "third"):
        (store.records / "x.json").write_text(content)
        repair(store)
    aside = store.root / "set-aside" / "records"
    found = {path.name: path.read_text() for path in aside.iterdir()}
    assert found == {"x.json": "first", "x.2.json": "second", "x.3.json": "third"}


def test_a_record_under_a_wrong_name_gets_the_right_one(store: Store) -> None:
    saved = store.save(make_record(), make_samples("acc@0.5", [1.0]))
    path_of(store, saved).rename(store.records / "mine.json")
    assert repair(store) == [f"records/mine.json renamed to {saved.cell.id}.json: that is its cell"]
    assert store.load() == [saved] and store.samples(saved) == make_samples("acc@0.5", [1.0])


@pytest.mark.parametrize("wrong_is_later", [True, False])
def test_of_two_records_of_a_cell_the_later_stays_under_the_right_name(store: Store, wrong_is_later: bool) -> None:
    scores = make_samples("acc@0.5", [1.0])
    first = store.save(make_record(score=0.1, started="2024-01-01T00:00:00Z"), scores)
    path_of(store, first).rename(store.records / "aside.json")
    second = store.save(make_record(score=0.9, started="2024-02-01T00:00:00Z"), scores)
    if wrong_is_later:
        path_of(store, second).rename(store.records / "zz.json")
        (store.records / "aside.json").rename(path_of(store, first))
    lines = repair(store)
    assert store.load() == [second] and store.samples(second) == scores
    earlier = f"{first.cell.id}.json" if wrong_is_later else "aside.json"
    assert f"records/{earlier} moved to set-aside/records/{earlier}: the cell {first.cell.id} has a later" in lines[0]
    assert len(lines) == 1 + wrong_is_later


def test_records_that_hold_each_others_names_leave_every_file_on_disk(store: Store) -> None:
    one, two = store.save(make_record("lora")), store.save(make_record("bitfit"))
    path_of(store, one).rename(store.records / "t")
    path_of(store, two).rename(path_of(store, one))
    (store.records / "t").rename(path_of(store, two))
    before = contents(store.root)
    assert len(repair(store)) == 2
    assert len(store.load()) == 1
    assert sorted(contents(store.root).values()) == sorted(before.values())


@pytest.mark.parametrize("spoil", [truncate, Path.unlink])
def test_a_record_whose_samples_are_damaged_or_gone_moves_aside(store: Store, spoil: Callable[[Path], None]) -> None:
    saved = store.save(make_record(), make_samples("acc@0.5", [1.0]))
    spoil(store.sample_scores / f"{saved.cell.id}.json")
    lines = repair(store)
    assert len(lines) == 1 and f"its samples file {saved.cell.id}.json is" in lines[0]
    assert store.load() == [] and store.get(saved.cell) is None


def test_only_old_leftovers_of_killed_writers_are_removed(store: Store) -> None:
    saved = store.save(make_record())
    for folder in (store.records, store.adapters, store.checkpoints):
        for name in (".old.tmp", ".new.tmp"):
            (folder / name).write_text('{"cell"')
        two_hours_ago = time.time() - 7200
        os.utime(folder / ".old.tmp", (two_hours_ago, two_hours_ago))
    lines = repair(store)
    assert [line.split()[0] for line in lines] == [f"{f}/.old.tmp" for f in ("records", "adapters", "checkpoints")]
    assert sorted(path.parent.name for path in store.root.rglob(".new.tmp")) == ["adapters", "checkpoints", "records"]
    assert not list(store.root.rglob(".old.tmp"))
    assert store.load() == [saved]


def test_what_is_no_results_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    discs = tmp_path / "music" / "records"
    discs.mkdir(parents=True)
    (discs / "blue.json").write_text('{"artist": "Joni Mitchell"}')
    (discs / ".old.tmp").write_text("")
    os.utime(discs / ".old.tmp", (0, 0))
    before = contents(tmp_path)
    for root in (tmp_path / "music", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a results folder"):
            repair(Store(root))
    assert contents(tmp_path) == before


def test_a_folder_with_nothing_but_half_a_record_can_be_repaired(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "results", create=True)
    truncate(path_of(store, store.save(make_record())))
    for folder in (store.sample_scores, store.adapters):
        folder.rmdir()
    assert len(repair(store)) == 1
    assert store.load() == []
