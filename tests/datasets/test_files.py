"""Tests of what all data sets of files share: splits, limits, missing and broken images, cache, fingerprints."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import pyarrow as pa
import pytest
from datasets import Dataset, Features, Value
from PIL import Image
from PIL.Image import Image as Picture

from petlbench.api.registries import DATASETS, TASKS
from petlbench.core.errors import UserError
from petlbench.core.source_code.closure import Closure, closure_of
from petlbench.datasets.files import images, source
from petlbench.datasets.files.declaration import Choice, Declaration, FilesConfig
from petlbench.datasets.files.reader import Part, Reader, Skips
from petlbench.datasets.files.source import FileSource, held_out
from tests.miniatures import picture


class Lines(Reader):
    """A reader of a file of image names for each part; every image gives one row of rec."""

    layout = "lines"
    readings: ClassVar[list[str]] = []

    @classmethod
    def find(cls, source: Declaration, root: Path | None) -> Self | None:
        return cls(source, root) if root and (root / "train.txt").is_file() else None

    @classmethod
    def places(cls, source: Declaration) -> str:
        return "train.txt"

    def parts(self, task: str) -> tuple[str, ...]:
        return tuple(path.stem for path in sorted(self.root.glob("*.txt")))

    def files(self, task: str, part: str) -> list[Path]:
        return [self.root / f"{part}.txt"]

    def read(self, task: str, part: str) -> Part:
        self.readings.append(part)
        path, skips = self.root / f"{part}.txt", Skips()
        names = [images.relative(name, path) for name in path.read_text().split()]
        if "empty.png" in names:
            skips.add("box without area", "empty.png")
        names = [name for name in names if name != "empty.png"]
        columns = {"image_id": names, "image": names, "expression": names, "box": [[0.0, 0.0, 1.0, 1.0]] * len(names)}
        return Part(pa.table({"sample_id": names, **columns, "subset": [part] * len(names)}), skips)


class Listed(FileSource):
    name = "listed"
    tasks = frozenset({"rec"})
    origin = "ask at the door"
    readers = (Lines,)
    image_bases = ("", "pictures")

    def choice(self, task: str, split: str) -> Choice:
        return {
            "train": Choice(("train",), "kept"),
            "validation": Choice(("train",), "held out"),
            "test": Choice(("testA", "testB")),
        }[split]


TRAIN = [f"train/{i:03d}.png" for i in range(60)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PETLBENCH_DATA", raising=False)
    found = tmp_path / "data"
    for seed, name in enumerate([*TRAIN, "test/a.png", "test/b.png", "test/c.png"]):
        picture(found / "pictures" / name, (16, 12), seed)
    (found / "train.txt").write_text("\n".join(TRAIN))
    (found / "testA.txt").write_text("test/a.png\ntest/b.png\nempty.png")
    (found / "testB.txt").write_text("test/c.png")
    Lines.readings.clear()
    return found


def listed(root: Path | None, **options: object) -> Listed:
    return Listed(FilesConfig(**options), root)  # type: ignore[arg-type]


def ids(rows: Dataset) -> list[str]:
    return list(rows["sample_id"])


def test_no_image_is_trained_on_and_validated_on(root: Path) -> None:
    train, validation = ids(listed(root).load("rec", "train")), ids(listed(root).load("rec", "validation"))
    assert validation and sorted(train + validation) == TRAIN
    assert validation == [name for name in TRAIN if held_out(name)]
    assert ids(listed(root).load_part("rec", "train")) == TRAIN


def test_a_split_of_several_parts_has_the_rows_of_all_and_says_which(root: Path) -> None:
    rows = listed(root).load("rec", "test")
    assert list(zip(rows["sample_id"], rows["subset"], strict=True)) == [
        ("test/a.png", "testA"),
        ("test/b.png", "testA"),
        ("test/c.png", "testB"),
    ]
    assert ids(listed(root).load("rec", "testB")) == ["test/c.png"]


def test_a_limit_takes_rows_from_all_over_the_split_and_always_the_same(root: Path) -> None:
    some = ids(listed(root).load("rec", "train", 12))
    assert len(some) == 12 and some == sorted(some) == ids(listed(root).load("rec", "train", 12))
    assert some[0] < TRAIN[20] and some[-1] > TRAIN[40]


def test_images_are_opened_when_a_row_is_taken(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    decoded = images.decoded
    monkeypatch.setattr(images, "decoded", lambda image: opened.append(image["path"]) or decoded(image))  # type: ignore[func-returns-value]
    rows = listed(root).load("rec", "train")
    assert not opened
    assert isinstance(rows[3]["image"], Picture) and rows[3]["image"].size == (16, 12)
    assert opened == [str(root / "pictures" / rows.with_format(None)[3]["sample_id"])] * 2
    streamed = next(iter(listed(root).stream("rec", "train")))
    assert isinstance(streamed["image"], Picture) and streamed["sample_id"] == rows[0]["sample_id"]


def test_a_missing_image_is_an_error_or_a_counted_skip(root: Path) -> None:
    (root / "pictures/test/b.png").unlink()
    with pytest.raises(UserError, match=r"1 images of listed, test, .*b\.png \(missing\): .*skip_broken"):
        listed(root).load("rec", "test")
    with pytest.raises(UserError, match="skip_broken"):
        listed(root).check()
    source = listed(root, skip_broken=True)
    source.check()
    assert ids(source.load("rec", "test")) == ["test/a.png", "test/c.png"]
    assert any("b.png (missing)" in note for note in source.notes())


def test_a_truncated_image_is_named_when_it_is_opened_or_skipped_before(root: Path) -> None:
    broken = root / "pictures/test/c.png"
    broken.write_bytes(broken.read_bytes()[:100])
    rows = listed(root).load("rec", "test")
    with pytest.raises(UserError, match=r"c\.png cannot be used \(.+\): get it again, or set skip_broken"):
        rows[2]
    source = listed(root, skip_broken=True)
    assert ids(source.load("rec", "test")) == ["test/a.png", "test/b.png"]
    assert any("c.png" in note for note in source.notes())


def test_a_bomb_is_refused_before_it_is_unpacked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (10_000, 10_000)).save(root / "pictures/test/a.png")
    unpacked: list[bool] = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: unpacked.append(True))
    with pytest.raises(UserError, match=r"a\.png .*10000 x 10000 pixels"):
        listed(root).load("rec", "test")[0]
    assert not unpacked
    assert images.fault(root / "pictures/test/a.png") == "10000 x 10000 pixels are more than 64,000,000"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b.png", "a\\..\\b.png", "a\0.png", ""])
def test_a_name_that_leads_out_of_the_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="not a file below the image folder"):
        images.relative(name, Path("annotations.json"))


def test_what_was_left_out_is_said_also_when_it_comes_from_the_cache(root: Path) -> None:
    for _ in range(2):
        source = listed(root)
        source.load("rec", "test")
        assert source.notes() == ("listed testA: left out 1 (box without area), first empty.png",)
    assert Lines.readings == ["testA", "testB"]


def test_the_cache_follows_the_content_of_the_files(root: Path) -> None:
    listed(root).load("rec", "testB")
    (root / "testB.txt").write_text("test/b.png")
    assert ids(listed(root).load("rec", "testB")) == ["test/b.png"]
    for cached in (root.parent / "cache/tables").iterdir():
        cached.write_bytes(cached.read_bytes()[:-20])
    assert ids(listed(root).load("rec", "testB")) == ["test/b.png"]


def test_a_cache_that_cannot_be_written_costs_only_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "file").write_text("")
    monkeypatch.setenv("PETLBENCH_CACHE", str(root / "file"))
    assert len(listed(root).load("rec", "test")) == 3


def test_the_fingerprint_follows_content_and_missing_images_but_not_the_place(root: Path) -> None:
    before = listed(root).fingerprint("rec")
    moved = root.rename(root.parent / "elsewhere")
    for options in ({}, {"skip_broken": True}, {"layout": "lines"}, {"hub": str(moved)}):
        assert listed(moved, **options).fingerprint("rec") == before
    assert listed(moved, columns={"image": "picture"}).fingerprint("rec") != before
    found = [before]
    (moved / "pictures/test/b.png").unlink()
    found.append(listed(moved).fingerprint("rec"))
    assert listed(moved, skip_broken=True).fingerprint("rec") == found[-1]
    (moved / "pictures/test/c.png").write_bytes(b"no picture")
    found.append(listed(moved, skip_broken=True).fingerprint("rec"))
    (moved / "testA.txt").write_text("test/a.png")
    found.append(listed(moved).fingerprint("rec"))
    assert len(set(found)) == 4


def test_the_fingerprint_follows_what_splits_are_made_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listed(root).fingerprint("rec")
    choices = {"train": Choice(("train",)), "validation": Choice(("testA",)), "test": Choice(("testB",))}
    monkeypatch.setattr(Listed, "choice", lambda self, task, split: choices[split])
    assert listed(root).fingerprint("rec") != before


def test_code_decides_what_is_kept_and_not_which_data_it_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, key = listed(root).fingerprint("rec"), listed(root)._key("rec", "train")
    assert Lines.readings == ["train", "testA", "testB"]
    real = closure_of

    def another(cls: type) -> Closure | None:
        closure = real(cls)
        return Closure(closure.definitions, "another") if closure and cls is Lines else closure

    monkeypatch.setattr(source, "closure_of", another)
    assert listed(root).fingerprint("rec") == data and listed(root)._key("rec", "train") != key
    assert Lines.readings == ["train", "testA", "testB"] * 2


def test_rows_read_by_code_that_is_in_no_file_are_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Listed, "__module__", "__main__")
    for _ in range(2):
        assert len(listed(root).load("rec", "test")) == 3
    assert Lines.readings == ["testA", "testB"] * 2 and not (root.parent / "cache/tables").exists()


def test_tables_of_files_with_other_names_are_kept_apart(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = listed(root)._key("rec", "testA")
    (root / "testA.txt").rename(root / "renamed.txt")
    monkeypatch.setattr(Lines, "files", lambda self, task, part: [self.root / "renamed.txt"])
    assert listed(root)._key("rec", "testA") != key


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("testAA", r"no split 'testAA': did you mean 'testA'\? there are train, validation, test, testA, testB$"),
        ("x", r"no split 'x': there are train, validation, test, testA, testB$"),
    ],
)
def test_an_unknown_split_is_answered_with_the_nearest_and_all(root: Path, split: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        listed(root).load("rec", split)


def test_a_part_that_is_not_there_is_found_before_anything_runs(root: Path) -> None:
    (root / "testB.txt").unlink()
    with pytest.raises(UserError, match=r"listed \(lines\) has no part 'testB'.*ask at the door"):
        listed(root).check()


def test_wrong_places_are_answered_in_one_line(root: Path, tmp_path: Path) -> None:
    cases = {
        f"the data root {tmp_path / 'nowhere'} does not exist": listed(tmp_path / "nowhere"),
        "listed is not there: looked below .* for train.txt; ask at the door": listed(tmp_path),
        "pass --data-root DIR or set PETLBENCH_DATA": listed(None),
        "no layout 'line': did you mean 'lines'": listed(root, layout="line"),
    }
    for expected, wrong in cases.items():
        with pytest.raises(UserError, match=expected):
            wrong.check()
    with pytest.raises(UserError, match="has no task 'vqa': choose one of rec"):
        listed(root).load("vqa", "train")


def test_a_folder_of_images_that_is_not_there_says_where_it_was_looked_for(root: Path) -> None:
    (root / "pictures/test").rename(root / "pictures/tests")
    with pytest.raises(
        UserError, match=r"lacks its images \(looked for .*data/test, .*pictures/test\): ask at the door"
    ):
        listed(root).load("rec", "test")


@pytest.mark.parametrize("dataset", DATASETS.names())
def test_a_source_declares_the_columns_that_its_tasks_do(dataset: str) -> None:
    cls = DATASETS.get(dataset)
    source = cls(cls.Config())
    for task in cls.tasks:
        assert source.features(task) == TASKS.get(task).features


def test_a_reader_that_gives_other_columns_than_the_task_has_is_named(root: Path) -> None:
    class More(Listed):
        def features(self, task: str) -> Features:
            return Features({**super().features(task), "mood": Value("string")})

    class Other(Listed):
        def features(self, task: str) -> Features:
            return Features({**super().features(task), "expression": Value("int64")})

    with pytest.raises(UserError, match=r"^listed: the reader of layout 'lines', for task 'rec', gives no column mood"):
        More(FilesConfig(), root).load("rec", "train")
    with pytest.raises(UserError, match=r"^listed: the reader .* gives a column of another type \(.*\): fix it$"):
        Other(FilesConfig(), root).load("rec", "train")
