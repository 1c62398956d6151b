"""Show the leaderboard in a terminal. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from petlbench.core.record import OLDER
from petlbench.core.tables import plain_table
from petlbench.core.units import human_bytes, human_count, human_seconds, score_text
from petlbench.results.rows import SETTING, label

if TYPE_CHECKING:
    from rich.table import Table

OPTIONAL = ("95 %", "rank", "effective")  # columns that are left out if empty
SCORE = "score: mean ± sample standard deviation over seeds"
INTERVAL = "95 %: bootstrap interval over seeds and test samples (samples alone for one seed)"
RANK = "rank: 1 + methods that are significantly better (5 % over all pairs, Holm), =: shared"
EFFECTIVE = "effective: of these, what the loss can send a gradient to in this cell"
FRONT = "front: nothing scores as well with fewer parameters"
STALE = "stale: these parts have changed since; compared among themselves only"
CONTENDED = "*: timed while other cells ran"


def leaderboard_table(frame: pd.DataFrame) -> Table:
    """Return a table per setting: the best fresh score bold, failures and stale rows dim, contended times marked `*`.

    Empty columns are left out: interval and rank without per-sample scores, and effective parameters if all are.
    """
    from rich.table import Table
    from rich.text import Text

    result = Table.grid()
    for setting, rows in frame.groupby(SETTING, sort=False):
        task, dataset, backbone = setting
        metric = next((name for name in rows["metric"] if name), "")
        heading = f"{task}:{dataset} on {backbone}" + (f", {metric}" if metric else "")
        result.add_row(Text(heading, style="italic"))
        result.add_row(_section(rows, frame.attrs))
    for text in sorted({text for notes in frame.attrs.get("notes", {}).values() for text in notes}):
        result.add_row(Text(text, style="dim"))
    for line in _caption(frame):
        result.add_row(Text(line, style="dim"))
    return result


def _caption(frame: pd.DataFrame) -> list[str]:
    lines = [f"{SCORE}; {FRONT}"]
    lines += [EFFECTIVE] if (frame["effective_params"] < frame["trainable_params"]).any() else []
    lines += [INTERVAL] if frame["score_low"].notna().any() else []
    lines += [RANK] if frame["rank"].notna().any() else []
    lines += [STALE] if any(parts != (OLDER,) for parts in frame.attrs.get("stale", {}).values()) else []
    return [*lines[:-1], f"{lines[-1]}; {CONTENDED}"] if frame["contended"].any() else lines


def _section(rows: pd.DataFrame, attrs: Mapping[Any, Any]) -> Table:
    from rich.text import Text

    texts = [_texts(row, attrs) for row in rows.itertuples()]
    shown = [name for name in texts[0] if name not in OPTIONAL or any(row[name] for row in texts)]
    section = plain_table(shown, shown[1:])  # the first is the method
    best = rows.loc[~rows["stale"], "score_mean"].max()
    for row, row_texts in zip(rows.itertuples(), texts, strict=True):
        dim = row.stale or row.outcome != "ok"
        style = "bold" if row.score_mean == best and not row.stale else "dim" if dim else ""
        # Text, not markup: a variant is free text and may contain brackets.
        section.add_row(*(Text(row_texts[name]) for name in shown), style=style)
    return section


def _texts(row: Any, attrs: Mapping[Any, Any]) -> dict[str, str]:
    runs = attrs.get("runs", {}).get(row.Index, row.seeds)
    mark = "*" if row.contended else ""
    score = _show(row.score_mean, score_text)
    if pd.notna(row.score_std):
        score += f" ± {score_text(row.score_std)}"
    if row.outcome != "ok":
        score = f"{score} {row.outcome}".strip()
    interval = f"{score_text(row.score_low)}–{score_text(row.score_high)}" if pd.notna(row.score_low) else ""
    fewer = pd.notna(row.effective_params) and row.effective_params < row.trainable_params
    changed = ", ".join(attrs.get("stale", {}).get(row.Index, ()))
    return {
        "method": label(row) + (f" stale: {changed}" if changed else ""),
        "score": score,
        "95 %": interval,
        "rank": _show(row.rank, str, "=" if row.Index in attrs.get("tied", ()) else ""),
        "seeds": str(row.seeds) if runs == row.seeds else f"{row.seeds} of {runs}",
        "trainable": _show(row.trainable_params, human_count)
        + _show(row.trainable_percent, lambda value: f" {value:.3g}%"),
        "effective": _show(row.effective_params, human_count) if fewer else "",
        "memory": _show(row.accounted_bytes, human_bytes),
        "training": _show(row.train_seconds, human_seconds, mark),
        "step": _show(row.step_seconds, human_seconds, mark),
        "front": "yes" if row.pareto else "",
    }


def _show(value: Any, form: Any, mark: str = "") -> str:
    return form(value) + mark if pd.notna(value) else ""
