"""Test which differences between rows of the leaderboard are significant. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from petlbench.results.rows import SETTING, Stale, fresh, groups, label, older_notes
from petlbench.results.store import Merged, Store
from petlbench.results.uncertainty.analysis import LEVEL, analyse
from petlbench.results.uncertainty.comparison import compare

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["compare", "mean_std", "pairs"]

# fmt: off
PAIR_COLUMNS = (*SETTING, "a", "b", "metric", "mean_a", "mean_b", "difference", "low", "high", "p", "p_holm",
                "significant")
# fmt: on


def mean_std(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (ddof 1); NaN if there are too few values for it."""
    array = np.asarray(list(values), dtype=float)
    mean = float(array.mean()) if array.size else float("nan")
    return mean, float(array.std(ddof=1)) if array.size > 1 else float("nan")


def pairs(results: Store | Merged, *, stale: Stale = fresh) -> pd.DataFrame:
    """Compare every pair of comparable rows of the leaderboard, with exactly PAIR_COLUMNS; `a` ranks above `b` in it.

    `mean_a` and `mean_b` are over seeds and test samples; `low` and `high` are the ends of the 95 % interval of the
    difference a - b. They and `p` come from Student's t (degrees of freedom: bootstrap.Covariances). `p_holm` is `p`
    adjusted over the pairs of the setting, and `significant` says whether it is below 0.05. `stale` is as in
    `leaderboard.table`. `attrs["notes"]` names, by setting, the rows without pairs and the reason; rows of an earlier
    schema version never have any.
    """
    import pandas as pd

    rows = groups(results.load(), stale)
    names = np.array([label(row) for row in rows], dtype=object)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in PAIR_COLUMNS}
    notes: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for setting, note in older_notes(rows).items():
        notes[setting].append(note)
    for indices, statistics in analyse(results, rows):
        first = rows[indices[0]]
        notes[first.setting] += statistics.notes
        left, right = statistics.pairs
        means, margin = statistics.means, statistics.margins[left, right]
        difference = means[left] - means[right]
        texts = dict(zip([*SETTING, "metric"], [*first.setting, first.metric], strict=True))
        values = {
            **{name: np.full(len(left), text, dtype=object) for name, text in texts.items()},
            "a": names[indices][left],
            "b": names[indices][right],
            "mean_a": means[left],
            "mean_b": means[right],
            "difference": difference,
            "low": difference - margin,
            "high": difference + margin,
            "p": statistics.p,
            "p_holm": statistics.adjusted,
            "significant": statistics.adjusted < LEVEL,
        }
        for name in PAIR_COLUMNS:
            columns[name].append(values[name])
    frame = pd.DataFrame({name: np.concatenate(parts) if parts else [] for name, parts in columns.items()})
    frame.attrs["notes"] = {setting: texts for setting, texts in notes.items() if texts}
    return frame
