"""A small data set of files, for tests of code that handles any data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Self

import pyarrow as pa

from petlbench.core.errors import UserError
from petlbench.datasets.files.declaration import Choice, Declaration
from petlbench.datasets.files.reader import Part, Reader, Skips
from petlbench.datasets.files.source import FileSource
from tests.miniatures import picture

SIZES = {"train": (40, 44), "val": (6, 6), "testA": (5, 5), "extra": (3, 3)}  # images, rows


def make(folder: Path) -> None:
    """Write the whole data set, as published."""
    for part, (images, rows) in SIZES.items():
        names = [f"{part}/{i:02}.png" for i in range(images)]
        for seed, name in enumerate(names):
            picture(folder / "pictures" / name, (16, 12), seed)
        entries = [[names[i % images], f"thing {i}", [1.0, 2.0, 3.0, 4.0]] for i in range(rows)]
        (folder / f"{part}.json").write_text(json.dumps(entries))


class ToyReader(Reader):
    """A reader of `<part>.json`, a list of [image, text, box or captions or None]."""

    layout = "toy"

    @classmethod
    def find(cls, source: Declaration, root: Path | None) -> Self | None:
        return cls(source, root) if root and any(root.glob("*.json")) else None

    @classmethod
    def places(cls, source: Declaration) -> str:
        return "*.json"

    def parts(self, task: str) -> tuple[str, ...]:
        return tuple(path.stem for path in sorted(self.root.glob("*.json")))

    def files(self, task: str, part: str) -> list[Path]:
        return [self.root / f"{part}.json"]

    def read(self, task: str, part: str) -> Part:
        skips = Skips()
        try:
            entries = json.loads(self.files(task, part)[0].read_text())
        except ValueError:
            raise UserError(f"{part}.json is truncated: get the file again") from None
        for name, _, label in entries:
            if task == "rec" and not label[2] * label[3]:
                skips.add("box without area", name)
        rows = [row for row in entries if task != "rec" or row[2][2] * row[2][3]]
        columns: dict[str, Any] = {
            "sample_id": [f"{part}-{i}" for i in range(len(rows))],
            "image_id": [name for name, *_ in rows],
            "image": [name for name, *_ in rows],
            "image_2": ["testA/00.png" for _ in rows],
            "expression": [text for _, text, _ in rows],
            "question": [text for _, text, _ in rows],
            "answers": [["yes"] for _ in rows],
            "answer_type": ["yes/no" for _ in rows],
            "box": [label for *_, label in rows],
            "captions": [label for *_, label in rows],
            "subset": [part for _ in rows],
        }
        return Part(pa.table({name: columns[name] for name in self.source.features(task)}), skips)


class Toy(FileSource):
    """A data set with validation held out of `train`, val and testA as test, and an unused part `extra`."""

    name = "toy"
    tasks = frozenset({"rec", "captioning", "pairs"})
    origin = "get it from the moon"
    readers = (ToyReader,)
    image_bases = ("", "pictures")
    sizes: ClassVar[dict[str, Any]] = {
        "rec": {part: {"images": images, "expressions": rows} for part, (images, rows) in SIZES.items()}
    }

    def choice(self, task: str, split: str) -> Choice:
        return {
            "train": Choice(("train",), "kept"),
            "validation": Choice(("train",), "held out"),
            "test": Choice(("val", "testA")),
        }[split]
