"""Recall@K of image-text retrieval, in both directions, with several captions per image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_KS = (1, 5, 10)
# Similarities held at once; a block of queries is as large as this allows.
_BLOCK_CELLS = 1 << 23


def _ranks(queries: NDArray[np.float32], items: NDArray[np.float32], query_group: Ints, item_group: Ints) -> Ints:
    """0-based rank of each query's best item of its own group."""
    result = np.empty(len(queries), dtype=np.int64)
    rows = max(1, _BLOCK_CELLS // len(items))
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        similarity = queries[block] @ items.T
        own = query_group[block, None] == item_group[None, :]
        best = np.where(own, similarity, -np.inf).argmax(axis=1)[:, None]
        score = np.take_along_axis(similarity, best, axis=1)
        ahead = (similarity > score) | ((similarity == score) & (np.arange(len(items)) < best))
        result[block] = ahead.sum(axis=1)
    return result


def ranks(
    image_embeddings: np.ndarray, caption_embeddings: np.ndarray, image_of_caption: np.ndarray
) -> tuple[Ints, Ints]:
    """0-based ranks of the right answer: of each image's best own caption (I,), and of each caption's image (C,).

    `image_embeddings` (I, d) and `caption_embeddings` (C, d) are compared by dot product in float32 (normalise them
    first where cosine is meant); `image_of_caption` (C,) indexes the former. Equal similarities rank in the order of
    their index. Memory is bounded: similarities are made in blocks of queries. Raises ValueError on shapes that do not
    fit, values that are not finite, an index out of range or an image without a caption.
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
    """What `recall` gives, from the 0-based ranks that `ranks` gives."""
    directions = {"i2t": image_ranks, "t2i": caption_ranks}
    scores = {f"{name}_r{k}": float(np.mean(found < k)) for name, found in directions.items() for k in _KS}
    return {
        **scores,
        "rsum": 100 * sum(scores.values()),
        "mean_r1": (scores["i2t_r1"] + scores["t2i_r1"]) / 2,
        **{f"{name}_median_rank": float(np.median(found)) + 1 for name, found in directions.items()},
    }
