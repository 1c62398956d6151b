"""The embedded default data: scenes of shapes (source domain) and of handwritten digits (target domain).

All four tasks use the same scenes. A split is generated once, kept as one Parquet file of scenes under
`cache_dir()/scenes/<digest>`, and turned into rows of a task when loaded. It needs no network. It is a test bed, and
makes no claim about real pictures.
"""

from __future__ import annotations

import hashlib
import io
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image
from pydantic import Field

from petlbench.api import source
from petlbench.core import table_cache
from petlbench.core.errors import UserError
from petlbench.core.paths import cache_dir
from petlbench.datasets.scenes import language, world

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

GENERATOR_VERSION = 1  # raise it with any change to scenes beyond those that the digest covers
DIGEST_SCENES = 64
EXPRESSIONS_PER_SCENE = 2
QUESTIONS_PER_SCENE = 2
PARQUET = {"use_dictionary": False, "compression": "none"}  # pictures are compressed already


class ScenesConfig(source.SourceConfig):
    """Number, size and seed of the scenes."""

    seed: int = Field(default=0, ge=0, lt=2**32, description="another seed gives other scenes")
    image_size: int = Field(default=48, ge=48, le=96, description="pixels per side")
    train_scenes: int = Field(default=6000, gt=0, description="scenes to train on; two rows each for rec and vqa")
    validation_scenes: int = Field(default=512, gt=0, description="scenes for validation")
    test_scenes: int = Field(default=512, gt=0, description="scenes for test")

    def count(self, split: source.Split) -> int:
        return int(getattr(self, f"{split}_scenes"))


class Scenes(source.Source):
    """Generated scenes of one domain, which need no files."""

    Config: ClassVar[type[source.SourceConfig]] = ScenesConfig
    config: ScenesConfig
    tasks = frozenset({"rec", "vqa", "captioning", "retrieval"})
    domain: ClassVar[world.Domain]

    def features(self, task: str) -> Features:
        from petlbench.api.schemas import CAPTIONING, REC, RETRIEVAL, VQA

        return {"rec": REC, "vqa": VQA, "captioning": CAPTIONING, "retrieval": RETRIEVAL}[task]

    def load(self, task: str, split: source.Split, limit: int | None = None) -> Dataset:
        """Return rows of `task`: two per scene in rec and vqa, one with five captions in captioning and retrieval."""
        from datasets import Dataset, DatasetInfo

        self._require_task(task)
        features = self.features(task)
        scenes = self._scenes(split, limit)
        rows = _rows(task, scenes.slice(0, limit), features).slice(0, limit)
        fingerprint = hashlib.sha256(f"{self.digest} {task} {split} {limit}".encode()).hexdigest()[:16]
        return Dataset(rows, info=DatasetInfo(features=features), fingerprint=fingerprint)

    def fingerprint(self, task: str) -> str:
        """Return a hex digest of the configuration and of the content: the first scenes of each split."""
        self._require_task(task)
        return hashlib.sha256(f"{self.digest} {task}".encode()).hexdigest()

    @property
    def digest(self) -> str:
        """Return the hex digest of the generated content, for all tasks together."""
        return _digest(self.domain, self.config)

    def _require_task(self, task: str) -> None:
        if task not in self.tasks:
            raise UserError(f"{self.domain}: no rows for task {task!r}; choose one of {', '.join(sorted(self.tasks))}")

    def _scenes(self, split: source.Split, limit: int | None) -> pa.Table:
        """Return a split's scenes, at least the first `limit`, cached or generated; a lack of cache only costs time."""
        path, count = cache_dir() / "scenes" / self.digest[:16] / f"{split}.parquet", self.config.count(split)
        table = table_cache.read_table(path)
        if table is not None and (table.num_rows != count or not table.schema.equals(_scene_schema())):
            table = None
        if table is None and limit is not None and limit < count:
            return generate_scenes(
                self.domain, self.config, split, limit
            )  # generating a few is faster than caching all
        if table is None:
            table = generate_scenes(self.domain, self.config, split, count)
            table_cache.write_table(table, path, **PARQUET)
        return table


