"""The declaration of a data set of files: options and splits, which its readers use."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from petlbench.api.source import Source, SourceConfig


class FilesConfig(SourceConfig):
    """Options of every data set of files."""

    layout: str | None = Field(None, description="the layout to read, if several lie below the data root")
    hub: str | None = Field(None, description="a copy in Parquet files: OWNER/NAME[@REVISION] on the hub, or a folder")
    columns: dict[str, str] = Field(
        {}, description="for a copy in Parquet: our name of a column, and its name in the copy"
    )
    skip_broken: bool = Field(False, description="skip images that are missing or do not decode, and report them")


@dataclass(frozen=True)
class Choice:
    """The content of a split: official parts, and of their images all, those to train on, or those held out."""

    parts: tuple[str, ...]
    images: Literal["all", "kept", "held out"] = "all"


class Declaration(Source):
    """A data set of files, declared without its rows."""

    Config: ClassVar[type[SourceConfig]] = FilesConfig
    config: FilesConfig
    name: ClassVar[str]
    image_bases: ClassVar[tuple[str, ...]] = ()  # folders below the root to which the images' names are relative

    @abstractmethod
    def choice(self, task: str, split: str) -> Choice:
        """Return the content of a split: train, validation or test."""
