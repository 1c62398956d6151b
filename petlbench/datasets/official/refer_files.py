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
from petlbench.datasets.files.coco import with_folder
from petlbench.datasets.files.declaration import Declaration
from petlbench.datasets.files.images import relative
from petlbench.datasets.files.pickles import blame_file, load_pickle, text_column
from petlbench.datasets.files.reader import Part, Reader
from petlbench.datasets.files.reading import read_json, refuse_repeats
from petlbench.datasets.official.refer_rows import FAULTS, box_faults, cast_boxes, rec_table, usable_references
from petlbench.datasets.official.refer_source import ReferSource

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

FOLDERS = ("{}", "refer/data/{}", "refer/{}", "data/{}")  # below the root, which may also be the data set's own folder
NO_SENTENCE = {"sent_id": None, "sent": None}  # so that a reference without a sentence gives a row, which is counted


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
    """The keys of instances.json that are used."""

    images: list[Picture]
    annotations: list[ReferAnnotation]


INSTANCES = TypeAdapter(Instances)


class ReferFiles(Reader):
    """A reader of the toolkit's two files; it reads both once for all parts."""

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
        complete = [folder for folder in folders if (folder / f"refs({source.config.split_by}).p").is_file()]
        return cls(source, root, complete[0]) if complete else None

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
        wanted = [split for split in pc.unique(table["subset"]).to_pylist() if belongs(split, part)]
        return usable_references(table.filter(pc.is_in(table["subset"], pa.array(wanted, pa.string()))))

    def _rows(self) -> pa.Table:
        """Return a row for each sentence of each part, usable or not. Raise UserError if a file is malformed."""
        with collector_paused():
            annotations = _Annotations(self.instances)
            with blame_file(self.references, "list of the toolkit's references"):
                return self._join(load_pickle(self.references), annotations)

    def _join(self, references: Any, annotations: _Annotations) -> pa.Table:
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        groups = [ref["sentences"] or [NO_SENTENCE] for ref in references]
        sentences = [sentence for group in groups for sentence in group]
        repeats = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        sentence_ids = pa.array([sentence["sent_id"] for sentence in sentences], pa.int64())
        expressions = text_column([sentence["sent"] for sentence in sentences])
        self._require_ids(sentence_ids, expressions)
        used = pa.array([ref["ann_id"] for ref in references], pa.int64())
        image_ids = pa.array([ref["image_id"] for ref in references], pa.int64())
        at = annotations.rows(used, self.references)
        pictures = annotations.pictures(image_ids, self.references)
        boxes = cast_boxes(annotations.boxes[at], whole=self.source.config.boxes == "int")
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

    def _require_ids(self, sentence_ids: pa.Array, expressions: pa.Array) -> None:
        if sentence_ids.filter(expressions.is_valid()).null_count:
            raise UserError(f"{self.references} has a sentence without sent_id: get the file again")
        refuse_repeats(sentence_ids.drop_null().to_pylist(), "sent_id", self.references)


class _Annotations:
    """instances.json as columns: boxes (A, 4) and image ids (A,); names (I,) and extents (I, 2) of the images."""

    def __init__(self, path: Path) -> None:
        import numpy as np
        import pyarrow as pa

        document = read_json(path, INSTANCES)
        listed, pictures = document["annotations"], document["images"]
        self.path = path
        unknown = np.inf  # without a size, no box counts as outside
        sizes = [(entry.get("width", unknown), entry.get("height", unknown)) for entry in pictures]
        with blame_file(path, "table of numbers of 64 bits"):
            self.ids = pa.array([entry["id"] for entry in listed], pa.int64())
            self.images = np.array([entry["image_id"] for entry in listed], np.int64)
            self.boxes = np.array([entry["bbox"] for entry in listed], np.float64).reshape(-1, 4)
            self.picture_ids = pa.array([entry["id"] for entry in pictures], pa.int64())
            self.extents = np.array(sizes, np.float64).reshape(-1, 2)
        self.names = pa.array([relative(with_folder(entry["file_name"]), path) for entry in pictures], pa.string())
        for kind, ids in (("annotation", self.ids), ("image", self.picture_ids)):
            refuse_repeats(ids.to_pylist(), kind, path)

    def rows(self, ids: pa.Array, asker: Path) -> np.ndarray[Any, Any]:
        """Return the rows of the annotations with these ids."""
        return self._places(self.ids, ids, "annotation", asker)

    def pictures(self, ids: pa.Array, asker: Path) -> np.ndarray[Any, Any]:
        """Return the rows of the images with these ids."""
        return self._places(self.picture_ids, ids, "image", asker)

    def _places(self, all_ids: pa.Array, ids: pa.Array, kind: str, asker: Path) -> np.ndarray[Any, Any]:
        import pyarrow.compute as pc

        places = pc.index_in(ids, value_set=all_ids)
        if places.null_count:
            missing = ids.filter(places.is_null())[0].as_py()
            raise UserError(
                f"{asker} refers to {kind} {missing}, which {self.path} lacks: get both files of one release"
            )
        return places.to_numpy()


def belongs(split_name: str, part: str) -> bool:
    """Return whether a reference of this split is in an official part, by the toolkit's rule: testAB is in two."""
    if part in ("train", "val"):
        return split_name == part
    return "test" in split_name if part == "test" else part[-1] in split_name
