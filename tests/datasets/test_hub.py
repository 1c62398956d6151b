"""Tests of copies of data sets in Parquet files, on small files in the hub's layouts."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Value
from huggingface_hub import constants
from PIL import Image

from petlbench.api.schemas import VQA
from petlbench.core.errors import UserError
from petlbench.datasets.files.coco import COCO_BASES
from petlbench.datasets.files.declaration import Choice, Declaration, FilesConfig
from petlbench.datasets.files.source import FileSource
from petlbench.datasets.hub import local_copy, shards
from petlbench.datasets.hub.parquet import HubParquet
from petlbench.results.store import Store
from tests.miniatures import one_epoch, picture

Row = dict[str, Any]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SENTENCE = pa.struct([("raw", pa.string()), ("sent", pa.string()), ("sent_id", pa.int64())])
ANSWER = pa.struct([("answer", pa.string()), ("answer_confidence", pa.string()), ("answer_id", pa.int64())])


class Small(FileSource):
    """A source of one task whose only layout is Parquet."""

    Config = FilesConfig
    readers = (HubParquet,)
    image_bases = COCO_BASES
    origin = "get it from the hub"
    made_of: ClassVar[Mapping[str, tuple[str, ...]]] = {"train": ("train",), "validation": ("val",), "test": ("test",)}

    def choice(self, task: str, split: str) -> Choice:
        return Choice(self.made_of[split])


class Refer(Small):
    name, tasks = "refcoco", frozenset({"rec"})
    made_of: ClassVar[Mapping[str, tuple[str, ...]]] = {**Small.made_of, "test": ("testA", "testB")}


class Questions(Small):
    name, tasks = "vqav2", frozenset({"vqa"})
    made_of: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("train2014",),
        "validation": ("val2014",),
        "test": ("test-dev2015",),
    }


class Compositions(Small):
    name, tasks = "gqa", frozenset({"vqa"})
    image_bases = ("images",)
    made_of: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "train": ("train_balanced",),
        "validation": ("val_balanced",),
        "test": ("testdev_balanced",),
    }


class Captions(Small):
    name, tasks = "flickr30k", frozenset({"captioning", "retrieval"})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PETLBENCH_DATA", raising=False)


def encoded(seed: int, size: tuple[int, int] = (32, 24)) -> bytes:
    """Return a picture of one colour, which identifies it."""
    made = io.BytesIO()
    Image.new("RGB", size, (seed * 7 % 256, seed % 256, 128)).save(made, "PNG")
    return made.getvalue()


def inside(seed: int) -> Row:
    return {"bytes": encoded(seed), "path": f"{seed}.png"}


def seed_of(image: Image.Image) -> int:
    return int(np.asarray(image)[0, 0, 1])


def write(path: Path, rows: Iterable[Row], group: int = 2, **kinds: pa.DataType) -> Path:
    """Write rows as the hub does; `kinds` gives the types of columns that pyarrow would not guess."""
    rows = list(rows)
    guessed = pa.Table.from_pylist(rows).schema
    schema = pa.schema([(name, kinds.get(name, guessed.field(name).type)) for name in guessed.names])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    return path


def reference(i: int, **changes: Any) -> Row:
    """Return a row as in lmms-lab/RefCOCO: an object with its expressions."""
    row = {
        "question_id": str(i),
        "image": inside(i),
        "question": "what is it?",
        "answer": [f"thing {i}", f"that {i}"],
        "bbox": [1.0 + i, 2.0, 10.0, 8.0],
        "file_name": f"COCO_train2014_{i // 2:012d}_{i}.jpg",
    }
    return {**row, **changes}


def refer(root: Path, **parts: list[Row]) -> Path:
    """Write a copy in the layout of lmms-lab/RefCOCO."""
    for name, rows in parts.items():
        write(root / "refcoco" / "data" / f"{name}-00000-of-00001.parquet", rows, image=IMAGE)
    return root


def error_of(call: Callable[[], object]) -> str:
    """Return the error of `call`, which must be one line."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_object_with_several_expressions_gives_a_row_for_each(tmp_path: Path) -> None:
    refer(tmp_path, train=[reference(i) for i in range(3)], val=[reference(3)], testA=[reference(4)])
    source = Refer(FilesConfig(), tmp_path)
    rows = source.load("rec", "train")
    assert rows["expression"][:] == ["thing 0", "that 0", "thing 1", "that 1", "thing 2", "that 2"]
    assert rows["sample_id"][:3] == ["train-0-0", "train-0-1", "train-1-0"]
    assert rows["image_id"][:] == ["0", "0", "0", "0", "1", "1"]  # COCO's number, without the annotation's number
    assert rows[2]["box"] == [2.0, 2.0, 10.0, 8.0] and rows[2]["subset"] == "train"
    assert [seed_of(row["image"]) for row in rows] == [0, 0, 1, 1, 2, 2]
    assert [seed_of(row["image"]) for row in source.stream("rec", "train")] == [0, 0, 1, 1, 2, 2]
    assert source.parts("rec") == ("train", "val", "testA")
    assert "has no part 'testB': did you mean 'testA'? there are train, val, testA; get it" in error_of(source.check)


