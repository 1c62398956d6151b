"""The bootstrap over seeds and samples, pairs and ranks and their cache, and the comparison of two methods."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from petlbench.core.errors import UserError
from petlbench.results.leaderboard import table
from petlbench.results.store import Store, find
from petlbench.results.uncertainty import analysis
from petlbench.results.uncertainty.bootstrap import bootstrap_means, covariances
from petlbench.results.uncertainty.comparison import compare
from petlbench.results.uncertainty.pairs import PAIR_COLUMNS, mean_std, pairs
from petlbench.results.uncertainty.significance import holm, p_values, quantiles
from tests.record_factory import make_record, make_samples

METRIC = "acc@0.5"
DESIGNED_COLUMNS = ["task", "dataset", "backbone", "a", "b", "metric", "mean_a", "mean_b", "difference", "low", "high"]
NORMAL = np.random.default_rng(0).normal(size=400)
NORMAL = (NORMAL - NORMAL.mean()) / NORMAL.std()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "results", create=True)


def put(store: Store, method: str, scores: object, ids: list[str] | None = None, **fields: object) -> None:
    scores = np.asarray(scores, dtype=float)
    record = make_record(method, float(scores.mean()), **fields)  # type: ignore[arg-type]
    store.save(record, make_samples(METRIC, scores.tolist(), ids))


def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every new computation fail from here on."""

    def refuse(*_: object) -> None:
        raise AssertionError("computed anew")

    monkeypatch.setattr(analysis, "bootstrap_means", refuse)


def error(scores: list[np.ndarray], seeds: list[list[int]]) -> float:
    """Return the standard error of one row's mean (checked against resamples) or of two rows' difference."""
    found = covariances(scores, seeds)
    resampled = bootstrap_means(scores, seeds, 4_000)
    assert resampled.std(axis=1, ddof=1) == pytest.approx(found.of_rows.errors, rel=0.05)
    largest = found.of_rows.errors.max()
    assert resampled.mean(axis=1) == pytest.approx([matrix.mean() for matrix in scores], abs=0.06 * largest)
    return float(found.of_rows.errors[0] if len(scores) == 1 else found.of_differences.errors[0, 1])


def p_and_freedom(scores: Sequence[np.ndarray], seeds: list[list[int]]) -> tuple[float, float]:
    """Return the p value of the difference of two rows and its degrees of freedom."""
    errors, freedom = (values[0, 1] for values in covariances(scores, seeds).of_differences)
    a, b = scores
    return float(p_values(a.mean() - b.mean(), errors, freedom)), float(freedom)


