"""The paired bootstrap and the comparison of two methods."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from petlbench.errors import UserError
from petlbench.records import Store
from petlbench.statistics import compare, mean_std, paired_bootstrap

from .record_factory import make_record, make_samples

METRIC = "acc@0.5"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path, create=True)


def put(store: Store, method: str, scores: list[float], ids: list[str] | None = None, **fields: object) -> None:
    record = make_record(method, float(np.mean(scores)), **fields)  # type: ignore[arg-type]
    store.save(record, make_samples(METRIC, scores, ids))


def test_mean_and_deviation_leave_unknown_what_too_few_values_give() -> None:
    assert mean_std([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_std([2.0])[0] == 2.0 and math.isnan(mean_std([2.0])[1])
    assert all(math.isnan(value) for value in mean_std([]))


def test_the_interval_agrees_with_the_normal_theory_of_paired_differences() -> None:
    rng = np.random.default_rng(1)
    difference = rng.normal(0.3, 2.0, size=400)
    shared = rng.normal(0, 50.0, size=400)  # cancels in the pairs; an unpaired bootstrap would be 25 times wider
    interval = paired_bootstrap(shared + difference, shared)
    error = difference.std() / 20
    assert interval.mean_difference == pytest.approx(difference.mean())
    assert interval.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.1 * error)


def test_the_interval_covers_the_truth_as_often_as_it_claims() -> None:
    rng = np.random.default_rng(2)
    inside = 0
    for trial in range(200):
        interval = paired_bootstrap(rng.normal(1.0, 1.0, 60), np.zeros(60), resamples=400, seed=trial, confidence=0.8)
        inside += interval.low <= 1.0 <= interval.high
    assert 0.72 < inside / 200 < 0.88


def test_swapping_the_methods_mirrors_the_interval_and_a_constant_gain_has_none() -> None:
    a, b = np.random.default_rng(3).random((2, 50))
    forward, backward = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))
    constant = paired_bootstrap(a + 1, a)
    assert (constant.low, constant.high) == pytest.approx((1.0, 1.0))


def test_the_seed_decides_the_interval() -> None:
    a, b = np.random.default_rng(4).random((2, 50))
    assert paired_bootstrap(a, b, seed=7) == paired_bootstrap(a, b, seed=7) != paired_bootstrap(a, b, seed=8)


def test_memory_stays_bounded_for_many_samples() -> None:
    a = np.random.default_rng(5).random(200_000)
    tracemalloc.start()
    paired_bootstrap(a, a[::-1], resamples=60)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # all resamples at once would take 192e6


@pytest.mark.parametrize("a, b", [([1.0], [1.0, 2.0]), ([], []), ([math.nan], [1.0]), ([[1.0]], [[1.0]])])
def test_scores_that_are_no_pairs_are_refused(a: list, b: list) -> None:
    with pytest.raises(ValueError, match="paired scores"):
        paired_bootstrap(np.array(a), np.array(b))


@pytest.mark.parametrize("arguments", [{"resamples": 0}, {"confidence": 1.0}])
def test_arguments_out_of_range_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="resamples must be"):
        paired_bootstrap(np.ones(3), np.ones(3), **arguments)


def test_samples_are_paired_by_id_not_by_position(store: Store) -> None:
    put(store, "lora", [1.0, 0.0, 3.0], ["x", "y", "z"])
    put(store, "bitfit", [2.0, 0.0, -1.0], ["z", "x", "y"])
    (row,) = compare(store, "lora", "bitfit").to_dict("records")
    # Every pair differs by exactly one, which only the right pairing shows.
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((1.0, 1.0, 1.0))
    assert (row["mean_a"], row["mean_b"]) == pytest.approx((4 / 3, 1 / 3))
    assert [row[name] for name in ("task", "dataset", "backbone", "seed")] == ["rec", "digits", "tiny", 0]
    assert row["metric"] == METRIC


def test_each_task_and_seed_both_methods_ended_ok_on_is_a_row(store: Store) -> None:
    for task, seed in (("rec", 0), ("rec", 1), ("vqa", 0)):
        put(store, "lora", [1.0, 0.0], task=task, seed=seed)
        put(store, "full", [0.0, 0.0], task=task, seed=seed)
    put(store, "lora", [1.0], seed=2)
    store.save(make_record("full", outcome="oom", seed=2))
    frame = compare(store, "lora", "full", resamples=50)
    assert list(frame[["task", "seed"]].itertuples(index=False, name=None)) == [("rec", 0), ("rec", 1), ("vqa", 0)]


def test_a_bare_name_stands_for_a_single_variant_only(store: Store) -> None:
    put(store, "lora", [1.0, 0.0], variant="r8")
    put(store, "full", [0.0, 0.0])
    assert len(compare(store, "lora", "full", resamples=50)) == 1
    put(store, "lora", [1.0, 0.0], variant="r16")
    with pytest.raises(UserError, match=r"no records of method lora; .*lora:r16, lora:r8"):
        compare(store, "lora", "full")
    assert len(compare(store, "lora:r8", "lora:r16", resamples=50)) == 1


def test_an_unknown_method_gets_a_suggestion(store: Store) -> None:
    put(store, "bitfit", [1.0])
    with pytest.raises(UserError, match="did you mean bitfit"):
        compare(store, "bitfti", "bitfit")


@pytest.mark.parametrize(
    "scores, ids, said",
    [
        ([1.0, 0.0], ["image-0", "other"], "different samples"),
        ([1.0], ["image-0"], "different samples"),
        ([1.0, 0.0], ["image-0", "image-0"], "distinct sample ids"),
        ([1.0, 0.0, 1.0], ["image-0", "image-1"], "one finite score"),
        ([1.0, math.nan], None, "one finite score"),
    ],
)
def test_what_cannot_be_paired_is_refused(store: Store, scores: list[float], ids: list[str], said: str) -> None:
    put(store, "lora", [1.0, 0.0])
    put(store, "full", scores, ids)
    with pytest.raises(UserError, match=said):
        compare(store, "lora", "full")


def test_records_without_per_sample_scores_or_of_several_recipes_are_refused(store: Store) -> None:
    put(store, "lora", [1.0])
    store.save(make_record("full", 0.5))
    with pytest.raises(UserError, match="no per-sample scores; rerun"):
        compare(store, "lora", "full")
    put(store, "lora", [1.0], steps=7)
    with pytest.raises(UserError, match="several recipes"):
        compare(store, "lora", "full")


def test_methods_that_share_nothing_are_not_compared(store: Store) -> None:
    put(store, "lora", [1.0])
    put(store, "full", [1.0], task="vqa")
    with pytest.raises(UserError, match="share no task"):
        compare(store, "lora", "full")
