"""A scene: a few coloured objects on a small canvas, with their boxes and pixels.

Two domains share sizes, colours and layout, and differ in kinds and backgrounds: `shapes` draws geometric figures on
light gradients, `digits` real handwritten digits (the UCI set in scikit-learn) on grainy textures. A scene depends on
(domain, split, seed, index) and the canvas alone, so any scene can be made without the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from petlbench.api.source import Split

T = TypeVar("T")
Domain = Literal["shapes", "digits"]
Box = tuple[int, int, int, int]

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart", "crescent", "arrow")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS: dict[str, tuple[str, ...]] = {"shapes": SHAPES, "digits": DIGITS}
# Every colour contrasts with both kinds of background; black and white do not, so they are missing.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 30),
    "green": (30, 160, 50),
    "blue": (40, 75, 245),
    "yellow": (245, 225, 20),
    "orange": (255, 135, 0),
    "purple": (155, 60, 235),
    "cyan": (0, 205, 225),
    "pink": (255, 95, 180),
}
SIZES = ("small", "large")
# Heights in pixels on a canvas of 48. Handwriting must be slightly larger than figures to be readable.
HEIGHTS: dict[str, dict[str, tuple[int, int]]] = {
    "shapes": {"small": (10, 12), "large": (15, 17)},
    "digits": {"small": (12, 13), "large": (17, 18)},
}
COUNTS = (2, 3, 3, 4, 4, 4, 5, 5, 5)  # objects in a scene, drawn uniformly from this list
OPACITY_FLOOR = 0.25  # fainter pixels are not drawn, so that a box is tight around visible pixels
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
DIGIT_SHARES = (0.6, 0.8)  # where each class's samples are cut into train, validation and test
SUPERSAMPLING = 8


@dataclass(frozen=True)
class Obj:
    """One object. `box` is x, y, width, height in pixels, tight around the drawn pixels."""

    kind: str
    colour: str
    size: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        x, y, w, h = self.box
        return x + w / 2, y + h / 2


@dataclass(frozen=True)
class Scene:
    """Objects with disjoint boxes, and their image: uint8, (height, width, 3)."""

    domain: Domain
    objects: tuple[Obj, ...]
    image: np.ndarray


def stream(domain: Domain, split: Split, seed: int, index: int, purpose: int) -> np.random.Generator:
    """Return a separate generator for each scene and purpose (1: picture, 2: language).

    `purpose` must not be zero, because numpy pads a seed's words with zeros.
    """
    return np.random.default_rng([list(KINDS).index(domain), SPLITS.index(split), seed, index, purpose])


def make_scene(domain: Domain, split: Split, seed: int, index: int, image_size: int = 48) -> Scene:
    """Return scene `index` of a split: 2 to 5 separate objects on a canvas of `image_size` (48 to 96) pixels a side."""
    rng = stream(domain, split, seed, index, purpose=1)
    pixels = background(domain, rng, image_size)
    count = pick(rng, COUNTS)
    while True:
        looks = _looks(domain, count, rng)
        masks = [_mask(domain, split, kind, size, image_size / 48, rng) for kind, _, size in looks]
        corners = _place([(m.shape[1], m.shape[0]) for m in masks], image_size, rng)
        if corners:
            break
    objects = []
    for (kind, colour, size), mask, (x, y) in zip(looks, masks, corners, strict=True):
        h, w = mask.shape
        patch = pixels[y : y + h, x : x + w]
        patch += mask[..., None] * (np.array(COLOURS[colour]) - patch)
        objects.append(Obj(kind, colour, size, (x, y, w, h)))
    return Scene(domain, tuple(objects), np.rint(pixels).astype(np.uint8))


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """Return one item, drawn uniformly; several times faster than `rng.choice`."""
    return items[int(rng.integers(len(items)))]


def background(domain: Domain, rng: np.random.Generator, side: int) -> np.ndarray:
    """Return an empty canvas, float (side, side, 3): a light plain gradient, or a grainy texture."""
    ys, xs = np.mgrid[0:side, 0:side] / side - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    slope = xs * math.cos(angle) + ys * math.sin(angle)
    tint = rng.uniform(-10, 10, 3)
    if domain == "shapes":
        field = rng.uniform(165, 225) + rng.uniform(0, 35) * slope
        return np.clip(field[..., None] + tint, 0, 250)
    cells = int(rng.integers(4, 9))
    texture = (
        np.sin(slope * rng.uniform(20, 45)),
        np.kron(rng.uniform(-1, 1, (cells, cells)), np.ones((-(-side // cells),) * 2))[:side, :side],
        np.sign(np.sin(xs * math.pi * cells) * np.sin(ys * math.pi * cells)),
    )[int(rng.integers(3))]
    field = rng.uniform(150, 205) + rng.uniform(6, 13) * texture
    return np.clip(field[..., None] + tint + rng.normal(0, 6, (side, side, 3)), 120, 250)


def _looks(domain: Domain, count: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Return (kind, colour, size) of each object, no two alike.

    Most scenes repeat colours, so that a model must see the kind to distinguish objects; some repeat a kind.
    """
    colours = list(COLOURS)
    palette = [pick(rng, colours) for _ in range(max(1, count // 2))] if rng.random() < 0.6 else colours
    while True:
        kinds = [pick(rng, KINDS[domain]) for _ in range(count)]
        if rng.random() < 0.3:
            kinds[0] = kinds[1]
        sizes = ["large" if rng.random() < 0.5 else "small" for _ in range(count)]
        looks = [(kind, pick(rng, palette), size) for kind, size in zip(kinds, sizes, strict=True)]
        if len(set(looks)) == count and sizes.count("large") <= 3:
            return looks


def _place(shapes: list[tuple[int, int]], side: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Return top-left corners that keep boxes (width, height) apart and inside; an empty list if they do not fit."""
    gap = round(2 * side / 48)
    placed: dict[int, Box] = {}
    for i in sorted(
        range(len(shapes)), key=lambda i: -shapes[i][1]
    ):  # large boxes first, because they are hard to place
        w, h = shapes[i]
        for u, v in rng.random((40, 2)).tolist():
            x, y = 1 + int(u * (side - w - 1)), 1 + int(v * (side - h - 1))
            if all(
                x + w + gap <= a or a + c + gap <= x or y + h + gap <= b or b + d + gap <= y
                for a, b, c, d in placed.values()
            ):
                placed[i] = (x, y, w, h)
                break
        else:
            return []
    return [placed[i][:2] for i in range(len(shapes))]


def _mask(domain: Domain, split: Split, kind: str, size: str, scale: float, rng: np.random.Generator) -> np.ndarray:
    low, high = (round(bound * scale) for bound in HEIGHTS[domain][size])
    height = int(rng.integers(low, high + 1))
    if domain == "digits":
        return _digit_mask(pick(rng, digit_samples(split)[kind]), height)
    return _shape_mask(kind, int(rng.integers(low, high + 1)), height)


def _trim(opacity: np.ndarray) -> np.ndarray:
    """Drop faint pixels, then empty borders."""
    opacity = np.where(opacity < OPACITY_FLOOR, 0, opacity)
    rows, columns = np.flatnonzero(opacity.any(1)), np.flatnonzero(opacity.any(0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@cache
def _digit_images() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images / 16, digits.target


@cache
def digit_samples(split: Split) -> dict[str, tuple[int, ...]]:
    """Return the indices into scikit-learn's digits that a split may use, by kind; the splits share none."""
    target = _digit_images()[1]
    samples = {}
    for label, kind in enumerate(DIGITS):
        members = np.random.default_rng([label, 1]).permutation(np.flatnonzero(target == label))
        cuts = [round(share * len(members)) for share in DIGIT_SHARES]
        samples[kind] = tuple(int(i) for i in np.split(members, cuts)[SPLITS.index(split)])
    return samples


@cache
def _digit_mask(sample: int, height: int) -> np.ndarray:
    glyph = _trim(_digit_images()[0][sample])
    width = max(3, round(height * glyph.shape[1] / glyph.shape[0]))
    grown = Image.fromarray(glyph.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    return _trim(np.clip(np.asarray(grown) * 1.2, 0, 1))


@cache
def _shape_mask(kind: str, width: int, height: int) -> np.ndarray:
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    _DRAW[kind](ImageDraw.Draw(canvas), canvas.width - 1, canvas.height - 1)
    return _trim(np.asarray(canvas.resize((width, height), Image.Resampling.BOX), dtype=np.float64) / 255)


Painter = Callable[[ImageDraw.ImageDraw, int, int], None]


def _polygon(*points: tuple[float, float]) -> Painter:
    """Return a painter of a polygon, given in fractions of the box and stretched to touch all its sides."""
    xs, ys = zip(*points, strict=True)

    def paint(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
        draw.polygon(
            [((x - min(xs)) / (max(xs) - min(xs)) * w, (y - min(ys)) / (max(ys) - min(ys)) * h) for x, y in points],
            fill=255,
        )

    return paint


def _ellipses(*parts: tuple[float, float, float, float, int]) -> Painter:
    """Return a painter of ellipses (left, top, right, bottom in fractions of the box, fill), later over earlier."""

    def paint(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
        for left, top, right, bottom, fill in parts:
            draw.ellipse((left * w, top * h, right * w, bottom * h), fill=fill)

    return paint


def _heart(draw: ImageDraw.ImageDraw, w: int, h: int) -> None:
    _ellipses((0, 0, 0.54, 0.58, 255), (0.46, 0, 1, 0.58, 255))(draw, w, h)
    draw.polygon([(0.03 * w, 0.4 * h), (0.5 * w, h), (0.97 * w, 0.4 * h), (0.5 * w, 0.25 * h)], fill=255)


def _star_points() -> list[tuple[float, float]]:
    turns = [(math.pi * i / 5, 1.0 if i % 2 == 0 else 0.42) for i in range(10)]
    return [(radius * math.sin(turn), -radius * math.cos(turn)) for turn, radius in turns]


_A, _B = 0.33, 0.67
_DRAW: dict[str, Painter] = {
    "circle": _ellipses((0, 0, 1, 1, 255)),
    "square": _polygon((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": _polygon((0.5, 0), (1, 1), (0, 1)),
    "star": _polygon(*_star_points()),
    "cross": _polygon(
        (_A, 0), (_B, 0), (_B, _A), (1, _A), (1, _B), (_B, _B), (_B, 1), (_A, 1), (_A, _B), (0, _B), (0, _A), (_A, _A)
    ),
    "diamond": _polygon((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "ring": _ellipses((0, 0, 1, 1, 255), (0.27, 0.27, 0.73, 0.73, 0)),
    "heart": _heart,
    "crescent": _ellipses((0, 0, 1, 1, 255), (0.35, 0.05, 1.25, 0.95, 0)),
    "arrow": _polygon((0, _A), (0.5, _A), (0.5, 0), (1, 0.5), (0.5, 1), (0.5, _B), (0, _B)),
}
