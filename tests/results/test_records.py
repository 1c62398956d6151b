"""The store of results: no half-written file, and no error that goes unnoticed on reading."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from petlbench.core.errors import UserError
from petlbench.core.files import write_atomic
from petlbench.core.record import Trial
from petlbench.results.store import Store, find
from tests.record_factory import make_record, make_samples


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "results", create=True)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_saved_record_and_its_samples_come_back_equal(store: Store) -> None:
    samples = make_samples("acc@0.5", [1.0, 0.0, 1.0])
    saved = store.save(make_record(), samples)
    assert store.load() == [saved] == [store.get(saved.cell)]
    assert store.samples(saved) == samples
    assert files(store.root) == [f"records/{saved.cell.id}.json", f"samples/{saved.cell.id}.json"]


def test_a_record_without_samples_points_to_none_even_when_an_earlier_one_did(store: Store) -> None:
    store.save(make_record(), make_samples("acc@0.5", [1.0]))
    saved = store.save(make_record(outcome="oom"))
    assert store.load() == [saved]
    assert saved.samples is None and store.samples(saved) is None


def test_infinite_and_undefined_losses_survive_as_strict_json(store: Store) -> None:
    losses = ((1, float("inf")), (2, float("-inf")), (3, float("nan")))
    trials = (Trial(lr=1.0, outcome="diverged", losses=losses),)
    saved = store.save(make_record(outcome="diverged").model_copy(update={"trials": trials}))

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is not JSON")

    json.loads((store.records / f"{saved.cell.id}.json").read_text(), parse_constant=refuse)
    assert repr(store.load()[0].trials) == repr(trials)


def test_an_unknown_cell_has_no_record(store: Store) -> None:
    assert store.get(make_record().cell) is None


FOREIGN = ["", '{"cell": {"met', "[1, 2]", "\x00\x01", '{"cell": 3, "outcome": "ok"}', '{"name": "theirs"}']


@pytest.mark.parametrize("content", FOREIGN)
def test_a_damaged_or_foreign_record_is_named_in_one_line_with_the_remedy(store: Store, content: str) -> None:
    store.save(make_record())
    path = store.records / "broken.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        store.load()
    message = str(caught.value)
    assert str(path) in message and f"`petlbench repair {store.root}`" in message and "rerun" in message
    assert "\n" not in message


def rewrite(path: Path, **changes: object) -> None:
    """Change keys of a record's file; None drops a key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_record_that_does_not_say_its_schema_is_refused(store: Store) -> None:
    saved = store.save(make_record())
    rewrite(store.records / f"{saved.cell.id}.json", schema_version=None)
    with pytest.raises(UserError, match="no `schema_version`"):
        store.load()


def test_a_record_under_a_wrong_name_is_refused_with_the_right_one(store: Store) -> None:
    saved = store.save(make_record())
    path = store.records / f"{saved.cell.id}.json"
    path.rename(path.with_name("mine.json"))
    with pytest.raises(UserError, match=rf"mine\.json holds the record that belongs into {path.name}; .*renames it"):
        store.load()


def test_a_second_record_of_a_cell_is_refused(store: Store) -> None:
    saved = store.save(make_record())
    path = store.records / f"{saved.cell.id}.json"
    path.with_name("zz copy.json").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=rf"zz copy\.json is a second record of the cell of {path.name}; .*the later"):
        store.load()


def test_a_record_of_a_newer_schema_asks_for_an_upgrade(store: Store) -> None:
    saved = store.save(make_record())
    path = store.records / f"{saved.cell.id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(UserError, match=r"schema version 99.*upgrade"):
        store.load()


def test_temporary_files_of_a_killed_process_are_ignored(store: Store) -> None:
    saved = store.save(make_record())
    (store.records / ".0123.tmp").write_text('{"cell"')
    (store.records / "._copy.json").write_text("\x00")
    assert store.load() == [saved]


def test_samples_never_lie_outside_their_folder(store: Store) -> None:
    (store.root / "secret.json").write_text('{"sample_ids": [], "scores": {}}')
    record = make_record().model_copy(update={"samples": "../secret.json"})
    with pytest.raises(UserError, match=r"samples/secret\.json is missing"):
        store.samples(record)


