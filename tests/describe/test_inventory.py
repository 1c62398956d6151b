"""`petlbench data check` on small data sets, whose files the tests write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from datasets import Dataset, Features, Image, List, Value

from petlbench.api.registries import DATASETS
from petlbench.api.source import Source, SourceConfig
from petlbench.commands import main
from petlbench.core.errors import UserError
from petlbench.datasets.files.declaration import FilesConfig
from petlbench.describe.dataset import DatasetPart, DatasetReport, opened_source, report_dataset
from tests.miniatures import picture
from tests.toy_dataset import SIZES, Toy, make

NLVR = Path(__file__).parents[1] / "fixtures" / "nlvr"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PETLBENCH_DATA", raising=False)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with the whole toy data set as published; `toy` is registered."""
    known = DATASETS.get
    monkeypatch.setattr(DATASETS, "get", lambda name: Toy if name == "toy" else known(name))
    folder = tmp_path / "data"
    make(folder)
    return folder


def change(root: Path, part: str, edit: Callable[[list[Any]], Any]) -> None:
    path = root / f"{part}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def inventory(root: Path | None, name: str = "rec:toy", sample: int | None = 16, **config: Any) -> DatasetReport:
    return report_dataset(*opened_source(name, config, root), sample=sample)


def entries(report: DatasetReport) -> dict[str, DatasetPart]:
    """Return the entries by name; a split that is made of parts is called `split NAME`."""
    return {f"split {e.name}" if e.made_of else e.name: e for e in report.entries}


def test_what_is_there_as_published_is_counted_and_found_sound(root: Path) -> None:
    report = inventory(root)
    assert report.ok
    by_name = entries(report)
    assert {name: tuple(by_name[name].counts.values()) for name in SIZES} == SIZES
    assert {e.verdict for name, e in by_name.items() if name in SIZES} == {"as published"}
    assert [by_name[name].opened for name in SIZES] == [16, 6, 5, 3]
    assert [by_name[name].needed for name in SIZES] == [True, True, True, False]
    train, validation = by_name["split train"], by_name["split validation"]
    assert train.counts["expressions"] + validation.counts["expressions"] == 44
    assert train.counts["images"] + validation.counts["images"] == 40
    assert 0 < validation.counts["images"] < train.counts["images"]
    assert (train.made_of, validation.made_of) == ("train, images kept", "train, images held out")
    assert (by_name["split test"].made_of, by_name["split test"].published) == ("val + testA", {"expressions": 11})


def test_another_size_than_published_fails_and_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(root, "val", lambda rows: rows.pop())
    report = inventory(root)
    assert not report.ok
    assert entries(report)["val"].differing == {"images": 6, "expressions": 6}
    assert entries(report)["split test"].differing == {"expressions": 11}
    assert main.main(["data", "check", "rec:toy", "--data-root", str(root)]) == 1
    out = capsys.readouterr().out
    assert "5 (published 6)" in out
    assert "10 (published 11)" in out
    assert "sizes differ" in out


def test_a_size_that_differs_where_nobody_needs_the_part_is_no_failure(root: Path) -> None:
    change(root, "extra", lambda rows: rows.pop())
    report = inventory(root)
    assert entries(report)["extra"].verdict == "sizes differ"
    assert report.ok