def test_mean_and_deviation_leave_unknown_what_too_few_values_give() -> None:
    assert mean_std([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_std([2.0])[0] == 2.0 and math.isnan(mean_std([2.0])[1])
    assert all(math.isnan(value) for value in mean_std([]))


def test_the_error_of_one_seed_is_that_of_the_mean_of_its_samples() -> None:
    assert error([3 * NORMAL[None]], [[0]]) == pytest.approx(3 / 20, rel=0.01)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_seeds_add_their_own_standard_error_however_few_they_are(seeds: int) -> None:
    levels = np.linspace(0.0, 0.5, seeds)
    assert error([np.repeat(levels[:, None], 50, axis=1)], [list(range(seeds))]) == pytest.approx(
        levels.std(ddof=1) / math.sqrt(seeds), rel=0.05
    )
    both = error([levels[:, None] + NORMAL], [list(range(seeds))])
    assert both == pytest.approx(math.sqrt(levels.var(ddof=1) / seeds + 1 / 400), rel=0.01)


def test_pairing_removes_what_two_methods_have_in_common() -> None:
    rng = np.random.default_rng(1)
    own = rng.normal(0.3, 2.0, size=(1, 400))
    hard = 50 * NORMAL
    assert error([own + hard, hard[None]], [[0], [0]]) == pytest.approx(own.std() / 20, rel=0.01)
    bad_seed = np.array([[0.0], [3.0], [9.0]])
    seeds = [[0, 1, 2], [0, 1, 2]]
    assert error([own + bad_seed, np.zeros((3, 400)) + bad_seed], seeds) == pytest.approx(own.std() / 20, rel=0.01)
    # Rows with other seeds have nothing in common.
    unpaired = error([own + bad_seed, np.zeros((3, 400)) + bad_seed], [[0, 1, 2], [3, 4, 5]])
    assert unpaired == pytest.approx(math.sqrt(2 * bad_seed.var(ddof=1) / 3 + own.var() / 400), rel=0.01)


def test_rounding_does_not_pass_for_a_tiny_error() -> None:
    scores = np.random.default_rng(3).random((3, 100))
    gains = [scores + gain for gain in np.linspace(0, 1, 20)]
    assert (covariances(gains, [[0, 1, 2]] * 20).of_differences.errors == 0).all()


def test_a_row_s_draws_do_not_depend_on_the_other_rows() -> None:
    a, b = np.random.default_rng(2).random((2, 3, 50))
    alone = bootstrap_means([a], [[0, 1, 2]], 20)
    assert np.allclose(bootstrap_means([b[:2], a, b], [[5, 7], [0, 1, 2], [1, 2, 3]], 20)[1], alone[0], rtol=1e-12)
    assert not np.allclose(bootstrap_means([a], [[0, 1, 2]], 20, seed=1), alone)


def test_memory_stays_bounded_for_many_samples() -> None:
    scores = np.random.default_rng(5).random((1, 200_000))
    tracemalloc.start()
    bootstrap_means([scores], [[0]], resamples=60)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # all resamples at once would need 192e6


def test_holm_steps_down_and_never_decreases() -> None:
    adjusted = holm(np.array([0.01, math.nan, 0.04, 0.03, 0.005]))
    # By hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 1 x 0.04 raised to the one before it; the missing one is left out.
    assert adjusted[[0, 2, 3, 4]] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert math.isnan(adjusted[1])
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0] and holm(np.array([])).size == 0


def test_p_values_are_student_s_and_decided_where_nothing_varies() -> None:
    errors = np.array([1.0, 1.0, 1.0, 0.0, 0.0, math.nan])
    p = p_values(np.array([12.706205, -12.706205, 0.0, 1.0, 0.0, 1.0]), errors, np.ones(6))
    assert p[:5] == pytest.approx([0.05, 0.05, 1.0, 0.0, 1.0], abs=1e-6) and math.isnan(p[5])
    assert quantiles(np.array([1.0, 1e9]), 0.95) == pytest.approx([12.706205, 1.959964], abs=1e-6)


def test_where_seeds_decide_the_test_is_the_paired_t_test_over_seed_means() -> None:
    a, b = np.array([0.1, 0.5, 0.3]), np.array([0.4, 1.2, 0.9])
    scores = [levels[:, None] + 1e-6 * NORMAL + 5 * NORMAL for levels in (a, b)]  # the difficulty of samples cancels
    p, freedom = p_and_freedom(scores, [[0, 1, 2]] * 2)
    assert freedom == pytest.approx(2, abs=1e-3) and p == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-3)


def test_where_samples_decide_the_test_is_the_paired_t_test_over_samples() -> None:
    a, b = np.random.default_rng(4).normal(size=(2, 1, 8)) + np.array([[[1.0]], [[0.0]]])
    p, freedom = p_and_freedom([a, b], [[0], [0]])
    assert freedom == pytest.approx(7) and p == pytest.approx(stats.ttest_rel(a[0], b[0]).pvalue)


def test_other_seeds_bring_degrees_of_freedom_of_their_own() -> None:
    levels = np.array([0.0, 0.4, 0.9])
    a, b = (np.repeat(values[:, None], 50, axis=1) for values in (levels, 2 + levels[::-1]))
    p, freedom = p_and_freedom([a, b], [[0, 1, 2], [3, 4, 5]])
    # Shares are not squared; Welch's formula squares them and would give 4 for two groups of equal spread.
    assert freedom == pytest.approx(2) and p_and_freedom([a, b[:1]], [[0, 1, 2], [3]])[1] == pytest.approx(2)
    welch = stats.ttest_ind(levels, 2 + levels, equal_var=False)
    assert p == pytest.approx(2 * stats.t.sf(abs(welch.statistic), 2))


