"""Read VQA's official files of questions and annotations, and Karpathy's split of COCO, as Arrow tables.

Formats: visualqa.org/download.html, "Input Questions Format" and "Annotation Format"; `dataset_coco.json` of Karpathy
and Fei-Fei (CVPR 2015).
"""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NotRequired

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import TypedDict

from petlbench.core.errors import UserError
from petlbench.datasets.files.reader import Skips
from petlbench.datasets.files.reading import read_json, refuse_repeats

if TYPE_CHECKING:
    import pyarrow as pa

ANSWERED = ("train2014", "val2014")  # the official parts whose answers are public

Identifier = Annotated[int, Field(strict=True, ge=0, lt=10**15)]


class VQAQuestion(TypedDict):
    """One question in a file of questions."""

    question_id: Identifier
    image_id: Identifier
    question: str


class Questions(TypedDict):
    """A file of questions."""

    questions: list[VQAQuestion]
    data_subtype: NotRequired[str]


class Answer(TypedDict):
    """The answer of one person."""

    answer: str


class VQAAnnotation(TypedDict):
    """Ten people's answers to a question; answers become bare strings at once, because there are millions."""

    question_id: Identifier
    answer_type: str
    answers: list[Annotated[Answer, AfterValidator(itemgetter("answer"))]]


class Annotations(TypedDict):
    """A file of annotations."""

    annotations: list[VQAAnnotation]


class KarpathyImage(TypedDict):
    """An image of `dataset_coco.json`; its captions are not read."""

    cocoid: Identifier
    split: Literal["train", "restval", "val", "test"]


class KarpathyImages(TypedDict):
    """`dataset_coco.json`."""

    images: list[KarpathyImage]


QUESTIONS = TypeAdapter(Questions)
ANNOTATIONS = TypeAdapter(Annotations)
KARPATHY = TypeAdapter(KarpathyImages)


def read_questions(path: Path, part: str) -> pa.Table:
    """Return the columns question_id, image_id (both int64) and question. Raise UserError for another part's file."""
    import pyarrow as pa

    document = read_json(path, QUESTIONS)
    subtype = document.get("data_subtype", part)
    if subtype in ANSWERED and subtype != part:
        raise UserError(f"{path} holds the questions of {subtype}, not of {part}: get the file again")
    rows = document["questions"]
    ids = np.array([row["question_id"] for row in rows], np.int64)
    refuse_repeats(ids.tolist(), "question_id", path)
    image_ids = pa.array([row["image_id"] for row in rows], pa.int64())
    questions = pa.array([row["question"] for row in rows], pa.string())
    return pa.table({"question_id": ids, "image_id": image_ids, "question": questions})


def read_annotations(path: Path) -> pa.Table:
    """Return the columns question_id (int64), answers and answer_type."""
    import pyarrow as pa

    rows = read_json(path, ANNOTATIONS)["annotations"]
    ids = np.array([row["question_id"] for row in rows], np.int64)
    refuse_repeats(ids.tolist(), "question_id", path)
    answers = pa.array([row["answers"] for row in rows], pa.list_(pa.string()))
    types = pa.array([row["answer_type"] for row in rows], pa.string())
    return pa.table({"question_id": ids, "answers": answers, "answer_type": types})


def answered_rows(question_path: Path, annotation_path: Path, part: str) -> pa.Table:
    """Return the questions of a part, in their order, with the columns of `read_annotations`.

    Raise UserError if a question has no annotation, or an annotation no question.
    """
    annotations = read_annotations(annotation_path)  # the large file first, while memory is empty
    questions = read_questions(question_path, part)
    ids, annotated_ids = questions["question_id"].to_numpy(), annotations["question_id"].to_numpy()
    if not np.array_equal(ids, annotated_ids):
        _require_ids_in(ids, annotated_ids, question_path, annotation_path)
        _require_ids_in(annotated_ids, ids, annotation_path, question_path)
        places = np.empty(len(ids), np.int64)
        places[np.argsort(ids)] = np.argsort(annotated_ids)
        annotations = annotations.take(places)
    return questions.append_column("answers", annotations["answers"]).append_column(
        "answer_type", annotations["answer_type"]
    )


def unanswered_rows(path: Path, part: str) -> pa.Table:
    """Return rows like `answered_rows` for questions without public answers: no answers, no type."""
    import pyarrow as pa

    questions = read_questions(path, part)
    nothing: pa.Array = pa.array([[]] * len(questions), pa.list_(pa.string()))
    return questions.append_column("answers", nothing).append_column("answer_type", pa.array([""] * len(questions)))


def usable_questions(rows: pa.Table, skips: Skips, *, trained: bool = True) -> pa.Table:
    """Return the rows with a question and, if `trained`, with answers; count the others."""
    import pyarrow.compute as pc

    rows = _without(rows, pc.equal(pc.utf8_trim_whitespace(rows["question"]), ""), "empty question", skips)
    if not trained:
        return rows
    return _without(rows, pc.equal(pc.list_value_length(rows["answers"]), 0), "no answers", skips)


def karpathy_splits(path: Path) -> dict[int, str]:
    """Return `train`, `val` or `test` by image id; `restval` is in train. Raise UserError if an image occurs twice."""
    listed = read_json(path, KARPATHY)["images"]
    refuse_repeats([image["cocoid"] for image in listed], "cocoid", path)
    return {image["cocoid"]: "train" if image["split"] == "restval" else image["split"] for image in listed}


def divide_by_karpathy(rows: pa.Table, splits: dict[int, str], skips: Skips) -> dict[str, pa.Table]:
    """Return the rows of each of Karpathy's splits, by image; count the rows whose image is not listed."""
    import pyarrow as pa
    import pyarrow.compute as pc

    coded = rows["image_id"].combine_chunks().dictionary_encode()
    names = [splits.get(image_id) for image_id in coded.dictionary.to_pylist()]
    split = pa.array(names, pa.string()).take(coded.indices)
    _without(rows, pc.is_null(split), "image not in dataset_coco.json", skips)
    return {name: rows.filter(pc.equal(split, name)) for name in ("train", "val", "test")}


def _require_ids_in(ids: np.ndarray, others: np.ndarray, path: Path, other: Path) -> None:
    missing = np.setdiff1d(ids, others)
    if len(missing):
        raise UserError(f"{path} has question_id {missing[0]}, which {other} lacks: get both again, of one release")


def _without(rows: pa.Table, bad: pa.ChunkedArray, reason: str, skips: Skips) -> pa.Table:
    import pyarrow.compute as pc

    count = pc.sum(bad).as_py() or 0
    if not count:
        return rows
    skips.add(reason, f"question {rows.filter(bad)['question_id'][0].as_py()}", count)
    return rows.filter(pc.invert(bad))