def test_shards_are_read_in_their_order_and_a_missing_one_is_reported(tmp_path: Path) -> None:
    for shard in range(2):
        rows = [reference(2 * shard + i) for i in range(2)]
        write(tmp_path / "refcoco" / f"val-0000{shard}-of-00002.parquet", rows, image=IMAGE)
    source = Refer(FilesConfig(), tmp_path)
    rows = source.load("rec", "val")
    assert len(rows) == 8 == len(set(rows["sample_id"][:]))
    assert [seed_of(row["image"]) for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    (tmp_path / "refcoco" / "val-00001-of-00002.parquet").unlink()
    missing = error_of(lambda: Refer(FilesConfig(), tmp_path).load("rec", "val"))
    assert "val-00001 is missing beside " in missing and "val-00000-of-00002.parquet" in missing


@pytest.mark.parametrize(
    "other", ["refcoco/two/val.parquet", "refcoco/validation.parquet", "refcoco/val-00000-of-00001.parquet"]
)
def test_a_part_that_occurs_twice_is_refused(tmp_path: Path, other: str) -> None:
    for name in ("refcoco/val.parquet", other):
        write(tmp_path / name, [reference(0)], image=IMAGE)
    assert "has val more than once (" in error_of(lambda: Refer(FilesConfig(), tmp_path).load("rec", "val"))


def annotation(i: int, split: str, sentences: int = 2) -> Row:
    """Return a row as in jxu124/refcoco: no image, corners of the box, the official part in a column."""
    name = f"COCO_train2014_{i:012d}"
    return {
        "image_id": i,
        "split": split,
        "sentences": [{"raw": f"The {i}-{k}", "sent": f"the {i} {k}", "sent_id": 10 * i + k} for k in range(sentences)],
        "file_name": f"{name}_{i}.jpg",
        "image_path": f"coco/train2014/{name}.jpg",
        "raw_anns": json.dumps({"bbox": [1.0, 2.0, 10.0, 8.0], "segmentation": [[1.0, 2.0]]}),
        "bbox": [1.0, 2.0, 11.0, 10.0],
    }


def text_only(root: Path, **changes: Any) -> Path:
    parts = {"train": ["train"] * 2, "validation": ["val"], "test": ["testA"], "testB": ["testB"]}
    number = 0
    for name, splits in parts.items():
        rows = []
        for split in splits:
            rows.append({**annotation(number, split), **changes})
            picture(root / f"images/train2014/COCO_train2014_{number:012d}.jpg")
            number += 1
        path = root / f"RefCOCO/data/{name}-00000-of-00001-0123456789abcdef.parquet"
        write(path, rows, sentences=pa.list_(SENTENCE))
    return root


def test_a_copy_without_images_takes_their_files_and_corners_become_boxes(tmp_path: Path) -> None:
    source = Refer(FilesConfig(), text_only(tmp_path))
    source.check()
    rows = source.load("rec", "test")
    assert rows["subset"][:] == ["testA", "testA", "testB", "testB"]  # from the column, not from the file's name
    assert rows["expression"][:2] == ["the 3 0", "the 3 1"] and rows["sample_id"][:2] == ["30", "31"]
    assert rows[0]["box"] == [1.0, 2.0, 10.0, 8.0] and rows[0]["image_id"] == "3"
    assert rows[0]["image"].size == (64, 48)
    assert len(source.load("rec", "train")) == 4 and len(source.load("rec", "validation")) == 2


def test_boxes_that_are_not_those_of_the_annotation_are_refused(tmp_path: Path) -> None:
    source = Refer(FilesConfig(), text_only(tmp_path, bbox=[5.0, 5.0, 6.0, 6.0]))
    assert "its boxes are not those of raw_anns: set columns" in error_of(lambda: source.load("rec", "val"))


def test_boxes_of_a_copy_are_left_alone_where_they_are_those_of_the_annotation(tmp_path: Path) -> None:
    source = Refer(FilesConfig(), text_only(tmp_path, bbox=[1.0, 2.0, 10.0, 8.0]))
    assert source.load("rec", "val")[0]["box"] == [1.0, 2.0, 10.0, 8.0]


def test_an_option_can_name_the_corners(tmp_path: Path) -> None:
    refer(tmp_path, val=[{**reference(0), "bbox": [0, 0, 1, 1], "wh": [3.0, 4.0, 10.0, 20.0]}])
    source = Refer(FilesConfig(columns={"corners": "wh", "box": "none"}), tmp_path)
    assert "has no column 'none'" in error_of(source.check)
    write(tmp_path / "b/refcoco/val.parquet", [{"image": inside(0), "answer": "a", "wh": [3.0, 4.0, 10.0, 20.0]}])
    source = Refer(FilesConfig(columns={"corners": "wh"}), tmp_path / "b")
    assert source.load("rec", "val")[0]["box"] == [3.0, 4.0, 7.0, 16.0]


def question(i: int, answered: bool = True, **changes: Any) -> Row:
    answers = [{"answer": f"a{k}", "answer_confidence": "yes", "answer_id": k} for k in range(10)] if answered else None
    row = {"question_id": 100 + i, "image_id": i // 2, "image": inside(i // 2), "question": f"what {i}?"}
    return {**row, "answers": answers, "answer_type": "other" if answered else None, **changes}


def questions(root: Path, **parts: list[Row]) -> Path:
    kinds = {"answers": pa.list_(ANSWER), "answer_type": pa.string(), "image": IMAGE}
    for name, rows in parts.items():
        write(root / "vqav2" / "data" / f"{name}-00000-of-00001.parquet", rows, **kinds)
    return root


def test_questions_have_all_answers_and_those_of_a_hidden_part_none(tmp_path: Path) -> None:
    questions(tmp_path, validation=[question(i) for i in range(4)], testdev=[question(9, answered=False)])
    source = Questions(FilesConfig(), tmp_path)
    assert source.parts("vqa") == ("val2014", "test-dev2015")
    rows = source.load("vqa", "validation")
    assert rows[1]["answers"] == [f"a{k}" for k in range(10)] and rows[1]["answer_type"] == "other"
    assert (rows[3]["sample_id"], rows[3]["image_id"], seed_of(rows[3]["image"])) == ("103", "1", 1)
    hidden = source.load("vqa", "test")
    assert (hidden[0]["answers"], hidden[0]["answer_type"]) == ([], "")
    assert source.notes() == ()


def test_questions_without_answers_among_others_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [question(0), question(1, answered=False), question(2, question="  ")]
    source = Questions(FilesConfig(), questions(tmp_path, validation=rows))
    assert source.load("vqa", "validation")["sample_id"][:] == ["100"]
    notes = "; ".join(source.notes())
    assert "left out 1 (empty question), first row 2" in notes and "left out 1 (no answer), first 101" in notes


def test_images_by_identifier_are_joined_and_only_the_balanced_questions_taken(tmp_path: Path) -> None:
    asked = [
        {
            "id": f"{i}",
            "imageId": f"n{i // 2}",
            "question": f"q{i}",
            "answer": f"a{i}",
            "types": {"structural": "query"},
        }
        for i in range(4)
    ]
    stored = [{"id": f"n{i}", "image": inside(i)} for i in (1, 0)]
    for scope, rows in (("balanced", asked), ("all", asked * 2)):
        write(tmp_path / f"gqa/testdev_{scope}_instructions/testdev-00000-of-00001.parquet", rows)
        write(tmp_path / f"gqa/testdev_{scope}_images/testdev-00000-of-00001.parquet", stored, image=IMAGE)
    source = Compositions(FilesConfig(), tmp_path)
    rows = source.load("vqa", "test")
    assert source.parts("vqa") == ("testdev_balanced",)
    assert rows["sample_id"][:] == ["0", "1", "2", "3"] and rows[3]["answers"] == ["a3"]
    assert [seed_of(row["image"]) for row in rows] == [0, 0, 1, 1] and rows[3]["answer_type"] == "query"


def test_images_that_only_an_identifier_names_are_files(tmp_path: Path) -> None:
    picture(tmp_path / "coco/val2014/COCO_val2014_000000000007.jpg")
    row = {"question_id": 1, "image_id": 7.0, "question": "what?", "answers": ["a"]}
    write(tmp_path / "vqav2/validation.parquet", [row])
    loaded = Questions(FilesConfig(), tmp_path).load("vqa", "validation")[0]
    assert (loaded["image"].size, loaded["image_id"]) == ((64, 48), "7")
    picture(tmp_path / "images/n7.jpg")
    for split, name in (("val", "n7"), ("testdev", "../n7")):
        path = f"gqa/{split}_balanced_instructions/{split}-00000-of-00001.parquet"
        write(tmp_path / path, [{"id": "1", "imageId": name, "question": "what?", "answer": "a"}])
    source = Compositions(FilesConfig(), tmp_path)
    assert source.load("vqa", "val_balanced")[0]["image"].size == (64, 48)
    assert "names the image '../n7', which is not a file below" in error_of(
        lambda: source.load("vqa", "testdev_balanced")
    )


def test_a_column_of_splits_divides_one_file(tmp_path: Path) -> None:
    splits = ["train", "train", "val", "test"]
    rows = [
        {"image": inside(i), "caption": [f" caption {i} {k}\n" for k in range(5)], "split": split, "img_id": str(i)}
        for i, split in enumerate(splits)
    ]
    write(tmp_path / "flickr30k/TEST/test/0000.parquet", rows, image=IMAGE)  # as the hub converts it
    source = Captions(FilesConfig(), tmp_path)
    source.check()
    assert [len(source.load("captioning", split)) for split in ("train", "validation", "test")] == [2, 1, 1]
    row = source.load("retrieval", "validation")[0]
    assert row["captions"] == [f"caption 2 {k}" for k in range(5)]
    assert (row["sample_id"], row["image_id"], seed_of(row["image"])) == ("2", "2", 2)


def test_karpathys_table_without_images_names_files_by_folder_and_name(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "restval", "validation", "test")):
        name = f"COCO_val2014_{number:012d}.jpg"
        picture(tmp_path / "coco/val2014" / name)
        row = {"filepath": "val2014", "filename": name, "sentences": ["one", "two"], "cocoid": number, "imgid": 7}
        column = "val" if split == "validation" else split
        write(tmp_path / f"Flickr30k/data/{split}-00000-of-00001.parquet", [{**row, "split": column}])

    class Karpathy(Captions):
        made_of: ClassVar[Mapping[str, tuple[str, ...]]] = {**Small.made_of, "train": ("train", "restval")}

    source = Karpathy(FilesConfig(), tmp_path)
    assert source.load("captioning", "train")["sample_id"][:] == ["0", "1"]
    assert source.load("captioning", "test")[0]["image"].size == (64, 48)


def test_captions_of_one_row_each_are_put_together_by_image(tmp_path: Path) -> None:
    rows = [{"image": inside(i % 2), "caption": f"caption {i}", "image_id": i % 2} for i in range(41)]
    write(tmp_path / "flickr30k/test.parquet", rows, image=IMAGE)
    loaded = Captions(FilesConfig(), tmp_path).load("captioning", "test")
    assert loaded["captions"][:] == [[f"caption {i}" for i in range(first, 41, 2)] for first in (0, 1)]
    assert [seed_of(row["image"]) for row in loaded] == [0, 1]


def test_the_year_of_a_part_is_read_off_the_names_of_images(tmp_path: Path) -> None:
    class Years(Captions):
        made_of: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(Small.made_of, ("val2017", "val2014"))

    for name, expected in (("COCO_val2014_000000000009.jpg", "val2014"), ("000000000009.jpg", "val2017")):
        root = tmp_path / expected
        write(root / "flickr30k/val.parquet", [{"image": inside(0), "answer": ["a"], "file_name": name}], image=IMAGE)
        source = Years(FilesConfig(), root)
        assert source.parts("captioning") == (expected,)
        assert source.load("captioning", expected)["image_id"][:] == ["9"]


def test_columns_of_other_names_are_listed_and_an_option_can_name_them(tmp_path: Path) -> None:
    rows = [{"photo": inside(i), "utterance": f"u{i}", "rectangle": [1.0, 1.0, 5.0, 5.0]} for i in range(2)]
    folder = write(tmp_path / "elsewhere/val.parquet", rows, photo=IMAGE).parent
    lacking = error_of(Refer(FilesConfig(hub=str(folder))).check)
    assert "has no column for expression, box or corners, image or image_id" in lacking
    assert "it has photo, utterance, rectangle; set columns: {expression: NAME}" in lacking
    columns = {"image": "photo", "expression": "utterance", "box": "rectangle"}
    rows = Refer(FilesConfig(hub=str(folder), columns=columns)).load("rec", "val")
    assert [(row["expression"], seed_of(row["image"])) for row in rows] == [("u0", 0), ("u1", 1)]
    wrong = Refer(FilesConfig(hub=str(folder), columns={**columns, "expression": "utterence"}))
    assert "has no column 'utterence': did you mean 'utterance'?; it has photo" in error_of(wrong.check)
    wrong = Refer(FilesConfig(hub=str(folder), columns={"expresion": "utterance"}))
    assert "columns: there is no 'expresion': did you mean 'expression'?" in error_of(wrong.check)


def test_files_of_other_things_are_not_taken_for_a_copy(tmp_path: Path) -> None:
    write(tmp_path / "refcoco/results.parquet", [reference(0)], image=IMAGE)  # a name without a split
    write(tmp_path / "refcoco/val.parquet", [{"step": 1, "loss": 2.0}])  # holds something else
    write(tmp_path / "val.parquet", [reference(0)], image=IMAGE)  # lies in no folder of the data set's name
    write(tmp_path / "refcocog/val.parquet", [reference(0)], image=IMAGE)
    assert "refcoco is not there: looked below" in error_of(Refer(FilesConfig(), tmp_path).check)
    (tmp_path / "val.parquet").rename(tmp_path / "refcoco/testA.parquet")
    assert Refer(FilesConfig(), tmp_path).parts("rec") == ("testA",)
    assert Refer(FilesConfig(), tmp_path / "refcoco").parts("rec") == ("testA",)  # the root is the folder itself


def test_a_part_with_more_rows_than_were_published_is_another_division(tmp_path: Path) -> None:
    class Counted(Refer):
        sizes: ClassVar[Mapping[str, Mapping[str, Mapping[str, int]]]] = {"rec": {"val": {"expressions": 3}}}

    source = Counted(FilesConfig(), refer(tmp_path, val=[reference(i) for i in range(2)]))
    assert "has 4 expressions in val, where 3 were published: it is divided" in error_of(
        lambda: source.load("rec", "val")
    )


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path) -> None:
    nan = float("nan")
    rows = [
        reference(0),
        reference(1, bbox=[nan, 1.0, 2.0, 2.0]),
        reference(2, bbox=[1.0, 1.0, 0.0, 2.0]),
        reference(3, bbox=[-9.0, 1.0, 5.0, 2.0]),
        reference(4, bbox=None),
        reference(5, answer=[]),
        reference(6, answer=["good", "  "]),
        reference(7, image=None),
        reference(8, image={"bytes": None, "path": None}),
        reference(9, answer=None),
    ]
    source = Refer(FilesConfig(), refer(tmp_path, val=rows))
    loaded = source.load("rec", "val")
    assert loaded["sample_id"][:] == ["val-0-0", "val-0-1", "val-6-0"]
    assert [seed_of(row["image"]) for row in loaded] == [0, 0, 6]
    notes = "; ".join(source.notes())
    for message in (
        "left out 2 (box that is missing or not finite), first row 1",
        "left out 1 (box without area), first row 2",
        "left out 1 (box outside its image), first row 3",
        "left out 2 (no expression), first row 5",
        "left out 1 (empty expression), first row 6",
        "left out 2 (no image), first row 7",
    ):
        assert message in notes
    again = Refer(FilesConfig(), tmp_path)  # from the cache
    assert again.load("rec", "val")["sample_id"][:] == loaded["sample_id"][:] and again.notes() == source.notes()


