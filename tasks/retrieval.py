"""Image-text retrieval: symmetric contrastive training, recall at K in both directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api import schemas
from petlbench.api.backbone import Backbone
from petlbench.api.heads import Aligner
from petlbench.api.task import Batch, Row, Scores, Task, own_or
from petlbench.api.tokens import Images, Texts, Tokens
from petlbench.metrics.recall import fold_recall, ranks, summarise

MAX_CAPTION = 40  # tokens, special ones included
CAPTIONS_PER_IMAGE = 2  # drawn per training step


class RetrievalHead(Aligner):
    """Two projections to a common space and a temperature, as in CLIP."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(width, width), nn.Linear(text_width, width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def of_image(self, tokens: Tokens) -> Tensor:
        return F.normalize(self.image(tokens.pooled()), dim=-1)

    def of_text(self, tokens: Tokens) -> Tensor:
        return F.normalize(self.text(tokens.pooled()), dim=-1)

    def scale(self) -> Tensor:
        """Return the scale of similarities, at most 100 as in CLIP."""
        return self.log_scale.clamp_max(math.log(100.0)).exp()


def contrastive_loss(logits: Tensor, own: Tensor) -> Tensor:
    """Return symmetric InfoNCE with several positives: `own` (I, C) is True if the caption belongs to the image.

    Each row's target spreads evenly over its own items, so no caption of an image counts as its negative.
    """
    target = own.to(logits.dtype)
    by_image = -(target * logits.log_softmax(1)).sum(1) / target.sum(1)
    by_text = -(target * logits.log_softmax(0)).sum(0) / target.sum(0)
    return (by_image.mean() + by_text.mean()) / 2


class Retrieval(Task):
    """Loss and metric both count every caption of an image as its own."""

    name: ClassVar[str] = "retrieval"
    default_dataset: ClassVar[str] = "digits"
    main_metric: ClassVar[str] = "mean_r1"
    keeps_predictions: ClassVar[bool] = False  # they are embeddings
    needs: ClassVar[frozenset[str]] = frozenset({"embed"})
    features = schemas.RETRIEVAL
    unit: ClassVar[str] = "captions"

    def head(self, backbone: Backbone) -> nn.Module:
        # Separate towers may differ in width.
        text = backbone.width if "fuse" in backbone.abilities else backbone.text_width
        return own_or(lambda: RetrievalHead(backbone.width, text), backbone, self.name)

    def collate(self, rows: Sequence[Row], backbone: Backbone, rng: np.random.Generator | None) -> Batch:
        images = backbone.images([row["image"] for row in rows])
        drawn = [_draw(row["captions"], rng) for row in rows]
        owners = torch.tensor([i for i, captions in enumerate(drawn) for _ in captions])
        ids = [row["image_id"] for row in rows]
        same = torch.tensor([[a == b for b in ids] for a in ids])  # a batch may hold an image twice
        texts = backbone.texts([caption for captions in drawn for caption in captions], max_length=MAX_CAPTION)
        return Batch(images, {"captions": texts}, {"owners": owners, "own": same[:, owners]})

    def _embed_images(self, backbone: Backbone, head: nn.Module, images: Images) -> Tensor:
        assert isinstance(head, Aligner)
        return head.of_image(backbone.fuse(backbone.embed_image(images, task=self.name), task=self.name))

    def _embed_texts(self, backbone: Backbone, head: nn.Module, texts: Texts) -> Tensor:
        assert isinstance(head, Aligner)
        return head.of_text(backbone.fuse(backbone.embed_text(texts, task=self.name), task=self.name))

    def loss(self, backbone: Backbone, head: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(head, Aligner)
        image = self._embed_images(backbone, head, batch.images)
        text = self._embed_texts(backbone, head, batch.texts["captions"])
        return contrastive_loss(head.similarity(image, text), batch.extras["own"])

    def predict(self, backbone: Backbone, head: nn.Module, batch: Batch, *, beams: int = 1) -> list[Any]:
        """Return per row the image's embedding (d,) and its captions' embeddings (C, d)."""
        image = self._embed_images(backbone, head, batch.images).float().cpu().numpy()
        text = self._embed_texts(backbone, head, batch.texts["captions"]).float().cpu().numpy()
        owners = batch.extras["owners"].cpu().numpy()
        return [(image[i], text[owners == i]) for i in range(len(image))]

    def score(self, rows: Sequence[Row], predictions: Sequence[Any]) -> Scores:
        """Return recall over the split and, from 5,000 images on, its mean over five folds of 1,000 (`fold1k_...`).

        A per-sample score is per image: the mean of its own hit and the share of its captions that find it.
        """
        images = np.stack([image for image, _ in predictions])
        texts = np.concatenate([text for _, text in predictions])
        owners = np.concatenate([np.full(len(text), i) for i, (_, text) in enumerate(predictions)])
        by_image, by_text = ranks(images, texts, owners)
        hits = np.bincount(owners, weights=by_text == 0) / np.bincount(owners)
        samples = {"mean_r1": (((by_image == 0) + hits) / 2).tolist()}
        metrics = {**summarise(by_image, by_text), **fold_recall(images, texts, owners)}
        return Scores(metrics, samples, [row["sample_id"] for row in rows])


def _draw(captions: Sequence[str], rng: np.random.Generator | None) -> list[str]:
    if rng is None or len(captions) <= CAPTIONS_PER_IMAGE:
        return list(captions)
    return [captions[int(i)] for i in rng.choice(len(captions), CAPTIONS_PER_IMAGE, replace=False)]
