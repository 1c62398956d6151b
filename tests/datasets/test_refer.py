"""Tests of RefCOCO, RefCOCO+, RefCOCOg and ReferItGame on miniatures in the refer toolkit's and TransVG's layouts."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from petlbench.api.schemas import REC
from petlbench.core.errors import UserError
from petlbench.datasets.files.pickles import load_pickle
from petlbench.datasets.files.source import held_out
from petlbench.datasets.official.refer import RefCOCO, RefCOCOg, RefCOCOPlus, ReferItGame
from petlbench.datasets.official.refer_source import ReferSource
from petlbench.results.store import Store
from tests.miniatures import one_epoch, picture

KINDS = {kind.name: kind for kind in (RefCOCO, RefCOCOPlus, RefCOCOg, ReferItGame)}
SIZE = (64, 48)
FIRST = 60  # first image id of the lists: some of the next 60 images are held out
SPLITS = ("train", "val", "testA", "testB", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "cache"))


def source(name: str, root: Path, **options: Any) -> ReferSource:
    return KINDS[name](KINDS[name].Config(**options), root)


def image_file(image_id: int, name: str = "refcoco") -> str:
    return f"{image_id}.jpg" if name == "referit" else f"COCO_train2014_{image_id:012d}.jpg"


class Refer:
    """A data set in the toolkit's layout: two references in each of `images` images, two sentences each."""

    def __init__(self, root: Path, name: str = "refcoco", split_by: str = "unc", splits: tuple[str, ...] = SPLITS[:4]):
        self.name, self.root, self.folder = name, root, root / KINDS[name].folder
        self.path, self.json = self.folder / f"refs({split_by}).p", self.folder / "instances.json"
        self.refs: list[dict[str, Any]] = []
        self.instances: dict[str, Any] = {"info": {}, "images": [], "annotations": [], "categories": []}
        for image in range(3 * len(splits)):
            self._add(image, splits[image // 3])
        self.write()

    def _add(self, image: int, split: str) -> None:
        said = {"id": image, "file_name": image_file(image, self.name), "width": SIZE[0], "height": SIZE[1]}
        self.instances["images"].append(said)
        for number in (2 * image, 2 * image + 1):
            box = [3.5 + number % 5, 4.25, 20.75, 11.5]
            polygon = {"segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], "iscrowd": 0, "area": 9.0, "category_id": 1}
            self.instances["annotations"].append({"id": 1000 + number, "image_id": image, "bbox": box, **polygon})
            ids = [10 * number, 10 * number + 1]
            sentences = [
                {"sent_id": i, "sent": f"the thing {i}", "raw": f"The thing {i}!", "tokens": ["the", "thing", str(i)]}
                for i in ids
            ]
            ref = {"ref_id": number, "ann_id": 1000 + number, "image_id": image, "split": split, "sent_ids": ids}
            self.refs.append({**ref, "sentences": sentences, "file_name": f"wrong_{number}.jpg", "category_id": 1})

    def write(self, protocol: int = 0) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(pickle.dumps(self.refs, protocol))
        self.json.write_text(json.dumps(self.instances))
        pictures = self.root / ("images/saiapr_tc-12" if self.name == "referit" else "coco/train2014")
        for said in self.instances["images"]:
            if not (pictures / said["file_name"]).exists() and "/" not in said["file_name"]:
                picture(pictures / said["file_name"], SIZE, said["id"])
        return self.root


def index(root: Path, name: str, key: str, parts: tuple[str, ...], *, new: bool = True) -> Path:
    """Write TransVG's lists: six expressions about three images for each of `parts`, which may repeat a part."""
    corners = name == "referit"
    pictures = root / ("referit/images" if corners else "other/images/mscoco/images/train2014")
    lists: dict[str, list[Any]] = {part: [] for part in parts}
    for number, part in enumerate(parts):
        for image in range(FIRST + 3 * number, FIRST + 3 * number + 3):
            picture(pictures / image_file(image, name), SIZE, image)
            box = [5.5, 6.5, 25.75, 30.25] if corners else [5.5, 6.5, 20.25, 23.75]
            lists[part] += [(image_file(image, name), f"{image}.mat", box, f"thing {i}", ["r1"]) for i in range(2)]
    for part, entries in lists.items():
        path = root / f"{key}/{key}_{part}.pth"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(entries, path, _use_new_zipfile_serialization=new)
    return root


def refused(name: str, root: Path, part: str = "train", **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        source(name, root, **options).load("rec", part)
    said = str(caught.value)
    assert "\n" not in said
    return said


THREE, FOUR, GOOGLE = ("train", "val", "test"), SPLITS[:4], ("train",) * 20 + ("val",)
MINIATURES: dict[
    str, tuple[Callable[[Path], Any], str, str, int]
] = {  # maker, data set, split_by, rows of its test split
    "refcoco": (lambda r: Refer(r), "refcoco", "unc", 24),
    "refcoco+": (lambda r: Refer(r, "refcoco+"), "refcoco+", "unc", 24),
    "refcocog umd": (lambda r: Refer(r, "refcocog", "umd", THREE), "refcocog", "umd", 12),
    "refcocog google": (lambda r: Refer(r, "refcocog", "google", GOOGLE), "refcocog", "google", 12),
    "referit berkeley": (lambda r: Refer(r, "referit", "berkeley", THREE), "referit", "berkeley", 12),
    "referit unc": (lambda r: Refer(r, "referit", "unc", ("train", "val", "testA", "testAB")), "referit", "unc", 24),
    "refcoco lists": (lambda r: index(r, "refcoco", "unc", FOUR), "refcoco", "unc", 12),
    "refcoco+ lists": (lambda r: index(r, "refcoco+", "unc+", FOUR, new=False), "refcoco+", "unc", 12),
    "refcocog umd lists": (lambda r: index(r, "refcocog", "gref_umd", THREE), "refcocog", "umd", 6),
    "refcocog google lists": (lambda r: index(r, "refcocog", "gref", GOOGLE), "refcocog", "google", 6),
    "referit lists": (lambda r: index(r, "referit", "referit", THREE), "referit", "berkeley", 6),
}


@pytest.mark.parametrize("case", MINIATURES)
def test_every_data_set_division_and_layout_gives_rows_with_images_that_decode(tmp_path: Path, case: str) -> None:
    make, name, split_by, count = MINIATURES[case]
    make(tmp_path)
    made = source(name, tmp_path, split_by=split_by)
    made.check()
    rows = {split: made.load("rec", split) for split in ("train", "validation", "test")}
    assert len(rows["test"]) == count
    ids = {split: set(found["sample_id"]) for split, found in rows.items()}
    assert len(set().union(*ids.values())) == sum(map(len, rows.values())) > 0
    assert {row["image"].size for found in rows.values() for row in found} == {SIZE}
    assert not made.notes()


@pytest.mark.parametrize(
    ("case", "metrics"),
    [
        ("refcoco", {"acc_50/testA", "acc_50/testB"}),
        ("refcoco+ lists", {"acc_50/testA", "mean_iou/testB"}),
        ("refcocog umd", set()),
        ("referit lists", set()),
    ],
)
def test_every_data_set_trains_for_an_epoch_and_is_scored(tmp_path: Path, case: str, metrics: set[str]) -> None:
    make, name, _, count = MINIATURES[case]
    make(tmp_path)
    rows = len(source(name, tmp_path).load("rec", "train"))
    record = one_epoch("rec", name, tmp_path, tmp_path / "out", rows=rows)
    assert record.outcome == "ok", record.reason
    assert {"acc_50", "mean_iou"} | metrics <= record.metrics.keys()
    samples = Store(tmp_path / "out").samples(record)
    assert samples is not None
    assert samples["sample_ids"] == source(name, tmp_path).load("rec", "test")["sample_id"][:]
    assert len(samples["sample_ids"]) == count


def test_rows_are_one_for_each_sentence_with_the_box_and_the_image_of_the_annotation(tmp_path: Path) -> None:
    rows = source("refcoco", Refer(tmp_path).root).load("rec", "train")
    assert list(rows.features) == list(REC)
    assert rows["sample_id"] == ["0", "1", "10", "11", "20", "21", "30", "31", "40", "41", "50", "51"]
    assert rows["image_id"] == [str(i) for i in range(3) for _ in range(4)]
    row = rows[6]
    assert (row["expression"], row["box"], row["subset"]) == ("the thing 30", [6.5, 4.25, 20.75, 11.5], "train")
    assert row["image"].size == SIZE
    place = rows.with_format(None)[6]["image"]["path"]
    assert place == str(tmp_path / "coco/train2014/COCO_train2014_000000000001.jpg")


def test_the_parts_are_the_official_ones_and_the_option_test_chooses(tmp_path: Path) -> None:
    root = Refer(tmp_path).root
    assert source("refcoco", root).parts("rec") == ("train", "val", "testA", "testB")
    count = {part: len(source("refcoco", root).load("rec", part)) for part in ("train", "validation", "test", "testA")}
    assert count == {"train": 12, "validation": 12, "test": 24, "testA": 12}
    assert source("refcoco", root).load("rec", "test")["subset"] == ["testA"] * 12 + ["testB"] * 12
    for test in ("testA", "testB"):
        assert set(source("refcoco", root, test=test).load("rec", "test")["subset"]) == {test}


def test_no_sentence_is_in_two_splits(tmp_path: Path) -> None:
    made = source("refcoco", Refer(tmp_path).root)
    ids = [i for split in ("train", "validation", "test") for i in made.load("rec", split)["sample_id"]]
    assert len(set(ids)) == len(ids) == 48


def test_google_has_no_test_and_validation_is_held_out_by_image(tmp_path: Path) -> None:
    splits = ("train",) * 20 + ("val",)
    made = source("refcocog", Refer(tmp_path, "refcocog", "google", splits).root, split_by="google")
    images = {split: set(made.load("rec", split)["image_id"]) for split in ("train", "validation", "test")}
    assert images["test"] == {"60", "61", "62"}
    assert images["train"] | images["validation"] == {str(i) for i in range(60)}
    assert images["validation"] == {str(i) for i in range(60) if held_out(str(i))} != set()
    assert not images["train"] & images["validation"]
    assert made.sizes["rec"]["train"]["expressions"] == 85474
    assert source("refcocog", tmp_path).sizes["rec"]["train"]["expressions"] == 80512


def test_a_reference_in_two_test_parts_is_in_both_and_once_in_their_union(tmp_path: Path) -> None:
    splits = ("train", "val", "testA", "testAB", "testBC", "trainval")
    made = source("referit", Refer(tmp_path, "referit", "unc", splits).root, split_by="unc")
    counts = {part: len(made.load("rec", part)) for part in ("train", "val", "testA", "testB", "testC", "test")}
    assert counts == {"train": 12, "val": 12, "testA": 24, "testB": 24, "testC": 12, "test": 36}
    assert set(made.load("rec", "test")["subset"]) == {"testA", "testAB", "testBC"}


@pytest.mark.parametrize("below", ["refer/data/refcoco", "refer/refcoco", "data/refcoco", "RefCOCO"])
def test_the_files_are_found_where_people_have_them(tmp_path: Path, below: str) -> None:
    made = Refer(tmp_path / "made")
    root = tmp_path / "root"
    shutil.copytree(made.folder, root / below)
    shutil.copytree(made.root / "coco", root / ("RefCOCO/coco" if below == "RefCOCO" else "coco"))
    root = root / "RefCOCO" if below == "RefCOCO" else root
    assert len(source("refcoco", root).load("rec", "train")) == 12
    with pytest.raises(UserError, match=r"refcoco\+ is not there"):
        source("refcoco+", root).check()


@pytest.mark.parametrize("below", ["split/data", "data", "ln_data", "split"])
def test_index_lists_are_found_where_people_have_them(tmp_path: Path, below: str) -> None:
    made = index(tmp_path / "made", "referit", "referit", THREE)
    root = tmp_path / "root"
    for path in (made / "referit").glob("*.pth"):
        (root / below / "referit").mkdir(parents=True, exist_ok=True)
        path.rename(root / below / "referit" / path.name)
    shutil.copytree(made / "referit/images", root / "refclef/images")
    assert len(source("referit", root).load("rec", "train")) == 6


def test_the_toolkits_layout_is_tried_first_and_the_option_layout_chooses(tmp_path: Path) -> None:
    Refer(tmp_path)
    index(tmp_path, "refcoco", "unc", SPLITS[:4])
    assert len(source("refcoco", tmp_path).load("rec", "train")) == 12
    shutil.rmtree(tmp_path / "coco")  # the lists' images lie elsewhere
    rows = source("refcoco", tmp_path, layout="transvg").load("rec", "train")
    assert rows["sample_id"] == [f"train-{i}" for i in range(6)]
    assert "did you mean" in refused("refcoco", tmp_path, layout="transvgg")


def test_boxes_are_exact_or_truncated_as_transvg_truncates_them(tmp_path: Path) -> None:
    made = Refer(tmp_path / "refer")
    made.instances["annotations"][0]["bbox"] = [-0.75, 4.9, 20.75, 11.99]
    made.write()
    assert source("refcoco", made.root).load("rec", "train")[0]["box"] == pytest.approx([-0.75, 4.9, 20.75, 11.99])
    assert source("refcoco", made.root, boxes="int").load("rec", "train")[0]["box"] == [0, 4, 20, 11]
    for name, key, exact, whole in (
        ("refcoco", "unc", [5.5, 6.5, 20.25, 23.75], [5, 6, 20, 23]),
        ("referit", "referit", [5.5, 6.5, 20.25, 23.75], [5, 6, 20, 24]),  # corners are truncated, not sizes
    ):
        root = index(tmp_path / name, name, key, ("train", "val"))
        assert source(name, root).load("rec", "train")[0]["box"] == exact
        assert source(name, root, boxes="int").load("rec", "train")[0]["box"] == whole


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path) -> None:
    made = Refer(tmp_path)
    nan = float("nan")
    boxes = [[nan, 1, 2, 3], [1, 1, float("inf"), 3], [1, 1, 0, 3], [1, 1, 2, -3], [64, 1, 2, 3]]
    for annotation, box in zip(made.instances["annotations"], boxes, strict=False):
        annotation["bbox"] = box
    made.refs[5]["sentences"][0]["sent"] = " \t"
    made.refs[5]["sentences"][1]["sent"] = "\u2003"
    made.write()
    made.refs[0]["sentences"], made.refs[6]["sentences"] = [], []
    made.path.write_bytes(pickle.dumps(made.refs, 2))
    found = source("refcoco", tmp_path)
    refused("refcoco", tmp_path)  # nothing of train is left
    with pytest.raises(UserError):
        found.load("rec", "train")
    assert len(found.load("rec", "val")) == 10
    assert sorted(found.notes()) == sorted(
        [
            "refcoco train: left out 1 (reference without a sentence), first annotation-1000",
            "refcoco train: left out 2 (empty sentence), first 50",
            "refcoco train: left out 2 (box that is not finite), first 10",
            "refcoco train: left out 4 (box without area), first 20",
            "refcoco train: left out 2 (box outside of the image), first 40",
            "refcoco val: left out 1 (reference without a sentence), first annotation-1006",
        ]
    )


@pytest.mark.parametrize("box", [[-30, 4, 30, 5], [3, -9, 5, 9], [64, 0, 4, 4], [0, 48, 4, 4], [1e300, 0, 4, 4]])
def test_a_box_that_lies_wholly_outside_is_left_out_and_one_at_the_edge_is_not(
    tmp_path: Path, box: list[float]
) -> None:
    made = Refer(tmp_path)
    made.instances["annotations"][0]["bbox"] = box
    made.instances["annotations"][1]["bbox"] = [-29.5, -8.5, 30, 9]
    made.instances["annotations"][2]["bbox"] = [63.5, 47.5, 500, 500]
    made.write()
    rows = source("refcoco", tmp_path).load("rec", "train")
    assert len(rows) == 10
    assert rows["box"][0] == [-29.5, -8.5, 30, 9]
    del made.instances["images"][0]["width"], made.instances["images"][0]["height"]
    made.write()
    known = box[0] + box[2] <= 0 or box[1] + box[3] <= 0 or box[0] > 1e38
    assert len(source("refcoco", tmp_path).load("rec", "train")) == (10 if known else 12)


def test_a_box_on_another_image_is_left_out(tmp_path: Path) -> None:
    made = Refer(tmp_path)
    made.refs[0]["image_id"] = 1
    made.write()
    found = source("refcoco", tmp_path)
    assert len(found.load("rec", "train")) == 10
    assert found.notes() == ("refcoco train: left out 2 (box on another image), first 0",)


def test_faulty_entries_of_lists_are_left_out_and_counted(tmp_path: Path) -> None:
    root = index(tmp_path, "referit", "referit", ("train", "val"))
    boxes = [[1, 1, 5, 5], [5, 5, 5, 9], [9, 9, 5, 5], [float("nan"), 1, 2, 3], [-9, 0, 0, 5], [0, 0, 4, 4]]
    entries = [(image_file(FIRST, "referit"), "", box, "" if i == 5 else "thing") for i, box in enumerate(boxes)]
    torch.save(entries, root / "referit/referit_train.pth")
    found = source("referit", root)
    assert found.load("rec", "train")["sample_id"] == ["train-0"]
    assert sorted(found.notes()) == [
        "referit train: left out 1 (box outside of the image), first train-4",
        "referit train: left out 1 (box that is not finite), first train-3",
        "referit train: left out 1 (empty sentence), first train-5",
        "referit train: left out 2 (box without area), first train-1",
    ]


def _set(path: list[Any], value: Any) -> Callable[[Refer], None]:
    """Return damage that sets a value in the references (path from `refs`) or in instances.json (from `instances`)."""

    def damage(made: Refer) -> None:
        place = getattr(made, path[0])
        for step in path[1:-1]:
            place = place[step]
        if value is KeyError:
            del place[path[-1]]
        else:
            place[path[-1]] = value

    return damage


DAMAGE: dict[str, tuple[Callable[[Refer], None], str]] = {
    "sent_id twice": (_set(["refs", 7, "sentences", 0, "sent_id"], 11), "refs(unc).p has sent_id 11 twice"),
    "no sent_id": (_set(["refs", 0, "sentences", 0, "sent_id"], None), "refs(unc).p has a sentence without sent_id"),
    "sent_id is text": (_set(["refs", 0, "sentences", 0, "sent_id"], "x"), "refs(unc).p is truncated or not a list"),
    "sent is a number": (_set(["refs", 0, "sentences", 0, "sent"], 5), "refs(unc).p is truncated or not a list"),
    "no sent": (_set(["refs", 0, "sentences", 0, "sent"], KeyError), "KeyError: 'sent'"),
    "no sentences": (_set(["refs", 3, "sentences"], KeyError), "KeyError: 'sentences'"),
    "sentences are text": (_set(["refs", 3, "sentences"], "abc"), "refs(unc).p is truncated or not a list"),
    "no split": (_set(["refs", 3, "split"], KeyError), "KeyError: 'split'"),
    "ann_id is a list": (_set(["refs", 3, "ann_id"], [[[1]]]), "refs(unc).p is truncated or not a list"),
    "ann_id is huge": (_set(["refs", 3, "ann_id"], 2**70), "refs(unc).p is truncated or not a list"),
    "unknown ann_id": (_set(["refs", 3, "ann_id"], 77), "refers to annotation 77, which"),
    "unknown image_id": (_set(["refs", 3, "image_id"], 88), "refers to image 88, which"),
    "references are a number": (_set(["__dict__", "refs"], 5), "refs(unc).p is truncated or not a list"),
    "references are numbers": (_set(["__dict__", "refs"], [5]), "refs(unc).p is truncated or not a list"),
    "annotation twice": (_set(["instances", "annotations", 1, "id"], 1000), "instances.json has annotation 1000 twice"),
    "image twice": (_set(["instances", "images", 1, "id"], 0), "instances.json has image 0 twice"),
    "no annotations": (_set(["instances", "annotations"], KeyError), "instances.json is truncated or malformed"),
    "box of three": (_set(["instances", "annotations", 1, "bbox"], [1, 2, 3]), "annotations.1.bbox"),
    "box of text": (_set(["instances", "annotations", 1, "bbox"], ["a"] * 4), "annotations.1.bbox"),
    "huge id": (_set(["instances", "annotations", 1, "id"], 2**70), "instances.json is truncated or not a table"),
    "huge width": (_set(["instances", "images", 1, "width"], 10**400), "instances.json is truncated or not a table"),
    "file_name is a number": (_set(["instances", "images", 1, "file_name"], 5), "images.1.file_name"),
    "leads out": (_set(["instances", "images", 1, "file_name"], "../../etc/passwd"), "do not trust it"),
    "leads out, COCO": (_set(["instances", "images", 1, "file_name"], "COCO_.._1.jpg"), "do not trust it"),
    "absolute": (_set(["instances", "images", 1, "file_name"], "/etc/passwd"), "do not trust it"),
    "no name": (_set(["instances", "images", 1, "file_name"], ""), "do not trust it"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_an_error_of_one_line_that_names_the_file_and_the_fault(tmp_path: Path, case: str) -> None:
    damage, said = DAMAGE[case]
    made = Refer(tmp_path)
    damage(made)
    made.path.write_bytes(pickle.dumps(made.refs, 2))
    made.json.write_text(json.dumps(made.instances))
    assert said in refused("refcoco", tmp_path)
    assert not list((tmp_path / "cache").rglob("*.parquet"))


def test_truncated_and_missing_files_are_errors(tmp_path: Path) -> None:
    made = Refer(tmp_path)
    for path in (made.path, made.json):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert f"{path} is truncated" in refused("refcoco", tmp_path)
        path.write_bytes(whole)
    made.json.unlink()
    assert f"cannot read {made.json}" in refused("refcoco", tmp_path)
    made.path.unlink()
    assert "refcoco/refs(unc).p beside instances.json" in refused("refcoco", tmp_path)


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    made = Refer(tmp_path)
    marker = tmp_path / "marker"
    made.path.write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    assert "'os.system'" in refused("refcoco", tmp_path)
    lists = index(tmp_path / "lists", "refcoco+", "unc+", ("train", "val"))
    (lists / "unc+/unc+_train.pth").write_bytes(made.path.read_bytes())
    assert "'os.system'" in refused("refcoco+", lists)
    assert not marker.exists()


def test_references_nested_in_themselves_or_deeply_are_errors(tmp_path: Path) -> None:
    made = Refer(tmp_path)
    deep = b"]" * 100_000 + b"a" * 99_999
    for content in (b"]q\x00h\x00a.", deep + b".", b"](U\x09sentences]}U\x07sent_id" + deep + b"sadsa."):
        made.path.write_bytes(b"\x80\x02" + content)
        assert str(made.path) in refused("refcoco", tmp_path)


@pytest.mark.parametrize(
    "entries",
    [
        5,
        [5],
        [()],
        [("a.jpg", "", [1, 2, 3], "x")],
        [("a.jpg", "", None, "x")],
        [("a.jpg", "", ["a"] * 4, "x")],
        [("a.jpg", "", [1, 2, 3, 4], 7)],
        [(None, "", [1, 2, 3, 4], "x"), ("../a.jpg", "", [1, 2, 3, 4], "x")],
        [("a.jpg", "", [1, 2, 3, 4], "x"), ("b.jpg", "", [[1], 2, 3, 4], "x")],
        {"a": 1},
    ],
)
def test_lists_that_are_no_lists_of_entries_are_errors(tmp_path: Path, entries: Any) -> None:
    root = index(tmp_path, "refcoco", "unc", ("train", "val"))
    torch.save(entries, root / "unc/unc_train.pth")
    assert str(root / "unc/unc_train.pth") in refused("refcoco", root)


def test_lists_of_some_parts_say_which_part_is_lacking(tmp_path: Path) -> None:
    root = index(tmp_path, "refcoco", "unc", ("train", "val"))
    found = source("refcoco", root)
    assert found.parts("rec") == ("train", "val")
    with pytest.raises(UserError, match="no part 'testA'"):
        found.check()


def test_sentences_in_python_2s_bytes_are_text(tmp_path: Path) -> None:
    made = Refer(tmp_path)
    whole = pickle.dumps(made.refs, 2)
    for old, new in ((b"the thing 0", b"caf\xc3\xa9 thing"), (b"the thing 1", b"caf\xe9 things")):
        whole = whole.replace(b"X" + bytes([len(old), 0, 0, 0]) + old, b"U" + bytes([len(new)]) + new)
    made.path.write_bytes(whole)
    assert source("refcoco", tmp_path).load("rec", "train")["expression"][:2] == ["café thing", "café things"]


def test_both_files_are_read_once_for_all_parts_and_again_when_one_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from petlbench.datasets.official import refer_files

    reads: list[Path] = []
    load = load_pickle
    monkeypatch.setattr(refer_files, "load_pickle", lambda path: reads.append(path) or load(path))
    made = Refer(tmp_path)
    found = source("refcoco", tmp_path)
    for split in ("train", "validation", "test"):
        found.load("rec", split)
    assert len(reads) == 1
    made.refs[0]["sentences"][0]["sent"] = "something else"
    made.write()
    assert found.load("rec", "train")["expression"][0] == "something else"
    assert len(reads) == 2
    assert source("refcoco", tmp_path).load("rec", "train")["expression"][0] == "something else"
    assert len(reads) == 2  # from the cache


def test_names_that_do_not_exist_are_answered_with_those_that_do(tmp_path: Path) -> None:
    root = Refer(tmp_path).root
    said = refused("refcoco", root, "testa")
    assert "no split 'testa'" in said
    assert "testA" in said
    assert "does not exist" in refused("refcoco", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="split_by"):
        source("refcoco", root, split_by="umd")


def test_missing_images_are_named(tmp_path: Path) -> None:
    root = Refer(tmp_path).root
    place = root / "coco/train2014/COCO_train2014_000000000002.jpg"
    place.unlink()
    assert f"first {place} (missing)" in refused("refcoco", root)
    assert len(source("refcoco", root, skip_broken=True).load("rec", "train")) == 8
    shutil.rmtree(root / "coco")
    assert "lacks its images" in refused("refcoco", root)
