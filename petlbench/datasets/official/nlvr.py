"""NLVR: sentences about synthetic images, true or false (Suhr, Lewis, Yeh, Artzi, ACL 2017; github.com/lil-lab/nlvr).

A sentence was written for up to four images; an identifier is `<sentence>-<image>`. An image is 400 x 100 pixels: three
boxes 100 pixels wide, 50 apart. Only permutation 0 of the boxes is used, so that copies with one and with all six
permutations give the same rows; in it the boxes stand in the order of `structured_rep`.

Train and validation come from `dev`, test is `hidden`. No sentence and no image is in two of them: `dev` is divided by
sentence, and where an image recurs under another sentence, test keeps it first, validation second.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from petlbench.api.source import Source, SourceConfig, Split
from petlbench.core.errors import UserError
from petlbench.core.paths import data_root
from petlbench.datasets.files import images

if TYPE_CHECKING:
    from datasets import Dataset, Features

IMAGE_SIZE = (400, 100)
BOX_PITCH = 150
HELD_OUT = 5  # one sentence of `dev` in this many is for validation
EXPRESSIONS_PER_IMAGE = 2
COLOURS = {"Yellow": "yellow", "Black": "black", "#0099ff": "blue"}
SIZES = {10: "small", 20: "medium", 30: "large"}
Row = dict[str, Any]


class Object(BaseModel):
    """One object of a box: its upper left corner within the box, and the side of its tight square, in pixels."""

    model_config = ConfigDict(frozen=True)

    x_loc: int = Field(ge=0, lt=100)
    y_loc: int = Field(ge=0, lt=100)
    size: Literal[10, 20, 30]
    type: Literal["square", "triangle", "circle"]
    color: Literal["Yellow", "Black", "#0099ff"]


Scene = tuple[tuple[Object, ...], tuple[Object, ...], tuple[Object, ...]]


class NLVRAnnotation(BaseModel):
    """A line of an annotation file; `evals` and all other keys are ignored."""

    sentence: str = Field(min_length=1)
    label: Literal["true", "false"]
    identifier: str = Field(pattern=r"^\d+-\d+$")
    directory: str | None = None
    structured_rep: Scene


@dataclass(frozen=True)
class NLVRExample:
    """A sentence with one image. Equal scenes are equal pixel for pixel."""

    sample_id: str
    sentence: str
    label: str
    scene: Scene
    image: Path

    @property
    def held_out(self) -> bool:
        return _hash(self.sample_id.split("-")[1]) % HELD_OUT == 0


class NLVRConfig(SourceConfig):
    """Options of NLVR."""

    skip_broken: bool = Field(False, description="leave out images that are missing or do not decode, and say so")


class NLVR(Source):
    """The corpus's `dev` and `hidden` parts as all four tasks.

    vqa asks the sentence, answered true or false; captioning and retrieval keep the sentences that are true of an
    image; rec makes expressions from `structured_rep`. A sentence is true of two images or so, and in retrieval only
    the image a caption belongs to counts as found. Rows stand in a fixed shuffled order: a limit is representative.
    """

    Config: ClassVar[type[SourceConfig]] = NLVRConfig
    tasks: ClassVar[frozenset[str]] = frozenset({"rec", "vqa", "captioning", "retrieval"})

    def __init__(self, config: NLVRConfig, root: Path | None = None) -> None:
        super().__init__(config, root)
        self._skip_broken = config.skip_broken
        self._faults: dict[str, dict[Path, str]] = {}

    def features(self, task: str) -> Features:
        from petlbench.api.schemas import CAPTIONING, REC, RETRIEVAL, VQA

        return {"rec": REC, "vqa": VQA, "captioning": CAPTIONING, "retrieval": RETRIEVAL}[task]

    def load(self, task: str, split: Split, limit: int | None = None) -> Dataset:
        from datasets import Dataset

        if task not in ROWS:
            raise UserError(f"nlvr has no task {task!r}: choose one of {', '.join(sorted(ROWS))}")
        part = "hidden" if split == "test" else "dev"
        faults = self._faults_of(part)
        rows = ROWS[task]([example for example in self._split(split) if example.image not in faults])
        if not rows:
            raise UserError(f"nlvr/{part} has no usable row for {task}, {split}: get the files again")
        rows.sort(key=lambda row: (_hash(row["sample_id"]), row["sample_id"]))
        return Dataset.from_list(rows[:limit], features=self.features(task))

    def check(self) -> None:
        for part, examples in self._parts.items():
            self._refuse(part, {e.image: "missing" for e in examples if not e.image.is_file()})

    def notes(self) -> tuple[str, ...]:
        return tuple(f"skipped {_summary(part, faults)}" for part, faults in self._faults.items() if faults)

    def fingerprint(self, task: str) -> str:
        """Return a digest of the annotation files, the images' sizes, and which images are left out.

        `skip_broken` itself does not count. The digest of FileSource, from which this class could derive, would make
        all records of NLVR stale.
        """
        digest = hashlib.sha256(task.encode())
        for part, examples in self._parts.items():
            left_out = self._faults_of(part) if self._skip_broken else {}
            digest.update(" ".join(sorted(path.name for path in left_out)).encode())
            digest.update((self._folder / part / f"{part}.json").read_bytes())
            for example in examples:
                size = example.image.stat().st_size if example.image.is_file() else None
                digest.update(f"{example.image.name} {size}\n".encode())
        return digest.hexdigest()

    @cached_property
    def _folder(self) -> Path:
        """The folder of `dev` and `hidden`: the root, its `nlvr` (a copy), or `nlvr/nlvr` (a clone)."""
        root = self.root or data_root()
        for folder in [root, root / "nlvr", root / "nlvr" / "nlvr"] if root else []:
            if (folder / "dev" / "dev.json").is_file():
                return folder.absolute()
        place = root or "DIR"
        raise UserError(
            "nlvr needs its files: clone the lil-lab/nlvr repository and pass --data-root DIR or set PETLBENCH_DATA "
            f"(looked for {place}/nlvr/dev/dev.json and {place}/dev/dev.json)"
        )

    @cached_property
    def _parts(self) -> dict[str, list[NLVRExample]]:
        return {part: read_part(self._folder, part) for part in ("dev", "hidden")}

    def _split(self, split: Split) -> list[NLVRExample]:
        dev, test = self._parts["dev"], self._parts["hidden"]
        if split == "test":
            return test
        taken = {e.scene for e in test}
        if split == "validation":
            return [e for e in dev if e.held_out and e.scene not in taken]
        taken |= {e.scene for e in dev if e.held_out}
        return [e for e in dev if not e.held_out and e.scene not in taken]

    def _faults_of(self, part: str) -> dict[Path, str]:
        """Return the unusable images of `part` with the reason; each is decoded once, in about half a millisecond."""
        if part not in self._faults:
            reasons = {e.image: images.fault(e.image, IMAGE_SIZE) for e in self._parts[part]}
            faults = {path: reason for path, reason in reasons.items() if reason}
            self._refuse(part, faults)
            self._faults[part] = faults
        return self._faults[part]

    def _refuse(self, part: str, faults: dict[Path, str]) -> None:
        if faults and len(faults) == len(self._parts[part]):
            raise UserError(f"{_summary(part, faults)}: none is left, get the images again")
        if faults and not self._skip_broken:
            advice = "fix them or set dataset_configs: {nlvr: {skip_broken: true}}"
            raise UserError(f"{_summary(part, faults)}: {advice}")


def read_part(folder: Path, part: str) -> list[NLVRExample]:
    """Return the examples of `<folder>/<part>/<part>.json`. Raises UserError that names the file and the line."""
    path = folder / part / f"{part}.json"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): clone the lil-lab/nlvr repository again") from None
    # `hidden` has no `directory`: its images are found by name.
    found = {file.name: file for file in (folder / part).glob("images/*/*-0.png")}
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        annotation = _parse(line, path, number)
        name = f"{part}-{annotation.identifier}-0.png"
        image = found.get(name, folder / part / "images" / (annotation.directory or "") / name)
        sample_id = f"{part}-{annotation.identifier}"
        examples.append(NLVRExample(sample_id, annotation.sentence, annotation.label, annotation.structured_rep, image))
    if not examples:
        raise UserError(f"{path} holds no sentence: get it again")
    return examples


def _parse(line: bytes, path: Path, number: int) -> NLVRAnnotation:
    try:
        return NLVRAnnotation.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(f"{path}, line {number} is truncated or malformed ({reason}): get the file again") from None


def _summary(part: str, faults: dict[Path, str]) -> str:
    path, reason = next(iter(faults.items()))
    verb = "image of nlvr/{} is" if len(faults) == 1 else "images of nlvr/{} are"
    return f"{len(faults)} {verb.format(part)} missing or do not decode, first {path} ({reason})"


def _vqa_rows(examples: Iterable[NLVRExample]) -> list[Row]:
    return [
        {"sample_id": e.sample_id, **image, "question": e.sentence, "answers": [e.label], "answer_type": "true/false"}
        for image, group in _by_image(examples)
        for e in group
    ]


def _captioned_rows(examples: Iterable[NLVRExample]) -> list[Row]:
    rows = []
    for image, group in _by_image(examples):
        captions = list(dict.fromkeys(e.sentence for e in group if e.label == "true"))
        if captions:
            rows.append({"sample_id": image["image_id"], **image, "captions": captions})
    return rows


def _rec_rows(examples: Iterable[NLVRExample]) -> list[Row]:
    rows = []
    for image, group in _by_image(examples):
        for number, (expression, box) in enumerate(_expressions(group[0])):
            sample_id = f"{image['image_id']}-{number}"
            rows.append({"sample_id": sample_id, **image, "expression": expression, "box": box, "subset": ""})
    return rows


ROWS: dict[str, Callable[[Iterable[NLVRExample]], list[Row]]] = {
    "vqa": _vqa_rows,
    "captioning": _captioned_rows,
    "retrieval": _captioned_rows,
    "rec": _rec_rows,
}


def _by_image(examples: Iterable[NLVRExample]) -> list[tuple[Row, list[NLVRExample]]]:
    """Return each image's columns and examples; files with the same scene are one image, named after the first."""
    groups: dict[Scene, list[NLVRExample]] = {}
    for example in examples:
        groups.setdefault(example.scene, []).append(example)
    return [
        ({"image_id": group[0].sample_id, "image": {"path": str(group[0].image), "bytes": None}}, group)
        for group in groups.values()
    ]