def test_degrees_of_freedom_lie_between_those_of_seeds_and_of_samples() -> None:
    spreads = np.array([1e-3, 0.03, 0.1, 0.3, 3.0])
    levels = spreads[:, None, None] * np.array([-1.0, 0.0, 1.0])[:, None]
    freedom = covariances(list(levels + NORMAL), [[0, 1, 2]] * 5).of_rows.freedom
    assert (np.diff(freedom) < 0).all() and freedom[[0, -1]] == pytest.approx([399, 2], rel=0.1)


@pytest.mark.parametrize("seeds, spread, at_most", [(1, 0.0, 0.07), (3, 0.0, 0.06), (3, 0.3, 0.075), (10, 0.03, 0.07)])
def test_about_as_many_null_pairs_are_significant_as_claimed(seeds: int, spread: float, at_most: float) -> None:
    rng = np.random.default_rng(6)
    found = []
    for _ in range(1000):
        levels = rng.normal(0, spread, size=(2, seeds, 1))
        a, b = rng.normal(0, 0.5, size=(2, seeds, 100)) + levels + rng.normal(0, 0.5, size=100)
        found.append(p_and_freedom([a, b], [list(range(seeds))] * 2)[0] < 0.05)
    assert 0.008 < np.mean(found) < at_most


def test_identical_methods_tie_and_a_clear_difference_separates(store: Store) -> None:
    for seed in range(3):
        scores = (np.random.default_rng(seed).random(200) < 0.6).astype(float)
        put(store, "lora", scores, seed=seed)
        put(store, "twin", scores, seed=seed)
        put(store, "bitfit", 0.5 * scores, seed=seed)
    frame = pairs(store)
    assert list(frame.columns) == list(PAIR_COLUMNS) == [*DESIGNED_COLUMNS, "p", "p_holm", "significant"]
    assert list(frame[["a", "b"]].itertuples(index=False, name=None)) == [
        ("lora", "twin"),
        ("lora", "bitfit"),
        ("twin", "bitfit"),
    ]
    assert frame.loc[0, ["difference", "low", "high", "p", "p_holm"]].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert frame["significant"].tolist() == [False, True, True]
    assert frame["p_holm"].tolist()[1] == pytest.approx(3 * frame["p"].tolist()[1])
    row = frame.iloc[1]
    assert row.low < row.difference < row.high and row.difference == pytest.approx(row.mean_a - row.mean_b)
    board = table(store)
    assert board["rank"].tolist() == [1, 1, 3] and board.attrs["tied"] == {0, 1}
    # The same comparison gives the same result.
    alone = compare(store, "lora", "bitfit").iloc[0]
    assert [alone[name] for name in ("low", "high", "p")] == pytest.approx([row.low, row.high, row.p])


def test_the_interval_of_a_row_is_laid_around_its_reported_score(store: Store) -> None:
    scores = 0.5 + 0.1 * NORMAL
    store.save(make_record("lora", 0.7), make_samples(METRIC, scores.tolist()))
    row = table(store).iloc[0]
    assert (row.score_low, row.score_high) == pytest.approx((0.7 - 1.96 * 0.005, 0.7 + 1.96 * 0.005), abs=0.0008)
    assert row["rank"] == 1


def test_the_interval_of_few_seeds_is_student_s(store: Store) -> None:
    levels = np.array([0.4, 0.5, 0.7])
    for seed, level in enumerate(levels):
        put(store, "lora", level + 1e-6 * NORMAL, seed=seed)
    row = table(store).iloc[0]
    low, high = stats.t.interval(0.95, 2, levels.mean(), stats.sem(levels))
    assert (row.score_low, row.score_high) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_pairs_keep_settings_metrics_and_code_apart(store: Store) -> None:
    fields: list[dict] = [{}, {"task": "vqa"}, {"fingerprints": {"data": "2", "method": "1"}}]
    for number, change in enumerate(fields):
        put(store, f"a{number}", NORMAL, **change)
        put(store, f"b{number}", NORMAL + 1, **change)
    put(store, "c", NORMAL + 9, fingerprints={"data": "2", "method": "3"})
    found = set(pairs(store)[["a", "b"]].itertuples(index=False, name=None))
    # Only the method's own code may differ.
    assert found == {("b0", "a0"), ("b1", "a1"), ("b2", "a2"), ("c", "a2"), ("c", "b2")}


