"""Student's t for differences and intervals, and Holm's correction for many comparisons. The first needs scipy."""

from __future__ import annotations

import numpy as np


def p_values(differences: np.ndarray, errors: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """Return two-sided p values of Student's t with `freedom` degrees of freedom; all arrays have one shape.

    Without any spread p is 1 for equal means and 0 for others; NaN stays NaN. A count of resamples beyond zero could
    not go below 1/resamples, which is too coarse for a correction for many pairs.
    """
    from scipy.special import stdtr  # scipy.stats.t gives the same and takes far longer to import

    equal = np.abs(differences) < 1e-12
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(equal, 0.0, np.abs(differences) / errors)
    return np.where(np.isnan(errors), np.nan, 2 * stdtr(freedom, -t))


def quantiles(freedom: np.ndarray, confidence: float) -> np.ndarray:
    """Return half the width, in standard errors, of Student's two-sided interval; `confidence` is in (0, 1)."""
    from scipy.special import stdtrit

    return stdtrit(freedom, (1 + confidence) / 2)


def holm(p: np.ndarray) -> np.ndarray:
    """Adjust p values [n] for n comparisons (Holm 1979, "A simple sequentially rejective multiple test procedure").

    NaN means no comparison: it stays NaN and does not count.
    """
    adjusted = np.full(p.shape, np.nan)
    compared = np.flatnonzero(~np.isnan(p))
    order = compared[np.argsort(p[compared], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return adjusted