def test_a_box_beyond_its_image_is_left_out_where_the_size_is_known(tmp_path: Path) -> None:
    rows = [reference(0, bbox=[x, 1.0, 5.0, 5.0], width=32, height=24) for x in (31.0, 32.0)]
    source = Refer(FilesConfig(), refer(tmp_path, val=rows))
    assert source.load("rec", "val")["sample_id"][:] == ["val-0-0", "val-0-1"]


def test_captions_that_are_empty_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"image": inside(i), "caption": texts} for i, texts in enumerate((["a", " "], [], [""], None))]
    write(tmp_path / "flickr30k/test.parquet", rows, image=IMAGE, caption=pa.list_(pa.string()))
    source = Captions(FilesConfig(), tmp_path)
    assert source.load("captioning", "test")["captions"][:] == [["a"]]
    assert "left out 2 (empty caption)" in source.notes()[0] and "left out 3 (no caption)" in source.notes()[1]


@pytest.mark.parametrize("twice", ["question", "sentence", "image"])
def test_identifiers_that_occur_twice_are_refused(tmp_path: Path, twice: str) -> None:
    source: FileSource
    if twice == "question":
        source, task = Questions(FilesConfig(), questions(tmp_path, validation=[question(0), question(0)])), "vqa"
    elif twice == "sentence":
        write(tmp_path / "refcoco/val.parquet", [{**annotation(0, "val"), "image": inside(0)}] * 2, image=IMAGE)
        source, task = Refer(FilesConfig(), tmp_path), "rec"
    else:
        rows = [{"image": inside(0), "caption": ["a"], "img_id": "7"}] * 2
        write(tmp_path / "flickr30k/val.parquet", rows, image=IMAGE)
        source, task = Captions(FilesConfig(), tmp_path), "captioning"
    expected = {"question": "100", "sentence": "0", "image": "7"}[twice]
    assert f"'{expected}' identifies several rows: get the copy again" in error_of(
        lambda: source.load(task, "validation")
    )


