"""Readers turn the annotations of a data set in one layout into rows."""

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
    """Items that a reader left out: `found` maps each reason to the number of items and the first one."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, which: str, count: int = 1) -> None:
        before, first = self.found.get(reason, (0, which))
        self.found[reason] = before + count, first

    def notes(self, where: str) -> list[str]:
        return [f"{where}: left out {n} ({reason}), first {which}" for reason, (n, which) in self.found.items()]


@dataclass(frozen=True)
class Part:
    """Rows in a task's schema, whose `image` (a string) names a file below an image folder, and the items left out."""

    table: pa.Table
    skips: Skips = field(default_factory=Skips)


class Reader(ABC):
    """A reader of one data set's annotations in one layout."""

    layout: ClassVar[str]

    def __init__(self, source: Declaration, root: Path) -> None:
        self.source, self.root = source, root

    @classmethod
    @abstractmethod
    def find(cls, source: Declaration, root: Path | None) -> Self | None:
        """Return a reader if the files of this layout lie below `root`, else None."""

    @classmethod
    @abstractmethod
    def places(cls, source: Declaration) -> str:
        """Return, in words for an error, the files that `find` looks for below the root."""

    @abstractmethod
    def parts(self, task: str) -> tuple[str, ...]:
        """Return the official parts whose files are present."""

    @abstractmethod
    def files(self, task: str, part: str) -> list[Path]:
        """Return the annotation files on which the rows depend; their content is part of the fingerprint."""

    @abstractmethod
    def read(self, task: str, part: str) -> Part:
        """Return rows with the schema's string columns; `image` is as in `Part`.

        Leave out and count the rows that cannot be used. Raise UserError if a file is truncated or of another layout,
        repeats an identifier, or names an image outside of the image folder.
        """

    def located(self, names: Sequence[str]) -> list[str]:
        """Return the place of each image, as `opened` takes it. Raise UserError if a folder of images is missing."""
        folders_of_names = [name.rpartition("/")[0] for name in names]
        bases = {folder: str(self._base(folder)) for folder in dict.fromkeys(folders_of_names)}
        return [f"{bases[folder]}/{name}" for folder, name in zip(folders_of_names, names, strict=True)]

    def _base(self, folder: str) -> Path:
        bases = [self.root / base for base in self.source.image_bases]
        present = next((base for base in bases if (base / folder).is_dir()), None)
        if present is None:
            tried = ", ".join(str(base / folder) for base in bases)
            raise UserError(f"{self.source.name} lacks its images (looked for {tried}): {self.source.origin}")
        return present.absolute()

    def absent(self, places: Iterable[str]) -> dict[str, str]:
        """Return those of `places` that have no file, each with the reason."""
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
        """Return the decoded picture of a row's `image`. Raise UserError with the file's name if it does not decode."""
        return images.decoded(image)

    def fault(self, place: str) -> str | None:
        """Return why the image at a place cannot be used, or None if it decodes in full."""
        return images.fault(Path(place))

    def stamp(self, place: str) -> str:
        """Return a text that changes when the image at a place changes."""
        status = os.stat(place)
        return f"{status.st_size} {status.st_mtime_ns}"

    def digest(self, path: Path) -> str:
        """Return a hex digest of everything in an annotation file on which rows depend."""
        return content_digest(path)
