"""Referring expressions in the files of the refer toolkit (Kazemzadeh et al. 2014, Yu et al. 2016; lichengunc/refer).

`<data set>/refs(<split_by>).p` is a pickle of Python 2: references, each an annotation with its sentences.
`instances.json` beside it is like COCO's: images, and annotations with boxes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NotRequired, Self, cast

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from petlbench.core.errors import UserError
from petlbench.core.files import content_digest
from petlbench.core.gc_pause import collector_paused
from petlbench.datasets.files.coco import placed
from petlbench.datasets.files.declaration import Declaration
from petlbench.datasets.files.images import relative
from petlbench.datasets.files.pickles import load_pickle, taken_apart, text_column
from petlbench.datasets.files.reader import Part, Reader
from petlbench.datasets.files.reading import read_json, refuse_repeats
from petlbench.datasets.official.refer_rows import FAULTS, box_faults, boxed, rec_table, usable_references
from petlbench.datasets.official.refer_source import ReferSource

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

FOLDERS = ("{}", "refer/data/{}", "refer/{}", "data/{}")  # below the root; the data set's own folder may be the root
NO_SENTENCE = {"sent_id": None, "sent": None}  # so that a reference without one leaves a row to be counted


class ReferAnnotation(TypedDict):
    """An annotation of instances.json; `bbox` is x, y, width, height in pixels."""

    id: int
    image_id: int
    bbox: Annotated[list[float], Field(min_length=4, max_length=4)]


class Picture(TypedDict):
    """An image of instances.json."""

    id: int
    file_name: str
    width: NotRequired[int]
    height: NotRequired[int]


class Instances(TypedDict):
    """What is used of instances.json."""

    images: list[Picture]
    annotations: list[ReferAnnotation]


INSTANCES = TypeAdapter(Instances)


class ReferFiles(Reader):
    """The toolkit's two files. Both are read once for all parts."""

    layout: ClassVar[str] = "refer"
    source: ReferSource

    def __init__(self, source: Declaration, root: Path, folder: Path) -> None:
        super().__init__(source, root)
        self.references = folder / f"refs({self.source.config.split_by}).p"
        self.instances = folder / "instances.json"
        self._known: tuple[list[str], pa.Table] | None = None

    @classmethod
    def find(cls, source: Declaration, root: Path | None) -> Self | None:
        if root is None:
            return None
        source = cast(ReferSource, source)
        folders = [root / base.format(source.folder) for base in FOLDERS]
        if root.resolve().name.lower() == source.folder:
            folders.append(root)
        there = [folder for folder in folders if (folder / f"refs({source.config.split_by}).p").is_file()]
        return cls(source, root, there[0]) if there else None

    @classmethod
    def places(cls, source: Declaration) -> str:
        source = cast(ReferSource, source)
        return f"{source.folder}/refs({source.config.split_by}).p beside instances.json (also in refer/data)"

    def parts(self, task: str) -> tuple[str, ...]:
        return self.source.division.parts

    def files(self, task: str, part: str) -> list[Path]:
        return [self.references, self.instances]

    def read(self, task: str, part: str) -> Part:
        import pyarrow as pa
        import pyarrow.compute as pc

        digests = [content_digest(path) for path in self.files(task, part)]
        if self._known is None or self._known[0] != digests:
            self._known = digests, self._rows()
        table = self._known[1]
        wanted = [said for said in pc.unique(table["subset"]).to_pylist() if belongs(said, part)]
        return usable_references(table.filter(pc.is_in(table["subset"], pa.array(wanted, pa.string()))))

    def _rows(self) -> pa.Table:
        """A row for each sentence of each part, usable or not. Raises UserError."""
        with collector_paused():
            annotations = _Annotations(self.instances)
            with taken_apart(self.references, "list of the toolkit's references"):
                return self._joined(load_pickle(self.references), annotations)

    def _joined(self, references: Any, annotations: _Annotations) -> pa.Table:
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        found = [ref["sentences"] or [NO_SENTENCE] for ref in references]
        sentences = [sentence for group in found for sentence in group]
        repeats = np.repeat(np.arange(len(found)), [len(group) for group in found])
        sentence_ids = pa.array([sentence["sent_id"] for sentence in sentences], pa.int64())
        expressions = text_column([sentence["sent"] for sentence in sentences])
        self._demand_ids(sentence_ids, expressions)
        used = pa.array([ref["ann_id"] for ref in references], pa.int64())
        image_ids = pa.array([ref["image_id"] for ref in references], pa.int64())
        at = annotations.rows(used, self.references)
        pictures = annotations.pictures(image_ids, self.references)
        boxes = boxed(annotations.boxes[at], whole=self.source.config.boxes == "int")
        faults = box_faults(boxes, annotations.extents[pictures])
        faults[annotations.images[at] != image_ids.to_numpy()] = FAULTS.index("box on another image")
        nameless = pc.binary_join_element_wise("annotation", used.cast(pa.string()), "-").take(pa.array(repeats))
        return rec_table(
            sample_id=pc.coalesce(sentence_ids.cast(pa.string()), nameless),
            image_id=image_ids.cast(pa.string()).take(repeats),
            image=annotations.names.take(pictures).take(repeats),
            expression=expressions,
            boxes=boxes[repeats],
            subset=pa.array([str(ref["split"]) for ref in references], pa.string()).take(repeats),
            faults=faults[repeats],
        )

    def _demand_ids(self, sentence_ids: pa.Array, expressions: pa.Array) -> None:
        if sentence_ids.filter(expressions.is_valid()).null_count:
            raise UserError(f"{self.references} has a sentence without sent_id: get the file again")
        refuse_repeats(sentence_ids.drop_null().to_pylist(), "sent_id", self.references)


