"""What a data set of files declares, which is all that its readers know of it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from petlbench.api.source import Source, SourceConfig


class FilesConfig(SourceConfig):
    """Options that every data set of files has."""

    layout: str | None = Field(None, description="which of its layouts to read, where several lie below the data root")
    hub: str | None = Field(None, description="a copy in Parquet files: OWNER/NAME[@REVISION] on the hub, or a folder")
    columns: dict[str, str] = Field({}, description="of a copy in Parquet: our name of a column, and its name there")
    skip_broken: bool = Field(False, description="leave out images that are missing or do not decode, and say so")


@dataclass(frozen=True)
class Choice:
    """What a split is made of: official parts; of their images all, those to train on, or those held out."""

    parts: tuple[str, ...]
    images: Literal["all", "kept", "held out"] = "all"


class Declaration(Source):
    """A data set of files without its rows."""

    Config: ClassVar[type[SourceConfig]] = FilesConfig
    config: FilesConfig
    name: ClassVar[str]
    image_bases: ClassVar[tuple[str, ...]] = ()  # folders below the root that the images' names start from

    @abstractmethod
    def choice(self, task: str, split: str) -> Choice:
        """What one of train, validation and test is made of."""
