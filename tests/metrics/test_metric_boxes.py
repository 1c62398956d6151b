"""Box overlap against TransVG's values and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from petlbench.metrics.boxes import acc_at, cxcywh_to_xyxy, iou_cxcywh, iou_xywh, iou_xyxy, mean_iou, xywh_to_xyxy
from tests.golden import FOLDER


def test_overlaps_and_accuracy_equal_transvg() -> None:
    with np.load(FOLDER / "m2ist" / "rec_utils.npz", allow_pickle=False) as golden:
        ious = iou_cxcywh(golden["pred_cxcywh"], golden["gt_cxcywh"])
        np.testing.assert_allclose(ious, golden["iou"], rtol=0, atol=1e-9)
        assert acc_at(ious) == pytest.approx(float(golden["acc_at_05"]), abs=1e-9)


def test_formats_describe_the_same_box() -> None:
    np.testing.assert_allclose(xywh_to_xyxy([10, 20, 30, 40]), [10, 20, 40, 60])
    np.testing.assert_allclose(cxcywh_to_xyxy([25, 40, 30, 40]), [10, 20, 40, 60])


def test_overlap_by_hand() -> None:
    predicted = [[0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2]]
    target = [[0, 0, 2, 2], [1, 0, 2, 2], [2, 0, 2, 2], [5, 5, 1, 1]]
    np.testing.assert_allclose(iou_xywh(predicted, target), [1, 1 / 3, 0, 0], atol=1e-12)


def test_empty_boxes_overlap_nothing() -> None:
    assert iou_xyxy([1, 1, 1, 1], [1, 1, 1, 1]) == 0


def test_only_the_prediction_is_clamped() -> None:
    overhanging, inside = [1.0, 0.5, 1.0, 1.0], [0.75, 0.5, 0.5, 1.0]
    assert iou_cxcywh(overhanging, inside) == pytest.approx(1)
    assert iou_cxcywh(overhanging, inside, clamp=False) == pytest.approx(0.5)
    assert iou_cxcywh(inside, overhanging) == pytest.approx(0.5)


def test_threshold_itself_counts() -> None:
    assert acc_at([0.5, 0.49999, 1.0, 0.0]) == 0.5
    assert acc_at([0.7, 0.8], threshold=0.75) == 0.5
    assert mean_iou([0.5, 1.0]) == 0.75


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e308])
@pytest.mark.parametrize("coordinate", range(4))
def test_prediction_that_is_not_finite_is_a_miss_and_leaves_the_mean_a_number(value: float, coordinate: int) -> None:
    good = [0.5, 0.5, 0.2, 0.2]
    bad = [value if i == coordinate else 0.5 for i in range(4)]
    for iou in (iou_cxcywh, iou_xywh, iou_xyxy):
        ious = iou([bad, good], [[0.5, 0.5, 0.9, 0.9], good])
        assert np.isfinite(mean_iou(ious))
        if not np.isfinite(value):
            assert ious[0] == 0


@pytest.mark.filterwarnings("error")
def test_infinite_box_is_not_the_whole_canvas() -> None:
    assert iou_cxcywh([0.5, 0.5, np.inf, np.inf], [0.5, 0.5, 1, 1]) == 0


def test_malformed_and_missing_boxes_are_refused() -> None:
    with pytest.raises(ValueError, match="four coordinates"):
        iou_xyxy([1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match="no boxes"):
        acc_at([])
