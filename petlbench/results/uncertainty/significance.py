"""Student's t for differences and intervals, and the correction for many comparisons. Needs scipy where called."""

from __future__ import annotations

import numpy as np


def p_values(differences: np.ndarray, errors: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """Two-sided, of Student's t with `freedom` degrees of freedom; all of one shape.

    Without any spread 1 for equal means and 0 for others; NaN stays NaN. Counting resamples beyond zero could not go
    below 1/resamples, which no correction for many pairs would survive.
    """
    from scipy.special import stdtr  # scipy.stats.t gives the same and takes far longer to import

    equal = np.abs(differences) < 1e-12
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(equal, 0.0, np.abs(differences) / errors)
    return np.where(np.isnan(errors), np.nan, 2 * stdtr(freedom, -t))


def quantiles(freedom: np.ndarray, confidence: float) -> np.ndarray:
    """How many standard errors a two-sided interval of Student's t reaches to each side; in (0, 1) the confidence."""
    from scipy.special import stdtrit

    return stdtrit(freedom, (1 + confidence) / 2)


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
