"""TransVG's augmentation of referring expressions (Deng et al., ICCV 2021), right and as it was released.

1. A text without a word of place has, every second time, its image cut: as if enlarged to a short side of 400, 500 or
   600 pixels, to a width and a height between 384 and 600 each, 20 tries to find a cut that the target allows.
2. In 4 of 5 rows brightness, contrast and saturation are multiplied by 0.6 to 1.4 each, in any order.
3. Every second row is mirrored, with left and right exchanged in the text.
4. The image is laid with a long side of 448 to 640 anywhere on a canvas of 640 pixels.

Enlarging is only reckoned with: an image is cut in its own pixels, to whole ones, and resampled once, by the backbone,
whose canvas stands for the 640 pixels. A backbone without a canvas sizes and places images as ever.

Rows are of rec's schema, with decoded images; boxes are in pixels of the row's image. A changed row has a `placement`
besides. All that is drawn comes from the generator that is given.
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
# As words, and with the endings that make other words of place of them: leftmost, right-hand, topmost, "on the lefts".
PLACE = re.compile(rf"\b({'|'.join(PLACES)})(?=(?:most|hand(?:ed)?|side|wards?|ish)?s?\b)", re.IGNORECASE)
OTHER = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class Rules:
    """What the release gets wrong."""

    places: Callable[[str], bool]  # whether a text speaks of places, so that its image must not be cut
    allows: Callable[[Corners, Cut], bool]  # whether a target can still be found in a cut
    mirror: Callable[[str], str]  # a text of the mirrored image


def transvg(row: Row, rng: np.random.Generator) -> Row:
    """With words as words, boxes to the fraction of a pixel, and cuts that keep the centre of the target.

    The box is limited to the cut, and so always has an area. Where no cut is found the image stays whole.
    """
    return _changed(row, rng, CORRECTED)


def transvg_released(row: Row, rng: np.random.Generator) -> Row:
    """As the authors' code: texts in lower case and boxes in whole pixels, what is left over being cut off.

    The centre's x is compared with the upper edge of a cut and its y with the left one, right and lower edges with
    nothing: a target may be cut to a box without area. Places are found in other words ("stop" has a top), and left and
    right exchanged there ("bright" becomes "bleft").
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
    """The first of TRIES cuts that the target allows, or all of the image."""
    ratio = int(rng.choice(SHORT_SIDES)) / min(image.size)
    for _ in range(TRIES):
        cut = _drawn(image.size, ratio, rng)
        if allows(box, cut):
            left, top, right, bottom = cut
            (x1, x2), (y1, y2) = np.clip(box[::2], left, right) - left, np.clip(box[1::2], top, bottom) - top
            return image.crop(cut), (float(x1), float(y1), float(x2), float(y2))
    return image, box


def _drawn(size: tuple[int, int], ratio: float, rng: np.random.Generator) -> Cut:
    """A cut in pixels of an image of `size` (width, height), drawn as if the image were `ratio` times as large."""
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
    """Left for right and right for left where they are words of place, as large as they were written."""
    return PLACE.sub(lambda found: _like(found[0], OTHER.get(found[0].lower(), found[0])), text)


def _like(old: str, new: str) -> str:
    """`new` in capitals where `old` is, or with a first one."""
    return new.upper() if old.isupper() else new.capitalize() if old[0].isupper() else new


def _mirrored_as_released(text: str) -> str:
    return re.sub("left|right", lambda found: OTHER[found[0]], text)


CORRECTED = Rules(lambda text: bool(PLACE.search(text)), _keeps_centre, _mirrored)
RELEASED = Rules(lambda text: any(word in text for word in PLACES), _keeps_as_released, _mirrored_as_released)
