"""Make training batches in threads, ahead of their use; the number of a batch determines its content."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

import numpy as np
from datasets import Dataset

from petlbench.api.task import Batch
from petlbench.training.setup import TrainingSetup


class Batches:
    """Endless training batches from number `start` on. Each epoch permutes the rows anew; a batch may span two epochs.

    A batch depends on the seed and its number alone, so any thread can make any batch at any time.
    """

    def __init__(self, rows: Dataset, setup: TrainingSetup, start: int = 0) -> None:
        self._rows, self._setup = rows, setup
        self._epochs: dict[int, np.ndarray] = {}
        self._made = prefetch(self._make, count(start), setup.context.workers)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Batch:
        with self._setup.clock.phase("data"):
            return next(self._made).to(self._setup.device)

    def close(self) -> None:
        """Stop making batches."""
        self._made.close()

    def _make(self, step: int) -> Batch:
        setup, size = self._setup, self._setup.recipe.batch_size
        rng = np.random.default_rng([setup.seed, 1, step])
        rows = [self._rows[self._place(i)] for i in range(step * size, (step + 1) * size)]
        drawn = setup.task.augmented(rows, setup.recipe.augment, rng)
        return setup.prepared(setup.task.collate(drawn, setup.backbone, rng))

    def _place(self, i: int) -> int:
        """Return the index of row number `i`, counted through all epochs."""
        epoch, within = divmod(i, len(self._rows))
        if epoch not in self._epochs:  # two threads may both draw the order, and draw the same one
            order = np.random.default_rng([self._setup.seed, 0, epoch]).permutation(len(self._rows))
            self._epochs = {number: o for number, o in self._epochs.items() if number >= epoch - 1} | {epoch: order}
        return int(self._epochs[epoch][within])


def prefetch(make: Callable[[int], Batch], numbers: Iterable[int], workers: int) -> Generator[Batch, None, None]:
    """Yield `make(number)` for each number, in order; `workers` threads each work one batch ahead.

    Decoding and resizing images release Python's lock, so threads are enough. An error of `make` is raised when its
    batch is due. With no workers, each batch is made when it is due.
    """
    if not workers:
        yield from map(make, numbers)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        waiting: deque[Future[Batch]] = deque()
        for number in numbers:
            waiting.append(pool.submit(make, number))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # do not wait: the garbage collector may end this generator in a thread that a worker waits for
        pool.shutdown(wait=False, cancel_futures=True)
