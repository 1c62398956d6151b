"""TransVG's augmentation of referring expressions (Deng et al., ICCV 2021), corrected and as released.

1. If the text has no word of place, the image is cut with probability 1/2: as if enlarged to a short side of 400, 500
   or 600 pixels, to a width and a height of 384 to 600 each, in up to 20 tries to find a cut that the target allows.
2. With probability 4/5 brightness, contrast and saturation are multiplied by 0.6 to 1.4 each, in random order.
3. With probability 1/2 the image is mirrored, and the text exchanges left and right.
4. The image gets a long side of 448 to 640 pixels and a random place on a canvas of 640 pixels.

Nothing is really enlarged: an image is cut in whole pixels of its own, and the backbone resamples it once; its canvas
stands for the 640 pixels. A backbone without a canvas sizes and places images as usual.

Rows follow rec's schema, with decoded images; boxes are in pixels of the row's image. A changed row also has a
`placement`. The generator that the caller passes draws all random values.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image, Transpose
from PIL.ImageEnhance import Brightness, Color, Contrast

from petlbench.api.task import Row
from petlbench.api.tokens import Placement

Corners = tuple[float, float, float, float]  # left, top, right, bottom
Cut = tuple[int, int, int, int]  # the same in whole pixels

CANVAS = 640
LONG_SIDES = range(448, CANVAS + 1, 32)
SHORT_SIDES = (400, 500, 600)
LEAST_CUT, MOST_CUT = 384, 600
TRIES = 20
COLOURED, STRENGTH = 0.8, 0.4
PLACES = ("left", "right", "top", "bottom", "middle")
# Whole words, also with endings that form other words of place: leftmost, right-hand, topmost, "on the lefts".
PLACE = re.compile(rf"\b({'|'.join(PLACES)})(?=(?:most|hand(?:ed)?|side|wards?|ish)?s?\b)", re.IGNORECASE)
OTHER = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Rules:
    """The rules that the release gets wrong."""

    places: Callable[[str], bool]  # whether a text names a place, which forbids cutting its image
    allows: Callable[[Corners, Cut], bool]  # whether a cut keeps enough of a target
    mirror: Callable[[str], str]  # returns the text of the mirrored image


def transvg(row: Row, rng: np.random.Generator) -> Row:
    """Augment a row with places as whole words, boxes in fractions of a pixel, and cuts that keep the target's centre.

    The box is limited to the cut, and so always has an area. If no cut fits, the image stays whole.
    """
    return _changed(row, rng, CORRECTED)


def transvg_released(row: Row, rng: np.random.Generator) -> Row:
    """Augment a row as the authors' code: texts in lower case, boxes truncated to whole pixels.

    The code compares the centre's x with the cut's upper edge and its y with the left one, and ignores right and lower
    edges: a target may end as a box without area. It finds places inside other words ("stop" has a top), and exchanges
    left and right there ("bright" becomes "bleft").
    """
    whole = {"expression": row["expression"].lower(), "box": [float(int(length)) for length in row["box"]]}
    return _changed({**row, **whole}, rng, RELEASED)


def _changed(row: Row, rng: np.random.Generator, rules: Rules) -> Row:
    image, text = row["image"].convert("RGB"), row["expression"]
    x, y, width, height = row["box"]
    box = (x, y, x + width, y + height)
    if not rules.places(text) and rng.random() < 0.5:
        image, box = _cut(image, box, rules.allows, rng)
    if rng.random() < COLOURED:
        image = _coloured(image, rng)
    if rng.random() < 0.5:
        image, text = image.transpose(Transpose.FLIP_LEFT_RIGHT), rules.mirror(text)
        box = (image.width - box[2], box[1], image.width - box[0], box[3])
    placement = Placement(int(rng.choice(LONG_SIDES)) / CANVAS, rng.random(), rng.random())
    left, top, right, bottom = box
    box_now = [left, top, right - left, bottom - top]
    return {**row, "image": image, "expression": text, "box": box_now, "placement": placement}


def _cut(
    image: Image, box: Corners, allows: Callable[[Corners, Cut], bool], rng: np.random.Generator
) -> tuple[Image, Corners]:
    """Return the first of TRIES cuts that the target allows, else the whole image, and the box within it."""
    ratio = int(rng.choice(SHORT_SIDES)) / min(image.size)
    for _ in range(TRIES):
        cut = _drawn(image.size, ratio, rng)
        if allows(box, cut):
            left, top, right, bottom = cut
            (x1, x2), (y1, y2) = np.clip(box[::2], left, right) - left, np.clip(box[1::2], top, bottom) - top
            return image.crop(cut), (float(x1), float(y1), float(x2), float(y2))
    return image, box


def _drawn(size: tuple[int, int], ratio: float, rng: np.random.Generator) -> Cut:
    """Draw a cut in pixels of an image of `size` (width, height), as if the image were `ratio` times as large."""
    enlarged = [round(length * ratio) for length in size]
    lengths = [int(rng.integers(LEAST_CUT, min(length, MOST_CUT), endpoint=True)) for length in enlarged]
    starts = [int(rng.integers(0, whole - part, endpoint=True)) for whole, part in zip(enlarged, lengths, strict=True)]
    first = [round(start / ratio) for start in starts]
    ends = [start + part for start, part in zip(starts, lengths, strict=True)]
    last = [min(whole, round(end / ratio)) for whole, end in zip(size, ends, strict=True)]
    return first[0], first[1], last[0], last[1]


def _coloured(image: Image, rng: np.random.Generator) -> Image:
    for i in rng.permutation(3):
        change = (Brightness, Contrast, Color)[i]
        image = change(image).enhance(rng.uniform(1 - STRENGTH, 1 + STRENGTH))
    return image


def _centre(box: Corners) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _keeps_centre(box: Corners, cut: Cut) -> bool:
    x, y = _centre(box)
    return cut[0] < x < cut[2] and cut[1] < y < cut[3]


def _keeps_as_released(box: Corners, cut: Cut) -> bool:
    x, y = _centre(box)
    return x > cut[1] and y > cut[0]


def _mirrored(text: str) -> str:
    """Exchange left and right if they are words of place, and keep their case."""
    return PLACE.sub(lambda found: _like(found[0], OTHER.get(found[0].lower(), found[0])), text)


def _like(old: str, new: str) -> str:
    """Return `new` in capitals if `old` is, or with a capital first letter if `old` has one."""
    return new.upper() if old.isupper() else new.capitalize() if old[0].isupper() else new


def _mirrored_as_released(text: str) -> str:
    return re.sub("left|right", lambda found: OTHER[found[0]], text)


CORRECTED = Rules(lambda text: bool(PLACE.search(text)), _keeps_centre, _mirrored)
RELEASED = Rules(lambda text: any(word in text for word in PLACES), _keeps_as_released, _mirrored_as_released)
