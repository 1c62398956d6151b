"""The base class of data sources: the interface between data and tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from petlbench.core.registry import registry_of

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

Split = str  # one of SPLITS, or an official part's own name

SPLITS = ("train", "validation", "test")


class SourceConfig(BaseModel):
    """Options of a data source; a suite sets them under `dataset_configs`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(ABC):
    """One data source. `root` is where its files lie (None: not given); sources that need none ignore it."""

    Config: ClassVar[type[SourceConfig]] = SourceConfig
    tasks: ClassVar[frozenset[str]]
    origin: ClassVar[str] = ""  # where to get its files, in a few words
    sizes: Mapping[str, Mapping[str, Mapping[str, int]]] = {}  # published sizes: by task, official part and unit

    def __init__(self, config: SourceConfig, root: Path | None = None) -> None:
        self.config = config
        self.root = root

    def features(self, task: str) -> Features:
        """Return the columns of `task`'s rows, as the registered task or the source itself declares them.

        A source that declares them can serve an unregistered task, and can be inspected without importing a task.
        """
        found: Features = registry_of("petlbench.tasks").get(task).features
        return found

    @abstractmethod
    def load(self, task: str, split: Split, limit: int | None = None) -> Dataset:
        """Return rows with the columns of `features(task)`, images decoded lazily, at most `limit`.

        Raises UserError, in one line, if files are missing, truncated or have unexpected content.
        """

    def load_part(self, task: str, part: str) -> Dataset:
        """Return all rows of an official part, even if the split of that name holds only some of them."""
        return self.load(task, part)

    def stream(self, task: str, split: Split) -> IterableDataset:
        """Return the rows of `load` one by one."""
        return self.load(task, split).to_iterable_dataset()

    def parts(self, task: str) -> tuple[str, ...]:
        """Return the official parts, which `load` takes too; empty if there are only train, validation and test."""
        return ()

    def check(self) -> None:  # noqa: B027 -- a source that needs no files has nothing to check
        """Raise UserError if the source cannot be used at all. It runs before anything else and is cheap."""

    def notes(self) -> tuple[str, ...]:
        """Return caveats for readers of the results, such as the number of skipped images; call it after `load`."""
        return ()

    @abstractmethod
    def fingerprint(self, task: str) -> str:
        """Return a hex digest of the content that `load` returns, independent of its location."""