def test_what_cannot_be_paired_has_no_rank_and_a_note_says_why(store: Store) -> None:
    for method in ("a", "b", "failing"):
        put(store, method, NORMAL)
    store.save(make_record("failing", outcome="oom", seed=1))
    put(store, "elsewhere", NORMAL + 5, [f"other-{index}" for index in range(400)])
    store.save(make_record("bare", 0.9))
    frame = table(store)
    ranks = dict(zip(frame["method"], frame["rank"], strict=True))
    assert (ranks["a"], ranks["b"]) == (1, 1) and frame["rank"].notna().sum() == 2
    bounded = dict(zip(frame["method"], frame["score_low"].notna(), strict=True))
    assert bounded == {"a": True, "b": True, "failing": True, "elsewhere": True, "bare": False}
    notes = frame.attrs["notes"]["rec", "digits", "tiny"]
    assert notes == sorted(pairs(store).attrs["notes"]["rec", "digits", "tiny"]) and len(notes) == 2
    assert "bare is not ranked: bare on rec:digits (tiny, seed 0) has no per-sample scores" in notes[0]
    assert notes[1] == "elsewhere is not ranked: tested on other samples than most"
    assert len(pairs(store)) == 1


def test_nothing_recorded_gives_no_pairs(store: Store) -> None:
    assert list(pairs(store).columns) == list(PAIR_COLUMNS) and len(pairs(store)) == 0


def test_the_cache_answers_the_same_without_computing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(2):
        put(store, "a", NORMAL, seed=seed)
        put(store, "b", NORMAL[::-1], seed=seed)
    store.save(make_record("bare", 0.9))
    first, first_pairs = table(store), pairs(store)
    frozen(monkeypatch)
    pd.testing.assert_frame_equal(table(store), first)
    pd.testing.assert_frame_equal(pairs(store), first_pairs)
    assert table(store).attrs == first.attrs


