"""Image files: accepted only below their folder, opened when needed, refused if too large."""

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

MOST_PIXELS = 64_000_000  # of an image: far above any data set of the field, yet a hostile file cannot fill memory


_PLAIN = re.compile(r"(\w+/)?\w+\.\w+", re.ASCII).fullmatch  # a fast check, which nearly all of the many names pass


def relative(name: str, source: Path) -> str:
    """Return `name`, an image's file name from `source`; raise UserError if it leads out of the image folder."""
    if _PLAIN(name):
        return name
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(
            f"{source} names the image {name!r}, which is not a file below the image folder: do not trust it"
        )
    return name


def fault(path: Path | io.BytesIO, size: tuple[int, int] | None = None) -> str | None:
    """Return in a few words why the file cannot be used, or None if it decodes in full.

    `size`, (width, height) in pixels, is required if boxes are given in the stored image's pixels.
    """
    try:
        actual = _open(path).size
    # A damaged stream makes Pillow's decoders raise errors of many types; all mean the same here.
    except Exception as error:
        return _reason(error, path)
    if size is not None and actual != size:
        return f"{actual[0]} x {actual[1]} pixels, not {size[0]} x {size[1]}"
    return None


def decoded(image: Mapping[str, Any]) -> Image:
    """Return the decoded picture of a row's `image` (`path`, or the file's `bytes`).

    Raise UserError with the file's name if it does not decode.
    """
    name = image["path"] or "an image"
    file = io.BytesIO(image["bytes"]) if image["bytes"] is not None else Path(image["path"])
    try:
        return _open(file)
    except Exception as error:
        reason = _reason(error, file)
    raise UserError(f"{name} cannot be used ({reason}): get it again, or set skip_broken for its data set")


def _reason(error: Exception, file: Path | io.BytesIO) -> str:
    """Return Pillow's message without the file's name, because the caller adds the name."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    message = str(error).replace(repr(str(file)), "it").replace(str(file), "it")
    return " ".join(message.split()) or type(error).__name__


def _open(file: Path | io.BytesIO) -> Image:
    """Return the image, decoded in full and in its own mode."""
    from PIL import Image as Images

    warnings.simplefilter("ignore", Images.DecompressionBombWarning)  # our limit is lower and raises an error
    with Images.open(file) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}")
        image.load()
        return image


def columns(features: Features) -> list[str]:
    """Return the names of the columns that hold images."""
    from datasets import Image as Picture

    return [name for name, feature in features.items() if isinstance(feature, Picture)]


def open_lazily(rows: Dataset, opened: Callable[[Mapping[str, Any]], Image] = decoded) -> Dataset:
    """Return rows that open their images (columns whose schema says `decode=False`) when a row is taken."""
    pictures = columns(rows.features)

    def batched(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**batch, **{name: [opened(image) for image in batch[name]] for name in pictures if name in batch}}

    return rows.with_transform(batched)


def open_row(
    row: Mapping[str, Any], pictures: Sequence[str], opened: Callable[[Mapping[str, Any]], Image]
) -> dict[str, Any]:
    """Return one row with its images opened."""
    return {**row, **{name: opened(row[name]) for name in pictures}}
