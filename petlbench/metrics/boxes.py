"""Box overlap and Acc@0.5 for referring expressions, as TransVG's evaluation computes them.

Boxes are arrays (..., 4). The names say the format: `xywh` is (left, top, width, height), `cxcywh` is (centre x,
centre y, width, height), `xyxy` is (left, top, right, bottom). Pixels and normalised coordinates work alike, as long as
both boxes agree.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# Keeps an empty box against an empty box at 0 instead of 0 / 0.
_EPS = 1e-16


def _boxes(boxes: ArrayLike) -> Floats:
    """The boxes; one with a coordinate that is not finite is all NaN, lest an infinite one becomes the whole canvas."""
    array = np.asarray(boxes, dtype=np.float64)
    if array.shape[-1:] != (4,):
        raise ValueError(f"boxes have four coordinates in the last axis, not the shape {array.shape}")
    return np.where(np.isfinite(array).all(axis=-1, keepdims=True), array, np.nan)


def xywh_to_xyxy(boxes: ArrayLike) -> Floats:
    """(..., 4) left, top, width, height -> left, top, right, bottom."""
    array = _boxes(boxes)
    return np.concatenate([array[..., :2], array[..., :2] + array[..., 2:]], axis=-1)


def cxcywh_to_xyxy(boxes: ArrayLike) -> Floats:
    """(..., 4) centre x, centre y, width, height -> left, top, right, bottom."""
    array = _boxes(boxes)
    half = array[..., 2:] / 2
    return np.concatenate([array[..., :2] - half, array[..., :2] + half], axis=-1)


def iou_xyxy(a: ArrayLike, b: ArrayLike) -> Floats:
    """Intersection over union of `a` and `b` (..., 4), by position -> (...), in [0, 1].

    0 where they are apart, and where a coordinate is not finite: such a prediction is a miss, not a hole in the mean.
    """
    first, second = _boxes(a), _boxes(b)
    top_left = np.maximum(first[..., :2], second[..., :2])
    bottom_right = np.minimum(first[..., 2:], second[..., 2:])
    with np.errstate(over="ignore", invalid="ignore"):  # of coordinates near the largest number
        overlap = np.clip(bottom_right - top_left, 0, None).prod(axis=-1)
        areas = [(box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (first, second)]
        ious = overlap / (areas[0] + areas[1] - overlap + _EPS)
    return np.where(np.isfinite(ious), ious, 0.0)


def iou_xywh(predicted: ArrayLike, target: ArrayLike) -> Floats:
    """IoU (...) of boxes (..., 4) given as left, top, width, height, such as COCO's annotations in pixels."""
    return iou_xyxy(xywh_to_xyxy(predicted), xywh_to_xyxy(target))


def iou_cxcywh(predicted: ArrayLike, target: ArrayLike, clamp: bool = True) -> Floats:
    """IoU (...) of normalised boxes (..., 4) given as centre, width, height.

    `clamp` cuts the prediction, not the target, to the canvas [0, 1], as TransVG does before it scores.
    """
    corners = cxcywh_to_xyxy(predicted)
    return iou_xyxy(np.clip(corners, 0, 1) if clamp else corners, cxcywh_to_xyxy(target))


def acc_at(ious: ArrayLike, threshold: float = 0.5) -> float:
    """Share of overlaps that reach `threshold`, in [0, 1]. Raises ValueError when there are none."""
    return float(np.mean(_some(ious) >= threshold))


def mean_iou(ious: ArrayLike) -> float:
    """Mean overlap, in [0, 1]. Raises ValueError when there are none."""
    return float(np.mean(_some(ious)))


def _some(ious: ArrayLike) -> Floats:
    array = np.asarray(ious, dtype=np.float64)
    if not array.size:
        raise ValueError("no boxes to score")
    return array
