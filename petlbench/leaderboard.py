"""Records to the leaderboard: one row per method, variant, task, data set and backbone. Imports no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .records import write_atomic
from .spec import Memory, Record, Timing
from .statistics import mean_std
from .units import human_bytes, human_count, human_seconds, score_text

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

TEXTS = ("method", "variant", "task", "dataset", "backbone", "outcome", "metric")
COUNTS = ("seeds", "trainable_params", "head_params", "stored_bytes", "accounted_bytes", "peak_bytes", "step_flops")
# fmt: off
COLUMNS = (
    "method", "variant", "task", "dataset", "backbone", "seeds", "outcome", "metric", "score_mean", "score_std",
    "trainable_params", "trainable_percent", "head_params", "stored_bytes", "accounted_bytes", "peak_bytes",
    "train_seconds", "step_seconds", "step_flops", "latency_seconds", "pareto",
)
# fmt: on
SETTING = ["task", "dataset", "backbone"]
# From bad luck to bad code: among equally frequent failures the last one names the row.
SEVERITY = ("timeout", "oom", "diverged", "failed")


def table(records: Iterable[Record]) -> pd.DataFrame:
    """The leaderboard, with exactly COLUMNS; what is unknown is missing (NaN or NA).

    Scores and seconds are means over the seeds that ended `ok`, `score_std` is the sample standard deviation (missing
    for one seed), counts and bytes are the largest of any seed. `seeds` counts the ones that ended `ok`; `outcome` is
    `ok` only if all did. Cells that differ in recipe or configuration are never averaged: each such group is a row,
    its `variant` ending in `#` and a digest when that is all that tells two rows apart. `attrs` holds, by row index,
    `contended` (a set: timings taken while other cells ran), `runs` (seeds run) and, by setting, `machines` and
    `notes` (what the records say a reader must know).
    """
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in _newest(records):
        groups[_group(record)].append(record)
    names = Counter(key[:-1] for key in groups)
    rows = [_row(key, group, ambiguous=names[key[:-1]] > 1) for key, group in groups.items()]
    rows.sort(key=_rank)
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "contended", "runs"])
    frame["pareto"] = _pareto(frame)
    frame = frame.astype(
        {name: "str" if name in TEXTS else "Int64" if name in COUNTS else "float64" for name in COLUMNS[:-1]}
    )
    attrs = {
        "contended": {index for index, flag in enumerate(frame["contended"]) if flag},
        "runs": dict(enumerate(frame["runs"].tolist())),
        "machines": _machines(groups),
        "notes": _notes(groups),
    }
    frame = frame[list(COLUMNS)]
    frame.attrs.update(attrs)
    return frame


def _notes(groups: Mapping[tuple[str, ...], list[Record]]) -> dict[tuple[str, ...], list[str]]:
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for group in groups.values():
        for record in group:
            found[record.cell.task, record.cell.dataset, record.cell.backbone].update(record.notes)
    return {setting: sorted(notes) for setting, notes in found.items()}


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write the leaderboard atomically; missing values are empty fields. Raises UserError when that fails."""
    write_atomic(path, frame.to_csv(index=False, lineterminator="\n").encode())


def label(row: Any) -> str:
    """How a row's method is named: `method` or `method:variant`."""
    return f"{row.method}:{row.variant}" if row.variant else str(row.method)


def _newest(records: Iterable[Record]) -> list[Record]:
    found: dict[str, Record] = {}
    for record in records:
        known = found.get(record.cell.id)
        if known is None or record.started > known.started:
            found[record.cell.id] = record
    return sorted(found.values(), key=lambda record: record.cell.seed)


def _group(record: Record) -> tuple[str, ...]:
    cell = record.cell
    seedless = cell.model_copy(update={"seed": 0})
    return (cell.task, cell.dataset, cell.backbone, cell.method, cell.variant, seedless.digest)


def _row(key: tuple[str, ...], group: Sequence[Record], ambiguous: bool) -> dict[str, Any]:
    task, dataset, backbone, method, variant, digest = key
    ok = [record for record in group if record.outcome == "ok"]
    parameters = [record.parameters for record in group if record.parameters]
    memories = [record.memory for record in group if record.memory]
    score_mean, score_std = mean_std([r.metrics[r.main_metric] for r in ok if r.main_metric in r.metrics])
    timings = [record.timing for record in ok if record.timing]
    alone = [timing for timing in timings if timing.jobs == 1]
    return {
        "method": method,
        "variant": f"{variant} #{digest}".lstrip() if ambiguous else variant,
        "task": task,
        "dataset": dataset,
        "backbone": backbone,
        "seeds": len(ok),
        "outcome": _outcome(group),
        "metric": next((record.main_metric for record in [*ok, *group] if record.main_metric), ""),
        "score_mean": score_mean,
        "score_std": score_std,
        "trainable_params": _largest(p.trainable for p in parameters),
        "trainable_percent": _largest(p.percent for p in parameters),
        "head_params": _largest(p.head for p in parameters),
        "stored_bytes": _largest(p.stored_bytes for p in parameters),
        "accounted_bytes": _largest(m.accounted_bytes for m in memories),
        "peak_bytes": _largest(_peak(record.memory) for record in ok),
        **_seconds(alone or timings),
        "step_flops": _largest(record.step_flops for record in group),
        "contended": bool(timings) and not alone,
        "runs": len(group),
    }


