"""Tests of GQA on a miniature in the official layout: rows, the parts of each split, and refused files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from petlbench.api.schemas import VQA
from petlbench.core.errors import UserError
from petlbench.datasets.official.gqa import GQA, GQAConfig
from petlbench.results.store import Store
from tests.miniatures import one_epoch, picture

IMAGES = {"train": range(100, 124), "val": range(200, 204), "testdev": range(300, 302)}
PREFIX = {"testdev": "n"}  # testdev's image ids are not all digits
LAYOUTS = {"own folder": ("", "images"), "parent": ("gqa", "gqa/images"), "questions apart": ("questions1.2", "images")}


def question(image: str, answer: str = "yes", **more: Any) -> dict[str, Any]:
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "dog (12)"}],
        "entailed": ["02930153"],
        "equivalent": ["02930152"],
        "question": f"Is there a dog in {image}?",
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": "", "local": "06-dog_on"},
        "answer": answer,
        "semanticStr": "select: dog (12)->exist: ? [0]",
        "annotations": {"answer": {}, "question": {"3": "12"}, "fullAnswer": {}},
        "types": {"detailed": "existC", "semantic": "obj", "structural": "verify" if answer == "yes" else "query"},
        "fullAnswer": f"{answer}, there is.",
        **more,
    }


def of_part(part: str) -> dict[str, Any]:
    """Return two questions about each image of a part."""
    names = [f"{PREFIX.get(part, '')}{number}" for number in IMAGES[part]]
    return {f"{name}{i}": question(name, ("yes", "red")[i]) for name in names for i in range(2)}


def miniature(root: Path, layout: str = "parent") -> Path:
    folder, images = (root / place for place in LAYOUTS[layout])
    folder.mkdir(parents=True)
    for part in IMAGES:
        rows = of_part(part)
        (folder / f"{part}_balanced_questions.json").write_text(json.dumps(rows))
        for name in {row["imageId"] for row in rows.values()}:
            picture(images / f"{name}.jpg", seed=int(name.removeprefix("n")))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return miniature(tmp_path / "data")


def source(root: Path, **options: Any) -> GQA:
    return GQA(GQAConfig(**options), root)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_questions_have_one_answer_their_structural_type_and_an_image(tmp_path: Path, layout: str) -> None:
    found = source(miniature(tmp_path / "data", layout))
    found.check()
    rows = found.load("vqa", "test")
    assert rows.features.keys() == VQA.keys() and len(rows) == 4
    assert {**rows[1], "image": rows[1]["image"].size} == {
        "sample_id": "n3001",
        "image_id": "n300",
        "image": (64, 48),
        "question": "Is there a dog in n300?",
        "answers": ["red"],
        "answer_type": "query",
    }
    assert rows["answer_type"][:] == ["verify", "query"] * 2


def test_parts_make_up_splits_and_training_on_val_too_holds_images_out(root: Path) -> None:
    of_val = {f"{number}" for number in IMAGES["val"]}
    plain, more = source(root), source(root, train_on="train+val")
    train, validation = (set(plain.load("vqa", split)["image_id"]) for split in ("train", "validation"))
    assert validation == of_val and train == {f"{number}" for number in IMAGES["train"]}
    train, validation = (set(more.load("vqa", split)["image_id"]) for split in ("train", "validation"))
    assert train & of_val and validation and not train & validation
    assert len(train | validation) == len(IMAGES["train"]) + len(IMAGES["val"])
    for one in (plain, more):
        assert set(one.load("vqa", "test")["image_id"]) == {"n300", "n301"}
    assert plain.fingerprint("vqa") != more.fingerprint("vqa")


def test_a_part_without_public_answers_has_rows_without_any(root: Path) -> None:
    hidden = {key: question(row["imageId"]) for key, row in of_part("testdev").items()}
    for row in hidden.values():
        del row["answer"], row["types"]
    hidden["n3000"]["answer"] = "yes"
    (root / "gqa" / "test_balanced_questions.json").write_text(json.dumps(hidden))
    rows = source(root).load("vqa", "test_balanced")
    assert rows["answers"][:] == [["yes"], [], [], []] and set(rows["answer_type"]) == {""}
    assert len(source(root).load("vqa", "test")) == 4


def test_an_empty_question_is_left_out_and_counted(root: Path) -> None:
    path = root / "gqa" / "val_balanced_questions.json"
    path.write_text(json.dumps({"1": question("200"), "2": question("200", question=" "), "3": question("201")}))
    found = source(root)
    assert found.load("vqa", "validation")["sample_id"][:] == ["1", "3"]
    assert found.notes() == ("gqa val_balanced: left out 1 (empty question), first question 2",)


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "truncated": (lambda text: text[: len(text) // 2], r"val_balanced_questions.json is truncated or malformed"),
    "a list": (lambda text: "[]", r"malformed \(Input should be an object\)"),
    "no image": (lambda text: text.replace('"imageId"', '"image"'), r"malformed \(2000.imageId: Field required\)"),
    "image a number": (lambda text: text.replace('"imageId": "200"', '"imageId": 200'), r"2000.imageId: Input"),
    "twice": (lambda text: text.replace('"2001": {', '"2000": {'), r"has question id 2000 twice"),
    "hostile": (lambda text: text.replace('"imageId": "200"', '"imageId": "../../etc/passwd"'), r"do not trust it"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(root: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    path = root / "gqa" / "val_balanced_questions.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=message) as caught:
        source(root).load("vqa", "validation")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_what_is_not_there_is_named_with_where_to_get_it(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gqa is not there: looked below .*_balanced_questions.json.*questions1.2.zip"):
        source(tmp_path).check()
    with pytest.raises(UserError, match=r"gqa has no split 'testdev_balance': did you mean 'testdev_balanced'"):
        source(root).load("vqa", "testdev_balance")
    with pytest.raises(UserError, match=r"gqa has no task 'rec'"):
        source(root).load("rec", "test")
    (root / "gqa" / "images" / "n300.jpg").unlink()
    with pytest.raises(UserError, match=r"1 images of gqa, test, are missing .*n300.jpg"):
        source(root).load("vqa", "test")
    (root / "gqa" / "images").rename(root / "gqa" / "pictures")
    with pytest.raises(UserError, match=r"gqa lacks its images \(looked for .*gqa/images.*images.zip"):
        source(root).load("vqa", "test")
    (root / "gqa" / "testdev_balanced_questions.json").unlink()
    with pytest.raises(UserError, match=r"gqa \(official\) has no part 'testdev_balanced'"):
        source(root).check()


def test_a_copy_in_parquet_serves_the_same_splits(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in IMAGES:
        asked = of_part(part)
        columns = {name: [row[name] for row in asked.values()] for name in ("question", "answer", "imageId")}
        encoded = {name: (root / "gqa" / "images" / f"{name}.jpg").read_bytes() for name in set(columns["imageId"])}
        pictures = [{"bytes": encoded[name], "path": f"{name}.jpg"} for name in columns["imageId"]]
        table = pa.table({"id": list(asked), "image": pictures, **columns})
        pq.write_table(table, copy / f"{part}_balanced-00000-of-00001.parquet")
    found, official = source(tmp_path, hub=str(copy), layout="parquet"), source(root)
    for split in ("train", "validation", "test"):
        ours, theirs = found.load("vqa", split), official.load("vqa", split)
        for column in ("image_id", "question", "answers"):
            assert ours[column][:] == theirs[column][:]
        assert ours[0]["image"].tobytes() == theirs[0]["image"].tobytes()


def test_a_miniature_trains_and_is_scored(root: Path, tmp_path: Path) -> None:
    record = one_epoch("vqa", "gqa", root, tmp_path / "out", rows=48)
    assert record.outcome == "ok", record.reason
    assert {"vqa_accuracy", "vqa_accuracy/query", "vqa_accuracy/verify"} <= record.metrics.keys()
    samples = Store(tmp_path / "out").samples(record)
    assert samples is not None and samples["sample_ids"] == list(of_part("testdev"))
