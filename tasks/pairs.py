"""Statements and questions about two images (NLVR2, Suhr et al., ACL 2019), answered by the decoder as in VL-T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image as Pictures
from PIL.Image import Image
from torch import Tensor, nn

from petlbench.api import schemas
from petlbench.api.backbone import Backbone
from petlbench.api.decoding import generated_texts, token_losses
from petlbench.api.task import Batch, Row, Scores, Task, enlarged
from petlbench.api.tokens import Tokens
from petlbench.core.errors import UserError

MAX_QUESTION, MAX_ANSWER = 128, 10  # tokens, special ones included
STATEMENT = "true/false"  # the answer type of statements, which are true or false
GAP = 4  # pixels between the two images of a drawing


class Pairs(Task):
    """A joint pass over a text and two images; the decoder answers.

    Statements are judged without generation: the task compares the logits of `true` and `false` where their tokens
    first differ; a statement is true if the logit of `true` is strictly larger (VL-T5, VL-PET). Questions are answered
    greedily.
    """

    name: ClassVar[str] = "pairs"
    default_dataset: ClassVar[str] = "digit_pairs"
    main_metric: ClassVar[str] = "accuracy"
    needs: ClassVar[frozenset[str]] = frozenset({"fuse", "decode", "pair"})
    features = schemas.PAIRS
    unit: ClassVar[str] = "pairs"

    def collate(self, rows: Sequence[Row], backbone: Backbone, rng: np.random.Generator | None) -> Batch:
        """Collate 2B images: all first ones, then all second ones."""
        images = backbone.images([row[name] for name in ("image", "image_2") for row in rows])
        texts = {"question": backbone.texts([row["question"] for row in rows], max_length=MAX_QUESTION)}
        if rng is not None:
            drawn = [row["answers"][int(rng.integers(len(row["answers"])))] for row in rows]
            texts["answer"] = backbone.texts(drawn, max_length=MAX_ANSWER)
        stated = torch.tensor([row["answer_type"] == STATEMENT for row in rows])
        return Batch(images, texts, {"stated": stated})

    def _memory(self, backbone: Backbone, batch: Batch) -> Tokens:
        text = backbone.embed_text(batch.texts["question"], task=self.name)
        return backbone.fuse(text, *backbone.embed_pair(batch.images, task=self.name), task=self.name)

    def loss(self, backbone: Backbone, head: nn.Module, batch: Batch) -> Tensor:
        """Return the mean over samples of the mean over an answer's tokens."""
        answer = batch.texts["answer"]
        losses = token_losses(backbone, self._memory(backbone, batch), answer, self.name)
        return (losses.sum(1) / answer.mask.sum(1)).mean()

    def predict(self, backbone: Backbone, head: nn.Module, batch: Batch, *, beams: int = 1) -> list[str]:
        """Answer every row; questions are decoded greedily whatever `beams` is."""
        memory, stated = self._memory(backbone, batch), batch.extras["stated"]
        answers = [""] * len(stated)
        for answer_rows, chosen in ((self._judge, stated), (self._generate, ~stated)):
            rows = chosen.nonzero().flatten()
            if len(rows):
                for row, answer in zip(rows.tolist(), answer_rows(backbone, memory.rows(rows)), strict=True):
                    answers[row] = answer
        return answers

    def _judge(self, backbone: Backbone, memory: Tokens) -> list[str]:
        true, false = backbone.texts(["true", "false"], max_length=MAX_ANSWER).ids.tolist()
        place = next((i for i, (a, b) in enumerate(zip(true, false, strict=True)) if a != b), None)
        if place is None:
            raise UserError("the backbone's tokenizer has no words for true and false: choose another tokenizer")
        before = torch.tensor([[backbone.start_id, *true[:place]]], device=memory.states.device)
        logits, _ = backbone.decode(memory, before.expand(len(memory.states), -1), task=self.name)
        larger = logits[:, -1, true[place]] > logits[:, -1, false[place]]
        return ["true" if yes else "false" for yes in larger.tolist()]

    def _generate(self, backbone: Backbone, memory: Tokens) -> list[str]:
        return generated_texts(backbone, memory, task=self.name, max_length=MAX_ANSWER, beams=1)

    def score(self, rows: Sequence[Row], predictions: Sequence[Any]) -> Scores:
        """Return the share of predictions that equal one of their row's answers to the letter."""
        scores = [float(p in row["answers"]) for p, row in zip(predictions, rows, strict=True)]
        return Scores({"accuracy": float(np.mean(scores))}, {"accuracy": scores}, [row["sample_id"] for row in rows])

    def picture(self, row: Row, prediction: Any) -> tuple[Image, str]:
        """Draw both images, the first one on the left."""
        left, right = enlarged(row["image"]), enlarged(row["image_2"])
        both = Pictures.new("RGB", (left.width + GAP + right.width, max(left.height, right.height)), "white")
        both.paste(left, (0, 0))
        both.paste(right, (left.width + GAP, 0))
        return both, f"{row['question']}: {prediction} (true: {row['answers'][0]})"
