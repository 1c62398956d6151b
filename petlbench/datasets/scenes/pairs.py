"""The embedded data in pairs: statements about one of two scenes of digits, true or false.

Each question of the target domain becomes a statement, such as `on the left how many red objects are there 3`. Its
scene stands on the side that it names, and the next scene on the other. A model that confuses the sides can only guess.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from petlbench.api import source
from petlbench.core.errors import UserError
from petlbench.datasets.scenes.digits import QUESTIONS_PER_SCENE, Digits
from petlbench.datasets.scenes.language import NUMERALS, YES_NO
from petlbench.datasets.scenes.world import COLOURS, KINDS, SIZES

if TYPE_CHECKING:
    from datasets import Dataset, Features

VERSION = 1  # part of the fingerprint: raise it if the same scenes give other rows
ANSWERS = (tuple(YES_NO.values()), tuple(NUMERALS), tuple(COLOURS), tuple(SIZES), tuple(KINDS["digits"]))


class DigitPairs(Digits):
    """Pairs of scenes of `digits`, with two statements for each pair; they need no files."""

    tasks = frozenset({"pairs"})

    def features(self, task: str) -> Features:
        from petlbench.api.schemas import PAIRS

        return PAIRS

    def load(self, task: str, split: source.Split, limit: int | None = None) -> Dataset:
        """Return rows of `pairs`; a limit takes the first ones."""
        from datasets import Dataset

        if task not in self.tasks:
            raise UserError(f"digit_pairs has no task {task!r}: choose one of {', '.join(sorted(self.tasks))}")
        needed = None if limit is None else limit + QUESTIONS_PER_SCENE
        questions = Digits(self.config).load("vqa", split, needed).with_format("arrow")[:].to_pylist()
        rows = [
            _statement(row, questions[(i + QUESTIONS_PER_SCENE) % len(questions)])
            for i, row in enumerate(questions[:limit])
        ]
        return Dataset.from_list(rows, features=self.features(task))

    def fingerprint(self, task: str) -> str:
        return hashlib.sha256(f"{VERSION} {task} {self.digest}".encode()).hexdigest()


def _statement(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return a statement about the scene of `row`, beside the scene of `other`.

    A hash draws the side and whether the statement is true; a false answer is another answer of the same kind.
    """
    draw = int(hashlib.sha256(row["sample_id"].encode()).hexdigest()[:8], 16)
    side, true, draw = ("left", "right")[draw % 2], draw // 2 % 2 == 1, draw // 4
    answer = row["answers"][0]
    if not true:
        wrong = [word for word in next(kind for kind in ANSWERS if answer in kind) if word != answer]
        answer = wrong[draw % len(wrong)]
    left, right = (row, other) if side == "left" else (other, row)
    return {
        "sample_id": row["sample_id"].replace("-vqa-", "-pairs-"),
        "image_id": f"{left['image_id']}+{right['image_id']}",
        "image": left["image"],
        "question": f"on the {side} {row['question']} {answer}",
        "answers": ["true" if true else "false"],
        "answer_type": "true/false",
        "image_2": right["image"],
    }