@pytest.mark.parametrize(
    "content", ["", '{"sample_ids": ["a"]}', '{"sample_ids": ["a", "b"], "scores": {"acc@0.5": [1.0]}}']
)
def test_damaged_samples_are_named(store: Store, content: str) -> None:
    saved = store.save(make_record(), make_samples("acc@0.5", [1.0]))
    path = store.sample_scores / f"{saved.cell.id}.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"samples.*rerun the cell lora on rec:digits"):
        store.samples(saved)


def test_a_full_disk_is_one_line_and_leaves_the_old_record_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    old = store.save(make_record(score=0.1))
    before = files(store.root)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"No space left.*free some space") as caught:
            store.save(make_record(score=0.9))
    assert "\n" not in str(caught.value)
    assert files(store.root) == before and store.load() == [old]


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes")
def test_a_write_that_the_system_cuts_off_leaves_the_old_record_whole(store: Store) -> None:
    old = store.save(make_record(score=0.1))
    before = files(store.root)
    code = f"""
import resource
from petlbench.results.store import Store
from petlbench.core.errors import UserError
store = Store.open({str(store.root)!r}, create=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    store.save(store.load()[0].model_copy(update={{"reason": "another"}}))
except UserError as error:
    print(error)
try:
    Store.open({str(store.root)!r}, create=True)
except UserError as error:
    print(error)
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert [line.split(str(store.root))[0] for line in said] == ["cannot write ", "cannot write to folder "]
    assert files(store.root) == before and store.load() == [old]


def test_a_record_is_not_written_when_its_samples_cannot_be(store: Store) -> None:
    store.sample_scores.rmdir()
    with pytest.raises(UserError):
        store.save(make_record(), make_samples("acc@0.5", [1.0]))
    assert store.load() == []


def test_an_interrupted_write_leaves_neither_a_target_nor_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x.json", b"{}")
    assert files(tmp_path) == []


def test_simultaneous_saves_of_one_cell_leave_one_whole_record(store: Store) -> None:
    records = [make_record(score=index / 20) for index in range(20)]
    with ThreadPoolExecutor(8) as pool:
        saved = list(pool.map(store.save, records))
    assert store.load()[0] in saved
    assert len(files(store.root)) == 1


def test_of_two_records_of_a_cell_in_merged_folders_the_newer_counts_with_its_samples(tmp_path: Path) -> None:
    a, b = (Store.open(tmp_path / name, create=True) for name in "ab")
    newer = a.save(make_record(score=0.9, started="2024-02-01T00:00:00Z"), make_samples("acc@0.5", [1.0]))
    b.save(make_record(score=0.1, started="2024-01-01T00:00:00Z"), make_samples("acc@0.5", [0.0]))
    other = b.save(make_record("bitfit"))
    merged = find([a.root, b.root])
    assert merged.load() == find([b.root, a.root]).load()
    assert {record.cell.id: record for record in merged.load()} == {r.cell.id: r for r in (newer, other)}
    assert merged.samples(newer) == make_samples("acc@0.5", [1.0])
    assert merged.get(other.cell) == other


def test_opening_what_is_no_results_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, said in (("file", "is a file"), ("empty", "not a results folder"), ("none", "no results folder at")):
        with pytest.raises(UserError, match=said):
            Store.open(tmp_path / name, create=False)
    assert not (tmp_path / "none").exists()
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match="file"):
            Store.open(tmp_path / name, create=True)


def test_a_folder_from_before_checkpoints_and_logs_still_opens(store: Store) -> None:
    saved = store.save(make_record())
    for folder in (store.checkpoints, store.logs, store.claims, store.cache):
        folder.rmdir()
    assert Store.open(store.root, create=False).load() == [saved]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, data: bytes) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot write to folder .*Permission denied"):
        Store.open(tmp_path / "results", create=True)


def test_nothing_downstream_of_records_imports_torch() -> None:
    names = ", ".join(
        f"petlbench.results.{name}" for name in ("store", "leaderboard", "uncertainty.pairs", "plots.figures")
    )
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
