"""COCO and Flickr30k in Karpathy's files, whose splits the field reports results on.

The files: github.com/karpathy/neuraltalk2 and "Deep Visual-Semantic Alignments for Generating Image Descriptions"
(CVPR 2015). `dataset_coco.json` and `dataset_flickr30k.json` hold all images of a data set, with split and captions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NotRequired, Self

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from petlbench.core.errors import UserError
from petlbench.core.files import content_digest
from petlbench.core.gc_pause import collector_paused
from petlbench.core.messages import did_you_mean
from petlbench.datasets.files.coco import COCO_BASES, COCO_IMAGES, with_folder
from petlbench.datasets.files.declaration import Choice, Declaration
from petlbench.datasets.files.reader import Part, Reader
from petlbench.datasets.files.reading import find_below, read_json, refuse_repeats
from petlbench.datasets.files.source import FileSource
from petlbench.datasets.hub.parquet import HubParquet
from petlbench.datasets.official.caption_rows import TASKS, caption_part, checked_names, published_sizes

if TYPE_CHECKING:
    from datasets import Features

FILES = "annotations: https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
FOLDERS = ("", "karpathy", "annotations", "caption_datasets")
FLICKR30K_IMAGES = ("flickr30k-images", "flickr30k_images/flickr30k_images", "flickr30k_images")


class Sentence(TypedDict):
    raw: str
    sentid: NotRequired[int]


class KarpathyEntry(TypedDict):
    """An image; Flickr30k's images have no `cocoid` and no `filepath`."""

    filename: str
    filepath: NotRequired[str]
    cocoid: NotRequired[int]
    split: str
    sentences: list[Sentence]


class KarpathyDocument(TypedDict):
    dataset: NotRequired[str]
    images: list[KarpathyEntry]


class KarpathyFile(Reader):
    """A reader of one Karpathy file, which holds all parts and is parsed once for them."""

    layout: ClassVar[str] = "karpathy"
    data_set: ClassVar[str]  # its name in the file
    homes: ClassVar[tuple[str, ...]]  # usual names of the data set's own folder
    splits: ClassVar[tuple[str, ...]]
    identifier: ClassVar[str]  # the key that identifies an image

    def __init__(self, source: Declaration, root: Path, path: Path) -> None:
        super().__init__(source, root)
        self.path = path
        self._parts: tuple[str, dict[str, Part]] = "", {}  # digest of the file, and the parts read from it

    @classmethod
    def find(cls, source: Declaration, root: Path | None) -> Self | None:
        path = find_below(root, cls._folders(), cls._file()) if root else None
        return cls(source, root, path) if root and path else None

    @classmethod
    def places(cls, source: Declaration) -> str:
        return f"{cls._file()} (here or in {', '.join(cls._folders()[1:])})"

    @classmethod
    def _file(cls) -> str:
        return f"dataset_{cls.data_set}.json"

    @classmethod
    def _folders(cls) -> tuple[str, ...]:
        return FOLDERS + tuple(f"{home}/{folder}".rstrip("/") for home in cls.homes for folder in FOLDERS)

    def parts(self, task: str) -> tuple[str, ...]:
        return self.splits

    def files(self, task: str, part: str) -> list[Path]:
        return [self.path]

    def read(self, task: str, part: str) -> Part:
        digest = content_digest(self.path)
        if digest != self._parts[0]:
            self._parts = digest, self._read()
        return self._parts[1][part]

    def _read(self) -> dict[str, Part]:
        document = read_json(self.path, _document())
        data_set = document.get("dataset", self.data_set)
        if data_set != self.data_set:
            raise UserError(f"{self.path} is of the data set {data_set!r}, not {self.data_set!r}: get {self._file()}")
        with collector_paused():
            entries = document["images"]
            refuse_repeats([self._id(entry) for entry in entries], self.identifier, self.path)
            sentence_ids = [text["sentid"] for entry in entries for text in entry["sentences"] if "sentid" in text]
            refuse_repeats(sentence_ids, "sentid", self.path)
            by_split: dict[str, list[KarpathyEntry]] = {split: [] for split in self.splits}
            for entry in entries:
                self._select(entry, by_split).append(entry)
            return {split: self._rows(chosen) for split, chosen in by_split.items()}

    def _select(self, entry: KarpathyEntry, by_split: Mapping[str, list[KarpathyEntry]]) -> list[KarpathyEntry]:
        """Return the list of the entry's split. Raise UserError if there is no such split."""
        split = entry["split"]
        if split not in by_split:
            hint = did_you_mean(split, by_split) or ":"
            where = f"{self.path} puts {entry['filename']!r} in the split {split!r}"
            raise UserError(f"{where}{hint} there are {', '.join(by_split)}; get the file again")
        return by_split[split]

    def _rows(self, entries: Sequence[KarpathyEntry]) -> Part:
        import numpy as np

        return caption_part(
            [self._id(entry) for entry in entries],
            checked_names([self._image(entry) for entry in entries], self.path),
            [sentence["raw"] for entry in entries for sentence in entry["sentences"]],
            np.repeat(np.arange(len(entries)), np.array([len(entry["sentences"]) for entry in entries], dtype=int)),
        )

    @abstractmethod
    def _id(self, entry: KarpathyEntry) -> int | str:
        """Return the image's identifier within the data set."""

    @abstractmethod
    def _image(self, entry: KarpathyEntry) -> str:
        """Return the image's file name below an image folder."""


