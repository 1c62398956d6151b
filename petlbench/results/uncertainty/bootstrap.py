"""Estimate the uncertainty of means over seeds and test samples. Needs numpy only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

BLOCK = 2**21  # counts drawn at a time: 16 MiB


class Spread(NamedTuple):
    """Standard errors and their degrees of freedom (at least 1) of Student's t; both arrays have one shape."""

    errors: np.ndarray
    freedom: np.ndarray


@dataclass(frozen=True, eq=False)
class Covariances:
    """Covariances [rows, rows] of the rows' means if other seeds, or other test samples, were drawn.

    `seeds` and `samples` both contain the noise of single (seed, sample) pairs; `both` is that noise, counted once.
    """

    seeds: np.ndarray
    samples: np.ndarray
    both: np.ndarray
    seed_freedom: np.ndarray  # [rows], degrees of freedom of `seeds`
    sample_freedom: int  # degrees of freedom of `samples`

    @property
    def of_rows(self) -> Spread:
        """Return the errors of the rows' means, [rows]."""
        return self._spread(np.diag)

    @property
    def of_differences(self) -> Spread:
        """Return the errors of all differences of rows, [rows, rows]: symmetric, zero on the diagonal."""
        return self._spread(_difference_variances)

    def _spread(self, variances: Callable[[np.ndarray], np.ndarray]) -> Spread:
        """Compute errors and Satterthwaite's degrees of freedom (1946, Biometrics Bulletin 2(6)), safe for few seeds.

        His formula is total^2 / (seeds^2 / (S - 1) + samples^2 / (n - 1)). With two or three seeds it gives too many:
        seeds that agree by chance give a small error and many degrees of freedom at once, so that equal methods look
        different. Weights by plain shares, total / (seeds / (S - 1) + samples / (n - 1)), never give more, and give
        the same if there is only one source.
        """
        seeds, samples, both = map(variances, (self.seeds, self.samples, self.both))
        # No part can exceed the whole in expectation: an estimate of the whole below a part is chance.
        total = np.maximum(np.maximum(seeds, samples), seeds + samples - both)
        # Divide before taking differences, as rows of other seeds have other degrees of freedom.
        shares = variances(self.seeds / self.seed_freedom[:, None]) + samples / self.sample_freedom
        freedom = np.divide(total, shares, out=np.ones_like(total), where=shares > 0)
        return Spread(np.sqrt(total), np.maximum(1.0, freedom))


def covariances(scores: Sequence[np.ndarray], seeds: Sequence[Sequence[int]]) -> Covariances:
    """Compute covariances from `scores[i]` [seeds of row i, samples], the scores of row i with the seeds `seeds[i]`.

    All rows have the same samples as columns, so that differences are paired by sample, and by seed between rows of
    the same seeds; rows of other seeds share no seed draws. The covariances are the limit of the bootstrap over both
    sources with ever more resamples (Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2)), with
    two biases removed. The few seeds count as if one less were drawn than there are (Rao and Wu 1988, "Resampling
    inference with complex survey data", JASA 83), else three seeds lose a third of the variance. The noise of (seed,
    sample) pairs counts once, while resampling both counts it three times (Owen).
    **With one seed only samples vary: the result does not cover the spread between seeds.**
    """
    by_sample = np.stack([matrix.mean(0) for matrix in scores])
    samples = by_sample.shape[1]
    among_samples = _covariance(by_sample, samples - 1) / samples
    among_seeds, both = np.zeros((2, len(scores), len(scores)))
    seed_freedom = np.array([max(1, len(names) - 1) for names in seeds])  # one seed has no variance to divide
    for names, rows in _strata(seeds).items():
        if len(names) > 1:
            where = np.ix_(rows, rows)
            stacked = np.stack([scores[row] for row in rows])
            by_seed = stacked.mean(2)
            among_seeds[where] = _covariance(by_seed, len(names) - 1) / len(names)
            rest = stacked - by_seed[:, :, None] - by_sample[rows][:, None] + by_seed.mean(1)[:, None, None]
            freedom = (len(names) - 1) * (samples - 1)
            both[where] = _covariance(rest.reshape(len(rows), -1), freedom) / (len(names) * samples)
    return Covariances(among_seeds, among_samples, both, seed_freedom, max(1, samples - 1))


def _strata(seeds: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    strata: dict[tuple[int, ...], list[int]] = {}
    for row, names in enumerate(seeds):
        strata.setdefault(tuple(names), []).append(row)
    return strata


def _covariance(values: np.ndarray, freedom: int) -> np.ndarray:
    centred = values - values.mean(axis=1, keepdims=True)
    return centred @ centred.T / max(1, freedom)


def _difference_variances(covariance: np.ndarray) -> np.ndarray:
    variance = np.diag(covariance)
    together = variance[:, None] + variance
    spread = together - 2 * covariance
    # Equal terms cancel up to rounding, which must not count as a tiny error.
    return np.where(spread > 1e-12 * together, spread, 0.0)


def bootstrap_means(
    scores: Sequence[np.ndarray], seeds: Sequence[Sequence[int]], resamples: int, seed: int = 0
) -> np.ndarray:
    """Return means of every row over resampled seeds and test samples, [rows, resamples], for the ends of intervals.

    `scores` and `seeds` are as in `covariances`, and the resamples have its variances: the effects of seeds and of
    samples are drawn separately and added, and their spread is scaled to `Covariances.of_rows`. Samples are drawn with
    replacement; seeds get normal weights (a wild bootstrap: Wu 1986, Annals of Statistics 14(4)), as draws among two
    or three seeds give only a handful of means without tails. The draws of a row depend on `seed`, its seeds and the
    number of samples, never on the other rows.
    """
    by_sample = np.stack([matrix.mean(0) for matrix in scores])
    samples = by_sample.shape[1]
    centre = by_sample.mean(1)
    deviations = np.empty((len(scores), resamples))
    rng = np.random.default_rng([seed, samples])
    block = max(1, BLOCK // samples)
    for start in range(0, resamples, block):
        counts = _counts(rng, min(block, resamples - start), samples)
        deviations[:, start : start + block] = (by_sample - centre[:, None]) @ counts.T / samples
    for names, rows in _strata(seeds).items():
        by_seed = np.stack([scores[row].mean(1) for row in rows]) - centre[rows, None]
        deviations[rows] += by_seed @ _seed_weights(names, resamples, seed).T
    for row, (matrix, row_seeds) in enumerate(zip(scores, seeds, strict=True)):
        target = covariances([matrix], [row_seeds])
        drawn = target.seeds[0, 0] + target.samples[0, 0]
        deviations[row] *= target.of_rows.errors[0] / math.sqrt(drawn) if drawn > 0 else 0.0
    return centre[:, None] + deviations


def _seed_weights(names: tuple[int, ...], resamples: int, seed: int) -> np.ndarray:
    # Other seeds get independent draws: seed 0 of one method says nothing about seed 3 of another.
    stream = int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big")
    weights = np.random.default_rng([seed, stream]).standard_normal((resamples, len(names)))
    return weights / math.sqrt(len(names) * max(1, len(names) - 1))


def _counts(rng: np.random.Generator, resamples: int, size: int) -> np.ndarray:
    """Draw `size` of `size` items with replacement and count each item, [resamples, size]."""
    picked = rng.integers(size, size=(resamples, size)) + size * np.arange(resamples)[:, None]
    return np.bincount(picked.ravel(), minlength=resamples * size).reshape(resamples, size).astype(float)
