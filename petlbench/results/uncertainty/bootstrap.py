"""Uncertainty over seeds and test samples. Needs numpy only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

BLOCK = 2**21  # counts drawn at once: 16 MiB


class Spread(NamedTuple):
    """Standard errors, and the degrees of freedom (at least 1) of Student's t that go with them; of one shape."""

    errors: np.ndarray
    freedom: np.ndarray


@dataclass(frozen=True, eq=False)
class Covariances:
    """Of the rows' means, [rows, rows]: what drawing other seeds, and other test samples, would do to them.

    Noise of single (seed, sample) pairs is contained in both; `both` is that part, to be counted once.
    """

    seeds: np.ndarray
    samples: np.ndarray
    both: np.ndarray
    seed_freedom: np.ndarray  # [rows], degrees of freedom of `seeds`
    sample_freedom: int  # and of `samples`

    @property
    def of_rows(self) -> Spread:
        """Of the rows' means, [rows]."""
        return self._spread(np.diag)

    @property
    def of_differences(self) -> Spread:
        """Of all differences of rows, [rows, rows]; symmetric, errors zero on the diagonal."""
        return self._spread(_of_differences)

    def _spread(self, of: Callable[[np.ndarray], np.ndarray]) -> Spread:
        """Satterthwaite's degrees of freedom (1946, Biometrics Bulletin 2(6)), made safe for few seeds.

        His are total^2 / (seeds^2 / (S - 1) + samples^2 / (n - 1)). With two or three seeds these are too many: seeds
        that happen to agree make the error small and the degrees of freedom many at once, and equal methods pass for
        different. Weighting by plain shares, total / (seeds / (S - 1) + samples / (n - 1)), never gives more, and gives
        the same where one source is alone.
        """
        seeds, samples, both = map(of, (self.seeds, self.samples, self.both))
        # Each alone is expected to be at most the whole: an estimate below them is chance.
        total = np.maximum(np.maximum(seeds, samples), seeds + samples - both)
        # Divided before differences are taken, as rows of other seeds bring degrees of freedom of their own.
        shares = of(self.seeds / self.seed_freedom[:, None]) + samples / self.sample_freedom
        freedom = np.divide(total, shares, out=np.ones_like(total), where=shares > 0)
        return Spread(np.sqrt(total), np.maximum(1.0, freedom))


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
    seed_freedom = np.array([max(1, len(names) - 1) for names in seeds])  # of one seed there is no variance to divide
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
    samples are drawn apart from each other and added, and their spread is brought to `Covariances.of_rows`. Samples
    are drawn with replacement; seeds get normal weights (a wild bootstrap: Wu 1986, Annals of Statistics 14(4)), as
    drawing among two or three gives a handful of means, none of them far out. The draws of a row depend on `seed`, its
    seeds and the number of samples, never on the other rows.
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
    for row, (matrix, own_seeds) in enumerate(zip(scores, seeds, strict=True)):
        own = covariances([matrix], [own_seeds])
        drawn = own.seeds[0, 0] + own.samples[0, 0]
        deviations[row] *= own.of_rows.errors[0] / math.sqrt(drawn) if drawn > 0 else 0.0
    return centre[:, None] + deviations


def _seed_weights(names: tuple[int, ...], resamples: int, seed: int) -> np.ndarray:
    # Other seeds draw on their own: nothing about seed 3 of one method can be known from seed 0 of another.
    own = int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big")
    weights = np.random.default_rng([seed, own]).standard_normal((resamples, len(names)))
    return weights / math.sqrt(len(names) * max(1, len(names) - 1))


def _counts(rng: np.random.Generator, resamples: int, size: int) -> np.ndarray:
    """How often each of `size` things came up among as many drawn, [resamples, size]."""
    picked = rng.integers(size, size=(resamples, size)) + size * np.arange(resamples)[:, None]
    return np.bincount(picked.ravel(), minlength=resamples * size).reshape(resamples, size).astype(float)