def damaged(data: bytes, how: str) -> bytes:
    footer = data.rfind(b"PAR1", 0, -4)
    middles = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "no parquet": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",  # a clone without LFS
        "footer of zeros": data[:-200] + bytes(192) + data[-8:],
        "footer beyond the file": data[:-8] + b"\xff\xff\xff\x7fPAR1",
        "pages of zeros": data[:4] + bytes(max(0, len(data) - 3000 - 4)) + data[-3000:],
    }
    assert footer < len(data)
    return middles[how]


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "no parquet", "footer of zeros", "footer beyond the file", "pages of zeros"]
)
def test_a_damaged_file_is_one_line(tmp_path: Path, how: str) -> None:
    rows = [{"image": inside(i), "answer": [f"{i} " * 400], "bbox": [1.0, 1.0, 2.0, 2.0]} for i in range(40)]
    path = write(tmp_path / "refcoco/val.parquet", rows, group=40, image=IMAGE)
    path.write_bytes(damaged(path.read_bytes(), how))
    message = error_of(lambda: Refer(FilesConfig(), tmp_path).load("rec", "val"))
    assert f"{path} is truncated, or not a Parquet file" in message and "get the file again" in message


def test_claims_of_huge_sizes_are_refused_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Refer(FilesConfig(), refer(tmp_path, val=[reference(i) for i in range(4)]))
    rows = source.load("rec", "val")
    monkeypatch.setattr(shards, "MOST_GROUP_BYTES", 100)
    assert "bytes of images in one row group: do not trust it" in error_of(lambda: rows[0])
    monkeypatch.setattr(local_copy, "MOST_TEXT_BYTES", 100)
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "other"))
    assert "holds more than 100 bytes of text" in error_of(lambda: Refer(FilesConfig(), tmp_path).load("rec", "val"))
    monkeypatch.setattr(local_copy, "MOST_ROWS", 3)
    assert "claims 4 rows: do not trust it" in error_of(lambda: Refer(FilesConfig(), tmp_path).load("rec", "val"))


