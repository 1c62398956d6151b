"""Base classes of the four data sets of referring expressions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from petlbench.datasets.files.coco import COCO_BASES
from petlbench.datasets.files.declaration import Choice, FilesConfig
from petlbench.datasets.files.source import FileSource

if TYPE_CHECKING:
    from datasets import Features

BASES = (*COCO_BASES, "refer/data/images", "refer/data/images/mscoco/images", "data/images/mscoco/images")

Sizes = Mapping[str, Mapping[str, Mapping[str, int]]]


@dataclass(frozen=True)
class Division:
    """One division of a data set: its official parts, and the key of TransVG's lists, if there are any."""

    parts: tuple[str, ...]
    index: str | None = None


class ReferConfig(FilesConfig):
    """Options of every data set of referring expressions."""

    split_by: str
    boxes: Literal["exact", "int"] = Field(
        "exact", description="the annotators' boxes, or their x, y, width, height truncated as TransVG's loader does"
    )


class ReferSource(FileSource):
    """Base class of the four data sets; `subset` is a reference's official part."""

    config: ReferConfig
    tasks: ClassVar[frozenset[str]] = frozenset({"rec"})
    image_bases: ClassVar[tuple[str, ...]] = (*BASES, *(f"ln_data/{base}" for base in BASES))
    folder: ClassVar[str]  # the data set's folder in the toolkit
    divisions: ClassVar[Mapping[str, Division]]  # by `split_by`
    index_corners: ClassVar[bool] = False  # whether TransVG's lists give x2, y2, not width, height

    @property
    def division(self) -> Division:
        return self.divisions[self.config.split_by]

    @abstractmethod
    def tested(self) -> tuple[str, ...]:
        """Return the official parts that make up the test split."""

    def features(self, task: str) -> Features:
        from petlbench.api.schemas import REC

        return REC

    def choice(self, task: str, split: str) -> Choice:
        return {"train": Choice(("train",)), "validation": Choice(("val",)), "test": Choice(self.tested())}[split]