def _seconds(timings: Sequence[Timing]) -> dict[str, float]:
    names = ("train_seconds", "step_seconds", "latency_seconds")
    values = {name: [getattr(timing, name) for timing in timings] for name in names}
    return {name: mean_std([v for v in values[name] if v is not None])[0] for name in names}


def _outcome(group: Sequence[Record]) -> str:
    failures = Counter(record.outcome for record in group if record.outcome != "ok")
    return max(failures, key=lambda name: (failures[name], SEVERITY.index(name))) if failures else "ok"


def _peak(memory: Memory | None) -> int | None:
    if memory is None:
        return None
    return memory.peak_rss_bytes if memory.peak_allocated_bytes is None else memory.peak_allocated_bytes


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _rank(row: dict[str, Any]) -> tuple[Any, ...]:
    score = row["score_mean"]
    missing = score != score
    setting = tuple(row[name] for name in SETTING)
    return (*setting, missing, 0.0 if missing else -score, row["method"], row["variant"])


def _pareto(frame: pd.DataFrame) -> list[bool]:
    """No other ok row of the setting scores at least as well with at most as many parameters, one of them strictly."""
    scored = frame[(frame["outcome"] == "ok") & frame["score_mean"].notna() & frame["trainable_params"].notna()]
    best: set[Any] = set()
    for _, rows in scored.groupby(SETTING, sort=False):
        score, size = rows["score_mean"].to_numpy(float), rows["trainable_params"].to_numpy(float)
        beaten = (
            (score >= score[:, None]) & (size <= size[:, None]) & ((score > score[:, None]) | (size < size[:, None]))
        )
        best |= set(rows.index.to_numpy()[~beaten.any(axis=1)])
    return [index in best for index in frame.index]


def _machines(groups: dict[tuple[str, ...], list[Record]]) -> dict[tuple[str, ...], list[str]]:
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for key, group in groups.items():
        for record in group:
            parts = [record.environment.get(name) for name in ("device_name", "device")]
            found[key[:3]].add(", ".join(str(part) for part in parts if part))
    return {setting: sorted(names - {""}) for setting, names in found.items()}


def render(frame: pd.DataFrame) -> Table:
    """The leaderboard for a terminal: a table per setting, best score bold, contended timings marked `*`."""
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
    note = "score: mean ± sample standard deviation over seeds; front: nothing scores as well with fewer parameters"
    if frame.attrs.get("contended"):
        note += "; *: timed while other cells ran"
    result.add_row(Text(note, style="dim"))
    return result


def _section(rows: pd.DataFrame, attrs: Mapping[Any, Any]) -> Table:
    from rich import box
    from rich.table import Table

    section = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    section.add_column("method", overflow="fold")
    for name in ("score", "seeds", "trainable", "memory", "training", "step", "front"):
        section.add_column(name, justify="right", no_wrap=True)
    best = rows["score_mean"].max()
    for row in rows.itertuples():
        style = "bold" if row.score_mean == best else "dim" if row.outcome != "ok" else ""
        section.add_row(*_cells(row, attrs), style=style)
    return section


def _cells(row: Any, attrs: Mapping[Any, Any]) -> list[Text]:
    from rich.text import Text

    runs = attrs.get("runs", {}).get(row.Index, row.seeds)
    mark = "*" if row.Index in attrs.get("contended", ()) else ""
    score = _show(row.score_mean, score_text)
    if pd.notna(row.score_std):
        score += f" ± {score_text(row.score_std)}"
    if row.outcome != "ok":
        score = f"{score} {row.outcome}".strip()
    percent = _show(row.trainable_percent, lambda value: f" {value:.3g}%")
    texts = [
        label(row),
        score,
        str(row.seeds) if runs == row.seeds else f"{row.seeds} of {runs}",
        _show(row.trainable_params, human_count) + percent,
        _show(row.accounted_bytes, human_bytes),
        _show(row.train_seconds, human_seconds, mark),
        _show(row.step_seconds, human_seconds, mark),
        "yes" if row.pareto else "",
    ]
    # Text, not markup: a variant is free text and may hold brackets.
    return [Text(text) for text in texts]


def _show(value: Any, form: Any, mark: str = "") -> str:
    return form(value) + mark if pd.notna(value) else ""
