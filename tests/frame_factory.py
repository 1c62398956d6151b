"""Make leaderboards by hand, for the tests of the code that reads them."""

from __future__ import annotations

from typing import Any

import pandas as pd

TEXTS = {"method": "lora", "variant": "", "size_name": "", "task": "rec", "dataset": "digits", "backbone": "tiny"}
ROW: dict[str, Any] = {
    **TEXTS,
    "size": float("nan"),
    "seeds": 1,
    "outcome": "ok",
    "stale": False,
    "metric": "acc@0.5",
    "score_mean": 0.5,
    "score_std": float("nan"),
    "score_low": float("nan"),
    "score_high": float("nan"),
    "trainable_params": 10_000,
    "accounted_bytes": 100 * 2**20,
    "train_seconds": 60.0,
    "step_flops": 5 * 10**9,
    "contended": False,
}
COUNTS = ("seeds", "trainable_params", "accounted_bytes", "step_flops")


def row(**values: Any) -> dict[str, Any]:
    """The values of a row that differ from ROW."""
    return values


def make_frame(*rows: dict[str, Any]) -> pd.DataFrame:
    """Return the columns that figures and curves read; each row gives only what differs from ROW."""
    unknown = {name for values in rows for name in values} - set(ROW)
    assert not unknown, unknown
    frame = pd.DataFrame([{**ROW, **values} for values in rows], columns=list(ROW))
    return frame.astype(dict.fromkeys((*TEXTS, "outcome", "metric"), "str") | dict.fromkeys(COUNTS, "Int64"))


def sweep(method: str, name: str, sizes: dict[float, tuple[float, float]], **common: Any) -> list[dict[str, Any]]:
    """Return rows of one method; `sizes` maps a size to (trainable parameters, score)."""
    return [
        {
            "method": method,
            "variant": f"{name}={size:g}",
            "size_name": name,
            "size": float(size),
            "trainable_params": int(cost),
            "score_mean": score,
            **common,
        }
        for size, (cost, score) in sizes.items()
    ]
