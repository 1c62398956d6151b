"""`python -m tests.benchmarks.bench_recall [IMAGES]`: the cost of scoring image-text retrieval at COCO's size.

Prints the time of the task's whole `score` (ranks both ways, recall, the folds of 1,000 images, the per-image scores)
and the peak memory of its process, on unit vectors of width 512, five captions an image and ten spare ones. Prints the
same for a plain similarity matrix with both sorts. Each runs in a separate process.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.benchmarks import sized

IMAGES, WIDTH = sized(5000, 50), 512


def _embeddings(images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images (I, 512), captions (C, 512) near their images, and the captions' images (C,)."""
    generator = np.random.default_rng(0)
    owners = np.sort(np.concatenate([np.repeat(np.arange(images), 5), np.arange(min(10, images))]))
    image = generator.standard_normal((images, WIDTH), dtype=np.float32)
    text = generator.standard_normal((len(owners), WIDTH), dtype=np.float32)
    text *= 5
    text += image[owners]
    for rows in (image, text):
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return image, text, owners


def _scored(images: np.ndarray, captions: np.ndarray, owners: np.ndarray) -> float:
    from petlbench.tasks.retrieval import Retrieval

    starts = np.searchsorted(owners, np.arange(len(images)))
    predictions = list(zip(images, np.split(captions, starts[1:]), strict=True))
    rows = [{"sample_id": str(i)} for i in range(len(images))]
    return Retrieval().score(rows, predictions).metrics["rsum"]


def _sorted(images: np.ndarray, captions: np.ndarray, owners: np.ndarray) -> float:
    similarity = images @ captions.T
    by_image = np.argsort(-similarity, axis=1, kind="stable")[:, :10]
    by_text = np.argsort(-similarity.T, axis=1, kind="stable")[:, :10]
    hits = [(owners[by_image] == np.arange(len(images))[:, None]), by_text == owners[:, None]]
    return 100 * sum(float(hit[:, :k].any(axis=1).mean()) for hit in hits for k in (1, 5, 10))


def _measured(function: Callable[..., float], images: int, connection: Any) -> None:
    import petlbench.tasks.retrieval  # noqa: F401 - the measure leaves out its import

    arrays = _embeddings(images)
    start = time.perf_counter()
    result = function(*arrays)
    seconds = time.perf_counter() - start
    connection.send((result, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def measure(function: Callable[..., float], images: int = IMAGES) -> tuple[float, float, int]:
    """Return rsum, seconds, and the process's peak of resident bytes, libraries and embeddings included."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(function, images, sender))
    process.start()
    sender.close()
    result: tuple[float, float, int] = receiver.recv()
    process.join()
    return result


def main(images: int) -> None:
    ours, plain = measure(_scored, images), measure(_sorted, images)
    for name, (rsum, seconds, memory) in (("score", ours), ("matrix and sort", plain)):
        print(f"{name:<16} {seconds:6.2f} s  {memory / 2**20:6.0f} MiB  rsum {rsum:.4f}")
    print(f"ratio            {ours[1] / plain[1]:6.2f}    {ours[2] / plain[2]:6.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