def test_images_are_not_read_with_the_table(tmp_path: Path) -> None:
    """With damaged pages of images, rows can be read, and only taking a picture reports the damage."""
    path = refer(tmp_path, val=[reference(i) for i in range(2)]) / "refcoco/data/val-00000-of-00001.parquet"
    group = pq.read_metadata(path).row_group(0)
    chunk = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "image.bytes")
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(bytes(data))
    rows = Refer(FilesConfig(), tmp_path).load("rec", "val")
    assert len(rows) == 4
    assert f"{path} is truncated, or not a Parquet file" in error_of(lambda: rows[0])


def test_neighbouring_rows_decode_their_group_once_by_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    true = shards.group_images

    def counted(path: Path, group: int, column: str) -> pa.ChunkedArray:
        read.append(group)
        return true(path, group, column)

    monkeypatch.setattr(shards, "group_images", counted)
    rows = Refer(FilesConfig(), refer(tmp_path, val=[reference(i) for i in range(12)])).load("rec", "val")
    assert not read
    with ThreadPoolExecutor(8) as pool:
        seeds = list(pool.map(lambda i: seed_of(rows[i]["image"]), range(len(rows))))
    assert seeds == [i // 2 for i in range(24)]
    assert sorted(read) == list(range(6))


def test_groups_are_kept_within_the_limit_of_bytes(tmp_path: Path) -> None:
    path = refer(tmp_path, val=[reference(i) for i in range(12)]) / "refcoco/data/val-00000-of-00001.parquet"
    groups = shards._Groups(2 * len(encoded(0)) + 40)  # one group of two, and no more
    for group in range(6):
        assert groups.images(path, group, "image.bytes")[1].as_py() == encoded(2 * group + 1)
        assert len(groups._kept) == 1


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    source = Refer(FilesConfig(), refer(tmp_path, val=[reference(0)]))
    assert seed_of(source.load("rec", "val")[0]["image"]) == 0
    assert source.reader.digest(source.reader.files("rec", "val")[0])
    refer(tmp_path, val=[reference(5), reference(6)])
    again = Refer(FilesConfig(), tmp_path)
    assert [seed_of(row["image"]) for row in again.load("rec", "val")] == [5, 5, 6, 6]


@pytest.mark.parametrize(
    "place", ["/etc/x.parquet#0", "{copy}/../x.parquet#0", "{copy}/data/val.parquet#0", "{file}#9"]
)
def test_a_reference_that_leads_elsewhere_is_refused(tmp_path: Path, place: str) -> None:
    source = Refer(FilesConfig(), refer(tmp_path, val=[reference(0)]))
    write(tmp_path / "x.parquet", [reference(0)], image=IMAGE)
    copy = tmp_path / "refcoco"
    place = place.format(copy=copy, file=copy / "data/val-00000-of-00001.parquet")
    refused = error_of(lambda: source.reader.opened({"path": place, "bytes": None}))
    assert "is not an image of the copy" in refused
    assert "is not an image of the copy" in error_of(lambda: source.reader.located(["../x.parquet#0"]))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "coco/../../COCO_train2014_000000000001.jpg"])
