"""NLVR2: statements about two photographs, true or false (Suhr et al., ACL 2019; github.com/lil-lab/nlvr).

The official files `nlvr2/data/{train,dev,test1}.json` hold a JSON object in each line. The statement `dev-850-0-1` is
about the images `dev-850-0-img0.png`, on the left, and `dev-850-0-img1.png`, on the right.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NotRequired, Self

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from petlbench.core.errors import UserError
from petlbench.core.gc_pause import collector_paused
from petlbench.datasets.files import images
from petlbench.datasets.files.declaration import Choice, Declaration
from petlbench.datasets.files.reader import Part, Reader, Skips
from petlbench.datasets.files.reading import find_below, read_bytes, refuse_repeats
from petlbench.datasets.files.source import FileSource

if TYPE_CHECKING:
    from datasets import Features

PARTS = ("train", "dev", "test1")
FOLDERS = ("nlvr2/data", "nlvr/nlvr2/data", "data", "nlvr2", "")


class NLVR2Example(TypedDict):
    """A line of a file; URLs, validation and other keys are ignored."""

    identifier: Annotated[str, Field(pattern=r"^(train|dev|test1)-\d+-\d+-\d+$")]
    sentence: str
    label: Literal["True", "False"]
    directory: NotRequired[int | str]  # the folder of a training pair


EXAMPLE = TypeAdapter(NLVR2Example)


class NLVR2Lines(Reader):
    """A reader of the files of the lil-lab/nlvr repository."""

    layout = "official"

    @classmethod
    def find(cls, source: Declaration, root: Path | None) -> Self | None:
        reader = cls(source, root) if root else None
        return reader if reader and reader.parts("pairs") else None

    @classmethod
    def places(cls, source: Declaration) -> str:
        return "nlvr2/data/{train,dev,test1}.json"

    def parts(self, task: str) -> tuple[str, ...]:
        folder = self._folder
        return tuple(part for part in PARTS if folder and (folder / f"{part}.json").is_file())

    def files(self, task: str, part: str) -> list[Path]:
        return [self._folder / f"{part}.json"] if self._folder else []

    @property
    def _folder(self) -> Path | None:
        """Return the folder of the files; `test1.json` distinguishes them from NLVR's and other data sets' files."""
        marker = find_below(self.root, FOLDERS, "test1.json")
        return marker.parent if marker else None

    def read(self, task: str, part: str) -> Part:
        import pyarrow as pa

        (path,) = self.files(task, part)
        examples, skips = read_lines(path), Skips()
        refuse_repeats([example["identifier"] for example in examples], "identifier", path)
        for example in examples:
            if not example["sentence"].strip():
                skips.add("empty sentence", example["identifier"])
        examples = [example for example in examples if example["sentence"].strip()]
        pairs = [example["identifier"].rpartition("-")[0] for example in examples]
        homes = [_home(example, pair) for example, pair in zip(examples, pairs, strict=True)]
        for home in set(homes):  # identifiers are digits, so only a directory could lead out of the image folder
            images.relative(home, path)
        places = [f"{home}/{pair}" for home, pair in zip(homes, pairs, strict=True)]
        labels = [[example["label"].lower()] for example in examples]
        columns = {
            "sample_id": [example["identifier"] for example in examples],
            "image_id": pairs,
            "image": [f"{place}-img0.png" for place in places],
            "question": [example["sentence"] for example in examples],
            "answer_type": ["true/false"] * len(examples),
            "image_2": [f"{place}-img1.png" for place in places],
        }
        arrays = {name: pa.array(values, pa.string()) for name, values in columns.items()}
        return Part(pa.table({**arrays, "answers": pa.array(labels, pa.list_(pa.string()))}), skips)

    def located(self, names: Sequence[str]) -> list[str]:
        """Return the place of each image; training images lie in numbered folders, or all in one."""
        folders = {folder: self._existing_folder(folder) for folder in {os.path.dirname(name) for name in names}}
        return super().located([f"{folders[os.path.dirname(name)]}/{os.path.basename(name)}" for name in names])

    def _existing_folder(self, folder: str) -> str:
        numbered = any((self.root / base / folder).is_dir() for base in self.source.image_bases)
        return folder if numbered else folder.partition("/")[0]


def read_lines(path: Path) -> list[NLVR2Example]:
    """Return the examples of a file. Raise UserError with the file and the line that is malformed."""
    examples = []
    with collector_paused():
        for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                examples.append(EXAMPLE.validate_json(line))
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                message = ": ".join(filter(None, [".".join(map(str, first["loc"])), " ".join(first["msg"].split())]))
                raise UserError(
                    f"{path}, line {number} is truncated or malformed ({message}): get the file again"
                ) from None
    return examples


def _home(example: NLVR2Example, pair: str) -> str:
    """Return the folder of a pair's images below the image folder, for instance `train/37`."""
    split, folder = pair.partition("-")[0], example.get("directory")
    return split if folder is None else f"{split}/{folder}"


class NLVR2(FileSource):
    """NLVR2 with train, dev for validation and test1 (Test-P) for test, all with public labels."""

    name = "nlvr2"
    tasks = frozenset({"pairs"})
    origin = (
        "statements: https://github.com/lil-lab/nlvr (nlvr2/data); images: by the form that its nlvr2/README.md links, "
        "unpacked to nlvr2/images/train, nlvr2/dev and nlvr2/test1"
    )
    sizes: Mapping[str, Mapping[str, Mapping[str, int]]] = {
        "pairs": {"train": {"pairs": 86_373}, "dev": {"pairs": 6_982}, "test1": {"pairs": 6_967}}
    }
    readers = (NLVR2Lines,)
    image_bases = ("nlvr2/images", "nlvr2", "nlvr/nlvr2/images", "nlvr/nlvr2", "nlvr/images", "images", "")

    def features(self, task: str) -> Features:
        from petlbench.api.schemas import PAIRS

        return PAIRS

    def choice(self, task: str, split: str) -> Choice:
        return Choice(({"train": "train", "validation": "dev", "test": "test1"}[split],))
