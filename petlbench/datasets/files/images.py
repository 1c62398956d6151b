"""Image files: below their folder and nowhere else, opened when they are needed, refused when they are too large."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from petlbench.core.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from PIL.Image import Image

MOST_PIXELS = 64_000_000  # of a picture: no data set of the field comes near, and a hostile file must not fill memory


_PLAIN = re.compile(r"(\w+/)?\w+\.\w+", re.ASCII).fullmatch  # nearly all, and they are many


def relative(name: str, source: Path) -> str:
    """`name`, an image's file name as `source` gives it, if it leads nowhere but below its folder; else UserError."""
    if _PLAIN(name):
        return name
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(f"{source} names the image {name!r}, which is no file below the image folder: do not trust it")
    return name


def fault(path: Path | io.BytesIO, size: tuple[int, int] | None = None) -> str | None:
    """Why the file cannot be used, in a few words, or None when it decodes in full.

    `size`, (width, height) in pixels, is demanded where boxes are given in the stored image's pixels.
    """
    try:
        found = _open(path).size
    # Pillow's decoders raise whatever a damaged stream makes them stumble over; all of it means the same here.
    except Exception as error:
        return _reason(error, path)
    if size is not None and found != size:
        return f"{found[0]} x {found[1]} pixels, not {size[0]} x {size[1]}"
    return None


def decoded(image: Mapping[str, Any]) -> Image:
    """The picture of a row's `image` (`path`, or the file's `bytes`). Raises UserError that names the file."""
    name = image["path"] or "an image"
    file = io.BytesIO(image["bytes"]) if image["bytes"] is not None else Path(image["path"])
    try:
        return _open(file)
    except Exception as error:
        reason = _reason(error, file)
    raise UserError(f"{name} cannot be used ({reason}): get it again, or set skip_broken for its data set")


def _reason(error: Exception, file: Path | io.BytesIO) -> str:
    """What Pillow said, without the file's name, which stands elsewhere."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    said = str(error).replace(repr(str(file)), "it").replace(str(file), "it")
    return " ".join(said.split()) or type(error).__name__


def _open(file: Path | io.BytesIO) -> Image:
    """Decoded in full, in its own mode."""
    from PIL import Image as Images

    warnings.simplefilter("ignore", Images.DecompressionBombWarning)  # the limit here is lower, and an error
    with Images.open(file) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}")
        image.load()
        return image


def columns(features: Features) -> list[str]:
    """The columns that hold images."""
    from datasets import Image as Picture

    return [name for name, feature in features.items() if isinstance(feature, Picture)]


def lazily(rows: Dataset, opened: Callable[[Mapping[str, Any]], Image] = decoded) -> Dataset:
    """Rows whose columns of images (their schema says `decode=False`) are opened when a row is taken."""
    pictures = columns(rows.features)

    def batched(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**batch, **{name: [opened(image) for image in batch[name]] for name in pictures if name in batch}}

    return rows.with_transform(batched)


def opened_row(
    row: Mapping[str, Any], pictures: Sequence[str], opened: Callable[[Mapping[str, Any]], Image]
) -> dict[str, Any]:
    """One row with its images opened."""
    return {**row, **{name: opened(row[name]) for name in pictures}}