class _Annotations:
    """instances.json as columns: boxes (A, 4) and image ids (A,); names (I,) and extents (I, 2) of the images."""

    def __init__(self, path: Path) -> None:
        import numpy as np
        import pyarrow as pa

        found = read_json(path, INSTANCES)
        listed, pictures = found["annotations"], found["images"]
        self.path = path
        unknown = np.inf  # a size that is not given refuses no box
        sizes = [(one.get("width", unknown), one.get("height", unknown)) for one in pictures]
        with taken_apart(path, "table of numbers of 64 bits"):
            self.ids = pa.array([one["id"] for one in listed], pa.int64())
            self.images = np.array([one["image_id"] for one in listed], np.int64)
            self.boxes = np.array([one["bbox"] for one in listed], np.float64).reshape(-1, 4)
            self.picture_ids = pa.array([one["id"] for one in pictures], pa.int64())
            self.extents = np.array(sizes, np.float64).reshape(-1, 2)
        self.names = pa.array([relative(placed(one["file_name"]), path) for one in pictures], pa.string())
        for kind, ids in (("annotation", self.ids), ("image", self.picture_ids)):
            refuse_repeats(ids.to_pylist(), kind, path)

    def rows(self, ids: pa.Array, asker: Path) -> np.ndarray[Any, Any]:
        """Where the annotations with these ids stand."""
        return self._places(self.ids, ids, "annotation", asker)

    def pictures(self, ids: pa.Array, asker: Path) -> np.ndarray[Any, Any]:
        """Where the images with these ids stand."""
        return self._places(self.picture_ids, ids, "image", asker)

    def _places(self, known: pa.Array, ids: pa.Array, kind: str, asker: Path) -> np.ndarray[Any, Any]:
        import pyarrow.compute as pc

        places = pc.index_in(ids, value_set=known)
        if places.null_count:
            lacking = ids.filter(places.is_null())[0].as_py()
            raise UserError(
                f"{asker} refers to {kind} {lacking}, which {self.path} lacks: get both files of one release"
            )
        return places.to_numpy()


def belongs(said: str, part: str) -> bool:
    """Whether a reference whose split is `said` is of an official part, as the toolkit tells: testAB is in two."""
    if part in ("train", "val"):
        return said == part
    return "test" in said if part == "test" else part[-1] in said
