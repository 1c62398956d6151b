"""Tests of VQAv2 on miniatures in the layout of the official files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from petlbench.api.schemas import VQA
from petlbench.commands.main import main
from petlbench.core.errors import UserError
from petlbench.core.record import Record
from petlbench.datasets.files.coco import image_name
from petlbench.datasets.files.source import held_out
from petlbench.datasets.official import vqa_files
from petlbench.datasets.official.vqav2 import VQAv2, VQAv2Config
from petlbench.results import leaderboard
from petlbench.results.store import Store
from tests.miniatures import one_epoch, picture

HELD = next(number for number in count(1) if held_out(str(number)))
TRAIN_IMAGES = [HELD, *islice((n for n in count(1) if not held_out(str(n))), 5)]
VAL_IMAGES = [n + 1000 for n in range(4)]
TEST_IMAGES = [2001, 2002]
ANSWERS = {"yes/no": ["yes"] * 10, "number": ["2"] * 6 + ["3"] * 4, "other": ["red"] * 3 + ["dark red"] * 7}
# In Karpathy's split, restval is part of val2014 and belongs to train.
KARPATHY = {
    **dict.fromkeys(TRAIN_IMAGES, "train"),
    **dict(zip(VAL_IMAGES, ["restval", "val", "test", "test"], strict=True)),
}


def made_questions(image_ids: list[int]) -> list[dict[str, Any]]:
    return [
        {"question_id": image_id * 1000 + n, "image_id": image_id, "question": f"what is {word} here?"}
        for image_id in image_ids
        for n, word in enumerate(ANSWERS)
    ]


def annotated(question: dict[str, Any]) -> dict[str, Any]:
    kind = list(ANSWERS)[question["question_id"] % 1000]
    answers = [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(ANSWERS[kind], start=1)]
    return {
        **{name: question[name] for name in ("question_id", "image_id")},
        "question_type": "what is",
        "answer_type": kind,
        "multiple_choice_answer": ANSWERS[kind][0],
        "answers": answers,
    }


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def questions_file(folder: Path, part: str) -> Path:
    return folder / f"v2_OpenEnded_mscoco_{part}_questions.json"


def annotations_file(folder: Path, part: str) -> Path:
    return folder / f"v2_mscoco_{part}_annotations.json"


def write_part(folder: Path, part: str, image_ids: list[int]) -> None:
    asked = made_questions(image_ids)
    head = {"info": {"version": "2.0"}, "license": {}, "data_type": "mscoco", "data_subtype": part}
    write(questions_file(folder, part), {**head, "task_type": "Open-Ended", "questions": asked})
    if part in vqa_files.ANSWERED:
        write(annotations_file(folder, part), {**head, "annotations": [annotated(q) for q in reversed(asked)]})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a complete data root with `vqa` and `coco`."""
    monkeypatch.setenv("PETLBENCH_CACHE", str(tmp_path / "cache"))
    made, vqa = tmp_path / "data", tmp_path / "data" / "vqa"
    write_part(vqa, "train2014", TRAIN_IMAGES)
    write_part(vqa, "val2014", VAL_IMAGES)
    write_part(vqa, "test2015", TEST_IMAGES)
    write_part(vqa, "test-dev2015", TEST_IMAGES[:1])
    listed = [{"cocoid": n, "split": split, "filename": "x.jpg", "sentences": []} for n, split in KARPATHY.items()]
    write(made / "coco" / "dataset_coco.json", {"dataset": "coco", "images": listed})
    for folder, image_ids in (("train2014", TRAIN_IMAGES), ("val2014", VAL_IMAGES), ("test2015", TEST_IMAGES)):
        for image_id in image_ids:
            picture(made / "coco" / image_name(folder, image_id), seed=image_id)
    return made


def source(root: Path | None, **options: Any) -> VQAv2:
    return VQAv2(VQAv2Config(**options), root)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the content of a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def images_of(found: VQAv2, split: str) -> set[int]:
    return {int(name) for name in found.load("vqa", split)["image_id"]}


