"""The base class of tasks: written once, against what a backbone can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Features
from PIL.Image import Image, Resampling
from torch import Tensor, nn

from petlbench.api.backbone import SUPPLIED, Backbone
from petlbench.api.tokens import Images, Texts

Row = dict[str, Any]  # one row of a data source, in the task's schema
Augmentation = Callable[[Row, np.random.Generator], Row]


@dataclass(frozen=True)
class Batch:
    """Rows made ready for a backbone: images, texts by role, and other tensors by name."""

    images: Images
    texts: dict[str, Texts] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        texts = {name: text.to(device) for name, text in self.texts.items()}
        extras = {name: tensor.to(device, non_blocking=True) for name, tensor in self.extras.items()}
        return Batch(self.images.to(device), texts, extras)

    def pinned(self) -> Batch:
        """In page-locked memory, from which a copy to a GPU does not wait."""
        texts = {name: text.pinned() for name, text in self.texts.items()}
        return Batch(self.images.pinned(), texts, {name: tensor.pin_memory() for name, tensor in self.extras.items()})


@dataclass(frozen=True)
class Scores:
    """Metrics over a split, and the per-sample scores behind them (by metric, aligned with `sample_ids`)."""

    metrics: dict[str, float]
    samples: dict[str, list[float]]
    sample_ids: list[str]


class Task(ABC):
    """What is asked of a backbone: rows in, loss and predictions out, scored by the published metric."""

    name: ClassVar[str]
    default_dataset: ClassVar[str]
    main_metric: ClassVar[str]
    keeps_predictions: ClassVar[bool] = True  # plain data, worth keeping beside the record
    needs: ClassVar[frozenset[str]]  # abilities of a backbone
    features: ClassVar[Features]
    unit: ClassVar[str] = "rows"  # what is counted of its data; a column of lists: their items, else the rows
    caption_references: ClassVar[str] = ""  # where predictions are captions: the column of those that they are held to
    recipe: ClassVar[dict[str, Any]] = {}
    augmentations: ClassVar[Mapping[str, Augmentation]] = {}  # by name, as a recipe's `augment` gives it

    def refuses(self, backbone: type[Backbone], config: Any) -> str | None:
        """Why a backbone of this configuration cannot serve this task, or None."""
        lacking = sorted(self.needs - backbone.abilities_of(config) - (SUPPLIED - backbone.refusals.keys()))
        reasons = [f" ({backbone.refusals[ability]})" if ability in backbone.refusals else "" for ability in lacking]
        said = [ability + reason for ability, reason in zip(lacking, reasons, strict=True)]
        return f"it cannot {' or '.join(said)}" if said else None

    def head(self, backbone: Backbone) -> nn.Module:
        """The task's own trained parameters; a module without parameters where it needs none."""
        return own_or(nn.Module, backbone, self.name)

    def augmented(self, rows: Sequence[Row], name: str, rng: np.random.Generator) -> Sequence[Row]:
        """Training rows changed at random, as the recipe says."""
        return rows if name == "none" else [self.augmentations[name](row, rng) for row in rows]

    @abstractmethod
    def collate(self, rows: Sequence[Row], backbone: Backbone, rng: np.random.Generator | None) -> Batch:
        """A batch for training (`rng` draws captions or answers) or, with rng None, for prediction."""

    @abstractmethod
    def loss(self, backbone: Backbone, head: nn.Module, batch: Batch) -> Tensor:
        """A scalar."""

    @abstractmethod
    def predict(self, backbone: Backbone, head: nn.Module, batch: Batch, *, beams: int = 1) -> list[Any]:
        """One prediction per row, as plain data or small arrays."""

    @abstractmethod
    def score(self, rows: Sequence[Row], predictions: Sequence[Any]) -> Scores:
        """The published metrics of all rows of a split together. Rows come without their images."""

    def submission(self, rows: Sequence[Row], predictions: Sequence[Any]) -> Any:
        """For rows whose answers are not public: what the evaluation server takes, as JSON values; else None."""
        return None

    def picture(self, row: Row, prediction: Any) -> tuple[Image, str]:
        """A test row with what was predicted for it, for a person: an image and a caption."""
        return enlarged(row["image"]), str(prediction)


def enlarged(image: Image, side: int = 192) -> Image:
    """Small images as whole multiples of their size, so that pixels stay square; others as they are."""
    factor = max(1, side // min(image.size))
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Resampling.NEAREST)


def own_or(head: Callable[[], nn.Module], backbone: Backbone, task: str) -> nn.Module:
    """The head that the backbone was published with for this task; else `head()`, with the values that it was
    pre-trained with where it brings some."""
    own = backbone.own_head(task)
    if own is not None:
        return own
    made = head()
    state = backbone.pretrained_head(task)
    if state:
        made.load_state_dict(state)
    return made