def _expressions(example: NLVRExample) -> list[tuple[str, list[float]]]:
    """Return, for a few objects that colour, shape and size identify, an expression and the box it refers to.

    Boxes are x, y, width, height in pixels. A hash of the sample chooses the objects, and for each the full description
    or a shorter one that still identifies it.
    """
    placed = [(thing, BOX_PITCH * slot) for slot, box in enumerate(example.scene) for thing in box]
    uses = Counter(phrase for thing, _ in placed for phrase in _phrases(thing))
    unique = []
    for number, (thing, left) in enumerate(placed):
        choices = [phrase for phrase in _phrases(thing) if uses[phrase] == 1]
        if choices:
            draw = _hash(f"{example.sample_id} object {number}")
            box = [float(left + thing.x_loc), float(thing.y_loc), float(thing.size), float(thing.size)]
            unique.append((draw, choices[draw % len(choices)], box))
    return [(expression, box) for _, expression, box in sorted(unique)[:EXPRESSIONS_PER_IMAGE]]


def _phrases(thing: Object) -> tuple[str, ...]:
    """Return the full description and the shorter ones. Where a shorter one is unique, so is the full one."""
    size, colour, shape = SIZES[thing.size], COLOURS[thing.color], thing.type
    return f"the {size} {colour} {shape}", f"the {colour} {shape}", f"the {size} {shape}", f"the {shape}"


def _hash(text: str) -> int:
    """Return the same number for the same text on every machine and version."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
