"""The annotations of a data set in one layout, turned into rows."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from petlbench.core.errors import UserError
from petlbench.core.files import content_digest
from petlbench.datasets.files import images
from petlbench.datasets.files.declaration import Declaration

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image


@dataclass
class Skips:
    """What was left out, and why: by reason, how many, and which was the first."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, which: str, count: int = 1) -> None:
        before, first = self.found.get(reason, (0, which))
        self.found[reason] = before + count, first

    def notes(self, where: str) -> list[str]:
        return [f"{where}: left out {n} ({reason}), first {which}" for reason, (n, which) in self.found.items()]


@dataclass(frozen=True)
class Part:
    """Rows in a task's schema, `image` (a string) naming a file below an image folder; and what was left out."""

    table: pa.Table
    skips: Skips = field(default_factory=Skips)


class Reader(ABC):
    """The annotations of one data set in one layout."""

    layout: ClassVar[str]

    def __init__(self, source: Declaration, root: Path) -> None:
        self.source, self.root = source, root

    @classmethod
    @abstractmethod
    def find(cls, source: Declaration, root: Path | None) -> Self | None:
        """A reader, if the files of this layout lie below `root`."""

    @classmethod
    @abstractmethod
    def places(cls, source: Declaration) -> str:
        """What `find` looks for below the root, for a person."""

    @abstractmethod
    def parts(self, task: str) -> tuple[str, ...]:
        """The official parts that are there."""

    @abstractmethod
    def files(self, task: str, part: str) -> list[Path]:
        """The annotation files that the rows depend on; their content is part of the fingerprint."""

    @abstractmethod
    def read(self, task: str, part: str) -> Part:
        """Rows with string columns as they are in the schema; `image` as in `Part`.

        Rows that cannot be used are left out and counted. Raises UserError for files that are not what they should be:
        truncated, of another layout, with identifiers that occur twice, or names that lead out of the image folder.
        """

    def located(self, names: Sequence[str]) -> list[str]:
        """Where each image is, as `opened` takes it. Raises UserError where a folder of images is missing."""
        within = [name.rpartition("/")[0] for name in names]
        bases = {folder: str(self._base(folder)) for folder in dict.fromkeys(within)}
        return [f"{bases[folder]}/{name}" for folder, name in zip(within, names, strict=True)]

    def _base(self, folder: str) -> Path:
        bases = [self.root / base for base in self.source.image_bases]
        found = next((base for base in bases if (base / folder).is_dir()), None)
        if found is None:
            tried = ", ".join(str(base / folder) for base in bases)
            raise UserError(f"{self.source.name} lacks its images (looked for {tried}): {self.source.origin}")
        return found.absolute()

    def absent(self, places: Iterable[str]) -> dict[str, str]:
        """Of `places`, those without a file, and the reason."""
        listed: dict[str, set[str]] = {}
        missing = {}
        for place in places:
            folder, _, name = place.rpartition("/")
            if folder not in listed:
                listed[folder] = set(os.listdir(folder))
            if name not in listed[folder]:
                missing[place] = "missing"
        return missing

    def opened(self, image: Mapping[str, Any]) -> Image:
        """The picture of a row's `image`, decoded. Raises UserError that names the file."""
        return images.decoded(image)

    def fault(self, place: str) -> str | None:
        """Why the image at a place cannot be used, or None when it decodes in full."""
        return images.fault(Path(place))

    def stamp(self, place: str) -> str:
        """What changes when the image at a place does."""
        status = os.stat(place)
        return f"{status.st_size} {status.st_mtime_ns}"

    def digest(self, path: Path) -> str:
        """A hex digest of all in an annotation file that rows depend on."""
        return content_digest(path)