def refusal(found: VQAv2, split: str = "train") -> str:
    """Return the error of loading a split, which must be one line."""
    with pytest.raises(UserError) as caught:
        found.load("vqa", split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_keep_the_official_question_and_all_ten_answers(root: Path) -> None:
    rows = source(root).load("vqa", "val2014")
    asked = made_questions(VAL_IMAGES)
    assert rows.features.keys() == VQA.keys()
    assert list(rows["sample_id"]) == [str(q["question_id"]) for q in asked]
    assert list(rows["question"]) == [q["question"] for q in asked]
    assert list(rows["answer_type"]) == list(ANSWERS) * len(VAL_IMAGES)
    assert list(rows["answers"]) == list(ANSWERS.values()) * len(VAL_IMAGES)
    assert rows[0]["image"].size == (64, 48) and rows[0]["image_id"] == "1000"


def test_annotations_are_joined_by_question_and_not_by_place(root: Path) -> None:
    """The two files have different orders, which sorting does not undo."""
    edit(questions_file(root / "vqa", "val2014"), lambda c: c["questions"].sort(key=lambda q: q["question_id"] % 7))
    edit(annotations_file(root / "vqa", "val2014"), lambda c: c["annotations"].sort(key=lambda q: q["image_id"] % 3))
    kinds = list(ANSWERS)
    rows = source(root).load("vqa", "val2014").remove_columns("image")
    assert len(rows) == 12
    assert all(row["answers"] == ANSWERS[kinds[int(row["sample_id"]) % 1000]] for row in rows)
    assert all(row["answer_type"] == kinds[int(row["sample_id"]) % 1000] for row in rows)


def test_karpathys_split_divides_by_image_and_restval_trains(root: Path) -> None:
    found = source(root)
    assert images_of(found, "train") == {*TRAIN_IMAGES, VAL_IMAGES[0]}
    assert images_of(found, "validation") == {VAL_IMAGES[1]}
    assert images_of(found, "test") == set(VAL_IMAGES[2:])
    assert found.notes() == ()


def test_karpathys_parts_come_from_one_reading_and_again_from_the_cache(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    answered = vqa_files.answered_rows

    def counted(question_path: Path, annotation_path: Path, part: str) -> pa.Table:
        read.append(question_path)
        return answered(question_path, annotation_path, part)

    monkeypatch.setattr(vqa_files, "answered_rows", counted)
    first, second = source(root), source(root)
    sizes = [len(first.load("vqa", split)) for split in ("train", "validation", "test")]
    assert sizes == [len(second.load("vqa", split)) for split in ("train", "validation", "test")] == [21, 3, 6]
    assert len(read) == 2


def test_parts_that_changed_on_disk_are_read_again(root: Path) -> None:
    found = source(root)
    assert len(found.load("vqa", "train")) == 21
    edit(root / "coco" / "dataset_coco.json", lambda c: c["images"][-1].update(split="val"))
    assert images_of(found, "validation") == {VAL_IMAGES[1], VAL_IMAGES[3]}


def test_the_official_split_holds_out_training_images_and_tests_on_val2014(root: Path) -> None:
    found = source(root, split="official")
    assert images_of(found, "validation") == {HELD}
    assert images_of(found, "train") == set(TRAIN_IMAGES) - {HELD}
    assert images_of(found, "test") == set(VAL_IMAGES)


def test_with_a_hidden_test_part_val2014_is_for_validation(root: Path) -> None:
    found = source(root, split="official", test="test")
    assert images_of(found, "train") == set(TRAIN_IMAGES)
    assert images_of(found, "validation") == set(VAL_IMAGES)
    assert images_of(found, "test") == set(TEST_IMAGES)


@pytest.mark.parametrize(("test", "image_ids"), [("test-dev", TEST_IMAGES[:1]), ("test", TEST_IMAGES)])
def test_hidden_test_parts_have_no_answers_and_images_of_test2015(root: Path, test: str, image_ids: list[int]) -> None:
    rows = source(root, test=test).load("vqa", "test")
    assert list(rows["answers"]) == [[]] * (3 * len(image_ids)) and set(rows["answer_type"]) == {""}
    assert {Path(place["path"]).name for place in rows.with_format(None)["image"]} == {
        f"COCO_test2015_{n:012d}.jpg" for n in image_ids
    }


@pytest.mark.parametrize("home", ["", "vqa/annotations", "VQA", "vqav2/raw", "coco/vqa"])
def test_files_are_found_where_people_keep_them(root: Path, home: str) -> None:
    shutil.move(root / "vqa", root / "elsewhere")
    for path in (root / "elsewhere").iterdir():
        (root / home).mkdir(parents=True, exist_ok=True)
        path.rename(root / home / path.name)
    found = source(root)
    found.check()
    assert len(found.load("vqa", "train")) == 21


def test_the_data_sets_own_folder_can_be_the_root(root: Path) -> None:
    for folder in ("train2014", "val2014"):
        shutil.move(root / "coco" / folder, root / "vqa" / "images" / folder)
    shutil.move(root / "coco" / "dataset_coco.json", root / "vqa" / "dataset_coco.json")
    assert len(source(root / "vqa").load("vqa", "train")) == 21


def test_fewer_than_ten_answers_are_fine(root: Path) -> None:
    edit(annotations_file(root / "vqa", "val2014"), lambda c: c["annotations"][-1].update(answers=[{"answer": "é"}]))
    assert source(root).load("vqa", "val2014")[0]["answers"] == ["é"]


def test_empty_questions_and_empty_answer_lists_are_left_out_and_counted(root: Path) -> None:
    edit(annotations_file(root / "vqa", "val2014"), lambda c: c["annotations"][-1].update(answers=[]))
    edit(questions_file(root / "vqa", "val2014"), lambda c: c["questions"][1].update(question=" \n"))
    edit(questions_file(root / "vqa", "test2015"), lambda c: c["questions"][0].update(question=""))
    found = source(root, split="official")
    assert len(found.load("vqa", "test")) == 10
    assert found.notes() == (
        "vqav2 val2014: left out 1 (empty question), first question 1000001",
        "vqav2 val2014: left out 1 (no answers), first question 1000000",
    )
    assert len(found.load("vqa", "test2015")) == 5


def test_images_that_karpathy_does_not_list_are_left_out_and_counted(root: Path) -> None:
    edit(root / "coco" / "dataset_coco.json", lambda c: c["images"].pop(1))
    found = source(root)
    assert len(found.load("vqa", "train")) == 18
    reason = f"left out 3 (image not in dataset_coco.json), first question {TRAIN_IMAGES[1]}000"
    assert found.notes() == (f"vqav2 karpathy_train: {reason}",)


def annotations_with(change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    return lambda root: edit(annotations_file(root / "vqa", "val2014"), lambda c: change(c["annotations"]))


def questions_with(change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    return lambda root: edit(questions_file(root / "vqa", "val2014"), lambda c: change(c["questions"]))


def karpathy_with(change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    return lambda root: edit(root / "coco" / "dataset_coco.json", lambda c: change(c["images"]))


def renumber_across_parts(root: Path) -> None:
    """Give a question of val2014 the number of one of train2014."""
    for path in (questions_file(root / "vqa", "val2014"), annotations_file(root / "vqa", "val2014")):
        path.write_text(path.read_text().replace("1000000", f"{HELD}000"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (questions_with(lambda q: q[1].update(question_id=1000000)), r"val2014_questions.json has question_id 1000000"),
        (annotations_with(lambda a: a.append(a[0])), r"val2014_annotations.json has question_id 1003002 twice"),
        (
            annotations_with(lambda a: a.pop()),
            r"questions.json has question_id 1000000, which .*annotations.json lacks",
        ),
        (questions_with(lambda q: q.pop()), r"annotations.json has question_id 1003002, which .*questions.json lacks"),
        (renumber_across_parts, rf"val2014_questions.json has question_id {HELD}000 twice"),
        (questions_with(lambda q: q[0].update(image_id=-1)), r"questions.0.image_id: .*greater than or equal to 0"),
        (questions_with(lambda q: q[0].update(image_id="../../etc/passwd")), r"questions.0.image_id: .*valid integer"),
        (questions_with(lambda q: q[0].update(image_id=10**30)), r"questions.0.image_id: .*"),
        (questions_with(lambda q: q[0].update(question=None)), r"questions.0.question: .*valid string"),
        (annotations_with(lambda a: a[0].pop("answers")), r"annotations.0.answers: Field required"),
        (annotations_with(lambda a: a[0].update(answers=["yes"])), r"annotations.0.answers.0: .*"),
        (annotations_with(lambda a: a[0]["answers"][3].pop("answer")), r"annotations.0.answers.3.answer: Field req"),
        (annotations_with(lambda a: a[0].update(answer_type=3)), r"annotations.0.answer_type: .*valid string"),
        (karpathy_with(lambda i: i.append(i[0])), rf"dataset_coco.json has cocoid {HELD} twice"),
        (karpathy_with(lambda i: i[0].update(split="dev")), r"dataset_coco.json .*images.0.split: .*'restval'"),
        (karpathy_with(lambda i: i[0].pop("cocoid")), r"dataset_coco.json .*images.0.cocoid: Field required"),
    ],
)
def test_damaged_files_are_one_line_that_names_file_and_place(
    root: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(root)
    assert re.search(said, refusal(source(root)))


@pytest.mark.parametrize("kind", [questions_file, annotations_file])
def test_truncated_files_are_named(root: Path, kind: Callable[[Path, str], Path]) -> None:
    path = kind(root / "vqa", "train2014")
    path.write_bytes(path.read_bytes()[:-20])
    assert refusal(source(root)).startswith(f"{path} is truncated or malformed")


def test_the_questions_of_another_part_are_refused(root: Path) -> None:
    shutil.copy(questions_file(root / "vqa", "train2014"), questions_file(root / "vqa", "val2014"))
    assert "holds the questions of train2014, not of val2014" in refusal(source(root))


@pytest.mark.parametrize(
    ("options", "lost"),
    [
        ({}, "coco/dataset_coco.json"),
        ({}, "vqa/v2_mscoco_val2014_annotations.json"),
        ({"split": "official"}, "vqa/v2_OpenEnded_mscoco_val2014_questions.json"),
        ({"test": "test-dev"}, "vqa/v2_OpenEnded_mscoco_test-dev2015_questions.json"),
    ],
)
def test_a_file_that_is_not_there_is_named_before_anything_runs(root: Path, options: dict[str, Any], lost: str) -> None:
    source(root, **options).check()
    (root / lost).unlink()
    with pytest.raises(UserError, match=rf"^vqav2 lacks {re.escape(Path(lost).name)} .*https://"):
        source(root, **options).check()
    assert "there are" in refusal(source(root, **options), "test" if options else "train")


def test_without_karpathys_file_the_official_split_works(root: Path) -> None:
    (root / "coco" / "dataset_coco.json").unlink()
    found = source(root, split="official")
    found.check()
    assert found.parts("vqa") == ("train2014", "val2014", "test-dev2015", "test2015")
    assert len(found.load("vqa", "test")) == 12


def test_an_unknown_split_is_answered_with_those_there_are(root: Path) -> None:
    assert re.search(
        "no split 'karpathy_vall'.* mean 'karpathy_val'.*test-dev2015", refusal(source(root), "karpathy_vall")
    )


def test_a_root_without_the_files_says_what_is_looked_for_and_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"v2_OpenEnded_mscoco_train2014_questions.json.*https://s3.amazonaws.com"):
        source(tmp_path).check()


def test_a_folder_of_images_that_is_missing_is_named(root: Path) -> None:
    shutil.rmtree(root / "coco" / "val2014")
    assert re.search(r"lacks its images .*coco/val2014.*http://images.cocodataset.org", refusal(source(root)))


def cell_of(root: Path, **options: Any) -> Record:
    rows = len(source(root, **options).load("vqa", "train"))
    return one_epoch("vqa", "vqav2", root, root.parent / "out", rows=rows, dataset_config=options)


@pytest.mark.parametrize(("options", "tested"), [({}, 6), ({"split": "official"}, 12)])
def test_a_miniature_trains_and_is_scored_by_answer_type(root: Path, options: dict[str, Any], tested: int) -> None:
    record = cell_of(root, **options)
    assert record.outcome == "ok", record.reason
    by_type = {f"vqa_accuracy/{kind}" for kind in ANSWERS}
    assert set(record.metrics) == {"vqa_accuracy", *by_type}
    samples = Store.open(root.parent / "out", create=False).samples(record)
    assert samples is not None and len(samples["sample_ids"]) == len(samples["scores"]["vqa_accuracy"]) == tested


def test_a_hidden_test_part_gives_a_submission_and_no_score(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = cell_of(root, test="test-dev")
    assert record.outcome == "ok", record.reason
    assert record.metrics == {} and "vqa_accuracy" in record.validation
    store = Store.open(root.parent / "out", create=False)
    (path,) = (store.root / "submissions").iterdir()
    submitted = json.loads(path.read_text())
    assert [set(entry) for entry in submitted] == [{"question_id", "answer"}] * 3
    assert [entry["question_id"] for entry in submitted] == [2001000, 2001001, 2001002]
    assert all(isinstance(entry["answer"], str) for entry in submitted)

    (row,) = leaderboard.table(store).to_dict("records")
    assert row["outcome"] == "ok" and row["score_mean"] != row["score_mean"] and row["metric"] == "vqa_accuracy"
    folder, asked = str(store.root), ["--data-root", str(root)]
    assert main(["leaderboard", folder]) == 0
    assert "no public answers" in " ".join(capsys.readouterr().out.split())
    for command in (["plot", folder, "--out", str(root / "plots")], ["compare", folder]):
        assert main(command) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err
    # The gallery reads a record's data set options from its cell, and has no true answer to show.
    assert main(["show", folder, "--out", str(root / "pictures"), *asked]) == 0
    assert len(list((root / "pictures").glob("*.png"))) == 1


def test_a_copy_in_parquet_files_gives_the_official_parts(root: Path) -> None:
    """The copy is as on the hub: answers as in the official files, images inside."""
    copy = root / "copy"
    copy.mkdir()
    schema = None
    for split, part, image_ids in (("train", "train2014", TRAIN_IMAGES), ("testdev", "test2015", TEST_IMAGES)):
        rows = [
            {
                **question,
                "question_id": str(question["question_id"]),
                "image": {"bytes": (root / "coco" / image_name(part, question["image_id"])).read_bytes(), "path": None},
                "answers": annotated(question)["answers"] if split == "train" else None,
                "answer_type": annotated(question)["answer_type"],
            }
            for question in made_questions(image_ids)
        ]
        table = pa.Table.from_pylist(rows, schema)
        schema = table.schema
        pq.write_table(table, copy / f"{split}-00000-of-00001.parquet")
    found = source(root, layout="parquet", hub=str(copy), split="official", test="test-dev")
    assert found.parts("vqa") == ("train2014", "test-dev2015")
    rows = found.load("vqa", "train")
    assert rows[0]["answers"] == ANSWERS["yes/no"] and rows[0]["image"].size == (64, 48)
    assert list(found.load("vqa", "test")["answers"]) == [[]] * 6
    with pytest.raises(UserError, match=r"no part 'karpathy_train'.*split: official"):
        source(root, layout="parquet", hub=str(copy)).check()
