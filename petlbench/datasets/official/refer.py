"""RefCOCO, RefCOCO+, RefCOCOg and ReferItGame: expressions that refer to one object in an image.

Kazemzadeh, Ordonez, Matten, Berg, EMNLP 2014 (ReferItGame); Yu et al., ECCV 2016 (RefCOCO, RefCOCO+); Mao et al., CVPR
2016 and Nagaraja et al., ECCV 2016 (RefCOCOg, divided by google and by umd). Boxes enclose the annotators' masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from petlbench.datasets.files.coco import COCO_IMAGES
from petlbench.datasets.files.declaration import Choice
from petlbench.datasets.files.reader import Reader
from petlbench.datasets.hub.parquet import HubParquet
from petlbench.datasets.official.refer_files import ReferFiles
from petlbench.datasets.official.refer_index import TransVGIndex
from petlbench.datasets.official.refer_source import Division, ReferConfig, ReferSource, Sizes

ANNOTATIONS = (
    "annotations: https://github.com/lichengunc/refer (unpack {} below DIR), or TransVG's index lists "
    "(https://github.com/djiajunustc/TransVG)"
)
READERS: tuple[type[Reader], ...] = (ReferFiles, TransVGIndex, HubParquet)


def _sizes(**parts: int | tuple[int, int]) -> Sizes:
    """Return `sizes` from each part's number of expressions, or numbers of expressions and of images."""
    counts = {name: (count, None) if isinstance(count, int) else count for name, count in parts.items()}
    return {
        "rec": {
            name: {"expressions": expressions} | ({} if images is None else {"images": images})
            for name, (expressions, images) in counts.items()
        }
    }


class UncConfig(ReferConfig):
    """Options of RefCOCO and RefCOCO+."""

    split_by: Literal["unc"] = Field("unc", description="who divided the data set")
    test: Literal["both", "testA", "testB"] = Field(
        "both",
        description="parts of the test split: people (testA), other objects (testB), or both, also scored separately",
    )


class RefCOCO(ReferSource):
    """RefCOCO: expressions from a game of two players. testA holds people, testB other objects."""

    Config = UncConfig
    config: UncConfig
    name: ClassVar[str] = "refcoco"
    readers = READERS
    folder: ClassVar[str] = "refcoco"
    origin: ClassVar[str] = f"{ANNOTATIONS.format('refcoco')}; {COCO_IMAGES}"
    divisions: ClassVar[Mapping[str, Division]] = {"unc": Division(("train", "val", "testA", "testB"), "unc")}
    # From memory.
    sizes: Sizes = _sizes(train=(120624, 16994), val=(10834, 1500), testA=(5657, 750), testB=(5095, 750))

    def tested(self) -> tuple[str, ...]:
        return ("testA", "testB") if self.config.test == "both" else (self.config.test,)


class RefCOCOPlus(RefCOCO):
    """RefCOCO+: like RefCOCO, but players were not allowed to say where in the image the object is."""

    name: ClassVar[str] = "refcoco+"
    folder: ClassVar[str] = "refcoco+"
    origin: ClassVar[str] = f"{ANNOTATIONS.format('refcoco+')}; {COCO_IMAGES}"
    divisions: ClassVar[Mapping[str, Division]] = {"unc": Division(("train", "val", "testA", "testB"), "unc+")}
    # From memory.
    sizes: Sizes = _sizes(train=(120191, 16992), val=(10758, 1500), testA=(5726, 750), testB=(4889, 750))


class RefCOCOgConfig(ReferConfig):
    """Options of RefCOCOg."""

    split_by: Literal["umd", "google"] = Field(
        "umd", description="who divided the data set: umd by image, google by object"
    )


class RefCOCOg(ReferSource):
    """RefCOCOg: longer expressions, written outside of a game.

    google published no test part, and its val shares images with its train. So val is the test split, and some training
    images are held out for validation.
    """

    Config = RefCOCOgConfig
    config: RefCOCOgConfig
    name: ClassVar[str] = "refcocog"
    readers = READERS
    folder: ClassVar[str] = "refcocog"
    origin: ClassVar[str] = f"{ANNOTATIONS.format('refcocog')}; {COCO_IMAGES}"
    divisions: ClassVar[Mapping[str, Division]] = {
        "umd": Division(("train", "val", "test"), "gref_umd"),
        "google": Division(("train", "val"), "gref"),
    }
    # From memory.
    sizes: Sizes = _sizes(train=(80512, 21899), val=(4896, 1300), test=(9602, 2600))
    google_sizes: ClassVar[Sizes] = _sizes(train=85474, val=9536)

    def __init__(self, config: RefCOCOgConfig, root: Path | None = None) -> None:
        super().__init__(config, root)
        if config.split_by == "google":
            self.sizes = self.google_sizes  # the parts have the same names but other sizes

    def tested(self) -> tuple[str, ...]:
        return ("test",) if self.config.split_by == "umd" else ("val",)

    def choice(self, task: str, split: str) -> Choice:
        if self.config.split_by == "google" and split != "test":
            return Choice(("train",), "kept" if split == "train" else "held out")
        return super().choice(task, split)


class ReferItConfig(ReferConfig):
    """Options of ReferItGame."""

    split_by: Literal["berkeley", "unc"] = Field(
        "berkeley", description="who divided the data set; TransVG's lists: berkeley"
    )


class ReferItGame(ReferSource):
    """ReferItGame (refclef): the first such game, on photographs of SAIAPR TC-12.

    The index lists and the toolkit's files keep different expressions. unc's test holds testA, testB and testC, with
    a reference that is in several of them only once; `subset` names its parts.
    """

    Config = ReferItConfig
    config: ReferItConfig
    name: ClassVar[str] = "referit"
    readers = READERS
    folder: ClassVar[str] = "refclef"
    origin: ClassVar[str] = (
        f"{ANNOTATIONS.format('refclef')}; images: SAIAPR TC-12 (https://www.imageclef.org/SIAPRdata), "
        "all in images/saiapr_tc-12"
    )
    image_bases: ClassVar[tuple[str, ...]] = tuple(
        f"{above}{base}"
        for above in ("", "refer/data/", "refer/", "data/", "ln_data/")
        for base in (
            "images/saiapr_tc-12",
            "saiapr_tc-12",
            "referit/images",
            "refclef/images/saiapr_tc-12",
            "refclef/saiapr_tc-12",
            "refclef/images",
            "images",
        )
    )
    divisions: ClassVar[Mapping[str, Division]] = {
        "berkeley": Division(("train", "val", "test"), "referit"),
        "unc": Division(("train", "val", "test", "testA", "testB", "testC")),
    }
    index_corners: ClassVar[bool] = True

    def tested(self) -> tuple[str, ...]:
        return ("test",)
