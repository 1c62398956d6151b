"""COCO's own caption files, in miniature."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from petlbench.core.errors import UserError
from petlbench.datasets.files.coco import image_name
from petlbench.datasets.official.coco_captions import COCOCaptions, COCOCaptionsConfig
from petlbench.results.store import Store
from tests.miniatures import one_epoch, picture

Document = dict[str, list[dict[str, Any]]]
TRAIN, VAL = range(70, 82), range(101, 105)  # 70, 78, 79 and 81 are held out


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "cache"))


def document(part: str) -> Document:
    """Return a document in COCO's form, with 5 to 7 captions per image, not in the images' order."""
    numbers = TRAIN if part.startswith("train") else VAL
    pictures = [{"license": 1, "id": n, "file_name": image_name(part, n).partition("/")[2]} for n in numbers]
    captions = [(n, rank) for rank in range(7) for n in reversed(numbers) if rank < 5 + n % 3]
    annotations = [
        {"image_id": n, "id": 1000 * n + rank, "caption": f"Thing {n} seen from side {rank}"} for n, rank in captions
    ]
    return {"images": pictures, "annotations": annotations}


def written(root: Path, year: int = 2017, below: str = "annotations", images: str = "") -> Path:
    """Write both parts of a year and return the data root."""
    for part in (f"train{year}", f"val{year}"):
        content = document(part)
        (root / below).mkdir(parents=True, exist_ok=True)
        (root / below / f"captions_{part}.json").write_text(json.dumps(content))
        for entry in content["images"]:
            picture(root / images / part / entry["file_name"], seed=entry["id"])
    return root


def source(root: Path, **options: Any) -> COCOCaptions:
    return COCOCaptions(COCOCaptionsConfig(**options), root)


@pytest.mark.parametrize("year", [2014, 2017])
@pytest.mark.parametrize(("task", "metric"), [("retrieval", "t2i_r5"), ("captioning", "cider_d")])
def test_a_miniature_goes_through_an_epoch_and_is_tested(tmp_path: Path, year: int, task: str, metric: str) -> None:
    root = written(tmp_path / "data", year)
    options = {} if year == 2017 else {"dataset_config": {"year": year}}
    record = one_epoch(task, "coco_captions", root, tmp_path / "out", rows=8, **options)
    assert record.outcome == "ok", record.reason
    assert metric in record.metrics
    samples = Store(tmp_path / "out").samples(record)
    assert samples is not None
    assert samples["sample_ids"] == list(map(str, VAL))


def test_validation_is_held_out_of_train_and_val_is_the_test(tmp_path: Path) -> None:
    made = source(written(tmp_path))
    ids = {split: list(made.load("captioning", split)["image_id"]) for split in ("train", "validation", "test")}
    assert not set(ids["train"]) & set(ids["validation"])
    assert sorted(ids["train"] + ids["validation"]) == list(map(str, TRAIN))
    assert len(ids["train"]) == 8
    assert ids["test"] == list(map(str, VAL))
    assert made.parts("captioning") == ("train2017", "val2017")


def test_captions_stand_in_file_order_beside_their_image(tmp_path: Path) -> None:
    rows = source(written(tmp_path)).load("retrieval", "test")
    assert [len(captions) for captions in rows["captions"]] == [5 + n % 3 for n in VAL]
    for n, captions in zip(VAL, rows["captions"], strict=True):
        assert captions == [f"Thing {n} seen from side {rank}" for rank in range(len(captions))]
    image = rows.with_format(None)[1]["image"]["path"]
    assert image.endswith("val2017/000000000102.jpg")


@pytest.mark.parametrize(
    ("year", "below", "images"),
    [
        (2014, "coco/annotations", "coco"),
        (2017, "", "images"),
        (2017, "annotations_trainval2017/annotations", "coco/images"),
        (2014, "coco", "mscoco"),
    ],
)
def test_files_are_found_where_people_keep_them(tmp_path: Path, year: int, below: str, images: str) -> None:
    made = source(written(tmp_path, year, below, images), year=year)
    made.check()
    assert len(made.load("captioning", "test")) == len(VAL)


def test_the_error_for_a_year_without_files_says_where_to_get_them(tmp_path: Path) -> None:
    made = source(written(tmp_path, 2014))
    with pytest.raises(UserError, match=r"no part 'train2017'.* there are train2014, val2014; annotations: http"):
        made.check()
    with pytest.raises(ValidationError, match="year"):
        source(tmp_path, year=2015)
    (tmp_path / "coco_captions").mkdir()
    with pytest.raises(UserError, match=r"looked below .* for captions_train2017.json .*annotations_trainval2017.zip"):
        source(tmp_path / "coco_captions").check()


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    root = written(tmp_path)
    content = document("val2017")
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 102]
    blank = next(entry for entry in content["annotations"] if entry["image_id"] == 103)
    blank["caption"] = "\n "
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    made = source(root)
    rows = made.load("captioning", "test")
    assert rows["image_id"] == ["101", "103", "104"]
    assert len(rows[1]["captions"]) == 5 + 103 % 3 - 1
    assert made.notes() == (
        "coco_captions val2017: left out 1 (blank caption), first of image 103",
        "coco_captions val2017: left out 1 (image without captions), first image 102",
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda d: d["annotations"][3].update(id=104000), "has annotation id 104000 twice"),
        (lambda d: d["images"][3].update(id=101), "has image id 101 twice"),
        (lambda d: d["annotations"][3].update(image_id=7), "the annotation 101000 of the image 7, which it does not"),
        (lambda d: d["images"][3].update(file_name="../../etc/passwd"), "names the image '../../etc/passwd'"),
        (lambda d: d["images"][3].update(file_name=".."), "names the image 'val2017/..'"),
        (lambda d: d["images"][3].pop("file_name"), "images.3.file_name: Field required"),
        (lambda d: d["annotations"][3].update(caption=5), "annotations.3.caption: Input should be a valid string"),
        (lambda d: d.pop("annotations"), "annotations: Field required"),
    ],
)
def test_damage_is_refused_in_one_line_that_names_the_file(
    tmp_path: Path, change: Callable[[Document], None], expected: str
) -> None:
    root = written(tmp_path)
    content = document("val2017")
    change(content)
    path = root / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        source(root).load("captioning", "test")
    assert str(caught.value).startswith(f"{path} ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path) / "annotations" / "captions_val2017.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(UserError, match=r"captions_val2017.json is truncated or malformed \(.*\): get the file again"):
        source(tmp_path).load("captioning", "test")