def test_a_name_of_an_image_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    source = Refer(FilesConfig(), text_only(tmp_path, image_path=name))
    assert "which is not a file below the image folder: do not trust it" in error_of(lambda: source.load("rec", "val"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 7}, "expression is of type int64, not text or lists of text: set `columns`"),
        ({"answer": [{"words": "a"}]}, "which has none of sent, raw, expression"),
        ({"bbox": "1 2 3 4"}, "box is of type string, not lists of four numbers: set `columns`"),
        ({"bbox": [1.0, 2.0]}, "row 0: box has 2 numbers, not 4: get the copy again"),
        ({"file_name": [1]}, "a column is of another type"),
    ],
)
def test_a_column_of_another_type_is_one_line(tmp_path: Path, changes: Row, message: str) -> None:
    source = Refer(FilesConfig(), refer(tmp_path, val=[reference(0, **changes)]))
    assert message in error_of(lambda: source.load("rec", "val"))


def test_a_broken_image_inside_is_reported_or_left_out(tmp_path: Path) -> None:
    rows = [reference(0), reference(1, image={"bytes": encoded(1)[:40], "path": None}), reference(2)]
    refer(tmp_path, val=rows)
    whole = Refer(FilesConfig(), tmp_path).load("rec", "val")
    assert "val-00000-of-00001.parquet#1 cannot be used" in error_of(lambda: whole[2])
    source = Refer(FilesConfig(skip_broken=True), tmp_path)
    assert [seed_of(row["image"]) for row in source.load("rec", "val")] == [0, 0, 2, 2]
    assert "1 images of refcoco" in source.notes()[-1]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the hub library's cache, with one data set in two revisions, and forbid the network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept = tmp_path / "hub/datasets--lmms-lab--RefCOCO"
    for commit, count in (("a" * 40, 2), ("b" * 40, 1)):
        path = kept / "snapshots" / commit / "data/val-00000-of-00001.parquet"
        write(path, [reference(i) for i in range(count)], image=IMAGE)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("a" * 40)
    return kept


