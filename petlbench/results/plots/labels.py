"""Texts inside a panel: names beside points, sizes along curves. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation

from petlbench.results.plots.placement import nearest, place_beside, place_labels

LEADER_POINTS = 10.0  # a label farther than this from its point gets a line to it
INK, FAINT = "#222222", "#8A8A8A"
OFFSET: dict[str, Any] = {"textcoords": "offset points", "annotation_clip": False}


class Labels:
    """Write texts beside the `points` [n, 2], in data units, of `axes`, whose limits are final.

    `marker` is the diameter of a marker in typographic points. `lines` [k, 2, 2], in data units, go from point to
    point; texts avoid them, and texts that were written before.
    """

    def __init__(self, axes: Axes, points: np.ndarray, marker: float, lines: np.ndarray) -> None:
        axes.apply_aspect()
        self.axes, self.points, self.marker = axes, points, marker
        self.unit = axes.figure.dpi / 72
        self.pixels = axes.transData.transform(points)
        self.lines = axes.transData.transform(lines.reshape(-1, 2)).reshape(-1, 2, 2)
        self.frame = axes.bbox.extents + 2 * self.unit * np.array([1, 1, -1, -1])
        self.written = np.empty((0, 4))

    def name(self, names: Mapping[int, str]) -> None:
        """Write each name near its point, with a line between them where they are not side by side."""
        chosen = list(names)
        texts = [self._text(index, _short(name), 8.0, INK) for index, name in names.items()]
        solid = self._markers([*chosen, *np.setdiff1d(np.arange(len(self.points)), chosen)])
        boxes = place_labels(self.pixels[chosen], self._sizes(texts, 1.5), self.frame, solid, self.lines, self.unit)
        for number, (text, box, index) in enumerate(zip(texts, boxes, chosen, strict=True)):
            self._move(text, box, index)
            text.set_gid(f"label-{self.axes.get_subplotspec().colspan.start}-{number}")  # type: ignore[union-attr]
            end = nearest(self.pixels[index], box)
            start = (end - self.pixels[index]) / self.unit
            if np.hypot(*start) > LEADER_POINTS:
                line = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": self.marker / 2}
                self.axes.annotate("", self.points[index], tuple(start), arrowprops=line, zorder=3, **OFFSET)
                self.lines = np.vstack([self.lines, [[self.pixels[index], end]]])
        self.written = np.vstack([self.written, boxes])

    def hint(self, hints: Mapping[int, str]) -> None:
        """Write each hint in small print right beside its point; leave it out where there is no room."""
        chosen = list(hints)
        texts = [self._text(index, hint, 6.0, FAINT) for index, hint in hints.items()]
        solid = np.vstack([self._markers(range(len(self.points))), self.written])
        gap = self.marker / 2 * self.unit + 1.0
        boxes = place_beside(self.pixels[chosen], self._sizes(texts, 0.0), self.frame, solid, self.lines, gap)
        for text, box, index in zip(texts, boxes, chosen, strict=True):
            if np.isnan(box).any():
                text.remove()
            else:
                self._move(text, box, index)

    def _text(self, index: int, text: str, size: float, color: str) -> Annotation:
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "color": color, "zorder": 6}
        return self.axes.annotate(text, self.points[index], (0, 0), **style, **OFFSET)

    def _move(self, text: Annotation, box: np.ndarray, index: int) -> None:
        text.set_position(tuple((box.reshape(2, 2).mean(0) - self.pixels[index]) / self.unit))

    def _sizes(self, texts: Sequence[Annotation], margin: float) -> np.ndarray:
        renderer = self.axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
        sizes = [text.get_window_extent(renderer).size for text in texts]
        return np.array(sizes).reshape(-1, 2) + 2 * margin * self.unit

    def _markers(self, order: Sequence[int] | range) -> np.ndarray:
        reach = self.marker / 2 * self.unit
        pixels = self.pixels[list(order)]
        return np.hstack([pixels - reach, pixels + reach])


def _short(name: str) -> str:
    """Return at most 32 characters: the beginning and the end, which say most."""
    return name if len(name) <= 32 else f"{name[:18]}…{name[-13:]}"
