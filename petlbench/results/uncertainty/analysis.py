"""Compute intervals, p values and ranks of comparable rows, and keep them in a cache. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from statistics import NormalDist

import numpy as np

from petlbench.core.errors import UserError
from petlbench.results.rows import Group, label, pools
from petlbench.results.store import Merged, Store
from petlbench.results.uncertainty.bootstrap import bootstrap_means, covariances
from petlbench.results.uncertainty.cache import Cache, key
from petlbench.results.uncertainty.sample_scores import Ids, aligned, score_matrix
from petlbench.results.uncertainty.significance import holm, p_values, quantiles

VERSION = 2  # of the computation: raise it when the same scores give other numbers, so that old caches are not used
RESAMPLES = 4_000  # their noise moves the ends of an interval by about 2 % of its length; standard errors use none
SEED = 0
CONFIDENCE = 0.95
LEVEL = 0.05  # significant below it, for adjusted p values


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of comparable rows, in their order; NaN if a row has no usable scores or two rows cannot be paired."""

    means: np.ndarray  # [rows], over seeds and test samples
    low: np.ndarray  # [rows], lower end of the interval minus the mean
    high: np.ndarray  # [rows], upper end minus the mean
    margins: np.ndarray  # [rows, rows], half the interval of differences; the diagonal is 0 for rows that can be paired
    p_matrix: np.ndarray  # [rows, rows], p values of differences; the diagonal is 1 for rows that can be paired
    notes: tuple[str, ...]  # why rows are left out

    @cached_property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the row indices of all pairs, the earlier row on the left."""
        paired = np.flatnonzero(~np.isnan(np.diag(self.margins)))
        left, right = np.triu_indices(len(paired), 1)
        return paired[left], paired[right]

    @cached_property
    def p(self) -> np.ndarray:
        """Return the p value of each pair."""
        return self.p_matrix[self.pairs]

    @cached_property
    def adjusted(self) -> np.ndarray:
        """Return the p value of each pair, adjusted by Holm over all of them."""
        return holm(self.p)

    @property
    def ranks(self) -> np.ndarray:
        """Return 1 + the number of significantly better rows, [rows]; NaN for rows that cannot be paired."""
        left, right = self.pairs
        worse = np.where(self.means[left] > self.means[right], right, left)[self.adjusted < LEVEL]
        ranks = 1.0 + np.bincount(worse, minlength=len(self.means))
        return np.where(np.isnan(np.diag(self.margins)), np.nan, ranks)


def analyse(results: Store | Merged, rows: Sequence[Group]) -> list[tuple[list[int], Statistics]]:
    """Return the row indices and statistics of each pool of comparable rows, from the cache if the input is the same.

    The bootstrap makes RESAMPLES resamples from the fixed seed SEED. The cache is in the (first) results folder; if it
    is damaged or cannot be written, the only cost is the time to compute again.
    """
    cache = Cache(results)
    analysed = []
    for indices in pools(rows):
        pool = [rows[index] for index in indices]
        name = key(cache.stores, pool, [VERSION, RESAMPLES, SEED, CONFIDENCE])
        arrays = cache.get(name, len(pool))
        statistics = Statistics(*arrays) if arrays else _compute(results, pool)
        cache.put(name, *(getattr(statistics, field.name) for field in fields(statistics)))
        analysed.append((indices, statistics))
    cache.save()
    return analysed


def _compute(results: Store | Merged, pool: Sequence[Group]) -> Statistics:
    ids, matrices, notes = _read(results, pool)
    means, low, high = np.full((3, len(pool)), np.nan)
    margins, p = np.full((2, len(pool), len(pool)), np.nan)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    by_samples: dict[frozenset[object], list[int]] = {}
    for index in matrices:
        by_samples.setdefault(frozenset(ids[index]), []).append(index)
    whole = {index for index in matrices if all(record.outcome == "ok" for record in pool[index].records)}
    votes = Counter({samples: len(whole.intersection(members)) for samples, members in by_samples.items()})
    usual = votes.most_common(1)[0][0] if votes else frozenset()
    for samples, members in by_samples.items():
        scores = [aligned(ids[index], matrices[index], ids[members[0]]) for index in members]
        seeds = [[record.cell.seed for record in pool[index].ok] for index in members]
        resampled = bootstrap_means(scores, seeds, RESAMPLES, SEED)
        means[members] = [matrix.mean() for matrix in scores]
        ends = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=1)
        spread = covariances(scores, seeds)
        # The resampled ends assume known variances; the factor, Student's t over z, accounts for estimated ones.
        low[members], high[members] = (ends - means[members]) * quantiles(spread.of_rows.freedom, CONFIDENCE) / z
        if samples == usual:
            keep = [place for place, index in enumerate(members) if index in whole]
            where = [members[place] for place in keep]
            errors, freedom = (values[np.ix_(keep, keep)] for values in spread.of_differences)
            margins[np.ix_(where, where)] = errors * quantiles(freedom, CONFIDENCE)
            p[np.ix_(where, where)] = p_values(means[where, None] - means[where], errors, freedom)
        else:
            notes += [f"{label(pool[index])} is not ranked: tested on other samples than most" for index in members]
    return Statistics(means, low, high, margins, p, tuple(notes))


def _read(results: Store | Merged, pool: Sequence[Group]) -> tuple[dict[int, Ids], dict[int, np.ndarray], list[str]]:
    """Read sample ids and scores [seeds, samples] by row; return notes on the rows whose scores cannot be used."""
    ids: dict[int, Ids] = {}
    matrices: dict[int, np.ndarray] = {}
    notes = []
    for index, row in enumerate(pool):
        if not row.scores:  # no seed ended ok, or the answers of the test split are not public
            continue
        try:
            ids[index], matrices[index] = score_matrix(results, row.ok)
        except UserError as error:
            notes.append(f"{label(row)} is not ranked: {error}")
    return ids, matrices, notes
