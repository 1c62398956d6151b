"""Retrieval recall against MultiWay-Adapter's values and by hand."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from petlbench.metrics import recall as module
from petlbench.metrics.recall import fold_recall, ranks, recall
from tests.golden import FOLDER

NAMES = {
    *(f"{direction}_r{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)),
    *("rsum", "mean_r1", "i2t_median_rank", "t2i_median_rank"),
}


def test_recall_equals_the_original() -> None:
    with np.load(FOLDER / "multiway_adapter" / "g6_recall.npz", allow_pickle=False) as golden:
        ours = recall(golden["image_feat"], golden["text_feat"], golden["text_image_id"])
        for k in (1, 5, 10):
            # The original averages percentages in float32.
            assert 100 * ours[f"i2t_r{k}"] == pytest.approx(float(golden[f"tr_r{k}"]), abs=1e-4)
            assert 100 * ours[f"t2i_r{k}"] == pytest.approx(float(golden[f"ir_r{k}"]), abs=1e-4)
        assert ours["rsum"] / 6 == pytest.approx(float(golden["average_score"]), abs=1e-4)


def test_keys_and_sums() -> None:
    generator = np.random.default_rng(0)
    owner = np.repeat(np.arange(20), 3)
    scores = recall(generator.normal(size=(20, 4)), generator.normal(size=(60, 4)), owner)
    assert set(scores) == NAMES
    assert scores["rsum"] == pytest.approx(100 * sum(scores[f"{d}_r{k}"] for d in ("i2t", "t2i") for k in (1, 5, 10)))
    assert scores["mean_r1"] == pytest.approx((scores["i2t_r1"] + scores["t2i_r1"]) / 2)


def test_any_own_caption_is_a_hit() -> None:
    images = np.eye(2)
    captions = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    found, back = ranks(images, captions, np.array([0, 0, 1]))
    assert found.tolist() == [0, 1]
    assert back.tolist() == [1, 0, 0]


def test_ties_rank_in_the_order_of_their_index() -> None:
    found, back = ranks(np.ones((3, 2)), np.ones((6, 2)), np.array([2, 1, 0, 0, 1, 2]))
    assert found.tolist() == [2, 1, 0]
    assert back.tolist() == [2, 1, 0, 0, 1, 2]


def test_collapsed_embeddings_do_not_look_perfect() -> None:
    scores = recall(np.ones((100, 4)), np.ones((100, 4)), np.arange(100))
    assert (scores["i2t_r1"], scores["t2i_r10"]) == (0.01, 0.1)
    assert scores["i2t_median_rank"] == 50.5


def test_perfect_retrieval_counts_ranks_from_one() -> None:
    scores = recall(np.eye(12), np.eye(12), np.arange(12))
    assert scores["rsum"] == pytest.approx(600)
    assert (scores["i2t_median_rank"], scores["t2i_median_rank"]) == (1, 1)


def test_blocks_do_not_change_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    owner = generator.permutation(np.repeat(np.arange(15), 2))
    # Small integers: similarities are exact, and full of ties.
    images, captions = generator.integers(-2, 3, size=(15, 5)), generator.integers(-2, 3, size=(30, 5))
    whole = ranks(images, captions, owner)
    monkeypatch.setattr(module, "_BLOCK_CELLS", 70)
    for ours, blocked in zip(whole, ranks(images, captions, owner), strict=True):
        np.testing.assert_array_equal(ours, blocked)


def test_ranks_equal_a_stable_sort() -> None:
    generator = np.random.default_rng(2)
    owner = np.repeat(np.arange(8), 3)
    images, captions = generator.integers(-2, 3, size=(8, 4)), generator.integers(-2, 3, size=(24, 4))
    found, back = ranks(images, captions, owner)
    similarity = images @ captions.T
    for image, rank in enumerate(found):
        order = np.argsort(-similarity[image], kind="stable")
        assert rank == next(place for place, caption in enumerate(order) if owner[caption] == image)
    for caption, rank in enumerate(back):
        assert np.argsort(-similarity[:, caption], kind="stable").tolist().index(owner[caption]) == rank


def test_folds_average_consecutive_thousands_with_their_own_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLD_SIZE", 4)
    generator = np.random.default_rng(3)
    owner = generator.permutation(np.repeat(np.arange(23), 2))
    images, captions = generator.normal(size=(23, 3)), generator.normal(size=(46, 3))
    scores = fold_recall(images, captions, owner)
    by_hand = [
        recall(images[4 * k : 4 * k + 4], captions[owner // 4 == k], owner[owner // 4 == k] - 4 * k) for k in range(5)
    ]
    assert set(scores) == {f"fold1k_{name}" for name in NAMES if not name.endswith("rank")}
    for name, value in scores.items():
        assert value == pytest.approx(np.mean([fold[name.removeprefix("fold1k_")] for fold in by_hand]))
    assert scores["fold1k_t2i_r1"] > recall(images, captions, owner)["t2i_r1"]  # fewer distractors
    assert fold_recall(images[:19], captions[owner < 19], owner[owner < 19]) == {}


def test_ranks_stay_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_CELLS", 1000)
    embeddings, owner = np.random.default_rng(4).normal(size=(2000, 8)).astype(np.float32), np.arange(2000)
    tracemalloc.start()
    try:
        ranks(embeddings, embeddings, owner)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000  # the whole matrix of similarities has 16 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("captions", "owner", "complaint"),
    [
        (np.ones((2, 3)), np.array([0, 1]), "do not fit"),
        (np.ones((2, 2)), np.array([0]), "indices"),
        (np.ones((2, 2)), np.array([0, 0]), "needs a caption"),
        (np.ones((2, 2)), np.array([0, 2]), "needs a caption"),
        (np.array([[1, np.nan], [1, 1]]), np.array([0, 1]), "not finite"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(captions: np.ndarray, owner: np.ndarray, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        recall(np.ones((2, 2)), captions, owner)
