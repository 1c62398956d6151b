"""Rows of captioned images, which captioning and retrieval share: one row per image, with all its captions."""

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
    """Return a source's `sizes`: the numbers of images and of captions of each official part."""
    sizes = {part: {"images": pictures, "captions": captions} for part, (pictures, captions) in parts.items()}
    return dict.fromkeys(TASKS, sizes)


def caption_part(image_ids: Sequence[int | str], names: Sequence[str], texts: Sequence[str], owners: Ints) -> Part:
    """Return a row for each image, with its captions, both in the given order; `owners` (C,) is each caption's image.

    Captions are kept as written, without the white space around them. Blank captions, and images left without
    captions, are skipped and counted.
    """
    import numpy as np
    import pyarrow as pa

    skips = Skips()
    stripped = np.array([text.strip() for text in texts], dtype=object)
    filled = stripped.astype(bool)
    for owner in owners[~filled].tolist():
        skips.add("blank caption", f"of image {image_ids[owner]!r}")
    owners = owners[filled]
    counts = np.bincount(owners, minlength=len(names))
    for index in np.flatnonzero(counts == 0).tolist():
        skips.add("image without captions", f"image {image_ids[index]!r}")
    ends = np.concatenate([[0], np.cumsum(counts[counts > 0])])
    by_image = pa.array(stripped[filled], pa.string()).take(pa.array(np.argsort(owners, kind="stable")))
    captions = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), by_image)
    kept = pa.array(counts > 0)
    ids = pa.array(list(map(str, image_ids)), pa.string()).filter(kept)
    image = pa.array(names, pa.string()).filter(kept)
    return Part(pa.table({"sample_id": ids, "image_id": ids, "image": image, "captions": captions}), skips)


def checked_names(names: Sequence[str], path: Path) -> list[str]:
    """Return the images' names from the file `path`, each checked by `images.relative`."""
    return [images.relative(name, path) for name in names]
