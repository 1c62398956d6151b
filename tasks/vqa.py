"""Visual question answering as generation, scored by VQA soft accuracy."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from petlbench.api import schemas
from petlbench.api.backbone import Backbone
from petlbench.api.decoding import generated_texts, token_losses
from petlbench.api.task import Batch, Row, Scores, Task, enlarged
from petlbench.api.tokens import Tokens
from petlbench.core.errors import UserError
from petlbench.metrics.vqa import vqa_accuracy

MAX_ANSWER = 10  # tokens, special ones included


class VisualQuestionAnswering(Task):
    """VL-T5's setting: the draw of an answer is proportional to its soft score, and the score weighs its loss.

    A row without public answers has an empty list: it can be predicted, but not trained on or scored.
    """

    name: ClassVar[str] = "vqa"
    default_dataset: ClassVar[str] = "digits"
    main_metric: ClassVar[str] = "vqa_accuracy"
    needs: ClassVar[frozenset[str]] = frozenset({"fuse", "decode"})
    features = schemas.VQA
    unit: ClassVar[str] = "questions"

    def collate(self, rows: Sequence[Row], backbone: Backbone, rng: np.random.Generator | None) -> Batch:
        images = backbone.images([row["image"] for row in rows])
        texts = {"question": backbone.texts([row["question"] for row in rows], max_length=64)}
        if rng is None:
            return Batch(images, texts)
        hidden = next((row["sample_id"] for row in rows if not row["answers"]), None)
        if hidden is not None:
            raise UserError(f"question {hidden} has no public answers to train on: train on another part")
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
        """Decode greedily whatever `beams` is, as VL-T5 decodes answers."""
        memory = self._memory(backbone, batch)
        return generated_texts(backbone, memory, task=self.name, max_length=MAX_ANSWER, beams=1)

    def score(self, rows: Sequence[Row], predictions: Sequence[Any]) -> Scores:
        """Return `vqa_accuracy`, overall and by answer type, over the rows with answers; no metric if none has any.

        If each has a single answer, `exact_match` is added: equality as written, as in GQA's evaluation.
        """
        answered = [(row, guess) for row, guess in zip(rows, predictions, strict=True) if row["answers"]]
        if not answered:
            return Scores({}, {}, [row["sample_id"] for row in rows])
        samples = {"vqa_accuracy": [vqa_accuracy(guess, row["answers"]) for row, guess in answered]}
        if all(len(row["answers"]) == 1 for row, _ in answered):
            samples["exact_match"] = [float(guess == row["answers"][0]) for row, guess in answered]
        metrics = {name: float(np.mean(scores)) for name, scores in samples.items()}
        by_kind = defaultdict(list)
        for (row, _), score in zip(answered, samples["vqa_accuracy"], strict=True):
            by_kind[row["answer_type"]].append(score)
        metrics |= {f"vqa_accuracy/{kind}": float(np.mean(scores)) for kind, scores in sorted(by_kind.items())}
        return Scores(metrics, samples, [row["sample_id"] for row, _ in answered])

    def submission(self, rows: Sequence[Row], predictions: Sequence[Any]) -> Any:
        """Return the official result format if no row has answers, else None; numeric identifiers become numbers."""
        if any(row["answers"] for row in rows):
            return None
        names = [row["sample_id"] for row in rows]
        ids = [int(name) if name.isascii() and name.isdecimal() else name for name in names]
        return [{"question_id": name, "answer": guess} for name, guess in zip(ids, predictions, strict=True)]

    def picture(self, row: Row, prediction: Any) -> tuple[Image, str]:
        truth = f" (true: {row['answers'][0]})" if row["answers"] else ""
        return enlarged(row["image"]), f"{row['question']}: {prediction}{truth}"


def _draw(answers: Sequence[str], rng: np.random.Generator) -> tuple[str, float]:
    """Draw an answer and its soft score: LXMERT's 0.3 per agreeing annotator of ten, at most 1; 1 for a lone answer."""
    counts = Counter(answers)
    if len(counts) == 1:
        return answers[0], 1.0
    scores = {answer: min(1.0, 0.3 * 10 * n / len(answers)) for answer, n in counts.items()}
    names, values = list(scores), np.array(list(scores.values()))
    place = int(rng.choice(len(names), p=values / values.sum()))
    return names[place], float(values[place])
