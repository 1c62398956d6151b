"""GQA: compositional questions about photographs, with one answer each (Hudson and Manning, CVPR 2019).

The official files `<part>_balanced_questions.json` each hold an object from question ids to questions. Train and
validation are the official parts of these names; test is testdev, whose answers are public.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NotRequired, Self

from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import TypedDict

from petlbench.api.source import SourceConfig
from petlbench.datasets.files import images
from petlbench.datasets.files.declaration import Choice, Declaration, FilesConfig
from petlbench.datasets.files.reader import Part, Reader, Skips
from petlbench.datasets.files.reading import find_below, read_json, refuse_repeats
from petlbench.datasets.files.source import FileSource
from petlbench.datasets.hub.parquet import HubParquet

if TYPE_CHECKING:
    from datasets import Features

PARTS = ("train_balanced", "val_balanced", "testdev_balanced", "test_balanced", "challenge_balanced")
FOLDERS = ("", "gqa", "questions", "gqa/questions", "questions1.2", "gqa/questions1.2", "GQA", "GQA/questions")


class Types(TypedDict):
    """The types of a question; results are broken down by `structural`."""

    structural: str


class GQAQuestion(TypedDict):
    """An entry of a file; entries of the hidden parts have no answer and no types."""

    question: str
    imageId: str
    answer: NotRequired[str]
    types: NotRequired[Annotated[Types, AfterValidator(itemgetter("structural"))]]


class BalancedQuestions(Reader):
    """A reader of the official files of balanced questions."""

    layout = "official"

    @classmethod
    def find(cls, source: Declaration, root: Path | None) -> Self | None:
        reader = cls(source, root) if root else None
        return reader if reader and reader.parts("vqa") else None

    @classmethod
    def places(cls, source: Declaration) -> str:
        return "gqa/{train,val,testdev}_balanced_questions.json"

    def parts(self, task: str) -> tuple[str, ...]:
        return tuple(part for part in PARTS if self._file(part))

    def files(self, task: str, part: str) -> list[Path]:
        path = self._file(part)
        return [path] if path else []

    def _file(self, part: str) -> Path | None:
        return find_below(self.root, FOLDERS, f"{part}_questions.json")

    def read(self, task: str, part: str) -> Part:
        import pyarrow as pa
        import pyarrow.compute as pc

        (path,) = self.files(task, part)
        questions = _questions(path)
        rows, skips = list(questions.values()), Skips()
        answers = [[row["answer"]] if "answer" in row else [] for row in rows]
        coded = pa.array([row["imageId"] for row in rows], pa.string()).dictionary_encode()
        names = pa.array([images.relative(f"{image_id}.jpg", path) for image_id in coded.dictionary.to_pylist()])
        table = pa.table(
            {
                "sample_id": pa.array(list(questions), pa.string()),
                "image_id": coded.cast(pa.string()),
                "image": names.cast(pa.string()).take(coded.indices),
                "question": pa.array([row["question"] for row in rows], pa.string()),
                "answers": pa.array(answers, pa.list_(pa.string())),
                "answer_type": pa.array([row.get("types", "") for row in rows], pa.string()),
            }
        )
        blank = pc.equal(pc.utf8_trim_whitespace(table["question"]), "")
        if count := pc.sum(blank).as_py():
            skips.add("empty question", f"question {table.filter(blank)['sample_id'][0]}", count)
            table = table.filter(pc.invert(blank))
        return Part(table, skips)


def _questions(path: Path) -> dict[str, GQAQuestion]:
    """Return the file's questions by id. Raise UserError if the file is malformed or has an id twice."""
    ids: list[str] = []

    def note(question_id: str) -> str:
        ids.append(question_id)  # because a dict alone does not show that a key came twice
        return question_id

    questions = read_json(path, TypeAdapter(dict[Annotated[str, AfterValidator(note)], GQAQuestion]))
    if len(ids) != len(questions):
        refuse_repeats(ids, "question id", path)
    return questions


class GQAConfig(FilesConfig):
    """Options of GQA."""

    train_on: Literal["train", "train+val"] = Field(
        "train",
        description="the official train part; or train and val, as VL-T5 and VL-PET do, except one image in "
        "twenty, which are for validation",
    )


class GQA(FileSource):
    """GQA's balanced questions. `answer_type` is the structural type: verify, query, choose, logical or compare."""

    name = "gqa"
    tasks = frozenset({"vqa"})
    Config: ClassVar[type[SourceConfig]] = GQAConfig
    config: GQAConfig
    origin = (
        "questions: https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip, unpacked to gqa; "
        "images: https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip, unpacked to gqa/images"
    )
    sizes: Mapping[str, Mapping[str, Mapping[str, int]]] = {  # from memory
        "vqa": {
            "train_balanced": {"questions": 943_000, "images": 72_140},
            "val_balanced": {"questions": 132_062, "images": 10_234},
            "testdev_balanced": {"questions": 12_578, "images": 398},
        }
    }
    readers = (BalancedQuestions, HubParquet)
    image_bases = ("gqa/images", "images", "GQA/images", "gqa/allImages/images", "allImages/images")

    def features(self, task: str) -> Features:
        from petlbench.api.schemas import VQA

        return VQA

    def choice(self, task: str, split: str) -> Choice:
        if split == "test":
            return Choice(("testdev_balanced",))
        if self.config.train_on == "train+val":
            return Choice(("train_balanced", "val_balanced"), "kept" if split == "train" else "held out")
        return Choice(("train_balanced",) if split == "train" else ("val_balanced",))