@pytest.mark.parametrize(
    ("name", "count"),
    [("lmms-lab/RefCOCO", 4), (f"lmms-lab/RefCOCO@{'b' * 40}", 2), ("lmms-lab/RefCOCO/data", 4)],
)
def test_a_name_on_the_hub_works_offline_once_fetched(hub: Path, name: str, count: int) -> None:
    rows = Refer(FilesConfig(hub=name)).load("rec", "val")
    assert len(rows) == count and seed_of(rows[0]["image"]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lmms-lab/RefCOC", "was not fetched; did you mean 'lmms-lab/RefCOCO'? ("),
        ("lmms-lab/GQA", "'lmms-lab/GQA' is not on this machine and was not fetched ("),
        ("lmms-lab/RefCOCO@main2", "is not on this machine and was not fetched"),
        ("lmms-lab/RefCOCO/none", "connect once, point HF_HOME to a cache that has it, or give a folder"),
        ("lmms-lab/Ref COCO!", "is not on this machine and was not fetched"),
        ("../x", "hub: folder '../x' does not exist: give a folder of Parquet files, or OWNER/NAME"),
        ("lmms-lab/../x", "hub: folder 'lmms-lab/../x' does not exist"),
        ("x", "hub: folder 'x' does not exist"),
        ("", "hub: folder '' does not exist"),
    ],
)
def test_a_name_that_cannot_be_fetched_is_one_line(hub: Path, name: str, message: str) -> None:
    assert message in error_of(Refer(FilesConfig(hub=name)).check)


