"""The leaderboard: what is averaged, what is kept apart, what stays empty."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from petlbench.errors import UserError
from petlbench.leaderboard import COLUMNS, render, table, write_csv
from petlbench.spec import Outcome
from petlbench.units import human_bytes, human_count, human_seconds

from .record_factory import MIB, make_record

# fmt: off
DESIGNED_COLUMNS = [
    "method", "variant", "task", "dataset", "backbone", "seeds", "outcome", "metric", "score_mean",
    "score_std", "trainable_params", "trainable_percent", "head_params", "stored_bytes", "accounted_bytes",
    "peak_bytes", "train_seconds", "step_seconds", "step_flops", "latency_seconds", "pareto",
]
# fmt: on


def shown(frame: pd.DataFrame) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(render(frame))
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_the_columns_are_exactly_the_designed_ones_even_when_empty() -> None:
    assert list(table([make_record()]).columns) == list(table([]).columns) == list(COLUMNS) == DESIGNED_COLUMNS


def test_seeds_are_averaged_with_the_sample_deviation() -> None:
    measured = ((0.4, 10.0), (0.5, 20.0), (0.6, 60.0))
    records = [make_record(score=score, seed=i, train_seconds=seconds) for i, (score, seconds) in enumerate(measured)]
    row = table(records).iloc[0]
    assert (row.seeds, row.outcome, row.metric) == (3, "ok", "acc@0.5")
    assert row.score_mean == pytest.approx(0.5) and row.score_std == pytest.approx(0.1)
    assert row.train_seconds == pytest.approx(30.0) and row.step_seconds == pytest.approx(0.1)


def test_one_seed_has_no_deviation_and_unknowns_are_empty_fields(tmp_path: Path) -> None:
    write_csv(table([make_record()]), tmp_path / "leaderboard.csv")
    (row,) = csv.DictReader((tmp_path / "leaderboard.csv").open())
    assert [name for name in COLUMNS if row[name] == ""] == ["variant", "score_std", "stored_bytes", "latency_seconds"]
    assert (row["trainable_params"], row["accounted_bytes"], row["pareto"]) == ("10000", str(100 * MIB), "True")


def test_a_failed_cell_is_a_row_with_its_parameters_and_no_score(tmp_path: Path) -> None:
    frame = table([make_record("full", outcome="oom", trainable=900_000), make_record()])
    write_csv(frame, tmp_path / "leaderboard.csv")
    _, failed = csv.DictReader((tmp_path / "leaderboard.csv").open())
    assert (failed["method"], failed["seeds"], failed["outcome"]) == ("full", "0", "oom")
    assert failed["trainable_params"] == "900000"
    assert {failed[name] for name in ("score_mean", "score_std", "peak_bytes", "train_seconds")} == {""}
    assert failed["pareto"] == "False"


def test_a_partly_failed_row_names_the_failure_and_averages_the_rest() -> None:
    outcomes: tuple[Outcome, ...] = ("ok", "oom", "ok", "timeout", "oom")
    row = table([make_record(score=0.5, seed=i, outcome=o) for i, o in enumerate(outcomes)]).iloc[0]
    assert (row.seeds, row.outcome, row.score_mean, bool(row.pareto)) == (2, "oom", 0.5, False)


def test_among_equally_frequent_failures_the_worst_names_the_row() -> None:
    outcomes: tuple[Outcome, ...] = ("failed", "oom", "timeout")
    records = [make_record(seed=i, outcome=o) for i, o in enumerate(outcomes)]
    assert table(records).iloc[0].outcome == "failed"


@pytest.mark.parametrize("change", [{"steps": 600}, {"method_config": {"rank": 8}}])
def test_cells_of_another_recipe_or_configuration_are_never_averaged(change: dict) -> None:
    frame = table([make_record(score=0.2), make_record(score=0.4, seed=1, **change)])
    assert frame["seeds"].tolist() == [1, 1] and sorted(frame["score_mean"]) == [0.2, 0.4]
    assert frame["variant"].nunique() == 2 and all(name.startswith("#") for name in frame["variant"])


def test_the_same_cell_twice_counts_once_and_the_newer_one_wins() -> None:
    old, new = make_record(score=0.1, started="2024-01-01"), make_record(score=0.9, started="2024-01-02")
    for records in ([old, new], [new, old]):
        frame = table(records)
        assert frame["seeds"].tolist() == [1] and frame["score_mean"].tolist() == [0.9]


def test_peak_memory_is_the_device_s_where_there_is_one() -> None:
    frame = table([make_record("a", 0.6, peaks=(7, 9)), make_record("b", 0.5, peaks=(None, 9))])
    assert frame["peak_bytes"].tolist() == [7, 9]


def test_the_pareto_front_is_per_setting_and_needs_a_strict_gain() -> None:
    rows = [("a", 0.9, 100), ("b", 0.9, 200), ("c", 0.5, 50), ("d", 0.4, 60), ("twin", 0.5, 50)]
    records = [make_record(name, score, trainable=size * 1000) for name, score, size in rows]
    frame = table([*records, make_record("d", 0.1, trainable=900_000, task="vqa")])
    front = {(row.task, row.method) for row in frame.itertuples() if row.pareto}
    assert front == {("rec", "a"), ("rec", "c"), ("rec", "twin"), ("vqa", "d")}


def test_rows_stand_by_setting_then_score_with_failures_last() -> None:
    records = [make_record("low", 0.1), make_record("none", outcome="failed"), make_record("high", 0.9)]
    frame = table([make_record("low", 0.3, task="vqa"), *records])
    assert frame["method"].tolist() == ["high", "low", "none", "low"]


def test_contended_timings_are_marked_and_give_way_to_uncontended_ones() -> None:
    records = [
        make_record("busy", 0.5, jobs=4, train_seconds=11.0),
        make_record("mixed", 0.4, jobs=4, train_seconds=99.0),
        make_record("mixed", 0.4, seed=1, train_seconds=22.0),
    ]
    frame = table(records)
    assert frame.attrs["contended"] == {0}
    assert frame["train_seconds"].tolist() == [11.0, 22.0]
    text = shown(frame)
    assert "11 s*" in text and "22 s " in text and "timed while other cells ran" in text


def test_the_terminal_table_shows_human_units_failures_and_brackets_verbatim() -> None:
    records = [make_record("lora", 0.5, variant="[bold]r=8[/]"), make_record("full", outcome="oom")]
    text = shown(table([*records, make_record("full", 0.4, seed=1)]))
    for part in ("lora:[bold]r=8[/]", "10k 1%", "100 MiB", "0.400 oom", "1 of 2", "rec:digits on tiny, acc@0.5"):
        assert part in text


def test_the_best_score_of_each_setting_is_bold() -> None:
    frame = table([make_record("a", 0.5), make_record("b", 0.6), make_record("c", 0.1, task="vqa")])
    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system="standard")
    console.print(render(frame))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    bold = {name: any(f"\x1b[1m{name}" in line for line in lines) for name in "abc"}
    assert bold == {"a": False, "b": True, "c": True}


def test_the_terminal_table_fits_eighty_columns_without_wrapping_a_row() -> None:
    records = [make_record("vl_adapter", 0.1 * seed, seed=seed, trainable=12_345) for seed in range(3)]
    console = Console(file=io.StringIO(), width=80)
    console.print(render(table(records)))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    (row,) = [line for line in lines if "vl_adapter" in line]
    for part in ("0.100 ± 0.100", "12.3k 1.23%", "100 MiB", "60 s", "200 ms", "yes"):
        assert part in row


def test_human_units_round_without_overflowing_into_the_next_unit() -> None:
    assert [human_count(n) for n in (0, 999, 999_999, 12_345)] == ["0", "999", "1M", "12.3k"]
    assert [human_bytes(n) for n in (12, 2**20 - 1, 1536 * MIB)] == ["12 B", "1 MiB", "1.5 GiB"]
    seconds = [human_seconds(n) for n in (0.0123, 0.99999, 59.97, 119.6, 7500)]
    assert seconds == ["12.3 ms", "1 s", "60 s", "2 min 00 s", "2 h 05 min"]


def test_a_csv_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_csv(table([make_record()]), tmp_path / "missing" / "leaderboard.csv")