@cache
def _document() -> TypeAdapter[KarpathyDocument]:
    return TypeAdapter(KarpathyDocument)


class COCOFile(KarpathyFile):
    data_set: ClassVar[str] = "coco"
    homes: ClassVar[tuple[str, ...]] = ("coco", "mscoco", "COCO")
    splits: ClassVar[tuple[str, ...]] = ("train", "restval", "val", "test")
    identifier: ClassVar[str] = "cocoid"

    def _id(self, entry: KarpathyEntry) -> int | str:
        if "cocoid" not in entry:
            raise UserError(f"{self.path} gives {entry['filename']!r} no cocoid: get {self._file()} again")
        return entry["cocoid"]

    def _image(self, entry: KarpathyEntry) -> str:
        folder = entry.get("filepath")
        return f"{folder}/{entry['filename']}" if folder else with_folder(entry["filename"])


class Flickr30kFile(KarpathyFile):
    data_set: ClassVar[str] = "flickr30k"
    homes: ClassVar[tuple[str, ...]] = ("flickr30k", "Flickr30k", "flickr")
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    identifier: ClassVar[str] = "filename"

    def _id(self, entry: KarpathyEntry) -> int | str:
        """Return the photo's number on Flickr; `imgid` is only a rank in the file."""
        return entry["filename"].rpartition(".")[0] or entry["filename"]

    def _image(self, entry: KarpathyEntry) -> str:
        return entry["filename"]


class Karpathy(FileSource):
    """Captioned images: one row per image, with all its captions."""

    tasks: ClassVar[frozenset[str]] = TASKS
    train: ClassVar[tuple[str, ...]] = ("train",)

    def features(self, task: str) -> Features:
        from petlbench.api.schemas import CAPTIONING

        return CAPTIONING

    def choice(self, task: str, split: str) -> Choice:
        return Choice({"train": self.train, "validation": ("val",), "test": ("test",)}[split])


class COCO(Karpathy):
    """COCO captions in Karpathy's split; train is `train` followed by `restval`, the rest of val2014."""

    name: ClassVar[str] = "coco"
    train: ClassVar[tuple[str, ...]] = ("train", "restval")
    readers: ClassVar[tuple[type[Reader], ...]] = (COCOFile, HubParquet)
    image_bases: ClassVar[tuple[str, ...]] = COCO_BASES
    origin: ClassVar[str] = f"{FILES} (dataset_coco.json); {COCO_IMAGES}"
    # From memory, as the field reports them. They add up to COCO's own 414,113 and 202,654 captions.
    sizes: Mapping[str, Mapping[str, Mapping[str, int]]] = published_sizes(
        train=(82_783, 414_113),
        restval=(30_504, 152_634),
        val=(5_000, 25_010),
        test=(5_000, 25_010),
    )


class Flickr30k(Karpathy):
    """Flickr30k in Karpathy's split."""

    name: ClassVar[str] = "flickr30k"
    readers: ClassVar[tuple[type[Reader], ...]] = (Flickr30kFile, HubParquet)
    # `images` below the root comes last because it may hold another data set's images.
    image_bases: ClassVar[tuple[str, ...]] = (
        *FLICKR30K_IMAGES,
        *(f"{home}/{folder}" for home in Flickr30kFile.homes for folder in (*FLICKR30K_IMAGES, "images")),
        "images/flickr30k-images",
        "images",
    )
    origin: ClassVar[str] = (
        f"{FILES} (dataset_flickr30k.json); images: on request at https://shannon.cs.illinois.edu/DenotationGraph/, "
        "unpacked to flickr30k/flickr30k-images"
    )
    # As printed in the notebook of MultiWay-Adapter's code.
    sizes: Mapping[str, Mapping[str, Mapping[str, int]]] = published_sizes(
        train=(29_000, 145_000),
        val=(1_014, 5_070),
        test=(1_000, 5_000),
    )