def test_the_hubs_own_conversion_is_taken_where_a_data_set_has_no_parquet(hub: Path) -> None:
    path = hub / "snapshots" / ("c" * 40) / "default/val/0000.parquet"
    write(path, [reference(i) for i in range(3)], image=IMAGE)
    (hub / "refs/refs/convert").mkdir(parents=True)
    (hub / "refs/refs/convert/parquet").write_text("c" * 40)
    (hub / "refs/main").unlink()
    assert len(Refer(FilesConfig(hub="lmms-lab/RefCOCO")).load("rec", "val")) == 6


def test_a_copy_that_was_asked_for_comes_before_files_that_are_there(tmp_path: Path) -> None:
    class Official(HubParquet):
        layout = "official"

        @classmethod
        def find(cls, source: Declaration, root: Path | None) -> Any:
            return cls(source, tmp_path, tmp_path)

    class Both(Refer):
        readers = (Official, HubParquet)

    folder = refer(tmp_path, val=[reference(0)]) / "refcoco"
    assert Both(FilesConfig(), tmp_path).reader.layout == "official"
    assert Both(FilesConfig(hub=str(folder)), tmp_path).reader.layout == "parquet"
    assert Both(FilesConfig(hub="refcoco"), tmp_path).reader.layout == "parquet"  # a folder below the root
    assert Both(FilesConfig(layout="parquet"), tmp_path).parts("rec") == ("val",)


def test_referring_expressions_of_a_copy_train_an_epoch(tmp_path: Path) -> None:
    parts = {"train": 8, "val": 2, "testA": 2, "testB": 2}
    numbers = iter(range(100))
    refer(tmp_path, **{name: [reference(next(numbers)) for _ in range(count)] for name, count in parts.items()})
    record = one_epoch("rec", "refcoco", tmp_path, tmp_path / "out", rows=16)
    assert (record.outcome, record.reason) == ("ok", "")
    assert record.metrics.keys() >= {"acc_50", "mean_iou", "acc_50/testA"}
    samples = Store.open(tmp_path / "out", create=False).samples(record)
    assert samples is not None and samples["sample_ids"] == [
        f"test{part}-{row}-{k}" for part in "AB" for row in (0, 1) for k in (0, 1)
    ]


def test_captions_of_a_copy_are_retrieved_after_an_epoch(tmp_path: Path) -> None:
    splits = ["train"] * 8 + ["val"] * 3 + ["test"] * 3
    rows = [
        {"image": inside(i), "caption": [f"{i} is {k}" for k in range(5)], "split": split, "img_id": str(i)}
        for i, split in enumerate(splits)
    ]
    write(tmp_path / "flickr30k/TEST/test/0000.parquet", rows, image=IMAGE)
    record = one_epoch("retrieval", "flickr30k", tmp_path, tmp_path / "out", rows=8)
    assert (record.outcome, record.reason) == ("ok", "")
    samples = Store.open(tmp_path / "out", create=False).samples(record)
    assert "rsum" in record.metrics and samples is not None and samples["sample_ids"] == ["11", "12", "13"]


class Riddles(Questions):
    """A source with a third party's tasks: one has the columns of questions, the other its own columns."""

    tasks = frozenset({"riddles", "counting"})

    def features(self, task: str) -> Features:
        return VQA if task == "riddles" else Features({**VQA, "count": Value("int64")})


def test_a_copy_serves_whichever_task_has_its_columns_and_no_other(tmp_path: Path) -> None:
    source = Riddles(FilesConfig(), questions(tmp_path, validation=[question(i) for i in range(2)]))
    assert source.load("riddles", "validation")[1]["question"] == question(1)["question"]
    assert "has no part 'val2014'" in error_of(lambda: source.load("counting", "validation"))
