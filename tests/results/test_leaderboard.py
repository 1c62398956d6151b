"""The leaderboard: which records are averaged, which stay separate, and which columns stay empty."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from petlbench.core.errors import UserError
from petlbench.core.recipe import Outcome
from petlbench.core.record import Inference, Record
from petlbench.core.units import human_bytes, human_count, human_seconds
from petlbench.results.leaderboard import COLUMNS, COUNTS, FLAGS, TEXTS, table, write_csv
from petlbench.results.leaderboard_table import leaderboard_table
from petlbench.results.rows import label
from petlbench.results.store import Store
from tests.record_factory import MIB, make_record, make_samples

ROOT = Path(__file__).parents[2]
# A column that is renamed, moved or dropped breaks what others read: this file is changed by hand, and knowingly.
DESIGNED_COLUMNS = (ROOT / "tests" / "fixtures" / "leaderboard_columns.txt").read_text(encoding="utf-8").split()
DOCUMENTED = ROOT / "docs" / "records.md"


def lines_of(frame: pd.DataFrame, width: int = 140, color: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=color, color_system="standard" if color else None)
    console.print(leaderboard_table(frame))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def shown(frame: pd.DataFrame) -> str:
    return " ".join(" ".join(lines_of(frame)).split())


def looks(frame: pd.DataFrame, names: str) -> dict[str, str]:
    """Return the style at the start of each row."""
    codes = {"\x1b[1m": "bold", "\x1b[2m": "dim"}
    lines = lines_of(frame, color=True)
    return {
        n: next((codes[c] for c in codes if any(line.lstrip().startswith(c + n) for line in lines)), "plain")
        for n in names
    }


def stale_of(record: Record) -> tuple[str, ...]:
    """Return the parts whose fingerprint is old."""
    return tuple(name for name, value in sorted(record.fingerprints.items()) if value == "old")


def test_the_columns_are_exactly_the_designed_ones_even_when_empty(tmp_path: Path) -> None:
    assert list(table([make_record()]).columns) == list(table([]).columns) == list(COLUMNS) == DESIGNED_COLUMNS
    write_csv(table([make_record()]), tmp_path / "leaderboard.csv")
    header, _, _ = (tmp_path / "leaderboard.csv").read_text().partition("\n")
    assert header.split(",") == DESIGNED_COLUMNS


def test_the_types_are_those_of_columns_that_exist() -> None:
    names = [*TEXTS, *FLAGS, *COUNTS]
    assert set(names) < COLUMNS.keys() and len(set(names)) == len(names)
    empty, full = table([]).dtypes, table([make_record()]).dtypes
    assert [str(kind) for kind in empty] == [str(kind) for kind in full]
    assert {str(kind) for kind in full[list(COUNTS)]} == {"Int64"} and {str(k) for k in full[list(FLAGS)]} == {"bool"}


@pytest.mark.skipif(not DOCUMENTED.exists(), reason="there is no docs/records.md")
def test_the_documents_explain_every_column_in_order() -> None:
    lines = [f"| `{name}` | {meaning} |" for name, meaning in COLUMNS.items()]
    assert "\n".join(lines) in DOCUMENTED.read_text(encoding="utf-8")


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
    assert [name for name in COLUMNS if row[name] == ""] == [
        *("variant", "size_name", "size", "score_std", "score_low", "score_high", "rank", "effective_params"),
        *("inference_extra_params", "stored_bytes", "latency_seconds", "merged_latency_seconds", "throughput"),
        "step_joules",
    ]
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


def test_what_inference_storage_energy_and_size_cost_has_columns(tmp_path: Path) -> None:
    def fast(seconds: float) -> Inference:
        return Inference(
            latency_seconds=seconds,
            throughput=1 / seconds,
            batch_size=8,
            merged_latency_seconds=seconds / 2,
            merged_throughput=2 / seconds,
        )

    records = [
        make_record(seed=0, inference=fast(0.2), step_joules=4.0, size=("rank", 8), flops=(1, 2)),
        make_record(seed=1, inference=fast(0.4), step_joules=8.0, size=("rank", 8), flops=(1, 2)),
        # Timed while another cell ran, so not averaged with the others.
        make_record(seed=2, inference=fast(9.0), step_joules=99.0, size=("rank", 8), flops=(1, 2), jobs=2),
    ]
    row = table(records).iloc[0]
    assert (row.size_name, row["size"], row.step_flops, row.stored_params) == ("rank", 8.0, 3, 10_000)
    assert (row.latency_seconds, row.merged_latency_seconds, row.throughput) == pytest.approx((0.3, 0.15, 3.75))
    assert row.step_joules == pytest.approx(6.0) and not row.contended


@pytest.mark.parametrize("change", [{"steps": 600}, {"method_config": {"rank": 8}}, {"fingerprints": {"data": "2"}}])
def test_cells_of_another_recipe_configuration_or_data_are_never_averaged(change: dict) -> None:
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
    assert frame["contended"].tolist() == [True, False]
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
    assert looks(frame, "abc") == {"a": "plain", "b": "bold", "c": "bold"}


def test_the_terminal_table_fits_without_wrapping_a_row(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    for seed in range(3):
        record = make_record("vl_adapter", 0.1 * seed, variant="r=8", seed=seed, trainable=12_345)
        store.save(record, make_samples("acc@0.5", [0.1 * seed] * 5))
    parts = ("0.100 ± 0.100", "12.3k 1.23%", "100 MiB", "60 s", "200 ms", "yes")
    # Bare records have no interval, and then 80 columns are enough.
    for results, width, more in ((store, 120, ("-0.150–0.352", " 1 ")), (store.load(), 80, ())):
        lines = lines_of(table(results), width)
        (row,) = [line for line in lines if "vl_adapter:r=8" in line]
        assert all(part in row for part in (*parts, *more))
        assert "95 %" in " ".join(lines) or not more


def rows_of(frame: pd.DataFrame) -> dict[str, tuple[bool, bool]]:
    return {label(row): (bool(row.stale), bool(row.pareto)) for row in frame.itertuples()}


def test_stale_rows_stand_apart_from_the_fresh_ones() -> None:
    old, new = {"method": "old", "data": "new"}, {"method": "new", "data": "new"}
    records = [
        make_record("lora", 0.9, fingerprints=old),
        make_record("lora", 0.5, seed=1, fingerprints=new),
        make_record("full", 0.6, fingerprints=new, trainable=900_000),
        make_record("bitfit", 0.7, fingerprints=old),
    ]
    frame = table(records, stale=stale_of)
    names = frame["variant"].tolist()
    assert frame["method"].tolist() == ["full", "lora", "lora", "bitfit"]
    # The fresh row keeps the plain name; stale rows are not averaged with it and do not beat it.
    assert names[:2] == ["", ""] and names[2].startswith("#") and names[3] == ""
    assert frame["score_mean"].tolist() == [0.6, 0.5, 0.9, 0.7]
    assert list(rows_of(frame).values()) == [(False, True), (False, True), (True, True), (True, False)]
    assert frame.attrs["stale"] == {2: ("method",), 3: ("method",)}
    assert "bitfit stale: method" in shown(frame) and "these parts have changed" in shown(frame)
    assert looks(frame, "fb") == {"f": "bold", "b": "dim"}
    assert "stale" not in shown(table(records))


def test_only_what_differs_in_the_method_alone_shares_a_pareto_front() -> None:
    records = [
        make_record("good", 0.9, fingerprints={"method": "1", "data": "1"}),
        make_record("other", 0.5, fingerprints={"method": "2", "data": "1"}),
        make_record("elsewhere", 0.5, fingerprints={"method": "1", "data": "2"}),
    ]
    front = {name: pareto for name, (_, pareto) in rows_of(table(records)).items()}
    assert front == {"good": True, "other": False, "elsewhere": True}


def test_rows_that_differ_only_in_their_code_get_distinct_names() -> None:
    records = [make_record(variant="r8", seed=seed, fingerprints={"method": str(seed)}) for seed in range(3)]
    variants = table(records)["variant"].tolist()
    assert len(set(variants)) == 3 and all(name.startswith("r8 #") for name in variants)
    twice = table(records[::-1])["variant"].tolist()
    assert sorted(twice) == sorted(variants)


def test_ranks_count_significantly_better_rows_and_ties_are_marked(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    noise = np.random.default_rng(0).normal(0, 0.1, size=(5, 300))
    for number, (method, level) in enumerate((("a", 0.8), ("b", 0.8), ("c", 0.5), ("d", 0.2), ("old", 0.1))):
        scores = level + noise[number]
        fingerprints = {"method": "old"} if method == "old" else {}
        record = make_record(method, float(scores.mean()), fingerprints=fingerprints)
        store.save(record, make_samples("acc@0.5", scores.tolist()))
    frame = table(store, stale=stale_of)
    assert dict(zip(frame["method"], frame["rank"], strict=True)) == {"a": 1, "b": 1, "c": 3, "d": 4, "old": 1}
    half = 1.96 * 0.1 / np.sqrt(300)
    assert frame["score_high"].to_numpy() - frame["score_mean"].to_numpy() == pytest.approx(half, rel=0.15)
    text = shown(frame)
    assert text.count(" 1= ") == 2 and " 3 " in text and "significantly better" in text
    assert table(store.load(), stale=stale_of)["rank"].isna().all()


def test_human_units_round_without_overflowing_into_the_next_unit() -> None:
    assert [human_count(n) for n in (0, 999, 999_999, 12_345)] == ["0", "999", "1M", "12.3k"]
    assert [human_bytes(n) for n in (12, 2**20 - 1, 1536 * MIB)] == ["12 B", "1 MiB", "1.5 GiB"]
    seconds = [human_seconds(n) for n in (0.0123, 0.99999, 59.97, 119.6, 7500)]
    assert seconds == ["12.3 ms", "1 s", "60 s", "2 min 00 s", "2 h 05 min"]


def test_a_csv_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_csv(table([make_record()]), tmp_path / "missing" / "leaderboard.csv")


def test_effective_parameters_are_shown_where_they_are_fewer_than_what_trains() -> None:
    fewer = make_record("vl_adapter", trainable=12_000)
    assert fewer.parameters
    fewer = fewer.model_copy(update={"parameters": fewer.parameters.model_copy(update={"effective": 3_000})})
    all_of_them = make_record("lora", trainable=9_000)
    assert all_of_them.parameters
    parameters = all_of_them.parameters.model_copy(update={"effective": 9_000})
    all_of_them = all_of_them.model_copy(update={"parameters": parameters})
    text = shown(table([fewer, all_of_them]))
    assert "effective" in text and "3k" in text and "what the loss can send" in text
    assert "effective" not in shown(table([all_of_them]))
