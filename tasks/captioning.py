"""Image captioning: teacher forcing, greedy or beam decoding, CIDEr-D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from PIL.Image import Image
from torch import Tensor, nn

from petlbench.api import schemas
from petlbench.api.backbone import Backbone
from petlbench.api.decoding import generated_texts, token_losses
from petlbench.api.task import Batch, Row, Scores, Task, enlarged
from petlbench.api.tokens import Tokens
from petlbench.metrics.captions import caption_scores

MAX_CAPTION = 40  # tokens, special ones included


class Captioning(Task):
    """Each step draws one caption per image; the loss is the mean over the batch's target tokens."""

    name: ClassVar[str] = "captioning"
    default_dataset: ClassVar[str] = "digits"
    main_metric: ClassVar[str] = "cider_d"
    needs: ClassVar[frozenset[str]] = frozenset({"decode"})
    features = schemas.CAPTIONING
    unit: ClassVar[str] = "captions"
    caption_references: ClassVar[str] = "captions"

    def collate(self, rows: Sequence[Row], backbone: Backbone, rng: np.random.Generator | None) -> Batch:
        images = backbone.images([row["image"] for row in rows])
        if rng is None:
            return Batch(images)
        drawn = [row["captions"][int(rng.integers(len(row["captions"])))] for row in rows]
        return Batch(images, {"caption": backbone.texts(drawn, max_length=MAX_CAPTION)})

    def _memory(self, backbone: Backbone, batch: Batch) -> Tokens:
        return backbone.fuse(backbone.embed_image(batch.images, task=self.name), task=self.name)

    def loss(self, backbone: Backbone, head: nn.Module, batch: Batch) -> Tensor:
        caption = batch.texts["caption"]
        return token_losses(backbone, self._memory(backbone, batch), caption, self.name).sum() / caption.mask.sum()

    def predict(self, backbone: Backbone, head: nn.Module, batch: Batch, *, beams: int = 1) -> list[str]:
        memory = self._memory(backbone, batch)
        return generated_texts(backbone, memory, task=self.name, max_length=MAX_CAPTION, beams=beams)

    def score(self, rows: Sequence[Row], predictions: Sequence[Any]) -> Scores:
        metrics, per_sample = caption_scores(list(predictions), [row["captions"] for row in rows])
        samples = {name: [s[name] for s in per_sample] for name in ("cider_d", "rouge_l", "bleu_4")}
        return Scores(metrics, samples, [row["sample_id"] for row in rows])

    def picture(self, row: Row, prediction: Any) -> tuple[Image, str]:
        return enlarged(row["image"]), f"{prediction} (one of its own: {row['captions'][0]})"
