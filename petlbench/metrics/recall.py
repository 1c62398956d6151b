"""Recall@K of image-text retrieval, in both directions, with several captions per image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

FOLDS, FOLD_SIZE = 5, 1000

_KS = (1, 5, 10)
# Similarities held at once; a block of queries is as large as this allows.
_BLOCK_CELLS = 1 << 23


def _ranks(queries: NDArray[np.float32], items: NDArray[np.float32], query_group: Ints, item_group: Ints) -> Ints:
    """0-based rank of each query's best item of its own group. The first of equally good own items counts."""
    by_group = np.argsort(item_group, kind="stable")
    first, last = (np.searchsorted(item_group[by_group], query_group, side) for side in ("left", "right"))
    result = np.empty(len(queries), dtype=np.int64)
    rows = max(1, _BLOCK_CELLS // len(items))
    similarity = np.empty((min(rows, len(queries)), len(items)), dtype=np.float32)
    for start in range(0, len(queries), rows):
        block = slice(start, min(start + rows, len(queries)))
        found = np.matmul(queries[block], items.T, out=similarity[: block.stop - start])
        owned = [by_group[a:b] for a, b in zip(first[block], last[block], strict=True)]
        best = np.array([own[row[own].argmax()] for row, own in zip(found, owned, strict=True)])
        score = np.take_along_axis(found, best[:, None], axis=1)
        ahead = np.count_nonzero(found > score, axis=1)
        tied = np.count_nonzero(found >= score, axis=1) > ahead + 1  # with more than itself
        for row in np.flatnonzero(tied):
            ahead[row] += np.count_nonzero(found[row, : best[row]] == score[row])
        result[block] = ahead
    return result


def ranks(
    image_embeddings: np.ndarray, caption_embeddings: np.ndarray, image_of_caption: np.ndarray
) -> tuple[Ints, Ints]:
    """0-based ranks of the right answer: of each image's best own caption (I,), and of each caption's image (C,).

    `image_embeddings` (I, d) and `caption_embeddings` (C, d) are compared by dot product in float32 (normalise them
    first where cosine is meant); `image_of_caption` (C,) indexes the former. Equal similarities rank in the order of
    their index, whichever is right: a model that maps everything to one point does not look perfect. Memory is bounded:
    similarities are made in blocks of queries. Raises ValueError on shapes that do not fit, values that are not finite,
    an index out of range or an image without a caption.
    """
    images = np.ascontiguousarray(image_embeddings, dtype=np.float32)
    captions = np.ascontiguousarray(caption_embeddings, dtype=np.float32)
    owner = np.asarray(image_of_caption, dtype=np.int64)
    _check(images, captions, owner)
    index = np.arange(len(images))
    return _ranks(images, captions, index, owner), _ranks(captions, images, owner, index)


def _check(images: NDArray[np.float32], captions: NDArray[np.float32], owner: Ints) -> None:
    if images.ndim != 2 or captions.ndim != 2 or images.shape[1] != captions.shape[1]:
        raise ValueError(
            f"embeddings of images {images.shape} and captions {captions.shape} do not fit: (I, d) and (C, d)"
        )
    if owner.shape != (len(captions),):
        raise ValueError(f"{len(captions)} captions but {owner.shape} indices of their images")
    if not (np.isfinite(images).all() and np.isfinite(captions).all()):
        raise ValueError("embeddings are not finite")
    if not len(images) or not np.array_equal(np.unique(owner), np.arange(len(images))):
        raise ValueError("every image needs a caption, and every caption an image")


def recall(
    image_embeddings: np.ndarray, caption_embeddings: np.ndarray, image_of_caption: np.ndarray
) -> dict[str, float]:
    """R@1, R@5, R@10 of image-to-text (`i2t_r1`...) and text-to-image (`t2i_r1`...), fractions in [0, 1].

    An image is a hit when any own caption is among the first K. `mean_r1` is the mean of both R@1; `rsum` is 100 times
    the sum of the six, as papers print percent; `i2t_median_rank` and `t2i_median_rank` count from 1. Arguments and
    errors as for `ranks`.
    """
    return summarise(*ranks(image_embeddings, caption_embeddings, image_of_caption))


def summarise(image_ranks: Ints, caption_ranks: Ints) -> dict[str, float]:
    """Return the scores of `recall`, computed from the 0-based ranks of `ranks`."""
    directions = {"i2t": image_ranks, "t2i": caption_ranks}
    scores = {f"{name}_r{k}": float(np.mean(found < k)) for name, found in directions.items() for k in _KS}
    return {
        **scores,
        "rsum": 100 * sum(scores.values()),
        "mean_r1": (scores["i2t_r1"] + scores["t2i_r1"]) / 2,
        **{f"{name}_median_rank": float(np.median(found)) + 1 for name, found in directions.items()},
    }


def fold_recall(
    image_embeddings: np.ndarray, caption_embeddings: np.ndarray, image_of_caption: np.ndarray
) -> dict[str, float]:
    """COCO's 1K protocol: the scores of `recall`, averaged over five folds of 1,000 images; no median ranks.

    The folds are the first five thousands of the images in their order, each with its own captions, so that 5,000
    images or more are needed; empty when there are fewer. Named `fold1k_i2t_r1`..., `fold1k_rsum`, `fold1k_mean_r1`.
    """
    if len(image_embeddings) < FOLDS * FOLD_SIZE:
        return {}
    fold_of_caption = np.asarray(image_of_caption) // FOLD_SIZE
    scores = []
    for fold in range(FOLDS):
        start, own = fold * FOLD_SIZE, fold_of_caption == fold
        images = image_embeddings[start : start + FOLD_SIZE]
        scores.append(recall(images, caption_embeddings[own], image_of_caption[own] - start))
    names = [name for name in scores[0] if not name.endswith("median_rank")]
    return {f"fold1k_{name}": float(np.mean([score[name] for score in scores])) for name in names}
