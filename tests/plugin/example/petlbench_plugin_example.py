"""A third party's method, task and data sets: train the gains of all norms; count the squares in an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage
from pydantic import Field, TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from petlbench.api.backbone import Backbone
from petlbench.api.method import Method, MethodConfig
from petlbench.api.source import Source, Split
from petlbench.api.task import Batch, Row, Scores, Task
from petlbench.datasets.files import images
from petlbench.datasets.files.declaration import Choice
from petlbench.datasets.files.reader import Part, Reader, Skips
from petlbench.datasets.files.reading import read_json
from petlbench.datasets.files.source import FileSource

MOST = 4  # squares in an image


class NormGainsConfig(MethodConfig):
    biases: bool = Field(True, description="train the norms' biases too")


class NormGains(Method):
    """Only the gains of layer norms train."""

    Config = NormGainsConfig
    recipe: ClassVar[dict[str, Any]] = {"lr": 5e-3}

    def adapt(self, backbone: Backbone) -> Backbone:
        backbone.freeze()
        for module in backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.requires_grad_(True)
                if module.bias is not None:
                    module.bias.requires_grad_(self.config.biases)
        return backbone


class Counting(Task):
    """How many squares are there? Scored by exact match."""

    name: ClassVar[str] = "counting"
    default_dataset: ClassVar[str] = "squares"
    main_metric: ClassVar[str] = "accuracy"
    needs: ClassVar[frozenset[str]] = frozenset({"fuse"})
    unit: ClassVar[str] = "scenes"
    features: ClassVar[Features] = Features(
        {"sample_id": Value("string"), "image_id": Value("string"), "image": Image(), "count": Value("int64")}
    )

    def head(self, backbone: Backbone) -> nn.Module:
        return nn.Linear(backbone.width, MOST)

    def collate(self, rows: Sequence[Row], backbone: Backbone, rng: np.random.Generator | None) -> Batch:
        counts = torch.tensor([row["count"] for row in rows]) if rng is not None else torch.zeros(len(rows))
        return Batch(backbone.images([row["image"] for row in rows]), extras={"counts": counts})

    def _logits(self, backbone: Backbone, head: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = head(backbone.fuse(backbone.embed_image(batch.images, task=self.name), task=self.name).mean())
        return logits

    def loss(self, backbone: Backbone, head: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self._logits(backbone, head, batch), batch.extras["counts"] - 1)

    def predict(self, backbone: Backbone, head: nn.Module, batch: Batch, *, beams: int = 1) -> list[int]:
        return (self._logits(backbone, head, batch).argmax(1) + 1).tolist()

    def score(self, rows: Sequence[Row], predictions: Sequence[Any]) -> Scores:
        hits = [float(p == row["count"]) for p, row in zip(predictions, rows, strict=True)]
        return Scores({"accuracy": float(np.mean(hits))}, {"accuracy": hits}, [row["sample_id"] for row in rows])


class Squares(Source):
    """Black images with one to four white squares on a grid."""

    tasks: ClassVar[frozenset[str]] = frozenset({"counting"})

    def load(self, task: str, split: Split, limit: int | None = None) -> Dataset:
        rng = np.random.default_rng(("train", "validation", "test").index(split))
        names = [f"{split}-{i}" for i in range(min(64, limit or 64))]
        counts = [int(rng.integers(1, MOST + 1)) for _ in names]
        rows = {"sample_id": names, "image_id": names, "image": [_drawn(n, rng) for n in counts], "count": counts}
        return Dataset.from_dict(rows, features=Counting.features)

    def fingerprint(self, task: str) -> str:
        return "0001"


class CountsFile(Reader):
    """A file `counts/<part>.json`: an object from the names of images, below `counts/images`, to their counts."""

    layout = "json"

    @classmethod
    def find(cls, source: FileSource, root: Path | None) -> Self | None:
        return cls(source, root) if root and (root / "counts").is_dir() else None

    @classmethod
    def places(cls, source: FileSource) -> str:
        return "counts/*.json"

    def parts(self, task: str) -> tuple[str, ...]:
        return tuple(path.stem for path in sorted((self.root / "counts").glob("*.json")))

    def files(self, task: str, part: str) -> list[Path]:
        return [self.root / "counts" / f"{part}.json"]

    def read(self, task: str, part: str) -> Part:
        (path,) = self.files(task, part)
        found, skips = read_json(path, TypeAdapter(dict[str, Annotated[int, Field(ge=0)]])), Skips()
        for name, count in found.items():
            if not 1 <= count <= MOST:
                skips.add(f"not from 1 to {MOST} squares", name)
        kept = {images.relative(name, path): count for name, count in found.items() if 1 <= count <= MOST}
        ids = [f"{part}/{name}" for name in kept]
        names, counts = pa.array(kept, pa.string()), pa.array(kept.values(), pa.int64())
        return Part(pa.table({"sample_id": ids, "image_id": names, "image": names, "count": counts}), skips)


class CountedFiles(FileSource):
    """Photographs of squares, counted by hand; one training image in twenty is held out for model choice."""

    name = "counted_files"
    tasks = frozenset({"counting"})
    origin = "write counts/{train,test}.json, and put their images into counts/images"
    readers = (CountsFile,)
    image_bases = ("counts/images",)

    def choice(self, task: str, split: str) -> Choice:
        return {
            "train": Choice(("train",), "kept"),
            "validation": Choice(("train",), "held out"),
            "test": Choice(("test",)),
        }[split]


def _drawn(count: int, rng: np.random.Generator) -> PillowImage.Image:
    pixels = np.zeros((48, 48, 3), np.uint8)
    for place in rng.choice(9, size=count, replace=False):
        x, y = 16 * (place % 3) + 4, 16 * (place // 3) + 4
        pixels[y : y + 8, x : x + 8] = 255
    return PillowImage.fromarray(pixels)