def test_rows_that_cannot_be_used_are_not_counted_and_listed_with_their_reason(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(root, "testA", lambda rows: rows[1].__setitem__(2, [1.0, 2.0, 0.0, 4.0]))
    report = inventory(root)
    entry = entries(report)["testA"]
    assert (entry.counts["expressions"], entry.left_out) == (4, {"box without area": 1})
    assert not report.ok
    main.main(["data", "check", "rec:toy", "--data-root", str(root)])
    assert "toy testA: left out 1 (box without area), first testA/01.png" in capsys.readouterr().out


def test_one_parts_fault_does_not_hide_the_others(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "val.json").write_text("[[")
    report = inventory(root)
    by_name = entries(report)
    assert (by_name["val"].error, by_name["val"].verdict) == (
        "val.json is truncated: get the file again",
        "cannot be used",
    )
    assert (by_name["train"].verdict, by_name["testA"].verdict) == ("as published", "as published")
    assert (by_name["split train"].ok, by_name["split test"].ok) == (True, False)
    assert main.main(["data", "check", "rec:toy", "--data-root", str(root)]) == 1
    assert capsys.readouterr().out.count("truncated") == 1, "once for the part and the split"


def test_a_missing_part_is_named_with_its_origin(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "val.json").unlink()
    (root / "extra.json").unlink()
    by_name = entries(inventory(root))
    assert (by_name["val"].verdict, by_name["val"].ok, by_name["val"].needed) == ("not there", False, True)
    assert (by_name["extra"].verdict, by_name["extra"].needed) == ("not there", False)
    assert main.main(["data", "check", "rec:toy", "--data-root", str(root)]) == 1
    out = capsys.readouterr().out
    assert "toy (toy) has no part 'val'" in out
    assert out.count("get it from the moon") == 1
    assert "not there (not needed)" in out


def test_a_data_set_that_is_not_there_is_said_once_and_is_no_mistake_of_the_command(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main.main(["data", "check", "rec:toy", "--data-root", str(tmp_path / "empty")]) == 1
    out = capsys.readouterr().out
    assert out.count("toy is not there") == 1
    assert "train, validation, test: toy is not there" in out
    assert "get it from the moon" in out
    assert not inventory(None).ok


def test_missing_images_are_counted_and_the_annotations_still_are(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(6):
        (root / "pictures" / "val" / f"{number:02}.png").unlink()
    report = inventory(root)
    entry = entries(report)["val"]
    assert (entry.counts["expressions"], len(entry.faults), entry.opened) == (6, 6, 0)
    assert entry.verdict == "missing or broken images: 6"
    assert not report.ok
    main.main(["data", "check", "rec:toy", "--data-root", str(root)])
    out = capsys.readouterr().out
    assert f"val: {root.absolute()}/pictures/val/00.png: missing" in out
    assert "val: and 1 more: --json lists all" in out
    assert "05.png" not in out
    assert "to fix it: get it from the moon" in out


def test_a_folder_of_images_that_is_not_there_leaves_the_counts(root: Path) -> None:
    for path in (root / "pictures" / "testA").iterdir():
        path.unlink()
    (root / "pictures" / "testA").rmdir()
    entry = entries(inventory(root))["testA"]
    assert "toy lacks its images" in entry.error
    assert entry.counts == {"images": 5, "expressions": 5}


def test_a_sample_spread_over_a_part_is_opened_or_all_of_it(root: Path) -> None:
    def cut(number: int) -> None:
        path = root / "pictures" / "train" / f"{number:02}.png"
        path.write_bytes(path.read_bytes()[:60])

    cut(39)
    (fault,) = entries(inventory(root, sample=2))["train"].faults.items()
    assert fault[0].endswith("train/39.png"), "the last is of every sample"
    assert "cannot be used" in fault[1]
    cut(21)
    assert len(entries(inventory(root, sample=2))["train"].faults) == 1
    everything = entries(inventory(root, sample=None))
    assert (everything["train"].opened, len(everything["train"].faults)) == (40, 2)
    assert not inventory(root, sample=None).ok
    assert entries(inventory(root, sample=0))["train"].ok


def test_what_skipping_broken_images_leaves_out_of_a_split_is_counted(root: Path) -> None:
    (root / "pictures" / "val" / "03.png").unlink()
    broken = entries(inventory(root))["split test"]
    assert "1 images of toy, test, are missing" in broken.error
    report = inventory(root, skip_broken=True)
    test = entries(report)["split test"]
    assert (test.counts, test.left_out) == ({"images": 10, "expressions": 10}, {"image missing or broken": 1})
    assert any("skipped: 1 images of toy, test" in note for note in report.notes)


def test_captions_are_counted_and_not_their_rows(root: Path) -> None:
    for part in SIZES:
        change(root, part, lambda rows: [row.__setitem__(2, ["a", "b", "c"]) for row in rows])
    report = inventory(root, "captioning:toy")
    assert entries(report)["val"].counts == {"images": 6, "captions": 18}
    assert (entries(report)["val"].verdict, report.ok) == ("sound", True), "no size is published for this task"


def test_both_images_of_a_pair_are_looked_at(root: Path) -> None:
    assert entries(inventory(root, "pairs:toy"))["val"].counts == {"images": 7, "pairs": 6}
    (root / "pictures" / "testA" / "00.png").write_bytes(b"no image")
    assert len(entries(inventory(root, "pairs:toy", sample=None))["val"].faults) == 1


class Rows(Source):
    """A source with rows only, in another order than their table."""

    Config = SourceConfig
    tasks = frozenset({"captioning"})
    sizes: ClassVar[dict[str, Any]] = {"captioning": {"test": {"captions": 6}}}
    folder: ClassVar[Path]

    def load(self, task: str, split: str, limit: int | None = None) -> Dataset:
        if split == "validation":
            raise UserError("validation got lost")
        features = Features({"image_id": Value("string"), "image": Image(), "captions": List(Value("string"))})
        places = [str(self.folder / f"{i}.png") for i in range(4)]
        rows = [{"image_id": str(i % 4), "image": places[i % 4], "captions": ["a"] * i} for i in range(6)]
        return Dataset.from_list(rows, features=features).select([3, 2, 1, 0])

    def fingerprint(self, task: str) -> str:
        return ""


def test_a_source_that_is_known_by_its_rows_is_checked_on_them(tmp_path: Path) -> None:
    for seed in range(4):
        picture(tmp_path / f"{seed}.png", (16, 12), seed)
    Rows.folder = tmp_path
    report = report_dataset("captioning", "rows", Rows(SourceConfig()), sample=None)
    by_name = {entry.name: entry for entry in report.entries}
    assert (by_name["test"].counts, by_name["test"].opened) == ({"images": 4, "captions": 6}, 4)
    assert (by_name["test"].verdict, by_name["train"].verdict) == ("as published", "sound")
    assert (by_name["validation"].error, report.ok) == ("validation got lost", False)
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "2.png").unlink()
    (train, *_) = report_dataset("captioning", "rows", Rows(SourceConfig()), sample=None).entries
    assert sorted(Path(place).name for place in train.faults) == ["0.png", "2.png"]
    (train, *_) = report_dataset("captioning", "rows", Rows(SourceConfig()), sample=1).entries
    assert train.opened == 1


def test_a_split_without_rows_is_no_sound_one(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features({"image_id": Value("string"), "image": Image(), "captions": List(Value("string"))})
    monkeypatch.setattr(Rows, "load", lambda *_: Dataset.from_dict({name: [] for name in features}, features))
    report = report_dataset("captioning", "rows", Rows(SourceConfig()), sample=16)
    assert {entry.error for entry in report.entries} == {"it has no rows"}
    assert not report.ok


def test_files_that_a_source_of_rows_lacks_are_missing_and_no_mistake(tmp_path: Path) -> None:
    report = inventory(tmp_path, "rec:nlvr")
    assert not report.ok
    assert {entry.verdict for entry in report.entries} == {"cannot be used"}
    assert inventory(NLVR, "rec:nlvr").ok


def test_no_configuration_is_needed_and_a_layout_must_exist(root: Path) -> None:
    assert opened_source("rec:toy", {}, root)[2].config == FilesConfig()
    with pytest.raises(UserError, match=r"toy has no layout 'toi': did you mean 'toy'\?"):
        opened_source("rec:toy", {"layout": "toi"}, root)
