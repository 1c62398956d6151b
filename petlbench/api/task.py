"""The base class of tasks: each is written once, against the abilities of backbones."""

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
    """Rows prepared for a backbone: images, texts by role, and other tensors by name."""

    images: Images
    texts: dict[str, Texts] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        texts = {name: text.to(device) for name, text in self.texts.items()}
        extras = {name: tensor.to(device, non_blocking=True) for name, tensor in self.extras.items()}
        return Batch(self.images.to(device), texts, extras)

    def pinned(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to a GPU are asynchronous."""
        texts = {name: text.pinned() for name, text in self.texts.items()}
        return Batch(self.images.pinned(), texts, {name: tensor.pin_memory() for name, tensor in self.extras.items()})


@dataclass(frozen=True)
class Scores:
    """Metrics over a split, and the per-sample scores behind them (by metric, aligned with `sample_ids`)."""

    metrics: dict[str, float]
    samples: dict[str, list[float]]
    sample_ids: list[str]


class Task(ABC):
    """A task for a backbone: it turns rows into a loss and predictions, and scores them with the published metric."""

    name: ClassVar[str]
    default_dataset: ClassVar[str]
    main_metric: ClassVar[str]
    keeps_predictions: ClassVar[bool] = True  # plain data, worth keeping beside the record
    needs: ClassVar[frozenset[str]]  # abilities of a backbone
    features: ClassVar[Features]
    unit: ClassVar[str] = "rows"  # the unit that counts its data: rows, or a column of lists, whose items count
    caption_references: ClassVar[str] = ""  # for predictions that are captions: the column of reference captions
    recipe: ClassVar[dict[str, Any]] = {}
    augmentations: ClassVar[Mapping[str, Augmentation]] = {}  # by name, as a recipe's `augment` gives it

    def refuses(self, backbone: type[Backbone], config: Any) -> str | None:
        """Return the reason why a backbone of this configuration cannot serve this task, or None."""
        lacking = sorted(self.needs - backbone.abilities_of(config) - (SUPPLIED - backbone.refusals.keys()))
        reasons = [f" ({backbone.refusals[ability]})" if ability in backbone.refusals else "" for ability in lacking]
        phrases = [ability + reason for ability, reason in zip(lacking, reasons, strict=True)]
        return f"it cannot {' or '.join(phrases)}" if phrases else None

    def head(self, backbone: Backbone) -> nn.Module:
        """Return the task's head, the module with its own trained parameters (none, if it needs none)."""
        return own_or(nn.Module, backbone, self.name)

    def augmented(self, rows: Sequence[Row], name: str, rng: np.random.Generator) -> Sequence[Row]:
        """Return training rows with the random changes of the augmentation `name`."""
        return rows if name == "none" else [self.augmentations[name](row, rng) for row in rows]

    @abstractmethod
    def collate(self, rows: Sequence[Row], backbone: Backbone, rng: np.random.Generator | None) -> Batch:
        """Return a batch for training (`rng` draws captions or answers) or, if rng is None, for prediction."""

    @abstractmethod
    def loss(self, backbone: Backbone, head: nn.Module, batch: Batch) -> Tensor:
        """Return the loss, a scalar."""

    @abstractmethod
    def predict(self, backbone: Backbone, head: nn.Module, batch: Batch, *, beams: int = 1) -> list[Any]:
        """Return one prediction per row, as plain data or small arrays."""

    @abstractmethod
    def score(self, rows: Sequence[Row], predictions: Sequence[Any]) -> Scores:
        """Return the published metrics over all rows of a split. Rows have no images here."""

    def submission(self, rows: Sequence[Row], predictions: Sequence[Any]) -> Any:
        """Return the evaluation server's input as JSON values, if the rows' answers are not public; else None."""
        return None

    def picture(self, row: Row, prediction: Any) -> tuple[Image, str]:
        """Return a picture and a caption that show a test row and its prediction."""
        return enlarged(row["image"]), str(prediction)


def enlarged(image: Image, side: int = 192) -> Image:
    """Enlarge small images by a whole factor, so that pixels stay square; keep the size of others."""
    factor = max(1, side // min(image.size))
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Resampling.NEAREST)


def own_or(head: Callable[[], nn.Module], backbone: Backbone, task: str) -> nn.Module:
    """Return the head published with the backbone for this task; else `head()`, with the backbone's pre-trained
    values if there are some."""
    own = backbone.own_head(task)
    if own is not None:
        return own
    made = head()
    state = backbone.pretrained_head(task)
    if state:
        made.load_state_dict(state)
    return made
