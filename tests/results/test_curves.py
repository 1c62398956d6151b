"""Curves, fronts and hypervolumes equal values computed by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from petlbench.results.plots.curves import (
    COLUMNS,
    Curve,
    box,
    current,
    curve_of,
    curve_table,
    curves,
    front,
    has_curves,
    hypervolume,
)
from tests.frame_factory import make_frame, row, sweep

BOX = {"reference": (1000.0, 0.0), "ideal": (1.0, 1.0)}


def test_the_front_goes_from_cheap_to_dear_without_dominated_or_repeated_points() -> None:
    assert front([30, 10, 20, 40, 10], [0.6, 0.4, 0.7, 0.9, 0.4]) == [1, 2, 3]
    assert front([10, 10, 10], [0.1, 0.3, 0.2]) == [1]
    assert front([], []) == []


@pytest.mark.parametrize("costs, scores", [([1, 2], [1]), ([-1], [0.5]), ([1], [np.nan]), ([[1]], [[1]])])
def test_points_without_an_order_are_refused(costs: list[float], scores: list[float]) -> None:
    with pytest.raises(ValueError, match="costs and scores"):
        front(costs, scores)


def test_the_hypervolume_is_the_area_under_the_staircase_over_that_of_the_box() -> None:
    # Three decades wide. 0.2 over the last 3, then 0.3 more over the last 2, then 0.4 more over the last 1.
    costs, scores = [1, 10, 100, 1000], [0.2, 0.5, 0.9, 1.0]
    assert hypervolume(costs, scores, **BOX) == pytest.approx((0.2 * 3 + 0.3 * 2 + 0.4 * 1) / 3)
    # The same with scores from 0.1 to 1.1, so the side has length one.
    shifted = hypervolume(costs, scores, (1000.0, 0.1), (1.0, 1.1))
    assert shifted == pytest.approx((0.1 * 3 + 0.3 * 2 + 0.4 * 1) / 3)


def test_the_box_ends_by_default_at_the_smallest_positive_cost_and_the_best_score() -> None:
    assert hypervolume([0, 10, 100], [0.1, 0.3, 0.5], (100.0, 0.0)) == pytest.approx(0.3 / 0.5)


@pytest.mark.parametrize("corner, share", [((1, 1), 1.0), ((1000, 1), 0.0), ((1, 0), 0.0), ((10, 0.5), 1 / 3)])
def test_a_point_is_worth_what_it_saves_times_what_it_gains(corner: tuple[float, float], share: float) -> None:
    assert hypervolume([corner[0]], [corner[1]], **BOX) == pytest.approx(share)


@pytest.mark.parametrize("outside, inside", [((0.0, 0.5), (1.0, 0.5)), ((5e3, 0.5), (1e3, 0.5)), ((10, 2), (10, 1))])
def test_what_lies_beyond_the_box_counts_as_on_its_side(
    outside: tuple[float, float], inside: tuple[float, float]
) -> None:
    points = [([c, 30.0], [s, 0.6]) for c, s in (outside, inside)]
    assert hypervolume(*points[0], **BOX) == pytest.approx(hypervolume(*points[1], **BOX))
    assert hypervolume([10.0], [-1.0], **BOX) == 0.0


def test_a_dominated_point_changes_nothing_and_a_dominating_one_adds() -> None:
    costs, scores = [3.0, 40.0, 500.0], [0.2, 0.6, 0.8]
    before = hypervolume(costs, scores, **BOX)
    assert hypervolume([*costs, 60.0], [*scores, 0.55], **BOX) == before
    assert hypervolume([*costs, 30.0], [*scores, 0.65], **BOX) > before


def test_the_unit_of_cost_does_not_matter() -> None:
    costs, scores = np.array([3.0, 40.0, 500.0]), [0.2, 0.6, 0.8]
    millions = hypervolume(costs / 1e6, scores, (1e-3, 0.0), (1e-6, 1.0))
    assert millions == pytest.approx(hypervolume(costs, scores, **BOX))


@pytest.mark.parametrize("reference", [(1.0, 0.0), (1000.0, 1.0), (np.nan, 0.0)], ids=["no width", "no height", "nan"])
def test_a_box_without_area_has_no_hypervolume(reference: tuple[float, float]) -> None:
    assert np.isnan(hypervolume([1.0], [1.0], reference, (1.0, 1.0)))


def test_the_box_runs_from_the_dearest_cost_and_the_floor_s_score_to_the_cheapest_and_the_best() -> None:
    points = [("full", 900, 0.8), ("head_only", 30, 0.4), ("bitfit", 20, 0.3)]
    frame = make_frame(*(row(method=m, trainable_params=p, score_mean=s) for m, p, s in points))
    assert box(frame, "trainable_params", ["head_only", "unheard_of"]) == ((900, 0.4), (20, 0.8))
    assert box(frame[frame["method"] != "head_only"], "trainable_params", ["head_only"]) == ((900, 0.3), (20, 0.8))


def test_a_cost_of_zero_counts_as_a_tenth_of_the_smallest_other_one() -> None:
    frame = make_frame(*(row(trainable_params=p, score_mean=s) for p, s in [(0, 0.5), (100, 0.6), (1000, 0.7)]))
    reference, ideal = box(frame, "trainable_params")
    assert (reference.cost, ideal.cost) == (1000, 10)
    assert np.isnan(box(frame[:1], "trainable_params")[0].cost)


def test_the_sizes_of_a_method_form_a_curve_and_everything_else_stands_alone() -> None:
    frame = make_frame(
        *sweep("lora", "rank", {16: (4, 0.5), 2: (9, 0.6), 4: (3, 0.4)}),
        *sweep("adapter", "reduction", {8: (1, 0.5)}),
        row(method="lora", size_name="rank", size=8.0),
        row(method="lora", variant="released rank=2", size_name="rank", size=2.0),
        row(method="full"),
    )
    assert curves(frame) == {
        Curve("adapter", "", "reduction"): [3],
        Curve("full", "", ""): [6],
        Curve("lora", "", ""): [4],
        Curve("lora", "", "rank"): [1, 2, 0],
        Curve("lora", "released", "rank"): [5],
    }


@pytest.mark.parametrize("variant, rest", [("rank=4 released", "released"), ("a rank=0.5 b", "a b"), ("rank=4", "")])
def test_the_size_is_taken_out_of_the_variant(variant: str, rest: str) -> None:
    (only,) = make_frame(row(variant=variant, size_name="rank", size=4.0)).itertuples()
    assert curve_of(only) == ("lora", rest, "rank")


def test_stale_rows_count_only_where_no_other_has_a_score() -> None:
    frame = make_frame(row(method="a", stale=True), row(method="b"), row(method="c", score_mean=np.nan))
    assert list(current(frame)["method"]) == ["b"]
    assert list(current(frame.drop(index=1))["method"]) == ["a"]


def table_frame() -> pd.DataFrame:
    return make_frame(
        row(method="full", trainable_params=1000, score_mean=0.9, train_seconds=1000.0),
        row(method="head_only", trainable_params=1, score_mean=0.5, train_seconds=1.0),
        *sweep("lora", "rank", {1: (10, 0.6), 4: (100, 0.8)}, train_seconds=10.0, contended=True),
        *sweep("adapter", "reduction", {8: (10, 0.7), 4: (100, 0.7)}, stale=True),
        *sweep("oft", "block", {8: (1, 0.9)}, outcome="oom"),
    )


def test_the_table_has_the_hypervolume_of_each_curve_and_its_share_of_the_front() -> None:
    table = curve_table(table_frame(), ["head_only"])
    assert tuple(table.columns) == COLUMNS
    parameters = table[table["axis"] == "trainable_params"].set_index("method")
    # In a box of three decades by 0.4: a quarter of the score at two decades, two quarters more at one.
    expected = (0.25 * 2 + 0.5 * 1) / 3
    assert parameters["hypervolume"].to_dict() == pytest.approx({"lora": expected, "full": 0.0, "head_only": 0.0})
    assert parameters["share_of_front"]["lora"] == pytest.approx(1.0)
    assert parameters["points"].to_dict() == {"lora": 2, "full": 1, "head_only": 1}
    assert parameters["size_name"].to_dict() == {"lora": "rank", "full": "", "head_only": ""}


def test_contended_timings_stay_out_of_the_table_s_time_axis() -> None:
    table = curve_table(table_frame())
    assert set(table.loc[table["axis"] == "train_seconds", "method"]) == {"full", "head_only"}


def test_costs_that_are_all_equal_leave_the_hypervolume_out() -> None:
    table = curve_table(table_frame())
    assert table.loc[table["axis"] == "step_flops", ["hypervolume", "share_of_front"]].isna().all(axis=None)


def test_curves_need_a_method_at_two_sizes_in_one_setting() -> None:
    one, two = sweep("lora", "rank", {1: (10, 0.6), 2: (20, 0.7)})
    assert has_curves(make_frame(one, two))
    assert not has_curves(make_frame(one, {**two, "task": "vqa"}, row(method="full")))
    assert not has_curves(make_frame(one, {**two, "score_mean": np.nan}))