class Shapes(Scenes):
    """The source domain: ten geometric figures on light gradients."""

    domain = "shapes"


class Digits(Scenes):
    """The target domain: handwritten digits (UCI, from scikit-learn) on grainy textures; splits share no digit."""

    domain = "digits"


def _describe(
    domain: world.Domain, config: ScenesConfig, split: source.Split, index: int
) -> tuple[world.Scene, dict[str, list[Any]]]:
    """Return a scene and the texts and boxes of all tasks about it, as list columns."""
    scene = world.make_scene(domain, split, config.seed, index, config.image_size)
    rng = world.stream(domain, split, config.seed, index, purpose=2)
    referred = language.expressions(scene, rng, EXPRESSIONS_PER_SCENE)
    questions = language.questions(scene, rng, QUESTIONS_PER_SCENE)
    return scene, {
        "expression": [text for text, _ in referred],
        "box": [list(map(float, scene.objects[target].box)) for _, target in referred],
        "question": [question for question, _, _ in questions],
        "answer": [answer for _, answer, _ in questions],
        "answer_type": [kind for _, _, kind in questions],
        "captions": language.captions(scene, rng),
    }


@cache
def _digest(domain: world.Domain, config: ScenesConfig) -> str:
    sha = hashlib.sha256(f"{GENERATOR_VERSION} {domain} {config.model_dump_json()}".encode())
    for split in world.SPLITS:
        for index in range(min(DIGEST_SCENES, config.count(split))):
            scene, columns = _describe(domain, config, split, index)
            sha.update(scene.image.tobytes())
            sha.update(repr(columns).encode())
    return sha.hexdigest()


@lru_cache(maxsize=3)  # the three splits of one source, in case the cache directory cannot be written
def generate_scenes(domain: world.Domain, config: ScenesConfig, split: source.Split, count: int) -> pa.Table:
    """Return the first `count` scenes of a split, one row each: image_id, image (PNG), the columns of `_describe`."""
    import pyarrow as pa

    rows = []
    for index in range(count):
        scene, columns = _describe(domain, config, split, index)
        png = io.BytesIO()
        Image.fromarray(scene.image).save(png, "PNG", compress_level=1)
        image = {"bytes": png.getvalue(), "path": None}
        rows.append({"image_id": f"{domain}-{split}-{index:05d}", "image": image, **columns})
    return pa.Table.from_pylist(rows, schema=_scene_schema())


def _scene_schema() -> pa.Schema:
    import pyarrow as pa

    texts = pa.list_(pa.string())
    return pa.schema(
        {
            "image_id": pa.string(),
            "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "expression": texts,
            "box": pa.list_(pa.list_(pa.float32(), 4)),
            "question": texts,
            "answer": texts,
            "answer_type": texts,
            "captions": texts,
        }
    )


def _rows(task: str, scenes: pa.Table, features: Features) -> pa.Table:
    """Return scenes as rows of a task's schema; a scene with several samples gives several rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    scenes = scenes.combine_chunks()
    if task in ("captioning", "retrieval"):
        columns = {name: scenes[name] for name in ("image_id", "image", "captions")}
        columns["sample_id"] = scenes["image_id"]
    else:
        task_columns = {"rec": ("expression", "box"), "vqa": ("question", "answer", "answer_type")}[task]
        parents = pc.list_parent_indices(scenes[task_columns[0]])
        columns = {name: scenes[name].take(parents) for name in ("image_id", "image")}
        columns |= {name: pc.list_flatten(scenes[name]) for name in task_columns}
        nth = [str(i) for texts in scenes[task_columns[0]].to_pylist() for i in range(len(texts))]
        columns["sample_id"] = pc.binary_join_element_wise(columns["image_id"], task, pa.array(nth), "-")
        columns["subset"] = pa.array([""] * len(nth))
    if task == "vqa":
        answers = columns["answer"].combine_chunks()
        columns["answers"] = pa.ListArray.from_arrays(list(range(len(answers) + 1)), answers)
    return pa.table({name: columns[name] for name in features}).cast(features.arrow_schema)
