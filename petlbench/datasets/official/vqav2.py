"""VQAv2 (Goyal, Khot, Summers-Stay, Batra, Parikh, CVPR 2017): ten people's answers to questions about COCO's images.

The test answers are not public. VL-T5, VL-Adapter and VL-PET therefore divide the questions of train2014 and val2014
by the Karpathy split of their images. That is the default here; another option keeps the official parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from petlbench.api.source import SPLITS, SourceConfig
from petlbench.core.errors import UserError
from petlbench.core.files import content_digest
from petlbench.datasets.files.coco import COCO_BASES, COCO_IMAGES, image_name
from petlbench.datasets.files.declaration import Choice, Declaration, FilesConfig
from petlbench.datasets.files.reader import Part, Reader, Skips
from petlbench.datasets.files.reading import find_below, refuse_repeats
from petlbench.datasets.files.source import FileSource
from petlbench.datasets.hub.parquet import HubParquet
from petlbench.datasets.official import vqa_files
from petlbench.datasets.official.vqa_files import ANSWERED

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

HIDDEN = ("test-dev2015", "test2015")  # the official parts without public answers, both about images of test2015
KARPATHY_PARTS = {"karpathy_train": "train", "karpathy_val": "val", "karpathy_test": "test"}
KARPATHY_FILE = "dataset_coco.json"
# Folders below the data root in which people and the field's repositories keep the files.
HOMES = ("", "vqa", "vqav2", "VQA", "VQAv2", "vqa_v2", "coco", "COCO", "mscoco")
SHELVES = ("", "annotations", "questions", "Annotations", "Questions", "karpathy", "vqa", "raw")
FOLDERS = (*(f"{home}/{shelf}".strip("/") for home in HOMES for shelf in SHELVES), "caption_datasets")


class VQAv2Config(FilesConfig):
    """Options of VQAv2."""

    split: Literal["karpathy", "official"] = Field(
        "karpathy",
        description="karpathy: questions of train2014 and val2014 by the Karpathy split of their images, as VL-PET; "
        "official: train on train2014 without held-out images, which are for validation, and test on val2014",
    )
    test: Literal["public", "test-dev", "test"] = Field(
        "public",
        description="public: test on public answers; test-dev, test: test on test-dev2015 or test2015, which gives a "
        "submission file and no score (with official, val2014 is for validation then, and all of train2014 trains)",
    )


class OfficialFiles(Reader):
    """A reader of VQA's official files and of `dataset_coco.json`.

    VQA's are `v2_OpenEnded_mscoco_<part>_questions.json` and `v2_mscoco_<part>_annotations.json`.
    """

    layout: ClassVar[str] = "official"

    def __init__(self, source: Declaration, root: Path) -> None:
        super().__init__(source, root)
        names = [KARPATHY_FILE, *map(_questions, (*ANSWERED, *HIDDEN)), *map(_annotations, ANSWERED)]
        self._found = {name: path for name in names if (path := find_below(root, FOLDERS, name))}
        self._read: dict[tuple[str, ...], Part] = {}  # by part and digests of its files

    @classmethod
    def find(cls, source: Declaration, root: Path | None) -> Self | None:
        if root is None or not any(find_below(root, FOLDERS, _questions(part)) for part in (*ANSWERED, *HIDDEN)):
            return None
        return cls(source, root)

    @classmethod
    def places(cls, source: Declaration) -> str:
        return (
            f"{_questions('train2014')}, {_annotations('train2014')} and their like, in vqa, vqav2 or the root itself"
        )

    def parts(self, task: str) -> tuple[str, ...]:
        every = (*KARPATHY_PARTS, *ANSWERED, *HIDDEN)
        return tuple(part for part in every if all(name in self._found for name in _names(part)))

    def files(self, task: str, part: str) -> list[Path]:
        """Return the files of a part. Raise UserError with the first file that is missing."""
        return [self._file(name) for name in _names(part)]

    def read(self, task: str, part: str) -> Part:
        if part not in KARPATHY_PARTS:
            return self._official(part)
        # Karpathy's three parts come from the same files: read these once, and keep each part until it is requested.
        content = [content_digest(path) for path in self.files(task, part)]
        if (part, *content) not in self._read:
            self._read = {(name, *content): part_read for name, part_read in self._karpathy().items()}
        return self._read.pop((part, *content))

    def _file(self, name: str) -> Path:
        if name not in self._found:
            raise UserError(f"{self.source.name} lacks {name} (looked below {self.root}): {self.source.origin}")
        return self._found[name]

    def _official(self, part: str) -> Part:
        skips = Skips()
        if part in HIDDEN:
            questions = vqa_files.unanswered_rows(self._file(_questions(part)), part)
            return Part(_rows(vqa_files.usable_questions(questions, skips, trained=False), "test2015"), skips)
        return Part(_rows(vqa_files.usable_questions(self._answered(part), skips), part), skips)

    def _answered(self, part: str) -> pa.Table:
        return vqa_files.answered_rows(self._file(_questions(part)), self._file(_annotations(part)), part)

    def _karpathy(self) -> dict[str, Part]:
        import pyarrow as pa

        splits = vqa_files.karpathy_splits(self._file(KARPATHY_FILE))
        skips = {name: Skips() for name in KARPATHY_PARTS}
        tables: dict[str, list[pa.Table]] = {name: [] for name in KARPATHY_PARTS}
        seen: list[pa.Array] = []
        for official in ANSWERED:
            rows = self._answered(official)
            seen += rows["question_id"].chunks
            divided = vqa_files.divide_by_karpathy(rows, splits, skips["karpathy_train"])
            for name, split in KARPATHY_PARTS.items():
                tables[name].append(_rows(vqa_files.usable_questions(divided[split], skips[name]), official))
        ids = pa.chunked_array(seen, pa.int64()).to_pylist()
        refuse_repeats(ids, "question_id", self._file(_questions("val2014")))
        return {name: Part(pa.concat_tables(tables[name]), skips[name]) for name in KARPATHY_PARTS}


class VQAv2(FileSource):
    """VQAv2's open-ended questions, divided by the options `split` and `test`. Published sizes are from memory."""

    Config: ClassVar[type[SourceConfig]] = VQAv2Config
    config: VQAv2Config
    name: ClassVar[str] = "vqav2"
    tasks: ClassVar[frozenset[str]] = frozenset({"vqa"})
    origin: ClassVar[str] = (
        "questions and annotations: https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_Questions_Train_mscoco.zip, "
        "v2_Annotations_Train_mscoco.zip, the same with Val, and v2_Questions_Test_mscoco.zip; Karpathy's split "
        "(dataset_coco.json): https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip, or else "
        f"dataset_configs: {{vqav2: {{split: official}}}}; {COCO_IMAGES}, test2015.zip likewise"
    )
    # Questions as counted by VL-T5 and visualqa.org, from memory. Every image of COCO 2014 has questions.
    sizes: Mapping[str, Mapping[str, Mapping[str, int]]] = {
        "vqa": {
            "train2014": {"questions": 443_757, "images": 82_783},
            "val2014": {"questions": 214_354, "images": 40_504},
            "test-dev2015": {"questions": 107_394},
            "test2015": {"questions": 447_793, "images": 81_434},
            "karpathy_train": {"questions": 605_102, "images": 113_287},
            "karpathy_val": {"questions": 26_729, "images": 5_000},
            "karpathy_test": {"questions": 26_280, "images": 5_000},
        }
    }
    readers: ClassVar[tuple[type[Reader], ...]] = (OfficialFiles, HubParquet)
    image_bases: ClassVar[tuple[str, ...]] = (
        *COCO_BASES,
        "COCO",
        "COCO/images",
        "vqa",
        "vqa/images",
        "vqav2",
        "vqav2/images",
        "VQA/Images/mscoco",
        "Images/mscoco",
    )

    def features(self, task: str) -> Features:
        from petlbench.api.schemas import VQA

        return VQA

    def choice(self, task: str, split: str) -> Choice:
        hidden = self.config.test != "public"
        if split == "test" and hidden:
            return Choice((f"{self.config.test}2015",))
        if self.config.split == "karpathy":
            return Choice(({"train": "karpathy_train", "validation": "karpathy_val", "test": "karpathy_test"}[split],))
        if hidden:
            return Choice(({"train": "train2014", "validation": "val2014"}[split],))
        if split == "test":
            return Choice(("val2014",))
        return Choice(("train2014",), "kept" if split == "train" else "held out")

    def check(self) -> None:
        for split in SPLITS:
            for part in self.choice("vqa", split).parts:
                self.reader.files("vqa", part)  # raises UserError with the missing file
        super().check()


def _questions(part: str) -> str:
    return f"v2_OpenEnded_mscoco_{part}_questions.json"


def _annotations(part: str) -> str:
    return f"v2_mscoco_{part}_annotations.json"


def _names(part: str) -> list[str]:
    """Return the names of the files from which the rows of a part are made."""
    if part in HIDDEN:
        return [_questions(part)]
    official = ANSWERED if part in KARPATHY_PARTS else (part,)
    names = [name(name_part) for name_part in official for name in (_questions, _annotations)]
    return [KARPATHY_FILE, *names] if part in KARPATHY_PARTS else names


def _rows(entries: pa.Table, folder: str) -> pa.Table:
    """Return the rows in the task's schema; their images lie in `folder`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    coded = entries["image_id"].combine_chunks().dictionary_encode()
    names = pa.array([image_name(folder, number) for number in coded.dictionary.to_pylist()], pa.string())
    return pa.table(
        {
            "sample_id": pc.cast(entries["question_id"], pa.string()),
            "image_id": pc.cast(coded.dictionary, pa.string()).take(coded.indices),
            "image": names.take(coded.indices),
            **{name: entries[name] for name in ("question", "answers", "answer_type")},
        }
    )
