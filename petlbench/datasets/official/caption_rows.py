"""Rows of captioned images, which captioning and retrieval share: one for an image, with all that was said of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from petlbench.datasets.files import images
from petlbench.datasets.files.reader import Part, Skips

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

TASKS = frozenset({"captioning", "retrieval"})


def published_sizes(**parts: tuple[int, int]) -> dict[str, dict[str, dict[str, int]]]:
    """A source's `sizes`: of each official part the numbers of images and of captions."""
    sizes = {part: {"images": pictures, "captions": captions} for part, (pictures, captions) in parts.items()}
    return dict.fromkeys(TASKS, sizes)


def captioned(image_ids: Sequence[int | str], names: Sequence[str], texts: Sequence[str], owners: Ints) -> Part:
    """A row for each image, in their order, with its captions in theirs; `owners` (C,) tells whose each of them is.

    Captions are kept as written, less the white space around them. Blank ones, and images left without any, are skipped
    and counted.
    """
    import numpy as np
    import pyarrow as pa

    skips = Skips()
    stripped = np.array([text.strip() for text in texts], dtype=object)
    said = stripped.astype(bool)
    for owner in owners[~said].tolist():
        skips.add("blank caption", f"of image {image_ids[owner]!r}")
    owners = owners[said]
    counts = np.bincount(owners, minlength=len(names))
    for silent in np.flatnonzero(counts == 0).tolist():
        skips.add("image without captions", f"image {image_ids[silent]!r}")
    ends = np.concatenate([[0], np.cumsum(counts[counts > 0])])
    by_image = pa.array(stripped[said], pa.string()).take(pa.array(np.argsort(owners, kind="stable")))
    captions = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), by_image)
    kept = pa.array(counts > 0)
    ids = pa.array(list(map(str, image_ids)), pa.string()).filter(kept)
    image = pa.array(names, pa.string()).filter(kept)
    return Part(pa.table({"sample_id": ids, "image_id": ids, "image": image, "captions": captions}), skips)


def below_folder(names: Sequence[str], path: Path) -> list[str]:
    """The images' names that `path` gives, each checked as by `images.relative`."""
    return [images.relative(name, path) for name in names]