@pytest.mark.parametrize("change", ["started", "scores", "another", "outcome"])
def test_a_rerun_is_not_answered_from_the_cache(store: Store, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    put(store, "a", NORMAL)
    table(store)
    frozen(monkeypatch)
    table(store)
    if change == "started":
        (path,) = store.sample_scores.iterdir()
        changed = path.stat().st_mtime_ns
        put(store, "a", NORMAL, started="2025-01-01T00:00:00Z")
        os.utime(path, ns=(changed, changed))
    elif change == "scores":
        put(store, "a", NORMAL + 0.5)
    elif change == "another":
        put(store, "b", NORMAL)
    else:
        store.save(make_record("a", outcome="oom", seed=1))
    with pytest.raises(AssertionError, match="computed anew"):
        table(store)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null entries", "short", "wild index", "words"])
def test_a_damaged_cache_is_computed_anew_and_replaced(
    store: Store, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    put(store, "a", NORMAL)
    put(store, "b", NORMAL + 1)
    first = table(store)
    path = store.root / "cache" / "statistics.json"
    whole = path.read_bytes()
    content = json.loads(whole)
    (entry,) = content.values()
    changes: dict = {
        "null entries": {"means": None},
        "short": {"low": [0.0]},
        "wild index": {"paired": [0, 7]},
        "words": {"p": "x"},
    }
    entry.update(changes.get(damage, {}))
    path.write_text(json.dumps(content) if damage in changes else damage)
    pd.testing.assert_frame_equal(table(store), first)
    assert path.read_bytes() == whole
    frozen(monkeypatch)
    pd.testing.assert_frame_equal(table(store), first)


def test_a_cache_that_cannot_be_written_is_done_without(store: Store) -> None:
    put(store, "a", NORMAL)
    (store.root / "cache").rmdir()
    (store.root / "cache").write_text("in the way")
    assert table(store)["rank"].tolist() == [1]


def test_several_folders_are_analysed_together_and_cached_in_the_first(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Store.open(tmp_path / "other", create=True)
    put(store, "a", NORMAL)
    put(other, "b", NORMAL + 1)
    first = table(find([store.root, other.root]))
    assert first["rank"].tolist() == [1, 2]
    assert [(root / "cache" / "statistics.json").exists() for root in (store.root, other.root)] == [True, False]
    frozen(monkeypatch)
    pd.testing.assert_frame_equal(table(find([store.root, other.root])), first)
    put(other, "b", NORMAL + 2)
    with pytest.raises(AssertionError, match="computed anew"):
        table(find([store.root, other.root]))


def test_samples_are_paired_by_id_not_by_position(store: Store) -> None:
    put(store, "lora", [1.0, 0.0, 3.0], ["x", "y", "z"])
    put(store, "bitfit", [2.0, 0.0, -1.0], ["z", "x", "y"])
    (row,) = compare(store, "lora", "bitfit").to_dict("records")
    # Every pair differs by exactly one, but only if it is paired correctly.
    assert (row["difference"], row["low"], row["high"], row["p"]) == pytest.approx((1.0, 1.0, 1.0, 0.0))
    assert (row["mean_a"], row["mean_b"]) == pytest.approx((4 / 3, 1 / 3))
    assert [row[name] for name in ("task", "dataset", "backbone", "seeds")] == ["rec", "digits", "tiny", 1]
    assert row["metric"] == METRIC
    (row,) = pairs(store).to_dict("records")
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((1.0, 1.0, 1.0))


def test_the_seeds_both_methods_ended_ok_on_make_one_row_per_setting(store: Store) -> None:
    for task, seed in (("rec", 0), ("rec", 1), ("vqa", 0)):
        put(store, "lora", [1.0 + seed, 0.0], task=task, seed=seed)
        put(store, "full", [0.0, 0.0], task=task, seed=seed)
    put(store, "lora", [9.0, 9.0], seed=2)
    store.save(make_record("full", outcome="oom", seed=2))
    frame = compare(store, "lora", "full")
    assert list(frame[["task", "seeds", "mean_a"]].itertuples(index=False, name=None)) == [
        ("rec", 2, 0.75),
        ("vqa", 1, 0.5),
    ]


def test_swapping_the_methods_mirrors_the_interval_and_less_confidence_narrows_it(store: Store) -> None:
    put(store, "lora", NORMAL)
    put(store, "full", NORMAL[::-1] + 0.1)
    there, back = (compare(store, *names).iloc[0] for names in (("lora", "full"), ("full", "lora")))
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low)) and there.p == pytest.approx(back.p)
    narrow = compare(store, "lora", "full", confidence=0.5).iloc[0]
    assert there.low < narrow.low < narrow.high < there.high


def test_a_bare_name_stands_for_a_single_variant_only(store: Store) -> None:
    put(store, "lora", [1.0, 0.0], variant="r8")
    put(store, "full", [0.0, 0.0])
    assert len(compare(store, "lora", "full")) == 1
    put(store, "lora", [1.0, 0.0], variant="r16")
    with pytest.raises(UserError, match=r"no records of method lora; .*lora:r16, lora:r8"):
        compare(store, "lora", "full")
    assert len(compare(store, "lora:r8", "lora:r16")) == 1


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
        ([1.0, 0.0, 1.0], ["image-0", "image-1"], "one (finite )?score"),
        ([1.0, math.nan], None, "one finite score"),
    ],
)
def test_what_cannot_be_paired_is_refused(store: Store, scores: list[float], ids: list[str], said: str) -> None:
    put(store, "lora", [1.0, 0.0])
    put(store, "full", scores, ids)
    with pytest.raises(UserError, match=said):
        compare(store, "lora", "full")


def test_records_of_different_data_are_refused_but_methods_have_code_of_their_own(store: Store) -> None:
    put(store, "lora", [1.0, 0.0], fingerprints={"method": "1", "data": "1"})
    put(store, "full", [1.0, 0.0], fingerprints={"method": "2", "data": "1"})
    assert len(compare(store, "lora", "full")) == 1
    put(store, "full", [1.0, 0.0], fingerprints={"method": "2", "data": "2"})
    with pytest.raises(UserError, match=r"different code or data \(data\)"):
        compare(store, "lora", "full")
    for seed, code in enumerate("12"):
        put(store, "lora", [1.0, 0.0], fingerprints={"method": code}, seed=seed)
        put(store, "full", [1.0, 0.0], fingerprints={"method": "2"}, seed=seed)
    with pytest.raises(UserError, match=r"lora on .* and lora on .* different code or data \(method\)"):
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


def test_a_confidence_out_of_range_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="confidence must be"):
        compare(store, "a", "b", confidence=1.0)
