"""Referring expressions in TransVG's index lists (derived from ReSC): `<key>/<key>_<part>.pth`, saved by torch.

A list has an entry (image file, mask file, box, phrase, attributes) for each expression. Boxes are x, y, width and
height in pixels; those of ReferItGame are x1, y1, x2, y2.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from petlbench.datasets.files.coco import with_folder
from petlbench.datasets.files.declaration import Declaration
from petlbench.datasets.files.images import relative
from petlbench.datasets.files.pickles import blame_file, load_torch, text_column
from petlbench.datasets.files.reader import Part, Reader
from petlbench.datasets.official.refer_rows import box_faults, cast_boxes, rec_table, usable_references
from petlbench.datasets.official.refer_source import ReferSource

if TYPE_CHECKING:
    import numpy as np

FOLDERS = ("", "split/data", "split", "data", "ln_data")  # below the root
ENTRY = "(image file, mask file, box, phrase, attributes)"


class TransVGIndex(Reader):
    """A reader of one list for each part."""

    layout: ClassVar[str] = "transvg"
    source: ReferSource

    def __init__(self, source: Declaration, root: Path, lists: dict[str, Path]) -> None:
        super().__init__(source, root)
        self.lists = lists

    @classmethod
    def find(cls, source: Declaration, root: Path | None) -> Self | None:
        division = cast(ReferSource, source).division
        key = division.index
        for folder in FOLDERS if root is not None and key is not None else ():
            assert root is not None
            named = {part: root / folder / f"{key}/{key}_{part}.pth" for part in division.parts}
            lists = {part: path for part, path in named.items() if path.is_file()}
            if lists:
                return cls(source, root, lists)
        return None

    @classmethod
    def places(cls, source: Declaration) -> str:
        key = cast(ReferSource, source).division.index
        return f"{key}/{key}_train.pth and so on (also in split/data, data, ln_data)" if key else "no index lists"

    def parts(self, task: str) -> tuple[str, ...]:
        return tuple(self.lists)

    def files(self, task: str, part: str) -> list[Path]:
        return [self.lists[part]]

    def read(self, task: str, part: str) -> Part:
        import numpy as np
        import pyarrow as pa

        path = self.lists[part]
        entries = load_torch(path)
        with blame_file(path, f"list of entries {ENTRY}"):
            names = text_column([str(entry[0]) for entry in entries])
            phrases = text_column([entry[3] for entry in entries])
            boxes = np.array([list(entry[2]) for entry in entries], np.float64).reshape(len(entries), 4)
        boxes = self._from_corner(boxes)
        coded = names.dictionary_encode()
        files = pa.array([relative(with_folder(name), path) for name in coded.dictionary.to_pylist()], pa.string())
        return usable_references(
            rec_table(
                sample_id=pa.array([f"{part}-{number}" for number in range(len(entries))], pa.string()),
                image_id=names,
                image=files.take(coded.indices),
                expression=phrases,
                boxes=boxes,
                subset=pa.repeat(part, len(entries)),
                faults=box_faults(boxes, np.full((len(entries), 2), np.inf)),
            )
        )

    def _from_corner(self, boxes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return boxes as x, y, width, height. Truncation applies to the file's own numbers, sizes or corners."""
        boxes = cast_boxes(boxes, whole=self.source.config.boxes == "int")
        if self.source.index_corners:
            boxes[:, 2:] -= boxes[:, :2]
        return boxes
