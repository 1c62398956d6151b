"""The command line: exit statuses, one-line errors, and which cells a run runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from petlbench import __version__, cli
from petlbench.errors import UserError
from petlbench.records import Store
from petlbench.spec import Cell, Outcome, Record

CELLS = [Cell(method=method, task="rec", dataset="digits", backbone="tiny") for method in ("full", "lora")]


def petlbench(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "petlbench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


class Launcher:
    """Takes the place of petlbench.launch.local.run_cells: saves a record of the outcome it is told to."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.ran: list[str] = []

    def __call__(self, cells: list[Cell], store: Store, **options: Any) -> list[Record]:
        self.ran = [cell.method for cell in cells]
        self.options = options
        return [store.save(self.record(cell)) for cell in cells]

    def record(self, cell: Cell) -> Record:
        outcome = self.outcomes.get(cell.method, "ok")
        metrics = {"acc_50": 0.5} if outcome == "ok" else {}
        return Record(cell=cell, outcome=outcome, reason="no luck", main_metric="acc_50", metrics=metrics)


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """Two cells without a model behind them, run in an empty folder."""
    launcher = Launcher()
    monkeypatch.setattr("petlbench.suite.expand", lambda suite, **filters: CELLS)
    monkeypatch.setattr("petlbench.launch.local.run_cells", launcher)
    monkeypatch.chdir(tmp_path)
    return launcher


def test_listing_imports_neither_torch_nor_pandas() -> None:
    script = (
        "import sys; from petlbench.cli import main; assert main(['list', 'methods']) == 0; "
        "sys.exit(', '.join({'torch', 'pandas', 'rich', 'transformers', 'datasets'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lora  " in done.stdout


def test_listing_as_json_with_a_wildcard(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "methods", "lo*", "--json"]) == 0
    target = "petlbench.methods.lora:LoRA"
    assert {"name": "lora", "distribution": "petlbench", "target": target} in json.loads(capsys.readouterr().out)


def test_check_names_what_fails_and_exits_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(name: str) -> type:
        if name == "lora":
            raise UserError("is broken")
        return object

    monkeypatch.setattr(cli.METHODS, "get", get)
    assert cli.main(["list", "methods", "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "FAILS" in line] == ["  FAILS: is broken"]
    assert lines[lines.index("  FAILS: is broken") - 1].startswith("lora ")
    assert cli.main(["list", "methods", "f*", "--check"]) == 0


def test_packaged_suites_are_listed_with_their_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "suites"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["quick", "smoke", "standard"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_a_mistyped_method_exits_with_2_and_writes_nothing(tmp_path: Path) -> None:
    done = petlbench("run", "quick", "--methods", "lroa", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "petlbench: error: unknown method 'lroa': did you mean 'lora'? `petlbench list methods` shows all\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "unknown command 'rnu': did you mean 'run'?"),
        (["run", "--jobs", "0"], "argument --jobs: a positive whole number is needed, not '0'"),
        (["run", "--seeds", "0,x"], "argument --seeds: comma-separated whole numbers are needed, not '0,x'"),
        (["run", "--methods", ","], "argument --methods: a comma-separated list of names is needed"),
        (["run", "qick"], "unknown suite 'qick': did you mean 'quick'?"),
        (["leaderboard", "nowhere"], "no results folder at nowhere"),
        (["list", "methds"], "argument kind: invalid choice: 'methds'"),
        ([], "the following arguments are required"),
    ],
)
def test_mistakes_exit_with_2_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"petlbench: error: {message}")
    assert error.count("\n") == 1


def test_a_closed_pipe_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "petlbench", "list", "methods"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 1


def test_a_run_leaves_records_table_and_plots(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "smoke", "--jobs", "2", "--device", "cpu"]) == 0
    assert launcher.ran == ["full", "lora"]
    assert launcher.options == {"device": "cpu", "jobs": 2, "threads": None, "data_root": None}
    out = Path("runs/smoke")
    assert len(list((out / "records").glob("*.json"))) == 2
    assert (out / "leaderboard.csv").read_text().count("\n") == 3
    assert (out / "plots").is_dir()
    printed = capsys.readouterr().out
    assert "smoke: 2 cells, 0 done, 2 to run; results in runs/smoke" in printed
    assert "lora" in printed


def test_a_second_run_runs_only_what_is_not_done(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    Store.open("out", create=True).save(launcher.record(CELLS[0]))
    assert cli.main(["run", "smoke", "--out", "out", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "done    full on rec:digits (tiny, seed 0)",
        "pending lora on rec:digits (tiny, seed 0)",
    ]
    assert cli.main(["run", "smoke", "--out", "out"]) == 0
    assert launcher.ran == ["lora"]


def test_failed_cells_count_as_done_unless_they_are_retried(
    launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.outcomes = {"lora": "diverged"}
    assert cli.main(["run", "smoke"]) == 1
    assert "diverged: lora on rec:digits (tiny, seed 0): no luck\n1 of 2 cells" in capsys.readouterr().err
    launcher.ran, launcher.outcomes = [], {}
    assert cli.main(["run", "smoke"]) == 1
    assert launcher.ran == []
    assert cli.main(["run", "smoke", "--retry-failed"]) == 0
    assert launcher.ran == ["lora"]


def test_a_run_without_a_single_score_still_leaves_its_table(launcher: Launcher) -> None:
    launcher.outcomes = {"full": "failed", "lora": "oom"}
    assert cli.main(["run", "smoke"]) == 1
    assert "oom" in Path("runs/smoke/leaderboard.csv").read_text()


def test_a_dry_run_writes_nothing(launcher: Launcher) -> None:
    assert cli.main(["run", "smoke", "--dry-run"]) == 0
    assert launcher.ran == []
    assert list(Path().iterdir()) == []


def test_an_interrupted_run_exits_with_130_and_says_how_to_continue(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("petlbench.launch.local.run_cells", interrupted)
    assert cli.main(["run", "smoke"]) == 130
    error = capsys.readouterr().err
    assert "run the same command again" in error
    assert error.count("\n") == 1


def test_cuda_without_a_cuda_device_is_refused_before_anything_is_written(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["run", "smoke", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("petlbench: error: --device cuda: torch sees no CUDA device")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["leaderboard", "out", "--csv", "table.csv"], lambda: Path("table.csv").is_file()),
        (["plot", "out", "--out", "figures"], lambda: any(Path("figures").iterdir())),
    ],
)
def test_results_can_be_shown_again(launcher: Launcher, arguments: list[str], written: Callable[[], bool]) -> None:
    store = Store.open("out", create=True)
    for cell in CELLS:
        store.save(launcher.record(cell))
    assert cli.main(arguments) == 0
    assert written()


def test_two_methods_are_compared_on_their_samples(launcher: Launcher, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store.open("out", create=True)
    for cell, scores in zip(CELLS, ([1.0, 1.0], [0.0, 0.0]), strict=True):
        samples = {"metric": "acc_50", "sample_ids": ["a", "b"], "scores": {"acc_50": scores}, "predictions": [0, 0]}
        store.save(launcher.record(cell), samples)
    assert cli.main(["compare", "out", "full", "lora"]) == 0
    assert "1.0" in capsys.readouterr().out
    assert cli.main(["compare", "out", "full", "lroa"]) == 2
    assert "did you mean lora" in capsys.readouterr().err
