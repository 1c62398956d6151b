"""COCO's own caption files of 2014 and of 2017 (the same images, divided otherwise)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from petlbench.core.errors import UserError
from petlbench.core.gc_pause import collector_paused
from petlbench.datasets.files.coco import COCO_BASES
from petlbench.datasets.files.declaration import Choice, Declaration, FilesConfig
from petlbench.datasets.files.reader import Part, Reader
from petlbench.datasets.files.reading import find_below, read_json, refuse_repeats
from petlbench.datasets.files.source import FileSource
from petlbench.datasets.hub.parquet import HubParquet
from petlbench.datasets.official.caption_rows import TASKS, caption_part, checked_names, published_sizes

if TYPE_CHECKING:
    from datasets import Features

    from petlbench.datasets.official.caption_rows import Ints

PARTS = ("train2014", "val2014", "train2017", "val2017")
FOLDERS = (
    "annotations",
    "coco/annotations",
    "mscoco/annotations",
    "COCO/annotations",
    "",
    "coco",
    "mscoco",
    "COCO",
    "annotations_trainval2014/annotations",
    "annotations_trainval2017/annotations",
)


class ImageEntry(TypedDict):
    id: int
    file_name: str


class CaptionAnnotation(TypedDict):
    id: int
    image_id: int
    caption: str


class CaptionsDocument(TypedDict):
    images: list[ImageEntry]
    annotations: list[CaptionAnnotation]


@cache
def _document() -> TypeAdapter[CaptionsDocument]:
    return TypeAdapter(CaptionsDocument)


class CaptionsFiles(Reader):
    """A reader of `captions_train2017.json` and the like, one file for each part."""

    layout: ClassVar[str] = "coco"

    def __init__(self, source: Declaration, root: Path, paths: Mapping[str, Path]) -> None:
        super().__init__(source, root)
        self.paths = paths

    @classmethod
    def find(cls, source: Declaration, root: Path | None) -> Self | None:
        if root is None:
            return None
        candidates = {part: find_below(root, FOLDERS, f"captions_{part}.json") for part in PARTS}
        paths = {part: path for part, path in candidates.items() if path}
        return cls(source, root, paths) if paths else None

    @classmethod
    def places(cls, source: Declaration) -> str:
        return f"captions_train2017.json and the like (here or in {', '.join(filter(None, FOLDERS))})"

    def parts(self, task: str) -> tuple[str, ...]:
        return tuple(self.paths)

    def files(self, task: str, part: str) -> list[Path]:
        return [self.paths[part]]

    def read(self, task: str, part: str) -> Part:
        path = self.paths[part]
        document = read_json(path, _document())
        with collector_paused():
            image_ids = [image["id"] for image in document["images"]]
            refuse_repeats(image_ids, "image id", path)
            refuse_repeats([annotation["id"] for annotation in document["annotations"]], "annotation id", path)
            names = [image["file_name"] for image in document["images"]]
            places = checked_names([name if "/" in name else f"{part}/{name}" for name in names], path)
            texts = [annotation["caption"] for annotation in document["annotations"]]
            return caption_part(image_ids, places, texts, _owners(document, path))


def _owners(document: CaptionsDocument, path: Path) -> Ints:
    """Return, for each annotation, the rank of its image. Raise UserError if the file does not list the image."""
    import numpy as np

    ranks = {image["id"]: rank for rank, image in enumerate(document["images"])}
    owners = np.array([ranks.get(annotation["image_id"], -1) for annotation in document["annotations"]], dtype=int)
    for stray in np.flatnonzero(owners < 0).tolist():
        annotation = document["annotations"][stray]
        which = f"annotation {annotation['id']} of the image {annotation['image_id']}"
        raise UserError(f"{path} has the {which}, which it does not list: get the file again")
    return owners


class COCOCaptionsConfig(FilesConfig):
    """Options of COCO's captions."""

    year: Literal[2014, 2017] = Field(2017, description="COCO's division into train and val")


class COCOCaptions(FileSource):
    """COCO's captions as COCO publishes them: one row per image, with all its captions.

    The captions of COCO's test images are not public, so `test` is the val part, and validation is held out of train.
    """

    Config: ClassVar[type[FilesConfig]] = COCOCaptionsConfig
    config: COCOCaptionsConfig
    name: ClassVar[str] = "coco_captions"
    tasks: ClassVar[frozenset[str]] = TASKS
    readers: ClassVar[tuple[type[Reader], ...]] = (CaptionsFiles, HubParquet)
    image_bases: ClassVar[tuple[str, ...]] = COCO_BASES
    origin: ClassVar[str] = (
        "annotations: http://images.cocodataset.org/annotations/annotations_trainval2017.zip (or 2014), unpacked to "
        "coco/annotations; images: http://images.cocodataset.org/zips/train2017.zip and val2017.zip (or 2014), "
        "unpacked to coco/train2017, coco/val2017"
    )
    # From memory, as counted in the COCO consortium's files.
    sizes: Mapping[str, Mapping[str, Mapping[str, int]]] = published_sizes(
        train2014=(82_783, 414_113),
        val2014=(40_504, 202_654),
        train2017=(118_287, 591_753),
        val2017=(5_000, 25_014),
    )

    def features(self, task: str) -> Features:
        from petlbench.api.schemas import CAPTIONING

        return CAPTIONING

    def choice(self, task: str, split: str) -> Choice:
        train, val = f"train{self.config.year}", f"val{self.config.year}"
        choices = {
            "train": Choice((train,), "kept"),
            "validation": Choice((train,), "held out"),
            "test": Choice((val,)),
        }
        return choices[split]
