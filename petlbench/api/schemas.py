"""The row schemas of the built-in tasks, which their sources declare too: looking at data imports no task."""

from __future__ import annotations

from datasets import Features, Image, List, Value

REC = Features(
    {
        "sample_id": Value("string"),
        "image_id": Value("string"),
        "image": Image(),
        "expression": Value("string"),
        "box": List(Value("float32"), length=4),  # x, y, width, height in pixels of the stored image
        "subset": Value("string"),  # the official part it is from, where a split has several: scored apart too
    }
)
VQA = Features(
    {
        "sample_id": Value("string"),
        "image_id": Value("string"),
        "image": Image(),
        "question": Value("string"),
        "answers": List(
            Value("string")
        ),  # all annotators' answers, ten in VQAv2; one stands for unanimity; none: hidden
        "answer_type": Value("string"),
    }
)
PAIRS = Features({**VQA, "image_2": Image()})  # `image` is the first, the left one; `image_id` names the two together
CAPTIONING = Features(
    {
        "sample_id": Value("string"),
        "image_id": Value("string"),
        "image": Image(),
        "captions": List(Value("string")),
    }
)
RETRIEVAL = CAPTIONING
