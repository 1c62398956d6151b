"""Visual question answering as generation, scored by VQA soft accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from petlbench.backbones.base import Backbone, Tokens
from petlbench.datasets import schemas
from petlbench.generation import generated_texts
from petlbench.losses import token_losses
from petlbench.metrics.vqa import vqa_accuracy
from petlbench.task import Batch, Row, Scores, Task, enlarged

MAX_ANSWER = 10  # tokens, special ones included


class VisualQuestionAnswering(Task):
    """VL-T5's setting: one answer is drawn with probability proportional to its soft score, which weighs its loss."""

    name: ClassVar[str] = "vqa"
    default_dataset: ClassVar[str] = "digits"
    main_metric: ClassVar[str] = "vqa_accuracy"
    needs: ClassVar[frozenset[str]] = frozenset({"fuse", "decode"})
    features = schemas.VQA

    def collate(self, rows: Sequence[Row], backbone: Backbone, rng: np.random.Generator | None) -> Batch:
        images = backbone.images([row["image"] for row in rows])
        texts = {"question": backbone.texts([row["question"] for row in rows], max_length=64)}
        if rng is None:
            return Batch(images, texts)
        drawn = [_draw(row["answers"], rng) for row in rows]
        texts["answer"] = backbone.texts([answer for answer, _ in drawn], max_length=MAX_ANSWER)
        weights = torch.tensor([weight for _, weight in drawn], dtype=torch.float32)
        return Batch(images, texts, {"weights": weights})

    def _memory(self, backbone: Backbone, batch: Batch) -> Tokens:
        text = backbone.embed_text(batch.texts["question"], task=self.name)
        return backbone.fuse(text, backbone.embed_image(batch.images, task=self.name), task=self.name)

    def loss(self, backbone: Backbone, head: nn.Module, batch: Batch) -> Tensor:
        answer = batch.texts["answer"]
        losses = token_losses(backbone, self._memory(backbone, batch), answer, self.name)
        return (batch.extras["weights"] * losses.sum(1) / answer.mask.sum(1)).mean()

    def predict(self, backbone: Backbone, head: nn.Module, batch: Batch, *, beams: int = 1) -> list[str]:
        """Greedy whatever `beams` says, as VL-T5 decodes answers."""
        memory = self._memory(backbone, batch)
        return generated_texts(backbone, memory, task=self.name, max_length=MAX_ANSWER, beams=1)

    def score(self, rows: Sequence[Row], predictions: Sequence[Any]) -> Scores:
        scores = [vqa_accuracy(p, row["answers"]) for p, row in zip(predictions, rows, strict=True)]
        metrics = {"vqa_accuracy": float(np.mean(scores))}
        for kind in sorted({row["answer_type"] for row in rows}):
            of_kind = [s for s, row in zip(scores, rows, strict=True) if row["answer_type"] == kind]
            metrics[f"vqa_accuracy/{kind}"] = float(np.mean(of_kind))
        return Scores(metrics, {"vqa_accuracy": scores}, [row["sample_id"] for row in rows])

    def picture(self, row: Row, prediction: Any) -> tuple[Image, str]:
        return enlarged(row["image"]), f"{row['question']}: {prediction} (true: {row['answers'][0]})"


def _draw(answers: Sequence[str], rng: np.random.Generator) -> tuple[str, float]:
    """One answer and its soft score: LXMERT's 0.3 per agreeing annotator of ten, at most 1; a lone answer counts 1."""
    counts = Counter(answers)
    if len(counts) == 1:
        return answers[0], 1.0
    scores = {answer: min(1.0, 0.3 * 10 * n / len(answers)) for answer, n in counts.items()}
    names, values = list(scores), np.array(list(scores.values()))
    place = int(rng.choice(len(names), p=values / values.sum()))
    return names[place], float(values[place])
