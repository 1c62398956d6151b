"""The seam between data and tasks."""

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
    origin: ClassVar[str] = ""  # where its files can be had, in a few words
    sizes: Mapping[str, Mapping[str, Mapping[str, int]]] = {}  # published: by task, official part, and what

    def __init__(self, config: SourceConfig, root: Path | None = None) -> None:
        self.config = config
        self.root = root

    def features(self, task: str) -> Features:
        """The columns of `task`'s rows: those that the registered task declares, or the source's own declaration.

        A source that declares them serves a task that is not registered, and imports none to be looked at.
        """
        found: Features = registry_of("petlbench.tasks").get(task).features
        return found

    @abstractmethod
    def load(self, task: str, split: Split, limit: int | None = None) -> Dataset:
        """Rows with the columns of `features(task)`, images decoded lazily, at most `limit`.

        Raises UserError, in one line, when files are missing, truncated or not what they should be.
        """

    def load_part(self, task: str, part: str) -> Dataset:
        """All rows of an official part, also where the split of that name is only some of them."""
        return self.load(task, part)

    def stream(self, task: str, split: Split) -> IterableDataset:
        """The rows of `load`, one after the other."""
        return self.load(task, split).to_iterable_dataset()

    def parts(self, task: str) -> tuple[str, ...]:
        """The official parts, which `load` takes as well; none where train, validation and test are all there is."""
        return ()

    def check(self) -> None:  # noqa: B027 -- a source that needs no files has nothing to check
        """Raise UserError when the source cannot be used at all, before anything runs. Cheap."""

    def notes(self) -> tuple[str, ...]:
        """What a reader of the results must know, such as how many images were skipped; asked after `load`."""
        return ()

    @abstractmethod
    def fingerprint(self, task: str) -> str:
        """A hex digest of what `load` would give: content, not location."""
