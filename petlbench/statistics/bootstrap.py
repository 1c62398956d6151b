"""Uncertainty over seeds and test samples, and the correction for many comparisons. Needs numpy only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 2**21  # counts drawn at once: 16 MiB


@dataclass(frozen=True, eq=False)
class Covariances:
    """Of the rows' means, [rows, rows]: what drawing other seeds, and other test samples, would do to them.

    Noise of single (seed, sample) pairs is contained in both; `both` is that part, to be counted once.
    """

    seeds: np.ndarray
    samples: np.ndarray
    both: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """Standard errors of the rows' means, [rows]."""
        return np.sqrt(self._total(*map(np.diag, (self.seeds, self.samples, self.both))))

    @property
    def difference_errors(self) -> np.ndarray:
        """Standard errors of all differences of rows, [rows, rows]; symmetric, zero on the diagonal."""
        return np.sqrt(self._total(*map(_of_differences, (self.seeds, self.samples, self.both))))

    @staticmethod
    def _total(seeds: np.ndarray, samples: np.ndarray, both: np.ndarray) -> np.ndarray:
        # Each alone is expected to be at most the whole: an estimate below them is chance.
        return np.maximum(np.maximum(seeds, samples), seeds + samples - both)


def covariances(scores: Sequence[np.ndarray], seeds: Sequence[Sequence[int]]) -> Covariances:
    """From `scores[i]`, [seeds of row i, samples]: per-sample scores of row i, its rows belonging to `seeds[i]`.

    The columns are the same samples for all rows, so that differences are paired by sample, and by seed between rows of
    the same seeds; rows of other seeds share no seed draws. The covariances are those that the bootstrap over both
    sources tends to with ever more resamples (Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics
    1(2)), unbiased in two ways: seeds, which are few, as if one less were drawn than there are (Rao and Wu 1988,
    "Resampling inference with complex survey data", JASA 83: else a third of the variance is lost with three seeds),
    and noise of (seed, sample) pairs counted once, where resampling both counts it three times (Owen).
    **With one seed only samples vary: the spread between seeds is then not covered.**
    """
    by_sample = np.stack([matrix.mean(0) for matrix in scores])
    samples = by_sample.shape[1]
    among_samples = _covariance(by_sample, samples - 1) / samples
    among_seeds, both = np.zeros((2, len(scores), len(scores)))
    for names, rows in _strata(seeds).items():
        if len(names) > 1:
            where = np.ix_(rows, rows)
            stacked = np.stack([scores[row] for row in rows])
            by_seed = stacked.mean(2)
            among_seeds[where] = _covariance(by_seed, len(names) - 1) / len(names)
            rest = stacked - by_seed[:, :, None] - by_sample[rows][:, None] + by_seed.mean(1)[:, None, None]
            freedom = (len(names) - 1) * (samples - 1)
            both[where] = _covariance(rest.reshape(len(rows), -1), freedom) / (len(names) * samples)
    return Covariances(among_seeds, among_samples, both)


def _strata(seeds: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    found: dict[tuple[int, ...], list[int]] = {}
    for row, names in enumerate(seeds):
        found.setdefault(tuple(names), []).append(row)
    return found


def _covariance(values: np.ndarray, freedom: int) -> np.ndarray:
    centred = values - values.mean(axis=1, keepdims=True)
    return centred @ centred.T / max(1, freedom)


def _of_differences(covariance: np.ndarray) -> np.ndarray:
    variance = np.diag(covariance)
    together = variance[:, None] + variance
    spread = together - 2 * covariance
    # What cancels leaves rounding behind, which must not pass for a tiny error.
    return np.where(spread > 1e-12 * together, spread, 0.0)


def bootstrap_means(
    scores: Sequence[np.ndarray], seeds: Sequence[Sequence[int]], resamples: int, seed: int = 0
) -> np.ndarray:
    """Means of every row over resampled seeds and test samples, [rows, resamples], for the ends of intervals.

    `scores` and `seeds` are as in `covariances`, whose variances the resamples have: the effects of seeds and of
    samples are drawn apart from each other and added, and their spread is brought to `Covariances.errors`. The draws
    of a row depend on `seed`, its seeds and the number of samples, never on the other rows.
    """
    by_sample = np.stack([matrix.mean(0) for matrix in scores])
    samples = by_sample.shape[1]
    centre = by_sample.mean(1)
    deviations = np.empty((len(scores), resamples))
    rng = np.random.default_rng([seed, samples])
    block = max(1, BLOCK // samples)
    for start in range(0, resamples, block):
        counts = _counts(rng, min(block, resamples - start), samples, samples)
        deviations[:, start : start + block] = (by_sample - centre[:, None]) @ counts.T / samples
    for names, rows in _strata(seeds).items():
        by_seed = np.stack([scores[row].mean(1) for row in rows]) - centre[rows, None]
        deviations[rows] += by_seed @ _seed_weights(names, resamples, seed).T
    for row, (matrix, own_seeds) in enumerate(zip(scores, seeds, strict=True)):
        own = covariances([matrix], [own_seeds])
        drawn = own.seeds[0, 0] + own.samples[0, 0]
        deviations[row] *= own.errors[0] / math.sqrt(drawn) if drawn > 0 else 0.0
    return centre[:, None] + deviations


def _seed_weights(names: tuple[int, ...], resamples: int, seed: int) -> np.ndarray:
    drawn = max(1, len(names) - 1)
    # Other seeds draw on their own: nothing about seed 3 of one method can be known from seed 0 of another.
    own = int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big")
    return _counts(np.random.default_rng([seed, own]), resamples, len(names), drawn) / drawn


def _counts(rng: np.random.Generator, resamples: int, size: int, drawn: int) -> np.ndarray:
    """How often each of `size` things came up among `drawn`, [resamples, size]."""
    picked = rng.integers(size, size=(resamples, drawn)) + size * np.arange(resamples)[:, None]
    return np.bincount(picked.ravel(), minlength=resamples * size).reshape(resamples, size).astype(float)


def p_values(differences: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Two-sided, by the normal approximation; without any spread 1 for equal means and 0 for others. NaN stays NaN.

    Counting resamples beyond zero could not go below 1/resamples, which no correction for many pairs would survive.
    """
    equal = np.abs(differences) < 1e-12
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(equal, 0.0, np.abs(differences) / errors)
    p = np.array([math.erfc(value / math.sqrt(2)) for value in z.ravel()]).reshape(z.shape)
    return np.where(np.isnan(errors), np.nan, p)


def holm(p: np.ndarray) -> np.ndarray:
    """p values, [n], adjusted for n comparisons (Holm 1979, "A simple sequentially rejective multiple test procedure").

    NaN is no comparison: it stays NaN and does not count.
    """
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return adjusted
